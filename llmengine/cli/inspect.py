"""`llmengine inspect`: the batches of a run as the model sees them."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmengine.cli.common import Debug, Overrides, reported

if TYPE_CHECKING:
    from numpy import ndarray

    from llmengine.data import Step, Tokenizer
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

    Tokens, what is masked and how, pairs, packing, lengths. Only the tokenizer is trained, and nothing is written.
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
    from llmengine.data import StepBatches, read_documents, split_documents
    from llmengine.training.run import tokenizer_of

    documents, data = read_documents(config.corpus), config.data
    held_out: Sequence[str] = ()
    if data.held_out:
        documents, held_out = split_documents(documents, data.held_out, config.seed)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = tokenizer_of(config, documents, saved or Path(scratch))
    examples = objectives.build(
        config.objective, documents, tokenizer,
        sequence_length=data.sequence_length, seed=config.seed, **data.options,
    )  # fmt: skip
    batches = StepBatches(examples, batch_tokens=data.batch_tokens, accumulation=data.accumulation, seed=config.seed)
    yield f"corpus      {len(documents):,} documents to train on, {_size(documents)}; held out {_size(held_out)}"
    yield f"tokenizer   {tokenizer.vocab_size:,} tokens"
    yield f"epoch       {len(examples):,} sequences, {batches.steps_per_epoch:,} steps, of the run's {config.steps:,}"
    yield from ("", f"sequence lengths of an epoch ({config.data.sequence_length} at most)")
    yield from histogram(examples.lengths(0))
    batch = batches[step]
    yield from ("", *_packing(batch, step, data.batch_tokens))
    yield from _counts(batch, tokenizer)
    yield from _sequences(batch, tokenizer, sequences)


def _size(documents: Sequence[str]) -> str:
    return f"{sum(map(len, documents)):,} characters"


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
    yield f"step {step} (epoch {batch.epoch}): {len(batch.micro_batches)} micro-batches, no padding"
    for i, micro in enumerate(batch.micro_batches):
        tokens, count = len(micro["input_ids"]), len(micro["cu_seqlens"]) - 1
        filled = 100 * tokens / batch_tokens
        yield (
            f"  micro-batch {i}: {tokens:,} tokens ({filled:.1f} % of batch_tokens) in {count} sequences, "
            f"longest {micro['max_seqlen']}"
        )
    items = ", ".join(f"{count:,} {name}" for name, count in batch.items.items())
    yield f"  losses are divided by: {items}"


def _counts(batch: Step, tokenizer: Tokenizer) -> Iterator[str]:
    """How many tokens are predicted and what stands in their places; how many pairs are of which kind."""
    first = batch.micro_batches[0]
    tokens = sum(len(micro["input_ids"]) for micro in batch.micro_batches)
    if not _next_token(first):
        kinds: Counter[str] = Counter()
        for micro in batch.micro_batches:
            kinds.update(_kinds(micro["input_ids"].tolist(), micro["labels"].tolist(), tokenizer.mask_id))
        predicted = sum(kinds[kind] for kind in ("masked", "random", "kept"))
        shares = ", ".join(
            f"{kinds[kind]:,} {kind} ({100 * kinds[kind] / max(predicted, 1):.1f} %)"
            for kind in ("masked", "random", "kept")
        )
        yield f"  predicted: {predicted:,} of {tokens:,} tokens ({100 * predicted / tokens:.1f} %): {shares}"
    else:
        yield f"  predicted: every token but the first of each sequence, {batch.items['tokens']:,} of {tokens:,}"
    if "next_sentence_label" in first:
        labels = [label for micro in batch.micro_batches for label in micro["next_sentence_label"].tolist()]
        yield f"  pairs: {labels.count(0)} follow (label 0), {labels.count(1)} random (label 1)"


def _next_token(micro: dict[str, Any]) -> bool:
    return bool((micro["labels"] == micro["input_ids"]).all())


def _kinds(ids: Sequence[int], labels: Sequence[int], mask_id: int | None) -> Iterator[str]:
    """For each token: "" (not predicted), or what stands in its place: the mask, a random token, itself."""
    from llmengine.data.examples import IGNORED

    for token, label in zip(ids, labels, strict=True):
        if label == IGNORED:
            yield ""
        else:
            yield "masked" if token == mask_id else "kept" if token == label else "random"


def _sequences(batch: Step, tokenizer: Tokenizer, most: int) -> Iterator[str]:
    micro = batch.micro_batches[0]
    bounds = micro["cu_seqlens"].tolist()
    if most and not _next_token(micro):
        yield "  below: truth→[MASK], truth→random token, =kept (predicted, but left as it is)"
    for i, (start, end) in enumerate(islice(pairwise(bounds), most)):
        kind = ""
        if "next_sentence_label" in micro:
            kind = ", the second segment " + ("is random", "follows")[micro["next_sentence_label"][i] == 0]
        yield f"\nsequence {i}: {end - start} tokens{kind}"
        yield from _lines(list(_tokens(micro, start, end, tokenizer)))


def _tokens(micro: dict[str, Any], start: int, end: int, tokenizer: Tokenizer) -> Iterator[str]:
    ids, labels = micro["input_ids"][start:end].tolist(), micro["labels"][start:end].tolist()
    if _next_token(micro):
        yield from map(tokenizer.token, ids)
        return
    for token, label, kind in zip(ids, labels, _kinds(ids, labels, tokenizer.mask_id), strict=True):
        written = tokenizer.token(token)
        if kind == "":
            yield written
        elif kind == "kept":
            yield f"={written}"
        else:
            yield f"{tokenizer.token(label)}→{written}"


def _lines(words: list[str], width: int = 110) -> Iterator[str]:
    line = " "
    for word in words:
        if len(line) + 1 + len(word) > width:
            yield line
            line = " "
        line += f" {word}"
    yield line
