"""Tags of words: alignment as transformers' word_ids, windows, valid BIO by search, gradients, answers."""

from __future__ import annotations

import itertools
import json
import re
import warnings

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmengine import Transformer, TransformerConfig
from llmengine.data.template import owned, spans
from llmengine.tasks import load, make
from llmengine.tasks.tagging import allowed

from .conftest import KINDS
from .tiny import BOTH, DECODER, ENCODER, XLNET, assert_cut_is_no_matter, model_of, train

# A word that spells out a special token is text to us (test_special_tokens.py), but that token to transformers.
WORD = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda word: not re.search(r"\[[A-Z]+\]|<.*>", word)
)
LABELS = ["O", "B-A", "I-A", "B-B", "I-B"]
ROWS = [
    {"words": "Emma met Mr Knightley and Harriet".split(), "tags": "B-A O B-A I-A O B-A".split()},
    {"words": "they went to Highbury Street".split(), "tags": "O O O B-B I-B".split()},
    {"words": "Harriet Smith saw Box Hill with Emma".split(), "tags": "B-A I-A O B-B I-B O B-A".split()},
    {"words": "Mr Knightley went to Highbury".split(), "tags": "B-A I-A O O B-B".split()},
]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(words=st.lists(WORD, max_size=8))
def test_the_first_piece_of_each_word_is_labelled(of_family, kind, words):
    """By the recipe of transformers' token classification."""
    both, theirs = of_family[kind], of_family[kind].theirs
    if kind in ("roberta", "gpt2"):
        theirs = spaced(theirs)
    task = make("tagging", both.ours, [], labels=["x", "y"], max_length=512)
    encoding = theirs(words, is_split_into_words=True)
    tags = [i % 2 for i in range(len(words))]
    labels, previous = [], None
    for word in encoding.word_ids():
        labels.append(-100 if word is None or word == previous else tags[word])
        previous = word
    examples = task.examples([{"words": words, "tags": ["xy"[tag] for tag in tags]}])
    assert len(examples) == any(label >= 0 for label in labels)
    if len(examples):
        assert examples[0, 0]["input_ids"].tolist() == encoding["input_ids"]
        assert examples[0, 0]["labels"].tolist() == labels


def spaced(tokenizer):
    """Where words have a space before them only in running text, transformers wants to be told."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    merges = [tuple(merge) for merge in merges]
    return type(tokenizer)(vocab=tokenizer.get_vocab(), merges=merges, add_prefix_space=True)


@given(length=st.integers(0, 60), size=st.integers(1, 12), data=st.data())
def test_windows_cover_all_tokens_once(length, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    windows = spans(length, size, overlap)
    mine = [token for begin, end in owned(windows) for token in range(begin, end)]
    assert mine == list(range(length))
    assert all(following - stop == -overlap for (_, stop), (following, _) in itertools.pairwise(windows))

    def context(window: tuple[int, int], token: int) -> float:
        """The tokens that a token sees on its poorer side, where the text goes on behind the window's edge."""
        left = token - window[0] if window[0] else float("inf")
        return min(left, window[1] - 1 - token if window[1] < length else float("inf"))

    for window, (begin, end) in zip(windows, owned(windows), strict=True):
        assert window[0] <= begin <= end <= window[1] and window[1] - window[0] <= size
        for token in range(begin, end):
            assert context(window, token) == max(context(each, token) for each in windows)


def test_a_long_sentence_keeps_all_its_words(wordpiece):
    words = [f"{word}{i}" for i, word in enumerate("Emma went to Highbury with Harriet Smith".split() * 30)]
    rows = [{"words": words, "tags": [("O", "B-A", "I-A")[i % 3] for i in range(len(words))]}, ROWS[0]]
    for stride in (0, 3, None, 20):
        task = make("tagging", wordpiece, rows, max_length=25, stride=stride)
        examples = task.examples(rows)
        labelled = sum(int((examples[0, i]["labels"] != -100).sum()) for i in range(len(examples)))
        assert labelled == len(words) + len(ROWS[0]["words"])
        assert max(examples.lengths(0)) <= 25
        (long, short) = task.answers(model_of(task, wordpiece), rows)
        assert (len(long["tags"]), len(short["tags"])) == (len(words), len(ROWS[0]["words"]))


