"""Several answers to a question: packed batches with any number of choices, against padded ones; gradients, answers."""

from __future__ import annotations

import pytest
import torch
import transformers

from llmengine import Transformer, TransformerConfig
from llmengine.tasks import load, make

from .tiny import BOTH, DECODER, ENCODER, XLNET, assert_cut_is_no_matter, model_of, train

ROWS = [
    {"question": "Emma went", "choices": ["home", "never so", "was"], "label": 0},
    {"question": "She was", "choices": ["very", "happy"], "label": 1},
    {"question": "Who was it", "choices": ["not so", "so much", "he", "Emma"], "label": 3},
    {"question": "They had", "choices": ["been"], "label": 0},
    {"question": "She went", "choices": ["was", "very", "home"], "label": 2},
]
EQUAL = [row for row in ROWS if len(row["choices"]) == 3]


def test_packed_equals_padded(of_family):
    """Equally many choices: (batch, choices, length) as transformers' recipe makes it."""
    both = of_family["bert"]
    task = make("choice", both.ours, EQUAL, max_length=32)
    model = task.wrap(model_of(task, both.ours, init_std=0.5)).eval()
    examples = task.examples(EQUAL)
    packed = examples.collate([examples[0, i] for i in range(2)])
    padded = both.theirs(
        [row["question"] for row in EQUAL for _ in row["choices"]], [c for row in EQUAL for c in row["choices"]],
        padding=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        wanted = model(**{k: v.view(2, 3, -1) for k, v in padded.items()}, labels=packed["labels"])
        out = model(**packed)
        alike = model(**{k: v for k, v in packed.items() if k != "choices"})
    for got in (out, alike):
        torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-5, atol=1e-5)


