"""Answers in a text: windows and spans as transformers' recipe has them, packed batches, the best span, gradients."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmengine import Transformer, TransformerConfig
from llmengine.tasks import load, make

from .conftest import KINDS
from .tiny import BOTH, DECODER, ENCODER, XLNET, assert_cut_is_no_matter, model_of, train

CONTEXT = (
    "Emma Woodhouse lived in Highbury. Mr. Knightley, who was thirty-seven, often came from Donwell Abbey to see her."
)
LONG = "It was very well, and they had been so happy. " * 6 + CONTEXT + " There was no more to be said of it." * 4


def row(question: str, context: str, answer: str | None) -> dict:
    found = [] if answer is None else [answer]
    return {
        "question": question, "context": context,
        "answers": {"text": found, "answer_start": [context.index(text) for text in found]},
    }  # fmt: skip


ROWS = [
    row("Where did Emma live?", CONTEXT, "Highbury"),
    row("Who came often?", CONTEXT, "Mr. Knightley"),
    row("How old was Mr. Knightley?", LONG, "thirty-seven"),
    row("From where did he come?", LONG, "Donwell Abbey"),
]
NONE = [row("Who was Harriet?", CONTEXT, None), row("Who was Jane?", "", None)]


def recipe(tokenizer, example: dict, max_length: int, stride: int) -> list[tuple[list[int], int, int]]:
    """prepare_train_features of transformers' examples/pytorch/question-answering/run_qa.py, for a context on the
    right, but for two things: its loops stay within the context (theirs run over its edge where the answer is the last
    token there), and of tokens with the same characters (a character's bytes) the outer ones count."""
    tokenized = tokenizer(
        example["question"].lstrip(), example["context"], truncation="only_second", max_length=max_length,
        stride=stride, return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    features = []
    for i, offsets in enumerate(tokenized["offset_mapping"]):
        input_ids = tokenized["input_ids"][i]
        if tokenizer.cls_token_id in input_ids:
            cls_index = input_ids.index(tokenizer.cls_token_id)
        elif tokenizer.bos_token_id in input_ids:
            cls_index = input_ids.index(tokenizer.bos_token_id)
        else:
            cls_index = 0
        sequence_ids = tokenized.sequence_ids(i)
        answers = example["answers"]
        if len(answers["answer_start"]) == 0:
            features.append((input_ids, cls_index, cls_index))
            continue
        start_char = answers["answer_start"][0]
        end_char = start_char + len(answers["text"][0])
        token_start_index = 0
        while sequence_ids[token_start_index] != 1:
            token_start_index += 1
        token_end_index = len(input_ids) - 1
        while sequence_ids[token_end_index] != 1:
            token_end_index -= 1
        if not (offsets[token_start_index][0] <= start_char and offsets[token_end_index][1] >= end_char):
            features.append((input_ids, cls_index, cls_index))
            continue
        first, last = token_start_index, token_end_index
        while token_start_index <= last and offsets[token_start_index][0] <= start_char:
            token_start_index += 1
        while token_end_index >= first and offsets[token_end_index][1] >= end_char:
            token_end_index -= 1
        start, end = token_start_index - 1, token_end_index + 1
        while start > first and offsets[start - 1] == offsets[start]:
            start -= 1
        while end < last and offsets[end + 1] == offsets[end]:
            end += 1
        features.append((input_ids, start, end))
    return features


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "xlnet"])
@settings(max_examples=25)
@given(data=st.data())
def test_features_are_those_of_transformers(of_family, kind, data):
    both = of_family[kind]
    several = [] if kind in ("roberta", "gpt2") else ["naïve", "你好"]  # whose bytes two windows could share there
    words = data.draw(st.lists(st.sampled_from([*CONTEXT.split(), *several]), min_size=1, max_size=60))
    first = data.draw(st.integers(0, len(words) - 1))
    answer = " ".join(words[first : first + data.draw(st.integers(1, 4))])
    context, start = " ".join(words), len(" ".join(words[:first])) + (first > 0)
    example = {
        "question": data.draw(st.sampled_from(["Who?", "Where was it?", "  When did he come"])), "context": context,
        "answers": {"text": [answer], "answer_start": [start]},
    }  # fmt: skip
    stride = data.draw(st.integers(0, 8))
    task = make("qa", both.ours, [], max_length=40, doc_stride=stride, max_question_tokens=20)
    examples = task.examples([example])
    ours = [examples[0, i] for i in range(len(examples))]
    made = [(e["input_ids"].tolist(), int(e["start_positions"]), int(e["end_positions"])) for e in ours]
    assert made == recipe(both.theirs, example, 40, stride)


