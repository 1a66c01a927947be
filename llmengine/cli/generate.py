"""`llmengine generate`: a decoder goes on with a text, an encoder-decoder writes what follows from it."""

from __future__ import annotations

from typing import Annotated

import typer

from llmengine.cli import models
from llmengine.cli.common import Debug, ModelPath, reported

EXAMPLES = """\
  llmengine generate runs/gpt --prompt "It was"
  llmengine generate runs/gpt --prompt "It was" --samples 3 --temperature 0.7 --seed 1
  llmengine generate runs/gpt --prompt "It was" --beams 4
  llmengine generate runs/bart --prompt "It <mask> a truth." --greedy"""


@reported
def command(
    run: ModelPath,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The beginning of a text; what an encoder-decoder reads.")
    ],
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The most tokens to add; 100, or as many as the model has room for.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many texts.")] = 1,
    temperature: Annotated[float, typer.Option(help="Below 1: likelier words.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw among that many tokens only.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the fewest with this probability together.")] = 0.95,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    beams: Annotated[int, typer.Option(min=1, help="Beam search with that many beams (no sampling).")] = 1,
    seed: Annotated[int | None, typer.Option(help="The same texts again.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    debug: Debug = False,
) -> None:
    """Write a text.

    A decoder (objective clm) goes on with the prompt, and both are printed. An encoder-decoder reads it; what it writes
    is printed alone.
    """
    from llmengine.training.predict import continuations

    if samples > 1 and (greedy or beams > 1):
        raise ValueError(f"--samples {samples}: --greedy and --beams give one text only")
    options: dict = {"num_beams": beams}
    if not greedy and beams == 1:
        options = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    trained = models.load(run, device)
    prompts = [prompt] * samples
    texts = continuations(trained.model, trained.tokenizer, prompts, new_tokens=new_tokens, **options)
    typer.echo("\n\n---\n\n".join(texts))
