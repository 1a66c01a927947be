"""`llmengine inspect`: the batches of a run as the model sees them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmengine.cli import batch_view
from llmengine.cli.common import Debug, Overrides, reported

if TYPE_CHECKING:
    from numpy import ndarray

    from llmengine.data import Corpus, Step
    from llmengine.training import RunConfig

EXAMPLES = """\
  llmengine inspect examples/train_bert.yaml
  llmengine inspect examples/train_gpt.yaml --sequences 1 --step 10
  llmengine inspect runs/bert"""
BAR, BINS = 40, 12


@reported
def command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A config file, or a run folder.")],
    step: Annotated[int, typer.Option(min=0, help="Which optimizer step's batch, from 0.")] = 0,
    sequences: Annotated[int, typer.Option(min=0, help="How many of its sequences to print.")] = 3,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Show a batch as the model sees it.

    Tokens, what is hidden and how, what is predicted, pairs, packing, lengths. Only the tokenizer is trained,
    and nothing is written.
    """
    from llmengine.training import RunConfig
    from llmengine.training.run import Folder

    folder = Folder(config) if config.is_dir() else None
    if folder is not None and not folder.config.is_file():
        raise FileNotFoundError(f"{config} is no run folder: it has no {folder.config.name}; give a config file")
    run_config = RunConfig.from_file(folder.config if folder else config, overrides or [])
    for line in _report(run_config, folder.model if folder else None, step, sequences):
        typer.echo(line)


def _report(config: RunConfig, saved: Path | None, step: int, sequences: int) -> Iterator[str]:
    from llmengine import objectives
    from llmengine.data import StepBatches, read_corpus, split_corpus
    from llmengine.training.pretraining import tokenizer_of

    pairs = objectives.OBJECTIVES[config.objective].pairs
    documents, data = read_corpus(config.corpus, pairs=pairs), config.data
    held_out: Corpus = ()
    if data.held_out:
        documents, held_out = split_corpus(documents, data.held_out, config.seed)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = tokenizer_of(config, documents, saved or Path(scratch))
    examples = objectives.build(
        config.objective, documents, tokenizer,
        sequence_length=data.sequence_length, seed=config.seed, **data.options,
    )  # fmt: skip
    batches = StepBatches(examples, batch_tokens=data.batch_tokens, accumulation=data.accumulation, seed=config.seed)
    what = "pairs" if pairs else "documents"
    yield f"corpus      {len(documents):,} {what} to train on, {_size(documents)}; held out {_size(held_out)}"
    yield f"tokenizer   {tokenizer.vocab_size:,} tokens"
    yield f"epoch       {len(examples):,} sequences, {batches.steps_per_epoch:,} steps, of the run's {config.steps:,}"
    sides = " on each side; both are counted together" if "seq2seq" in examples.heads else ""
    yield from ("", f"sequence lengths of an epoch ({config.data.sequence_length} at most{sides})")
    yield from histogram(examples.lengths(0))
    batch = batches[step]
    yield from ("", *_packing(batch, step, data.batch_tokens))
    yield from batch_view.counts(batch, tokenizer)
    yield from batch_view.sequences(batch, tokenizer, sequences)


def _size(documents: Corpus) -> str:
    from llmengine.data import Pairs, Shards

    if isinstance(documents, Shards):
        return f"{len(documents.tokens.ids):,} tokens"
    texts = documents.texts if isinstance(documents, Pairs) else documents
    return f"{sum(map(len, texts)):,} characters"


def histogram(lengths: ndarray) -> list[str]:
    """Bars of how many sequences have which length."""
    import numpy

    low, high = int(lengths.min()), int(lengths.max())
    bins = min(BINS, high - low + 1)
    edges = [low + (high + 1 - low) * i // bins for i in range(bins + 1)]
    counts, _ = numpy.histogram(lengths, bins=edges)
    width = len(str(high))
    return [
        f"  {first:{width}} to {end - 1:{width}}  {count:>9,}  {'#' * -(-BAR * int(count) // int(counts.max()))}"
        for (first, end), count in zip(pairwise(edges), counts, strict=True)
    ]


# ---- a batch ---------------------------------------------------------------------------------------------------------


def _packing(batch: Step, step: int, batch_tokens: int) -> Iterator[str]:
    from llmengine.data.examples import tokens_of

    yield f"step {step} (epoch {batch.epoch}): {len(batch.micro_batches)} micro-batches, no padding"
    for i, micro in enumerate(batch.micro_batches):
        tokens, count = tokens_of(micro), len(micro["cu_seqlens"]) - 1
        filled = 100 * tokens / batch_tokens
        yield (
            f"  micro-batch {i}: {tokens:,} tokens ({filled:.1f} % of batch_tokens) in {count} sequences, "
            f"longest {micro['max_seqlen']}{_target(micro)}"
        )
    if batch.streams is not None:
        parts = [part for row in batch.streams for part in row]
        goes_on = sum(part.behind > 0 for part in parts)
        yield f"  streams: {goes_on} of {len(parts)} sequences go on where their stream's last one was, with its memory"
    items = ", ".join(f"{count:,} {name}" for name, count in batch.items.items())
    yield f"  losses are divided by: {items}"


def _target(micro: dict[str, Any]) -> str:
    return f", longest target {micro['decoder_max_seqlen']}" if "decoder_max_seqlen" in micro else ""