def test_the_answer_can_be_read_off_its_tokens(of_family):
    """Of every family, XLNet's too, and of characters that are several tokens."""
    emoji = row("Which?", "He wrote 👍🏽 to her, and “naïve” 你好", "👍🏽")
    for both in of_family.values():
        for example in [*ROWS, emoji]:
            task = make("qa", both.ours, [], max_length=64, max_question_tokens=24)
            examples = task.examples([example])
            start = example["answers"]["answer_start"][0]
            found = 0
            for reader in task._read([(0, example)])[0]:
                for i, window in enumerate(reader.windows):
                    a, b = (int(examples[0, i][f"{side}_positions"]) for side in ("start", "end"))
                    if a == b == window.cls:
                        continue
                    found += 1
                    a, b = (place - window.place + window.begin for place in (a, b))
                    said = example["context"][reader.starts[a] : reader.ends[b]]
                    assert example["answers"]["text"][0] in said and len(said) <= len(example["answers"]["text"][0]) + 2
                    assert start <= reader.ends[a] and reader.starts[b] < start + len(example["answers"]["text"][0])
            assert found


def test_windows_without_the_answer(wordpiece):
    for outside, label in (("cls", 0), ("ignore", -100)):
        options = {"max_length": 48, "max_question_tokens": 12, "outside": outside, "unanswerable": True}
        task = make("qa", wordpiece, [], **options)
        examples = task.examples(ROWS[2:3])
        starts = [int(examples[0, i]["start_positions"]) for i in range(len(examples))]
        assert len(starts) > 2 and sum(start > 0 for start in starts) >= 1
        assert {start for start in starts if start <= 0} == {label}
        batch = examples.collate([examples[0, i] for i in range(len(examples))])
        assert examples.items(batch) == {"sequences": sum(start >= 0 for start in starts)}
        empty = task.examples(NONE)
        assert {int(empty[0, i]["start_positions"]) for i in range(len(empty))} == {0}


def test_long_questions_are_cut_and_told(wordpiece):
    rows = [ROWS[0], {**ROWS[0], "question": "where " * 30}]
    task = make("qa", wordpiece, rows, max_length=48, max_question_tokens=12)
    with pytest.warns(UserWarning, match="1 of 2 rows have more text than max_question_tokens 12"):
        examples = task.examples(rows)
    assert examples.truncated == 1 and max(examples.lengths(0)) <= 48