def test_windows_see_what_surrounds_a_word(wordpiece):
    """A long sentence's tags are those of windows read by themselves."""
    words = "Emma went to Highbury with Harriet Smith".split() * 5
    task = make("tagging", wordpiece, [], labels=LABELS, max_length=20, constrained=False)
    model = model_of(task, wordpiece, init_std=0.5).eval()
    (answer,) = task.answers(model, [{"words": words}])
    encoding = wordpiece.encodings([words], words=True)[0]
    firsts = [encoding.word_ids.index(i) for i in range(len(words))]
    for (start, stop), (begin, end) in zip(w := spans(len(encoding.ids), 18, 5), owned(w), strict=True):
        logits = model(torch.tensor([[2, *encoding.ids[start:stop], 3]])).logits[0]
        for word, place in enumerate(firsts):
            if begin <= place < end:
                assert answer["tags"][word] == LABELS[int(logits[1 + place - start].argmax())]


@pytest.mark.parametrize("crf", [False, True])
def test_answers_are_the_best_valid_tags(wordpiece, crf):
    """Against the enumeration of all sequences of tags."""
    task = make("tagging", wordpiece, [], labels=LABELS, max_length=64, crf=crf)
    free = make("tagging", wordpiece, [], labels=LABELS, max_length=64, crf=crf, constrained=False)
    changed = 0
    for seed in range(6):
        model = model_of(task, wordpiece, init_std=0.5).eval()
        torch.manual_seed(seed)
        for parameter in model.heads.parameters():
            torch.nn.init.normal_(parameter)
        rows = [{"words": row["words"][:length]} for row, length in zip(ROWS, (4, 1, 5, 3), strict=True)]
        answers = list(task.answers(model, rows))
        changed += sum(a != b for a, b in zip(answers, free.answers(model, rows), strict=True))
        for row, answer in zip(rows, answers, strict=True):
            encoding = wordpiece.encodings([row["words"]], words=True)[0]
            firsts = [1 + encoding.word_ids.index(i) for i in range(len(row["words"]))]
            with torch.no_grad():
                emissions = model(torch.tensor([[2, *encoding.ids, 3]])).logits[0, firsts]
            _, found = max(
                (score(model.heads["tagging"].chain, emissions, tags), tags)
                for tags in itertools.product(range(len(LABELS)), repeat=len(firsts))
                if all(allowed(a, b) for a, b in itertools.pairwise(["", *(LABELS[tag] for tag in tags)]))
            )
            assert answer["tags"] == [LABELS[tag] for tag in found]
    assert changed, "the constraint must have made a difference"


def score(chain, emissions: torch.Tensor, tags: tuple[int, ...]) -> float:
    total = sum(emissions[i, tag].item() for i, tag in enumerate(tags))
    if chain is None:
        return total
    steps = sum(chain.transition[a, b].item() for a, b in itertools.pairwise(tags))
    return total + chain.start[tags[0]].item() + chain.end[tags[-1]].item() + steps


def test_what_bio_allows():
    valid = [("", "O"), ("", "B-A"), ("O", "B-A"), ("B-A", "I-A"), ("I-A", "I-A"), ("I-A", "B-A"), ("B-B", "O")]
    assert all(allowed(a, b) for a, b in valid)
    assert not any(allowed(a, b) for a, b in [("", "I-A"), ("O", "I-A"), ("B-B", "I-A"), ("I-B", "I-A"), ("I", "I-A")])


