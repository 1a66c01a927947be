"""Answers that are drawn."""

from __future__ import annotations

import pytest

from llmengine import tasks

from .letters import letter_tokenizer, model_of

ROWS = [{"source": "a b c"}] * 6 + [{"source": "d"}] * 6


def task_of(architecture: str, **options) -> tasks.Task:
    return tasks.make(
        "seq2seq", letter_tokenizer(words="="), [], max_length=24, architecture=architecture, separator="=", **options
    )


def answers(model, task: tasks.Task, batch_tokens: int = 4096) -> list[str]:
    return [answer["text"] for answer in task.answers(model, ROWS, batch_tokens=batch_tokens)]


@pytest.fixture(params=["encoder_decoder", "decoder"])
def model(request):
    return model_of(task_of(request.param), request.param, init_std=0.3)


def test_draws_follow_the_seed_and_no_row_repeats_another(model):
    kind = model.config.architecture
    drawn = answers(model, task_of(kind, temperature=1.0, seed=1))
    assert answers(model, task_of(kind, temperature=1.0, seed=1)) == drawn
    assert answers(model, task_of(kind, temperature=1.0, seed=2)) != drawn
    assert len(set(drawn[:6])) > 2 and len(set(drawn[6:])) > 2
    one_by_one = answers(model, task_of(kind, temperature=1.0, seed=1), batch_tokens=1)
    assert len(set(one_by_one[:6])) > 2, "batches do not begin the same draws anew"


def test_cold_or_narrow_draws_are_the_likeliest(model):
    kind = model.config.architecture
    likeliest = answers(model, task_of(kind))
    assert len(set(likeliest)) == 2
    for options in ({"temperature": 1e-4}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-6}):
        assert answers(model, task_of(kind, **options)) == likeliest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature must be 0 \(no draws\) or more, got -1"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be 1 or more, got 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"temperature": 1.0, "beams": 2}, "choose one"),
        ({"top_k": 3}, "give a temperature above 0"),
        ({"beams": 0}, "beams must be 1 or more, got 0"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        task_of("decoder", **options)