def test_each_question_has_its_own_choices(wordpiece):
    """A batch of questions with different numbers of choices is each question by itself."""
    task = make("choice", wordpiece, ROWS, max_length=32)
    model = task.wrap(model_of(task, wordpiece, init_std=0.5)).eval()
    examples = task.examples(ROWS)
    batch = examples.collate([examples[0, i] for i in range(len(ROWS))])
    assert batch["choices"].tolist() == [3, 2, 4, 1, 3] and len(batch["cu_seqlens"]) == 14
    out = model(**batch)
    assert out.logits.shape == (5, 4)
    losses = []
    for i, row in enumerate(ROWS):
        alone = model(**examples.collate([examples[0, i]]))
        torch.testing.assert_close(out.logits[i, : len(row["choices"])], alone.logits[0], rtol=1e-5, atol=1e-5)
        losses.append(alone.loss)
    torch.testing.assert_close(out.loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
    assert examples.items(batch) == {"sequences": 5}


@pytest.mark.parametrize("shape", [ENCODER, DECODER, XLNET, BOTH])
def test_gradients_and_training(of_family, shape):
    tokenizer = of_family["gpt2" if shape is DECODER else "bert"].ours
    task = make("choice", tokenizer, ROWS, max_length=32)
    model = task.wrap(model_of(task, tokenizer, shape, **({"decoder_start_token_id": 0} if shape is BOTH else {})))
    examples = task.examples(ROWS)
    assert_cut_is_no_matter(model, examples)
    train(model, examples, 80)
    answers = list(task.answers(model, ROWS, batch_tokens=30))
    assert [answer["choice"] for answer in answers] == [row["label"] for row in ROWS]
    for answer, row in zip(answers, ROWS, strict=True):
        assert len(answer["scores"]) == len(row["choices"]) and sum(answer["scores"]) == pytest.approx(1.0)
    assert task.judge(ROWS, answers).scores["accuracy"].value == 1.0
    assert task.judge(ROWS, [{"choice": 0}] * 5).scores["accuracy"].value == pytest.approx(2 / 5)


def test_answers_come_in_the_order_of_rows_whatever_the_batches(wordpiece):
    task = make("choice", wordpiece, ROWS, max_length=32)
    model = model_of(task, wordpiece, init_std=0.5)
    one_by_one = [next(task.answers(model, [row])) for row in ROWS * 5]
    for batch_tokens in (1, 60, 4096):
        for answer, alone in zip(task.answers(model, ROWS * 5, batch_tokens=batch_tokens), one_by_one, strict=True):
            assert answer["scores"] == pytest.approx(alone["scores"], abs=1e-5)


def test_truncation_is_counted_and_told(wordpiece):
    rows = [{"question": "she was " * 10, "choices": ["x", "y"], "label": 0}, ROWS[1]]
    task = make("choice", wordpiece, rows, max_length=10)
    with pytest.warns(UserWarning, match="1 of 2 rows have more text than max_length 10"):
        examples = task.examples(rows)
    assert examples.truncated == 1
    example = examples[0, 0]
    assert example["lengths"].tolist() == [10, 10]
    x, y = (wordpiece.encode(text)[0] for text in "xy")
    assert [int(example["input_ids"][i]) for i in (8, 18)] == [x, y], "the longer one is cut"


def test_saved_and_loaded_and_read_by_transformers(of_family, tmp_path):
    both = of_family["bert"]
    task = make("choice", both.ours, ROWS, max_length=32)
    task.save(tmp_path)
    shape = {
        "vocab_size": both.ours.vocab_size,
        "d_model": 32,
        "n_layers": 1,
        "n_heads": 2,
        "d_ff": 32,
        "init_std": 0.5,
    }
    torch.manual_seed(0)
    model = Transformer(TransformerConfig.preset("bert-tiny", objectives=["choice"], classifier="pooled", **shape))
    model.save_pretrained(tmp_path)
    again, answers = load(tmp_path, both.ours), list(task.answers(model, EQUAL))
    for answer, other in zip(again.answers(Transformer.from_pretrained(tmp_path), EQUAL), answers, strict=True):
        assert answer["scores"] == pytest.approx(other["scores"], abs=1e-6)
    theirs = transformers.BertForMultipleChoice.from_pretrained(tmp_path).eval()
    for row, answer in zip(EQUAL, answers, strict=True):
        inputs = both.theirs([row["question"]] * 3, row["choices"], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = theirs(**{k: v[None] for k, v in inputs.items()}).logits[0]
        assert answer["scores"] == pytest.approx(logits.softmax(0).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x", "choices": [], "label": 0}, r"row 1: choices is \[\]; expected one choice or more"),
        ({"question": "x", "choices": "ab", "label": 0}, r"row 1: choices is 'ab'; expected a list of texts"),
        ({"question": "x", "choices": ["a", "b"], "label": 2}, r"row 1: label is 2; expected a number from 0 to 1"),
        ({"question": "x", "choices": ["a", "b"], "label": -1}, r"row 1: label is -1; expected a number from 0 to 1"),
        ({"question": "x", "choices": ["a", "b"], "label": "a"}, r"row 1: label is 'a'; expected a number from 0 to 1"),
        ({"question": "x", "choices": ["a", "b"]}, r"row 1 has no 'label'; its columns: question, choices"),
    ],
)
def test_wrong_rows(wordpiece, row, message):
    task = make("choice", wordpiece, [], max_length=16)
    with pytest.raises(ValueError, match=message):
        task.examples([row])
    with pytest.raises(ValueError, match=message):
        task.judge([row], [{"choice": 0}])


def test_wrong_batches_are_told(wordpiece):
    task = make("choice", wordpiece, ROWS, max_length=32)
    model, examples = model_of(task, wordpiece), task.examples(ROWS)
    batch = examples.collate([examples[0, 0], examples[0, 1]])
    for changed, message in (
        ({"choices": torch.tensor([3, 3])}, r"choices are \[3, 3\]; expected 1 or more each, together 5"),
        ({"choices": torch.tensor([5, 0])}, r"choices are \[5, 0\]; expected 1 or more each"),
        ({"choices": None}, "5 sequences are not equally many choices for 2 questions; give choices"),
        ({"choices": torch.tensor([5])}, r"labels has shape \(2,\); expected \(1,\), one per question"),
        ({"labels": torch.tensor([0, 2])}, "labels holds 2 for question 1, which has 2 choices"),
        ({"choices": torch.tensor([3.0, 2.0])}, "choices has dtype torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**batch | changed)
    tagger = model_of(make("tagging", wordpiece, [], labels=["O", "x"], max_length=8), wordpiece)
    with pytest.raises(ValueError, match=r"choices given, but objectives \['tagging'\] lack 'choice'"):
        tagger(torch.tensor([[5, 6]]), choices=torch.tensor([1]))
