"""`llmengine generate`: a decoder goes on with a text, an encoder-decoder writes what follows from it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from llmengine.cli import fine_tuned, models
from llmengine.cli.common import Debug, ModelPath, reported

EXAMPLES = """\
  llmengine generate runs/gpt --prompt "It was"
  llmengine generate runs/gpt --prompt "It was" --samples 3 --temperature 0.7 --seed 1
  llmengine generate runs/gpt --prompt "It was" --beams 4
  llmengine generate runs/bart --prompt "It <mask> a truth."
  llmengine generate runs/chat --prompt "What is a whale?" --samples 3"""


# Of a decoder's texts; others are the likeliest unless a flag asks for draws
TEMPERATURE, TOP_P = 0.8, 0.95


@reported
def command(
    run: ModelPath,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The beginning of a text; a source to be rewritten; a question.")
    ],
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The most tokens to add; 100, or as many as the model has room for.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many texts.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(help=f"Below 1: likelier words. Default where words are drawn: {TEMPERATURE}.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among that many tokens only.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help=f"Draw among the fewest with this probability together. Default: {TOP_P}; 1: all."),
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    beams: Annotated[int | None, typer.Option(min=1, help="Beam search with that many beams (no draws).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same texts again.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    debug: Debug = False,
) -> None:
    """Write a text.

    A decoder (objective clm) goes on with the prompt, and both are printed; its words are drawn. An encoder-decoder
    reads it, as does a model that was fine-tuned for seq2seq; one fine-tuned for chat replies. What they write is
    printed alone, and is the likeliest unless --temperature, --top-k, --top-p, --seed or --samples ask for draws.
    """
    from llmengine.training.predict import continuations

    draws = {"--temperature": temperature, "--top-k": top_k, "--top-p": top_p, "--seed": seed}
    asked = [name for name, value in draws.items() if value is not None] + ["--samples"] * (samples > 1)
    searched = greedy or (beams or 1) > 1
    if searched and asked:
        raise ValueError(f"{asked[0]} is for texts that are drawn; --greedy and --beams give one text only")
    sampling = {
        "temperature": TEMPERATURE if temperature is None else temperature,
        "top_k": top_k,
        "top_p": TOP_P if top_p is None else top_p,
        "seed": seed,
    }
    if fine_tuned.is_fine_tuned(run):
        options = _drawn(sampling) if asked else _search(beams) if searched else {}
        texts = _answers(run, device, prompt, samples, new_tokens, options)
    else:
        trained = models.load(run, device)
        drawn = asked or (not searched and trained.model.config.architecture == "decoder")
        options = {"do_sample": True, **sampling} if drawn else {"num_beams": beams or 1}
        prompts = [prompt] * samples
        given: dict[str, Any] = {"new_tokens": new_tokens, "begins": trained.config is None}
        texts = continuations(trained.model, trained.tokenizer, prompts, **given, **options)
    typer.echo("\n\n---\n\n".join(texts))


def _search(beams: int | None) -> dict[str, Any]:
    """Options of `Writing`."""
    return {"beams": beams or 1, "temperature": 0.0, "top_k": None, "top_p": None}


def _drawn(sampling: dict[str, Any]) -> dict[str, Any]:
    """Options of `Writing`, whose seed is a number: without one, another each time."""
    seed = random.SystemRandom().getrandbits(62) if sampling["seed"] is None else sampling["seed"]
    return {**sampling, "beams": 1, "seed": seed}


def _answers(
    run: Path, device: str, prompt: str, samples: int, new_tokens: int | None, options: dict[str, Any]
) -> list[str]:
    """What a fine-tuned model answers, with these options in place of its own."""
    from llmengine.tasks.writing import Writing

    tuned = fine_tuned.load(run, device)
    task = tuned.task
    if not isinstance(task.options, Writing):
        raise ValueError(f"{run} was fine-tuned for {task.name}, which writes no texts; ask it: llmengine predict")
    if new_tokens is not None:
        options = {**options, task.options.longest: new_tokens}
    task = type(task)(task.tokenizer, task.max_length, task.labels, replace(task.options, **options))
    rows = [fine_tuned.question(task, prompt)] * samples
    return [answer["text"] for answer in task.answers(tuned.model, rows)]
