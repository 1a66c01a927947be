"""Texts from texts: inputs as transformers' tokenizers make them, exact losses, and models that learn to reverse."""

from __future__ import annotations

import pytest
import torch
import transformers

from llmengine import Transformer, tasks
from llmengine.data import Tokenizer
from llmengine.data.examples import tokens_of

from .letters import letter_tokenizer, model_of, words_of_letters
from .tiny import assert_cut_is_no_matter, train

SENTENCES = ["It is a truth universally acknowledged.", "She said <pad> nothing </s> at all.", "你好, Bennet!"]


def reversed_words(count: int, longest: int = 6) -> list[dict[str, str]]:
    return [{"source": word, "target": " ".join(reversed(word.split()))} for word in words_of_letters(count, longest)]


def task_of(architecture: str = "encoder_decoder", **options) -> tasks.Task:
    tokenizer = letter_tokenizer(words="=") if architecture == "decoder" else letter_tokenizer()
    options = {"architecture": architecture, "separator": "="} | options
    max_length = options.pop("max_length", 24)
    return tasks.make("seq2seq", tokenizer, [], max_length=max_length, **options)


@pytest.fixture(scope="module", params=["encoder_decoder", "decoder"])
def learnt(request):
    rows, task = reversed_words(64), task_of(request.param)
    model = model_of(task, request.param)
    train(model, task.examples(rows), 120)
    return task, model, rows


def test_a_model_learns(learnt):
    task, model, rows = learnt
    answers = list(task.answers(model, rows))
    judgement = task.judge(rows, answers)
    assert judgement.main == "chrf" and judgement.rows == 64
    assert judgement.scores["exact_match"].value == 1.0, answers[:4]


def test_answers_depend_on_no_batch(learnt):
    """One by one, in small batches and at once, by every way of writing."""
    task, model, rows = learnt
    asked = [{"source": row["source"]} for row in rows[:9]] + [{"source": "a"}, {"source": " ".join("abcdefghij")}]
    for options in ({}, {"beams": 3, "length_penalty": 0.5}, {"no_repeat_ngram": 1}, {"repetition_penalty": 1.3}):
        other = task_of(task.options.architecture, max_length=40, max_target_length=12, **options)
        alone = [next(iter(other.answers(model, [row]))) for row in asked]
        assert list(other.answers(model, asked, batch_tokens=60)) == alone
        assert list(other.answers(model, asked)) == alone
    assert list(task.answers(model, [])) == []
    model.train()
    assert list(task.answers(model, rows[:2])) == [{"text": row["target"]} for row in rows[:2]]
    assert model.training
    model.eval()


def test_repetition_can_be_forbidden(learnt):
    task, model, _ = learnt
    other = task_of(task.options.architecture, no_repeat_ngram=1)
    text = next(iter(other.answers(model, [{"source": "a b a b"}])))["text"].split()
    assert len(set(text)) == len(text)


def test_saved_and_loaded(learnt, tmp_path):
    task, model, rows = learnt
    model.save_pretrained(tmp_path)
    task.save(tmp_path)
    again = tasks.load(tmp_path, task.tokenizer)
    assert again.options == task.options
    loaded = Transformer.from_pretrained(tmp_path)
    assert list(again.answers(loaded, rows)) == list(task.answers(model, rows))


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_inputs_are_those_of_transformers(family, tmp_path, novels):
    tokenizer = Tokenizer.train(novels, "bpe", 600, family=family)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prefix = "summarize: " if family == "t5" else ""
    task = tasks.make("seq2seq", tokenizer, [], max_length=512, prefix=prefix)
    texts = [SENTENCES[0], SENTENCES[2], ""]
    examples = task.examples([{"source": a, "target": b} for a, b in zip(texts, texts[::-1], strict=True)])
    for i, (a, b) in enumerate(zip(texts, texts[::-1], strict=True)):
        assert examples[0, i]["input_ids"].tolist() == theirs(prefix + a).input_ids
        assert examples[0, i]["labels"].tolist() == theirs(text_target=b).input_ids
    assert examples.lengths(0).tolist() == [len(e["input_ids"]) + len(e["labels"]) for e in examples.made]


def test_special_tokens_in_a_text_are_text(novels):
    tokenizer = Tokenizer.train(novels, "bpe", 600, family="bart")
    task = tasks.make("seq2seq", tokenizer, [], max_length=100)
    (example,) = task.examples([{"source": SENTENCES[1], "target": SENTENCES[1]}]).made
    for ids in example.values():
        ids = ids.tolist()
        assert [ids.count(token) for token in (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)] == [0, 1, 1]
        assert tokenizer.decode(ids) == SENTENCES[1]


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder"])
def test_accumulation_changes_nothing(architecture):
    rows, task = reversed_words(12), task_of(architecture)
    model = model_of(task, architecture)
    assert_cut_is_no_matter(model, task.examples(rows))


