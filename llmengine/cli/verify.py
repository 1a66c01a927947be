"""`llmengine verify`: do two checkpoints compute the same, and if not, from which layer on?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmengine.cli import models
from llmengine.cli.common import FAILURE, Debug, reported

EXAMPLES = """\
  llmengine verify bert-base-uncased/ my-bert
  llmengine verify checkpoint_best.pt my-bart --tolerance 1e-6
  llmengine verify runs/gpt my-gpt --text "It was a truth" """.rstrip()


@reported
def command(
    a: Annotated[Path, typer.Argument(metavar="A", help=models.READABLE)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    text: Annotated[
        str | None, typer.Option(help="Compare on this text, by the tokenizer of A or B. Default: random tokens.")
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="How many random sequences.")] = 2,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Allowed difference, relative to a tensor's largest value, at least to 1.")
    ] = 1e-4,
    debug: Debug = False,
) -> None:
    """Compare two checkpoints.

    Runs both in float32 on the same tokens and prints by how much their hidden states differ, layer by layer, and
    their logits. Exit code 1 where a difference exceeds the tolerance.
    """
    import torch

    from llmengine.models.comparison import compare, random_tokens

    a, b = models.weights_of(a), models.weights_of(b)
    first, second = (models.read(path, "float32") for path in (a, b))
    for path, model in ((a, first), (b, second)):
        typer.echo(f"{path}: {models.describe(model)}")
    if text is None:
        ids = random_tokens((first, second), sequences, length, seed)
        typer.echo(f"{ids.shape[0]} x {ids.shape[1]} random tokens (seed {seed}), float32\n")
    else:
        ids = torch.tensor([_encode(text, a, b)])
        typer.echo(f"{ids.shape[1]} tokens of the text, float32\n")
    differences = compare(first, second, ids)
    width = max(len(difference.name) for difference in differences)
    typer.echo(f"{'':{width}}  difference  largest value")
    for d in differences:
        typer.echo(f"{d.name:{width}}  {d.largest:10.1e}  {d.magnitude:13.1e}{'  <' * d.exceeds(tolerance)}")
    if one_sided := set(first.config.objectives) ^ set(second.config.objectives):
        typer.echo(f"not compared, as only one has them: {', '.join(sorted(one_sided))}")
    diverging = next((difference.name for difference in differences if difference.exceeds(tolerance)), None)
    if diverging is not None:
        typer.echo(f"\nThey diverge from {diverging} on (tolerance {tolerance:g}).")
        raise typer.Exit(FAILURE)
    typer.echo(f"\nThe same within {tolerance:g}.")


def _encode(text: str, a: Path, b: Path) -> list[int]:
    from llmengine.data import Tokenizer
    from llmengine.data.tokenizer_files import files_in

    directory = next((path for path in (a, b) if path.is_dir() and files_in(path)), None)
    if directory is None:
        raise FileNotFoundError(
            f"--text: neither {a} nor {b} has a tokenizer's files; leave out --text to compare on random tokens"
        )
    ids = Tokenizer.load(directory).encode(text)
    if not ids:
        raise ValueError("--text gives no tokens")
    return ids
