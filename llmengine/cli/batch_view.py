"""A batch as text: what is hidden, what is predicted, and who sees what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmengine.data import Step, Tokenizer

PAIRS = {"next_sentence_label": ("follows", "is random"), "sentence_order_label": ("follows", "precedes the first")}


def counts(batch: Step, tokenizer: Tokenizer) -> Iterator[str]:
    """How many tokens are predicted and what stands in their places; how many pairs are of which kind."""
    first = batch.micro_batches[0]
    tokens = sum(len(micro["input_ids"]) for micro in batch.micro_batches)
    predicted = batch.items["tokens"]
    if "decoder_input_ids" in first:
        yield f"  predicted: every token of the targets, {predicted:,}; the sources have {tokens:,}"
    elif "query_ranks" in first:
        yield f"  predicted: {predicted:,} of {tokens:,} tokens ({100 * predicted / tokens:.1f} %), in a random order"
    elif _next_token(first):
        yield f"  predicted: every token but the first of each sequence, {predicted:,} of {tokens:,}"
    else:
        yield f"  predicted: {_masked(batch, tokens, tokenizer)}"
    for name in PAIRS.keys() & first.keys():
        labels = [label for micro in batch.micro_batches for label in micro[name].tolist()]
        other = "random" if name == "next_sentence_label" else "swapped"
        yield f"  pairs: {labels.count(0)} follow (label 0), {labels.count(1)} {other} (label 1)"


def sequences(batch: Step, tokenizer: Tokenizer, most: int) -> Iterator[str]:
    """The first few sequences, and before them how to read them."""
    micro = batch.micro_batches[0]
    if most and (legend := _legend(micro)):
        yield f"  below: {legend}"
    for i, (start, end) in enumerate(islice(pairwise(micro["cu_seqlens"].tolist()), most)):
        yield f"\nsequence {i}: {end - start} tokens{_kind(micro, i)}"
        if "decoder_input_ids" in micro:
            first, last = micro["decoder_cu_seqlens"][i : i + 2].tolist()
            for name, ids in (
                ("the encoder reads", micro["input_ids"][start:end]),
                ("the decoder reads", micro["decoder_input_ids"][first:last]),
                ("and is to write", micro["labels"][first:last]),
            ):
                yield f" {name}"
                yield from _lines(map(tokenizer.token, ids.tolist()))
        else:
            yield from _lines(_tokens(micro, start, end, tokenizer))


def _legend(micro: dict[str, Any]) -> str:
    if "decoder_input_ids" in micro:
        return "each token to be written is seen by none; the decoder sees all that the encoder reads, and its own past"
    if "query_ranks" in micro:
        return (
            "3→token is the third to be predicted: it sees the text without numbers and the tokens with lower ones; "
            "(3)token is seen by higher numbers only; ·token is text of a second part, which the first does not see"
        )
    if _next_token(micro):
        return ""
    return "truth→[MASK], truth→random token, =kept (predicted, but left as it is)"


def _kind(micro: dict[str, Any], i: int) -> str:
    if "decoder_cu_seqlens" in micro:
        return f" and {int(micro['decoder_cu_seqlens'].diff()[i])} of the target"
    if "position_ids" in micro:
        positions = micro["position_ids"][slice(*micro["cu_seqlens"][i : i + 2].tolist())]
        return f", the translation, whose positions begin anew, from token {int((positions == 0).nonzero()[-1])} on"
    return "".join(
        f", the second segment {kinds[int(micro[name][i])]}" for name, kinds in PAIRS.items() if name in micro
    )


def _next_token(micro: dict[str, Any]) -> bool:
    return micro["labels"].shape == micro["input_ids"].shape and bool((micro["labels"] == micro["input_ids"]).all())


def _masked(batch: Step, tokens: int, tokenizer: Tokenizer) -> str:
    kinds: Counter[str] = Counter()
    for micro in batch.micro_batches:
        kinds.update(_kinds(micro["input_ids"].tolist(), micro["labels"].tolist(), tokenizer.mask_id))
    predicted = sum(kinds[kind] for kind in ("masked", "random", "kept"))
    shares = ", ".join(
        f"{kinds[kind]:,} {kind} ({100 * kinds[kind] / max(predicted, 1):.1f} %)"
        for kind in ("masked", "random", "kept")
    )
    return f"{predicted:,} of {tokens:,} tokens ({100 * predicted / tokens:.1f} %): {shares}"


def _kinds(ids: Sequence[int], labels: Sequence[int], mask_id: int | None) -> Iterator[str]:
    """For each token: "" (not predicted), or what stands in its place: the mask, a random token, itself."""
    from llmengine.data.examples import IGNORED

    for token, label in zip(ids, labels, strict=True):
        if label == IGNORED:
            yield ""
        else:
            yield "masked" if token == mask_id else "kept" if token == label else "random"


def _tokens(micro: dict[str, Any], start: int, end: int, tokenizer: Tokenizer) -> Iterator[str]:
    ids = micro["input_ids"][start:end].tolist()
    if "query_ranks" in micro:
        yield from _in_order(micro, start, end, map(tokenizer.token, ids))
        return
    labels = micro["labels"][start:end].tolist()
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


def _in_order(micro: dict[str, Any], start: int, end: int, written: Iterator[str]) -> Iterator[str]:
    """Tokens with their number in the order of those that not all see; without one where several share a rank."""
    keys = micro["key_ranks"][start:end].tolist()
    shared = {rank for rank, count in Counter(keys).items() if count > 1 and rank >= 0}
    numbers = {rank: i + 1 for i, rank in enumerate(sorted({*keys} - shared - {-1}))}
    predicted = set(micro["target_positions"].tolist())
    for i, (token, rank) in enumerate(zip(written, keys, strict=True)):
        if rank < 0:
            yield token
        elif rank in shared:
            yield f"·{token}"
        else:
            yield f"{numbers[rank]}→{token}" if start + i in predicted else f"({numbers[rank]}){token}"


def _lines(words: Iterator[str], width: int = 110) -> Iterator[str]:
    line = " "
    for word in words:
        if len(line) + 1 + len(word) > width:
            yield line
            line = " "
        line += f" {word}"
    yield line