def test_packed_is_padded():
    """An encoder-decoder's packed batch has the loss of the padded one whose labels Hugging Face would shift."""
    rows, task = reversed_words(5), task_of()
    model = model_of(task, "encoder_decoder").eval()
    examples = task.examples(rows)
    batch = examples.collate(examples.made)
    assert tokens_of(batch) == examples.lengths(0).sum() and examples.items(batch) == {
        "tokens": sum(len(each["labels"]) for each in examples.made)
    }

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([each[name] for each in examples.made], True, value)

    ids, labels = padded("input_ids", 0), padded("labels", -100)
    other = model(ids, (ids != 0).long(), labels=labels, decoder_attention_mask=(labels != -100).long())
    torch.testing.assert_close(model(**batch).loss, other.loss)


def test_a_decoders_example():
    """<s> source = target </s>, with labels on what the model writes."""
    tokenizer = letter_tokenizer("<s> $A", words="=")
    task = tasks.make("seq2seq", tokenizer, [], max_length=16, architecture="decoder", separator="=")
    (example,) = task.examples([{"source": "a b", "target": "c"}]).made
    words = [tokenizer.token(i) for i in example["input_ids"].tolist()]
    assert words == ["<s>", "a", "b", "=", "c", "</s>"]
    assert example["labels"].tolist() == [-100] * 4 + example["input_ids"][4:].tolist()
    examples = task.examples([{"source": "a b", "target": "c"}])
    assert examples.items(examples.collate(examples.made)) == {"tokens": 2}


def test_what_is_too_long_is_cut_and_told():
    row = {"source": "a b c d e f g h", "target": "h g f e d c b a"}
    task = task_of(max_length=6, max_target_length=4)
    with pytest.warns(UserWarning) as told:
        (example,) = task.examples([row]).made
    assert {str(each.message) for each in told} == {
        "task 'seq2seq': 1 of 1 sources are longer than the 5 tokens that fit, and are cut at the end",
        "task 'seq2seq': 1 of 1 targets are longer than the 4 tokens that fit, and are cut at the end",
    }
    tokenizer = task.tokenizer
    assert tokenizer.decode(example["input_ids"].tolist(), skip_special=False) == "a b c d e </s>"
    assert tokenizer.decode(example["labels"].tolist(), skip_special=False) == "h g f </s>"
    decoder = task_of("decoder", max_length=10, max_target_length=4)
    with pytest.warns(UserWarning, match="are cut at the end"):
        (example,) = decoder.examples([row]).made
    assert decoder.tokenizer.decode(example["input_ids"].tolist(), False) == "a b c d e = h g f </s>"
    with pytest.warns(UserWarning, match="sources are longer than the 5 tokens"):
        list(decoder.answers(model_of(decoder, "decoder"), [row]))


def test_a_target_may_begin_with_a_token_of_choice():
    """mBART's targets begin with the token of their language, which its config does not name."""
    rows, task = reversed_words(3), task_of(start="j")
    model = model_of(task, "encoder_decoder")
    assert model.config.decoder_start_token_id == task.tokenizer.encode("j")[0]
    assert task.wrap(model) is model
    with pytest.raises(ValueError, match="option start"):
        task_of().wrap(model_of(task_of(), "encoder_decoder", decoder_start_token_id=None))
    with pytest.raises(ValueError, match="start 'z' is not in the tokenizer's vocabulary"):
        task_of(start="z").model_fields()
    assert len(list(task.answers(model, rows))) == 3


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"source": "a"}], "row 1 has no 'target'; its columns: source"),
        ([{"source": "a", "target": "b"}, {"source": 3, "target": "b"}], "row 2: source is 3; expected a text"),
    ],
)
def test_wrong_rows(rows, message):
    with pytest.raises(ValueError, match=message):
        task_of().examples(rows)


def test_an_empty_source_of_a_template_without_tokens():
    task = tasks.make("seq2seq", letter_tokenizer("$A"), [], max_length=8)
    with pytest.raises(ValueError, match="row 1: source is empty"):
        task.examples([{"source": "", "target": "b"}])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"architecture": "encoder"}, "architecture 'encoder' is not one of encoder_decoder, decoder"),
        ({"max_target_length": 1}, "max_target_length must be 2 or more, got 1"),
        ({"architecture": "decoder", "start": "a"}, "start is for encoder-decoders"),
        ({"beams": 0}, "beams must be 1 or more, got 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"max_length": 1}, "max_length 1 and max_target_length 1 leave no room"),
        ({"architecture": "decoder", "separator": " \n"}, "gives no token of this tokenizer"),
        ({"beam": 2}, "no option beam; options: beams"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        task_of(**options)


def test_a_model_of_another_kind():
    task = task_of()
    with pytest.raises(ValueError, match="architecture is 'encoder_decoder', but the model is a decoder with"):
        task.wrap(model_of(task, "decoder"))
