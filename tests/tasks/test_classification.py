"""Classes, several classes and numbers of texts and pairs: inputs as transformers makes them, gradients, answers."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmengine import Transformer, TransformerConfig
from llmengine.tasks import load, make

from .conftest import KINDS
from .tiny import BOTH, DECODER, ENCODER, XLNET, assert_cut_is_no_matter, model_of, train

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
GOOD, BAD = ["She was happy.", "A handsome girl", "they had been very well"], ["no", "It was not.", "never so much"]
SINGLE = [{"text": text, "label": "good"} for text in GOOD] + [{"text": text, "label": "bad"} for text in BAD]
PAIRS = [{"text": a, "text_pair": b, "label": str(b in GOOD)} for a in GOOD for b in (*BAD[:2], GOOD[0])]
MULTI = [{"text": text, "label": [name for name in ("a", "e", "y") if name in text]} for text in GOOD + BAD]
NUMBERS = [{"text": text, "label": len(text) / 10} for text in GOOD + BAD]
SEVERAL = [{"text": text, "label": [text.count("e") / 2, len(text) / 10]} for text in GOOD + BAD]
ROWS = {"single": SINGLE, "pairs": PAIRS, "multi": MULTI, "numbers": NUMBERS, "several": SEVERAL}
PROBLEMS = {"multi": "multi", "numbers": "regression", "several": "regression"}
data = pytest.mark.parametrize("rows", ROWS)


def task_of(rows: str, tokenizer, max_length: int = 64, **options):
    options = {"problem": PROBLEMS.get(rows, "single"), **options}
    return make("classification", tokenizer, ROWS[rows], max_length=max_length, **options)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(text=TEXT, pair=st.none() | TEXT, max_length=st.integers(6, 24))
def test_inputs_are_those_of_transformers(of_family, kind, text, pair, max_length):
    tokenizers = of_family[kind]
    task = make("classification", tokenizers.ours, [], labels=["a", "b"], max_length=max_length)
    texts = [[text]] if pair is None else [[text], [pair]]  # a single text's pair "" is none to transformers
    wanted = tokenizers.theirs(
        *texts,
        truncation="longest_first",
        max_length=max_length,
        return_token_type_ids=True,
        return_overflowing_tokens=True,
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        examples = task.examples([{"text": text, "text_pair": pair, "label": "b"}])
    assert len(told) == examples.truncated == (len(wanted["input_ids"]) > 1)
    example, ids = examples[0, 0], wanted["input_ids"][0]
    assert example["input_ids"].tolist() == (ids or [tokenizers.ours.eos_id])
    assert ("token_type_ids" in example) == (kind in ("bert", "xlnet"))
    if "token_type_ids" in example:
        assert example["token_type_ids"].tolist() == wanted["token_type_ids"][0]
    assert int(example["labels"]) == 1


def test_truncation_is_counted_and_told(wordpiece):
    rows = [{"text": "she was " * n, "label": "x"} for n in (1, 3, 4, 50)]
    task = make("classification", wordpiece, rows, max_length=8, labels=["x", "y"])
    with pytest.warns(UserWarning, match="2 of 4 rows have more text than max_length 8; it was cut at its end") as told:
        assert task.examples(rows).truncated == 2
    assert told[0].filename == __file__, "the caller is named"
    with pytest.warns(UserWarning, match="2 of 4 rows"):
        assert len(list(task.answers(model_of(task, wordpiece), rows))) == 4


@data
def test_gradients_do_not_depend_on_the_cut(wordpiece, rows):
    task = task_of(rows, wordpiece)
    examples = task.examples(ROWS[rows])
    assert_cut_is_no_matter(model_of(task, wordpiece), examples)
    batch = examples.collate([examples[0, i] for i in range(4)])
    assert examples.items(batch) == {"sequences": 4}


@pytest.mark.parametrize(
    ("kind", "shape"), [("bert", ENCODER), ("gpt2", DECODER), ("t5", BOTH), ("roberta", BOTH), ("xlnet", XLNET)]
)
def test_packed_equals_padded(of_family, kind, shape):
    """A batch of ours, and the same texts as transformers pads them."""
    both = of_family[kind]
    task = task_of("pairs", both.ours)
    special = {"pad_token_id": 5 if kind == "xlnet" else 0, "decoder_start_token_id": None if kind == "roberta" else 0}
    model = task.wrap(model_of(task, both.ours, shape, **special)).eval()
    examples = task.examples(PAIRS)
    packed = examples.collate([examples[0, i] for i in range(len(PAIRS))])
    both.theirs.pad_token = both.theirs.pad_token or both.theirs.eos_token
    padded = both.theirs(
        [row["text"] for row in PAIRS], [row["text_pair"] for row in PAIRS], padding=True, return_tensors="pt",
        return_token_type_ids=both.ours.token_types,
    )  # fmt: skip
    with torch.no_grad():
        out = model(**packed)
        wanted = model(**padded, labels=packed["labels"])
    torch.testing.assert_close(out.logits, wanted.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss, wanted.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "shape", "score"),
    [
        ("single", ENCODER, "label"),
        ("single", DECODER, "label"),
        ("single", BOTH, "label"),
        ("multi", ENCODER, "labels"),
        ("several", ENCODER, "value"),
    ],
)
def test_training_reaches_the_labels(of_family, rows, shape, score):
    tokenizer = of_family["gpt2" if shape is DECODER else "bert"].ours
    task = task_of(rows, tokenizer)
    model = task.wrap(model_of(task, tokenizer, shape, **({"decoder_start_token_id": 0} if shape is BOTH else {})))
    train(model, task.examples(ROWS[rows]), 60)
    model.train()
    answers = list(task.answers(model, ROWS[rows], batch_tokens=20))
    assert model.training
    for answer, row in zip(answers, ROWS[rows], strict=True):
        assert answer[score] == (pytest.approx(row["label"], abs=0.2) if score == "value" else row["label"])


def test_answers_come_in_the_order_of_rows_whatever_the_batches(wordpiece):
    task = task_of("pairs", wordpiece)
    model = model_of(task, wordpiece).eval()
    rows = [{"text": "she " * (n % 7), "text_pair": "was" if n % 3 else None} for n in range(30)]
    one_by_one = [next(task.answers(model, [row])) for row in rows]
    assert not model.training
    for batch_tokens in (1, 40, 4096):
        for answer, alone in zip(task.answers(model, rows, batch_tokens=batch_tokens), one_by_one, strict=True):
            assert answer["label"] == alone["label"] and answer["scores"] == pytest.approx(alone["scores"], abs=1e-6)
            assert math.isclose(sum(answer["scores"].values()), 1.0, abs_tol=1e-6)
            assert answer["label"] == max(answer["scores"], key=answer["scores"].get)
    assert list(task.answers(model, [])) == []


def test_what_is_not_finite_is_no_answer(wordpiece):
    task = task_of("single", wordpiece)
    model = model_of(task, wordpiece)
    with torch.no_grad():
        model.heads["classification"].out.bias[1] = math.nan
    with pytest.raises(ValueError, match=r"the model's outputs are NaN or infinite; its training diverged"):
        list(task.answers(model, SINGLE))


def test_a_threshold(wordpiece):
    for threshold in (0.1, 0.5, 0.9):
        task = task_of("multi", wordpiece, threshold=threshold)
        for answer in task.answers(model_of(task, wordpiece, init_std=1.0), MULTI):
            assert answer["labels"] == [name for name, p in answer["scores"].items() if p >= threshold]


def test_an_empty_text_has_a_token(of_family):
    tokenizer = of_family["gpt2"].ours
    task = task_of("single", tokenizer)
    (answer,) = task.answers(model_of(task, tokenizer, DECODER), [{"text": ""}])
    assert answer["label"] in ("good", "bad")
    assert task.examples([{"text": "", "label": "bad"}])[0, 0]["input_ids"].tolist() == [tokenizer.eos_id]


@pytest.mark.parametrize("given", [[3, 20, 100], ["b", "a"], ["10", "9"]])
def test_labels_are_sorted(wordpiece, given):
    rows = [{"text": "x", "label": label} for label in given]
    task = make("classification", wordpiece, rows, max_length=8)
    assert task.labels == {3: ("3", "20", "100"), "b": ("a", "b"), "10": ("9", "10")}[given[0]]
    assert task.model_fields() == {"n_labels": len(given), "labels": task.labels, "problem": "single"}


@data
def test_judged(wordpiece, rows):
    task = task_of(rows, wordpiece)
    key = {"single": "label", "multi": "labels", "regression": "value"}[task.options.problem]
    right = [{key: row["label"]} for row in ROWS[rows]]
    judgement = task.judge(ROWS[rows], right)
    best = 0.0 if judgement.lower_is_better else 1.0
    assert judgement.scores[judgement.main].value == best
    if rows == "single":
        unseen = [{"text": "x", "label": "unseen"}, *SINGLE]
        assert task.judge(unseen, [{"label": "bad"}, *right]).scores["accuracy"].value == pytest.approx(6 / 7)


@data
def test_saved_and_loaded(wordpiece, rows, tmp_path):
    task = task_of(rows, wordpiece, max_length=17)
    task.save(tmp_path)
    again = load(tmp_path, wordpiece)
    assert (again.labels, again.options, again.max_length) == (task.labels, task.options, 17)
    model = model_of(task, wordpiece)
    model.save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    assert loaded.config == model.config and loaded.config.labels == task.labels
    for answer, other in zip(again.answers(loaded, ROWS[rows]), task.answers(model, ROWS[rows]), strict=True):
        for key in answer:
            assert answer[key] == (other[key] if key in ("label", "labels") else pytest.approx(other[key], abs=1e-5))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_transformers_pipeline_shows_the_labels(of_family, family, tmp_path):
    tokenizer = of_family[family].ours
    task = task_of("single", tokenizer)
    fields = {"classifier": "pooled"} if family == "bert" else {"summary": "last", "classifier_bias": False}
    shape = {
        "vocab_size": tokenizer.vocab_size,
        "d_model": 32,
        "n_layers": 1,
        "n_heads": 2,
        "d_ff": 32,
        "init_std": 0.5,
    }
    special = {name: getattr(tokenizer, f"{name[:3]}_id") for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = TransformerConfig.preset(
        {"bert": "bert-tiny", "gpt2": "gpt-tiny"}[family], objectives=["classification"], **shape, **fields, **special,
        **task.model_fields(),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config)
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    pipe = transformers.pipeline("text-classification", str(tmp_path), device="cpu")
    assert set(pipe.model.config.label2id) == {"good", "bad"}
    for row, answer in zip(SINGLE, task.answers(model, SINGLE), strict=True):
        theirs = pipe(row["text"], top_k=None)
        assert {each["label"]: each["score"] for each in theirs} == pytest.approx(answer["scores"], abs=1e-5)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "x"}], {}, r"row 1 has no 'label'; its columns: text"),
        ([{"text": "x", "label": "a"}], {}, r"1 classes, 'a'; expected 2 or more"),
        ([{"text": "x", "label": ""}], {}, r"row 1: label is ''; expected the name of a class"),
        ([{"text": "x", "label": 1.5}], {}, r"row 1: label is 1.5; expected the name of a class"),
        ([{"text": "x", "label": "a"}], {"problem": "multi"}, r"row 1: label is 'a'; expected a list"),
        ([{"text": "x", "label": "a"}], {"problem": "regression"}, r"row 1: label is 'a'; expected a finite number"),
        ([{"text": "x", "label": math.nan}], {"problem": "regression"}, r"label is nan; expected a finite number"),
        ([], {"problem": "binary"}, r"problem 'binary' is not one of single, multi, regression"),
        ([], {"threshold": 0}, r"threshold must be between 0 and 1, got 0"),
        ([], {"treshold": 0}, r"no option treshold; options: problem, threshold"),
    ],
)
def test_wrong_training_rows(wordpiece, rows, options, message):
    with pytest.raises(ValueError, match=message):
        make("classification", wordpiece, rows, max_length=8, **options)


def test_wrong_rows_and_models(wordpiece):
    task = make("classification", wordpiece, [], labels=["a", "b"], max_length=8)
    for rows, message in (
        ([{"text": 3, "label": "a"}], r"row 1: text is 3; expected a text"),
        ([{"text": "x", "label": "a"}, {"text": "x", "text_pair": 3, "label": "a"}], r"row 2: text_pair is 3"),
        ([{"text": "x", "label": "c"}], r"row 1: label is 'c'; expected one of a, b"),
        ([{"label": "a"}], r"row 1 has no 'text'; its columns: label"),
        ([{"text": "x\ud83d", "label": "a"}], r"row 1: text is 'x\\ud83d'; expected a text without half surrogate"),
    ):
        with pytest.raises(ValueError, match=message):
            task.examples(rows)
    numbers = make("classification", wordpiece, SEVERAL, max_length=32, problem="regression")
    with pytest.raises(ValueError, match=r"row 1: label is 1; expected as many numbers as the others, 2"):
        numbers.examples([{"text": "x", "label": 1}])
    with pytest.raises(ValueError, match=r"the model's problem is 'multi', the task's 'single'"):
        list(task.answers(model_of(task, wordpiece, problem="multi"), []))
    with pytest.raises(ValueError, match=r"the model's labels is \('b', 'a'\), the task's \('a', 'b'\)"):
        task.wrap(model_of(task, wordpiece, labels=("b", "a")))
    task.wrap(model_of(task, wordpiece, labels=None))
    with pytest.raises(ValueError, match=r"the model lacks objective 'classification'; it has \['mlm'\]"):
        task.wrap(model_of(task, wordpiece, objectives=["mlm"]))
    with pytest.raises(ValueError, match=r"max_length must be 5 or more"):
        make("classification", wordpiece, [], labels=["a", "b"], max_length=4)


def test_token_types_only_where_the_model_has_them(wordpiece):
    task = task_of("pairs", wordpiece)
    examples = task.examples(PAIRS)
    for types in (0, 1, 2):
        model = task.wrap(model_of(task, wordpiece, type_vocab_size=types))
        batch = examples.collate([examples[0, 0]])
        assert ("token_type_ids" in batch) == (types == 2)
        assert torch.isfinite(model(**batch).loss)


@pytest.mark.parametrize("problem, label", [("single", "bda"), ("multi", ["good", "bda"])])
def test_judging_rows_tells_of_labels_that_the_model_does_not_know(of_family, problem, label):
    tokenizer = of_family["bert"].ours
    known = "good" if problem == "single" else ["good"]
    rows = [{"text": "a", "label": label}, {"text": "b", "label": known}, {"text": "c", "label": label}]
    task = make("classification", tokenizer, rows, max_length=8, labels=["bad", "good"], problem=problem)
    answers = [{"label": "good", "labels": ["good"]}] * 3
    with pytest.warns(UserWarning, match=r"2 of 3 rows have a label that the model does not know \('bda': 2\)"):
        task.judge(rows, answers)
