"""`llmengine fill`: an encoder's candidates for masked words."""

from __future__ import annotations

from typing import Annotated

import typer

from llmengine.cli import models
from llmengine.cli.common import Debug, ModelPath, reported

EXAMPLES = """\
  llmengine fill runs/bert "She was [MASK] happy."
  llmengine fill runs/bert "He had [MASK] to [MASK]." --top 10"""


@reported
def command(
    run: ModelPath,
    text: Annotated[str, typer.Argument(help="A text in which [MASK] stands for missing words.")],
    top: Annotated[int, typer.Option(min=1, help="Candidates per mask.")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    debug: Debug = False,
) -> None:
    """Fill in masked words.

    Prints TEXT with the likeliest words, and the candidates of each mask with their probabilities.
    """
    from llmengine.training.predict import fill_text

    trained = models.load(run, device)
    filling = fill_text(trained.model, trained.tokenizer, text, top)
    typer.echo(trained.tokenizer.decode(filling.ids))
    for number, candidates in enumerate(filling.candidates, 1):
        typer.echo(f"\nmask {number}")
        for token, probability in candidates:
            typer.echo(f"  {100 * probability:5.1f} %  {trained.tokenizer.token(token)}")