def test_a_type_that_never_begins_is_not_constrained(wordpiece):
    rows = [{"words": ["Emma", "went"], "tags": ["I-A", "O"]}]
    task = make("tagging", wordpiece, rows, max_length=16)
    assert task.labels == ("O", "I-A")
    model = task.wrap(model_of(task, wordpiece))
    train(model, task.examples(rows), 20)
    assert next(task.answers(model, rows)) == {"tags": ["I-A", "O"]}


@pytest.mark.parametrize("words", [[], ["\x00"], ["Emma", "\u200b\x00", "went"], ["\x00", "Emma"]])
def test_words_without_a_token(wordpiece, words):
    task = make("tagging", wordpiece, [], labels=LABELS, max_length=16)
    model = model_of(task, wordpiece)
    (answer,) = task.answers(model, [{"words": words}])
    seen = [word for word in words if "\x00" not in word]
    (alone,) = task.answers(model, [{"words": seen}])
    assert len(answer["tags"]) == len(words)
    assert [tag for tag, word in zip(answer["tags"], words, strict=True) if word in seen] == alone["tags"]
    examples = task.examples([{"words": words, "tags": ["O"] * len(words)}, ROWS[0]])
    assert len(examples) == (2 if seen else 1)


def test_a_word_without_a_token_does_not_split_a_span(wordpiece):
    task = make("tagging", wordpiece, ROWS, max_length=32)
    model = task.wrap(model_of(task, wordpiece))
    train(model, task.examples(ROWS), 60)
    (answer,) = task.answers(model, [{"words": ["Mr", "\x00", "Knightley", "\x00", "went"]}])
    assert answer["tags"] == ["B-A", "I-A", "I-A", "O", "O"]


@pytest.mark.parametrize(
    ("shape", "crf"), [(ENCODER, False), (ENCODER, True), (DECODER, False), (XLNET, False), (BOTH, False)]
)
def test_gradients_and_training(wordpiece, shape, crf):
    fields = {"decoder_start_token_id": 0} if shape is BOTH else {}
    task = make("tagging", wordpiece, ROWS, max_length=32, crf=crf)
    model = task.wrap(model_of(task, wordpiece, shape, **fields))
    examples = task.examples(ROWS)
    assert_cut_is_no_matter(model, examples)
    batch = examples.collate([examples[0, 0], examples[0, 1]])
    assert examples.items(batch) == {"tokens": 11}
    train(model, examples, 60, lr=1e-2 if crf else 3e-3)
    answers = list(task.answers(model, ROWS, batch_tokens=10))
    assert answers == [{"tags": row["tags"]} for row in ROWS]
    assert task.judge(ROWS, answers).scores["span_f1"].value == 1.0


def test_parts_of_speech_are_judged_by_accuracy(wordpiece):
    rows = [{"words": ["Emma", "went"], "tags": ["NOUN", "VERB"]}]
    task = make("tagging", wordpiece, rows, max_length=16)
    assert task.labels == ("NOUN", "VERB")
    assert task.judge(rows, [{"tags": ["NOUN", "NOUN"]}]).scores["token_accuracy"].value == 0.5


def test_saved_and_loaded(wordpiece, tmp_path):
    task = make("tagging", wordpiece, ROWS, max_length=32, crf=True, stride=4)
    assert task.labels == ("O", "B-A", "B-B", "I-A", "I-B")
    task.save(tmp_path)
    model = model_of(task, wordpiece)
    model.save_pretrained(tmp_path)
    again, loaded = load(tmp_path, wordpiece), Transformer.from_pretrained(tmp_path)
    assert (again.labels, again.options) == (task.labels, task.options) and loaded.config.labels == task.labels
    assert list(again.answers(loaded, ROWS)) == list(task.answers(model, ROWS))