@pytest.mark.parametrize(("kind", "shape"), [("bert", ENCODER), ("gpt2", DECODER), ("xlnet", XLNET), ("roberta", BOTH)])
def test_packed_equals_padded(of_family, kind, shape):
    tokenizer = of_family[kind].ours
    task = make("qa", tokenizer, [], max_length=64, max_question_tokens=20)
    special = {"decoder_start_token_id": 2} if shape is BOTH else {}
    model = task.wrap(model_of(task, tokenizer, shape, init_std=0.5, **special)).eval()
    examples = task.examples(ROWS)
    chosen = [examples[0, i] for i in range(len(examples))]
    packed = examples.collate(chosen)
    padded = {
        name: torch.nn.utils.rnn.pad_sequence([example[name] for example in chosen], batch_first=True)
        for name in ("input_ids", "token_type_ids")
        if name in packed
    }
    lengths = torch.tensor([len(example["input_ids"]) for example in chosen])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    spans = {name: packed[name] for name in ("start_positions", "end_positions")}

    def run(batch):
        model.zero_grad()
        out = model(**batch, **spans)
        out.loss.backward()
        return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    out, gradients = run({k: v for k, v in packed.items() if k not in spans})
    wanted, right = run({**padded, "attention_mask": mask})
    assert out.start_logits.shape == (int(lengths.sum()),)
    torch.testing.assert_close(out.start_logits, wanted.start_logits[mask == 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.end_logits, wanted.end_logits[mask == 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, wanted.loss, rtol=1e-5, atol=1e-5)
    for name, gradient in right.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@given(
    logits=st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=9),
    most=st.integers(1, 12), blank=st.integers(0, 9), threshold=st.floats(-5, 5), unanswerable=st.booleans(),
)  # fmt: skip
def test_the_best_span_is_that_of_the_enumeration(wordpiece, logits, most, blank, threshold, unanswerable):
    """One window, in which every word is a token and one of them could be white space."""
    options = {"max_answer_tokens": most, "threshold": threshold, "unanswerable": unanswerable}
    task = make("qa", wordpiece, [], max_length=64, **options)
    context = " ".join("she was he had it not so and the".split()[: len(logits)])
    ((reader,), _) = task._read([(0, {"question": "?", "context": context})])
    (window,) = reader.windows
    assert window.end == len(logits)
    if blank < len(logits):  # a token that stands for a space
        starts, ends = reader.starts.copy(), reader.ends.copy()
        place = context.find(" ") if " " in context else 0
        starts[blank], ends[blank] = place, place + (" " in context)
        reader = reader._replace(starts=starts, ends=ends)
    every = torch.full((len(window.inputs.ids), 2), 50.0)  # the question and special tokens must not matter
    every[window.cls] = torch.tensor([1.0, 1.5])
    every[window.place : window.place + len(logits)] = torch.tensor(logits)
    answer = task._answer(reader, [every])
    allowed = {
        (i, j): every[window.place + i, 0].double() + every[window.place + j, 1].double()
        for i, j in itertools.product(range(len(logits)), repeat=2)
        if i <= j < i + most and blank not in (i, j)
    }
    if not allowed:
        assert answer["answer"] == ""
        return
    best = max(allowed.values())
    scores = [*allowed.values(), torch.tensor(2.5, dtype=torch.float64)] if unanswerable else list(allowed.values())
    total = torch.stack(scores).logsumexp(0)
    if unanswerable and 2.5 - best > threshold:
        assert answer == {"answer": "", "start": 0, "end": 0, "score": pytest.approx(math.exp(2.5 - total))}
        return
    assert answer["score"] == pytest.approx(math.exp(best - total))
    tied = [pair for pair, value in allowed.items() if value == best]
    texts = [(int(reader.starts[i]), int(reader.ends[j])) for i, j in tied]
    assert (answer["start"], answer["end"]) in texts
    assert answer["answer"] == context[answer["start"] : answer["end"]]


def test_the_best_of_all_windows(wordpiece):
    task = make("qa", wordpiece, [], max_length=48, max_question_tokens=12)
    ((reader,), _) = task._read([(0, ROWS[2])])
    logits = [torch.zeros(len(window.inputs.ids), 2) for window in reader.windows]
    last = reader.windows[-1]
    logits[-1][last.place + 3, 0] = logits[-1][last.place + 5, 1] = 3.0
    answer = task._answer(reader, logits)
    assert (answer["start"], answer["end"]) == (reader.starts[last.begin + 3], reader.ends[last.begin + 5])


@pytest.mark.parametrize("kind", ["bert", "gpt2", "roberta", "t5"])
def test_answers_neither_begin_nor_end_with_a_space(of_family, kind):
    tokenizer = of_family[kind].ours
    task = make("qa", tokenizer, [], max_length=64, max_answer_tokens=4, max_question_tokens=20)
    shape = DECODER if kind == "gpt2" else ENCODER
    for answer, example in zip(task.answers(model_of(task, tokenizer, shape, init_std=0.5), ROWS), ROWS, strict=True):
        assert answer["answer"] == answer["answer"].strip() != ""
        assert answer["answer"] == example["context"][answer["start"] : answer["end"]]
        assert 0 < answer["score"] <= 1


@pytest.mark.parametrize("shape", [ENCODER, DECODER, XLNET])
def test_gradients_and_training(of_family, shape):
    tokenizer = of_family["gpt2" if shape is DECODER else "bert"].ours
    rows = ROWS[:3] + NONE
    task = make("qa", tokenizer, rows, max_length=72, max_question_tokens=20, unanswerable=True)
    model = task.wrap(model_of(task, tokenizer, shape))
    examples = task.examples(rows)
    assert_cut_is_no_matter(model, examples)
    train(model, examples, 100)
    answers = list(task.answers(model, rows, batch_tokens=100))
    assert [answer["answer"] for answer in answers] == [
        (each["answers"]["text"] or [""])[0].strip(".") for each in rows
    ]
    for answer, each in zip(answers, rows, strict=True):
        if answer["answer"]:
            assert answer["start"] == each["answers"]["answer_start"][0]
    judgement = task.judge(rows, answers)
    assert judgement.scores["exact_match"].value == 1.0 and judgement.main == "f1"


def test_a_context_without_a_token(wordpiece):
    task = make("qa", wordpiece, [], max_length=48)
    model = model_of(task, wordpiece)
    for context in ("", "   ", "\x00"):
        (answer,) = task.answers(model, [{"question": "Who?", "context": context}])
        assert answer == {"answer": "", "start": 0, "end": 0, "score": 1.0}


def test_saved_and_loaded_and_read_by_transformers(of_family, tmp_path):
    tokenizer = of_family["bert"].ours
    task = make("qa", tokenizer, [], max_length=128)
    shape = {
        "vocab_size": tokenizer.vocab_size,
        "d_model": 32,
        "n_layers": 1,
        "n_heads": 2,
        "d_ff": 32,
        "init_std": 0.5,
    }
    torch.manual_seed(0)
    model = Transformer(TransformerConfig.preset("bert-tiny", objectives=["qa"], pooler="none", **shape))
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    task.save(tmp_path)
    answers = list(task.answers(model, ROWS[:2]))
    again = load(tmp_path, tokenizer)
    assert again.options == task.options
    for answer, other in zip(again.answers(Transformer.from_pretrained(tmp_path), ROWS[:2]), answers, strict=True):
        assert answer == {**other, "score": pytest.approx(other["score"], abs=1e-6)}
    theirs = transformers.BertForQuestionAnswering.from_pretrained(tmp_path).eval()
    for example, answer in zip(ROWS, answers, strict=False):
        inputs = of_family["bert"].theirs(example["question"], example["context"], return_tensors="pt")
        with torch.no_grad():
            out = theirs(**inputs)
        inside = np.array(inputs.sequence_ids(0)) == 1
        scores = out.start_logits[0, :, None] + out.end_logits[0, None, :]
        valid = torch.tensor(inside[:, None] & inside[None, :]).triu() & ~torch.ones(scores.shape).bool().triu(30)
        best = int(scores.masked_fill(~valid, -math.inf).argmax())
        first, last = divmod(best, len(inside))
        assert inputs.token_to_chars(0, first).start == answer["start"]
        assert inputs.token_to_chars(0, last).end == answer["end"]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": [], "answer_start": []}, r"row 1: answers is .*; expected an answer, or option unanswerable"),
        ({"text": ["Emma"], "answer_start": []}, r"answers.answer_start is \[\]; expected as many numbers as text"),
        ({"text": ["Emma"], "answer_start": [3]}, "is 'Emma'; expected what context has at character 3, 'a Wo'"),
        ({"text": ["Emma"], "answer_start": [-4]}, "expected what context has at character -4"),
        ({"text": "Emma", "answer_start": [0]}, r"row 1: text is 'Emma'; expected a list of texts"),
        ("Emma", r"row 1: answers is 'Emma'; expected \{text"),
    ],
)  # fmt: skip
def test_wrong_rows(wordpiece, answers, message):
    task = make("qa", wordpiece, [], max_length=64)
    with pytest.raises(ValueError, match=message):
        task.examples([{"question": "Who?", "context": CONTEXT, "answers": answers}])


