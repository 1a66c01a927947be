"""`llmengine evaluate`: loss, perplexity and accuracy on texts that the model was not trained on."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from llmengine.cli import models
from llmengine.cli.common import Debug, ModelPath, reported

EXAMPLES = """\
  llmengine evaluate runs/gpt
  llmengine evaluate runs/gpt --corpus other_texts/ --json"""


@reported
def command(
    run: ModelPath,
    corpus: Annotated[
        list[str] | None, typer.Option(help="Texts to evaluate on (default: what the run held out). May be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    debug: Debug = False,
) -> None:
    """Measure loss and accuracy.

    On the texts that the run held out, or on another corpus.
    """
    from llmengine import objectives
    from llmengine.data import StepBatches, read_documents, split_documents
    from llmengine.training.evaluation import evaluate

    trained = models.load(run, device)
    config = trained.config
    if config is None:
        raise ValueError(f"{run} is a model directory; give its run folder, which knows objective and sequence length")
    documents = read_documents(corpus or config.corpus)
    if not corpus:
        if not config.data.held_out:
            raise ValueError(f"{run} held out nothing (data.held_out: 0); give texts: --corpus FILE")
        documents = split_documents(documents, config.data.held_out, config.seed)[1]
    data = config.data
    examples = objectives.build(
        config.objective, documents, trained.tokenizer,
        sequence_length=data.sequence_length, seed=config.seed, **data.options,
    )  # fmt: skip
    batches = StepBatches(examples, batch_tokens=data.batch_tokens, seed=config.seed, shuffle=False)
    device_of = trained.model.words.weight.device
    result = evaluate(trained.model, batches, device_of, config.precision)
    result |= {"examples": len(examples), "weights": str(trained.source)}
    typer.echo(json.dumps(result, indent=2) if as_json else describe(result))


def describe(result: dict) -> str:
    lines = [f"loss        {result['loss']:.4f}"]
    if len(result["losses"]) > 1:
        lines += [f"  {head:10}{loss:.4f}" for head, loss in result["losses"].items()]
    lines.append(f"perplexity  {result['perplexity']:.2f}")
    lines += [f"accuracy    {100 * share:.1f} % ({head})" for head, share in result.get("accuracy", {}).items()]
    return "\n".join([*lines, f"on {result['examples']:,} examples, weights of {result['weights']}"])