def test_transformers_pipeline_shows_the_labels(of_family, tmp_path):
    tokenizer = of_family["bert"].ours
    task = make("tagging", tokenizer, ROWS, max_length=32, constrained=False)
    shape = {
        "vocab_size": tokenizer.vocab_size,
        "d_model": 32,
        "n_layers": 1,
        "n_heads": 2,
        "d_ff": 32,
        "init_std": 0.5,
    }
    config = TransformerConfig.preset(
        "bert-tiny", objectives=["tagging"], pooler="none", **shape, **task.model_fields()
    )
    torch.manual_seed(0)
    model = Transformer(config)
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    pipe = transformers.pipeline("token-classification", str(tmp_path), device="cpu", ignore_labels=[])
    for row, answer in zip(ROWS, task.answers(model, ROWS), strict=True):
        theirs = [each["entity"] for each in pipe(" ".join(row["words"])) if not each["word"].startswith("##")]
        assert theirs == answer["tags"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": ["a"], "tags": "O"}, r"row 1: tags is 'O'; expected a list of texts"),
        ({"words": "a b", "tags": ["O"]}, r"row 1: words is 'a b'; expected a list of texts"),
        ({"words": ["a", "b"], "tags": ["O"]}, r"row 1: tags is \['O'\]; expected as many as words, 2, not 1"),
        ({"words": ["a"], "tags": ["B-C"]}, r"row 1: tags is 'B-C'; expected one of O, B-A, I-A, B-B, I-B"),
        ({"tags": ["O"]}, r"row 1 has no 'words'; its columns: tags"),
        (
            {"words": ["a", "\udc00"], "tags": ["O", "O"]},
            r"row 1: words is '\\udc00'; expected a text without half sur",
        ),
    ],
)
def test_wrong_rows(wordpiece, row, message):
    task = make("tagging", wordpiece, [], labels=LABELS, max_length=32)
    with pytest.raises(ValueError, match=message):
        task.examples([row])


def test_judging_tells_of_tags_that_the_model_does_not_know(wordpiece):
    task = make("tagging", wordpiece, [], labels=LABELS, max_length=32)
    rows = [*ROWS, {"words": "On Monday Emma".split(), "tags": ["O", "B-DATE", "B-A"]}]
    rows += [{"words": list("abcdefgh"), "tags": [f"B-{i}" for i in range(6)] + ["B-DATE", "I-DATE"]}]
    answers = [{"tags": [tag if tag in LABELS else "O" for tag in row["tags"]]} for row in rows]
    told = r"2 of 6 rows have a tag that the model does not know \('B-DATE': 2, 'B-0': 1, .* and 3 more\): no answer to"
    with pytest.warns(UserWarning, match=told):
        judged = task.judge(rows, answers)
    assert judged.scores["span_recall"].value == 10 / 18 and judged.scores["span_precision"].value == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert task.judge(ROWS, answers[:4]).scores["span_f1"].value == 1


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (["O"], r"row 1: tags is \['O'\]; expected as many as words, 2, not 1"),
        (["O", "NN"], "row 1: tags is 'NN'; expected O, or B-, I- and a type, as the model's tags are"),
    ],
)
def test_rows_that_cannot_be_judged(wordpiece, tags, message):
    task = make("tagging", wordpiece, [], labels=LABELS, max_length=32)
    with pytest.raises(ValueError, match=message):
        task.judge([{"words": ["a", "b"], "tags": tags}], [{"tags": ["O", "O"]}])


def test_tags_of_another_scheme_are_told(wordpiece):
    rows = [{"words": ["a", "b", "c"], "tags": ["I-A", "O", "I-A"]}, {"words": ["a", "b"], "tags": ["I-A", "B-A"]}]
    with pytest.raises(ValueError, match=r"tags are no BIO: 3 spans begin with I- and 1 with B-; convert them"):
        make("tagging", wordpiece, rows, max_length=32)
    assert make("tagging", wordpiece, rows, max_length=32, constrained=False).labels == ("O", "B-A", "I-A")
    with pytest.raises(ValueError, match=r"stride must be 0 to 29 .*, got 30"):
        make("tagging", wordpiece, ROWS, max_length=32, stride=30)