def test_answers_that_no_window_holds_are_told(wordpiece):
    """Windows of six tokens that share two: of ROWS only the answers of few tokens can be in one."""
    short = make("qa", wordpiece, [], max_length=12, max_question_tokens=3, doc_stride=2)
    lost = 0
    for example in ROWS:
        made = short.examples([example])
        lost += all(made[0, i]["start_positions"] == 0 for i in range(len(made)))
    assert 0 < lost < len(ROWS)
    told = f"{lost} of {len(ROWS)} rows have an answer that no window holds whole.* max_length 12, .* share 2 tokens"
    with pytest.warns(UserWarning, match=told):
        short.examples(ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("qa", wordpiece, [], max_length=64).examples(ROWS)


@pytest.mark.parametrize(
    ("max_length", "options", "message"),
    [
        (32, {"doc_stride": 20, "max_question_tokens": 10}, r"doc_stride \(20\) must be less than the 19 tokens of"),
        (16, {"max_question_tokens": 16}, "16 leaves no token for .* 3 special tokens .* give max_length 20 or more"),
        (64, {"max_answer_tokens": 0}, "max_answer_tokens must be 1 or more, got 0"),
        (64, {"outside": "null"}, "outside 'null' is neither cls nor ignore"),
    ],
)  # fmt: skip
def test_wrong_options(wordpiece, max_length, options, message):
    with pytest.raises(ValueError, match=message):
        make("qa", wordpiece, [], max_length=max_length, **options)
