"""Checks of a batch at the model's door. Values are read only where that costs no synchronisation: on CPU, eagerly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmengine.models.config import TransformerConfig
from llmengine.models.layout import IGNORED, Layout, Packed, Padded, dense, unpadded

INTEGERS = (torch.int64, torch.int32)


def readable(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


@dataclass(frozen=True)
class Tokens:
    """One sequence argument of forward with what describes its shape; `side` "" or "decoder_" precedes their names."""

    input_ids: Tensor
    attention_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    side: str = ""

    def layout(self, config: TransformerConfig, *, causal: bool, padded: bool = False) -> Layout:
        """Checks what describes the batch's shape and returns its layout; `padded` asks for a Padded one."""
        ids, mask, side = self.input_ids, self.attention_mask, self.side
        _integers(f"{side}input_ids", ids)
        if ids.numel() == 0:
            raise ValueError(f"Transformer: {side}input_ids is empty, shape {tuple(ids.shape)}")
        if config.encoder_vocab_size is None or side:
            _range(f"{side}input_ids", ids, config.vocab_size, "vocab_size")
        else:
            _range("input_ids", ids, config.encoder_vocab_size, "encoder_vocab_size")
        if self.cu_seqlens is not None:
            if mask is not None:
                raise ValueError(
                    f"Transformer: give {side}attention_mask or {side}cu_seqlens, not both: packed batches have no "
                    "padding"
                )
            return self._packed(config, self.cu_seqlens, causal)
        if self.max_seqlen is not None:
            raise ValueError(f"Transformer: {side}max_seqlen belongs to {side}cu_seqlens, which was not given")
        if ids.dim() != 2:
            raise ValueError(
                f"Transformer: {side}input_ids has shape {tuple(ids.shape)}; expected (batch, length), "
                f"or (tokens,) or (1, tokens) with {side}cu_seqlens"
            )
        _length(config, ids.shape[1], f"{side}input_ids")
        if mask is None:
            return Padded(torch.ones_like(ids), causal) if padded else dense(ids.shape, ids.device, causal)
        self.check_mask(mask)
        return Padded(mask, causal) if padded else unpadded(mask, causal)

    def must_stay_padded(self, config: TransformerConfig) -> bool:
        """Whether tokens cannot be taken out of the batch: shapes must not follow data, or distances would change."""
        mask = self.attention_mask
        if mask is None or torch.compiler.is_compiling():
            return mask is not None
        return config.counts_distances and isinstance(mask, Tensor) and readable(mask) and _has_holes(mask)

    def _packed(self, config: TransformerConfig, cu_seqlens: Tensor, causal: bool) -> Packed:
        ids, side, max_seqlen = self.input_ids, self.side, self.max_seqlen
        if ids.dim() > 2 or (ids.dim() == 2 and ids.shape[0] != 1):
            raise ValueError(
                f"Transformer: {side}input_ids has shape {tuple(ids.shape)}; with {side}cu_seqlens: (tokens,) or "
                "(1, tokens)"
            )
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
            given = (
                f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}" if isinstance(cu_seqlens, Tensor) else type(cu_seqlens)
            )
            raise ValueError(f"Transformer: {side}cu_seqlens must be an int32 tensor (sequences + 1,), got {given}")
        if len(cu_seqlens) < 2:
            raise ValueError(
                f"Transformer: {side}cu_seqlens holds no sequence; expected its starts and the end of the last one"
            )
        tokens = ids.numel()
        if torch.compiler.is_compiling():
            return Packed(ids.shape, cu_seqlens, tokens if max_seqlen is None else max_seqlen, causal)
        longest = int(cu_seqlens.diff().max()) if max_seqlen is None or readable(cu_seqlens) else max_seqlen
        if readable(cu_seqlens):
            first, last, shortest = int(cu_seqlens[0]), int(cu_seqlens[-1]), int(cu_seqlens.diff().min())
            if first != 0 or last != tokens or shortest < 1:
                raise ValueError(
                    f"Transformer: {side}cu_seqlens must rise from 0 to the number of tokens ({tokens}); "
                    f"it starts at {first}, ends at {last}, and its smallest step is {shortest}"
                )
            if max_seqlen is not None and longest > max_seqlen:
                raise ValueError(
                    f"Transformer: {side}max_seqlen is {max_seqlen}, but {side}cu_seqlens has a sequence of {longest}"
                )
        _length(config, longest, f"{side}cu_seqlens")
        return Packed(ids.shape, cu_seqlens, longest, causal)

    def check_mask(self, mask: Tensor) -> None:
        ids, side = self.input_ids, self.side
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"Transformer: {side}attention_mask is {given}; expected {tuple(ids.shape)} of 0 and 1")
        if mask.device != ids.device:
            raise ValueError(f"Transformer: {side}attention_mask is on {mask.device}, {side}input_ids on {ids.device}")
        if not readable(mask):
            return
        if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
            wrong = mask[(mask != 0) & (mask != 1)][0].item()
            raise ValueError(f"Transformer: {side}attention_mask must hold 0 (padding) and 1 only, got {wrong}")
        empty = (~mask.bool().any(1)).nonzero()
        if len(empty):
            raise ValueError(
                f"Transformer: {side}attention_mask has no token in row {int(empty[0])}; leave empty rows out"
            )


def layouts_of(config: TransformerConfig, *sides: Tokens) -> list[Layout]:
    """The layouts of the one sequence argument, or of the encoder's and the decoder's, which then knows the former."""
    padded = any(tokens.must_stay_padded(config) for tokens in sides)
    if config.architecture != "encoder_decoder":
        return [sides[0].layout(config, causal=config.causal, padded=padded)]
    source, target = (tokens.layout(config, causal=bool(tokens.side), padded=padded) for tokens in sides)
    if source.sequences != target.sequences:
        raise ValueError(
            f"Transformer: {source.sequences} sequences for the encoder but {target.sequences} for the decoder"
        )
    target.memory = source  # type: ignore[assignment]  # both are packed, or both padded
    return [source, target]


def check_like(name: str, x: Tensor | None, input_ids: Tensor, below: int, limit: str, *, label: bool = False) -> None:
    """A tensor of ids (or labels: IGNORED too) beside input_ids."""
    if x is None:
        return
    _integers(name, x)
    if x.shape != input_ids.shape:
        raise ValueError(
            f"Transformer: {name} has shape {tuple(x.shape)}; expected that of input_ids, {tuple(input_ids.shape)}"
        )
    if x.device != input_ids.device:
        raise ValueError(f"Transformer: {name} is on {x.device} but input_ids on {input_ids.device}")
    _range(name, x, below, limit, label=label)


def positions_of(config: TransformerConfig, layout: Layout, input_ids: Tensor, given: Tensor | None) -> Tensor:
    """Each token's position, as it is given or as the layout has it."""
    if given is None:
        return layout.positions(config.position_of == "token")
    if given.shape == (1, input_ids.shape[-1]):
        given = given.expand(input_ids.shape)
    most = 2**31 if config.max_positions is None else config.max_positions
    check_like("position_ids", given, input_ids, most, "max_positions")
    return layout.enter(given)


def check_labels(
    objective: str, labels: Tensor, input_ids: Tensor, sequences: int, config: TransformerConfig
) -> Tensor:
    """One objective's labels, in the shape that its head wants."""
    name = {"nsp": "next_sentence_label", "sop": "sentence_order_label", "qa": "start_positions"}.get(
        objective, "labels"
    )
    if objective in ("mlm", "clm", "seq2seq", "plm"):
        check_like(name, labels, input_ids, config.vocab_size, "vocab_size", label=True)
    elif objective == "rtd":
        check_like(name, labels, input_ids, 2, "number of classes", label=True)
    elif objective == "tagging":
        check_like(name, labels, input_ids, config.n_labels, "n_labels", label=True)
    elif objective == "classification" and config.problem != "single":
        _numbers(name, labels, sequences, config)
    elif objective == "qa":
        if tuple(labels.shape) != (sequences, 2):
            raise ValueError(f"Transformer: start_positions and end_positions must be ({sequences},) each")
    else:
        classes = config.n_labels if objective == "classification" else 2
        if objective == "choice":
            sequences, classes = labels.numel(), sequences  # check_choices knows how many each question has
        labels = _sequence_labels(name, labels, sequences, classes)
    return labels


def check_choices(choices: Tensor | None, labels: object, questions: int, sequences: int) -> None:
    """That a batch's sequences are the questions' choices, and that each label is one of its question's."""
    if choices is None:
        if sequences % max(questions, 1):
            raise ValueError(
                f"Transformer: {sequences} sequences are not equally many choices for {questions} questions; give "
                "choices"
            )
        counts = [sequences // max(questions, 1)] * questions
    else:
        _integers("choices", choices)
        if choices.dim() != 1:
            raise ValueError(f"Transformer: choices has shape {tuple(choices.shape)}; expected (questions,)")
        if not readable(choices):
            return
        counts = choices.tolist()
        if sum(counts) != sequences or min(counts, default=0) < 1:
            raise ValueError(
                f"Transformer: choices are {counts}; expected 1 or more each, together {sequences}, the sequences"
            )
    if not isinstance(labels, Tensor) or not readable(labels):
        return
    if labels.numel() != questions:
        raise ValueError(
            f"Transformer: labels has shape {tuple(labels.shape)}; expected ({questions},), one per question"
        )
    for question, (label, count) in enumerate(zip(labels.flatten().tolist(), counts, strict=True)):
        if label >= count:
            raise ValueError(f"Transformer: labels holds {label} for question {question}, which has {count} choices")


def _sequence_labels(name: str, x: Tensor, sequences: int, classes: int) -> Tensor:
    """Labels of whole sequences, (sequences,) or (sequences, 1), flattened."""
    _integers(name, x)
    if tuple(x.shape) not in ((sequences,), (sequences, 1)):
        raise ValueError(f"Transformer: {name} has shape {tuple(x.shape)}; expected ({sequences},), one per sequence")
    _range(name, x, classes, "number of classes", label=True)
    return x.flatten()


def _numbers(name: str, x: Tensor, sequences: int, config: TransformerConfig) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"Transformer: {name} must be a torch.Tensor, got {type(x).__name__}")
    shapes = [(sequences, config.n_labels)] + ([(sequences,)] if config.n_labels == 1 else [])
    if tuple(x.shape) not in shapes:
        raise ValueError(
            f'Transformer: {name} has shape {tuple(x.shape)}; problem "{config.problem}" expects {shapes[0]}, numbers'
        )
    if config.problem == "multi" and readable(x) and not ((x == 0) | (x == 1)).all():
        raise ValueError(f'Transformer: {name} must hold 0 and 1 only where problem is "multi"')


def target_of(
    source: Tokens, labels: Tensor | None, config: TransformerConfig, mask: Tensor | None, cu_seqlens: Tensor | None,
    max_seqlen: int | None, side: str,
) -> Tokens:  # fmt: skip
    """A decoder's input where none was given: the labels, or for a classifier the source, shifted right."""
    if labels is None and config.token_task is None and config.encoder_vocab_size is None:
        ids, bounds = source.input_ids, source.cu_seqlens
        if bounds is not None:
            return Tokens(shift_packed(ids, config, bounds), None, bounds, source.max_seqlen, side)
        if source.attention_mask is not None:
            source.check_mask(source.attention_mask)
        return Tokens(shift_right(ids, config, source.attention_mask), source.attention_mask, side=side)
    if isinstance(labels, Tensor) and cu_seqlens is not None:
        return Tokens(shift_packed(labels, config, cu_seqlens), mask, cu_seqlens, max_seqlen, side)
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        raise ValueError(
            "Transformer: an encoder-decoder needs decoder_input_ids, or labels (batch, length), or labels (tokens,) "
            "with decoder_cu_seqlens"
        )
    return Tokens(shift_right(labels, config), mask, None, max_seqlen, side)


def shift_right(labels: Tensor, config: TransformerConfig, attention_mask: Tensor | None = None) -> Tensor:
    """A decoder's input for these targets (batch, length): decoder_start_token_id, or the target's last token, and then
    the target without its last place; padding on the left stays there. IGNORED becomes padding."""
    tokens = _without_ignored(labels, config)
    if attention_mask is None:
        begins = tokens.new_zeros(len(tokens), 1, dtype=torch.int64)
        ends = (tokens != (config.pad_token_id or 0)).sum(1, keepdim=True) - 1
    else:
        real = attention_mask.int()
        begins = real.argmax(1, keepdim=True)
        ends = real.shape[1] - 1 - real.flip(1).argmax(1, keepdim=True)
    if config.decoder_start_token_id is not None:
        first = tokens.new_full(begins.shape, config.decoder_start_token_id)
    else:
        first = tokens.gather(1, ends.clamp(min=0))
    return tokens.roll(1, 1).scatter(1, begins, first)


def shift_packed(labels: Tensor, config: TransformerConfig, cu_seqlens: Tensor) -> Tensor:
    """`shift_right` of a packed batch, (tokens,) or (1, tokens): each sequence on its own."""
    tokens = _without_ignored(labels.flatten(), config)
    # what cu_seqlens may be is checked with the input that this gives: until then no place is outside
    starts, ends = (places.long().remainder(max(len(tokens), 1)) for places in (cu_seqlens[:-1], cu_seqlens[1:] - 1))
    first = tokens[ends] if config.decoder_start_token_id is None else config.decoder_start_token_id
    shifted = tokens.roll(1)
    shifted[starts] = first
    return shifted.view(labels.shape)


def _without_ignored(labels: Tensor, config: TransformerConfig) -> Tensor:
    return torch.where(labels == IGNORED, config.pad_token_id or 0, labels)


def denominators(num_items_in_batch: Tensor | int | dict | None, counted: dict[str, str]) -> dict[str, Tensor | int]:
    """num_items_in_batch as {"tokens": n, "sequences": m}; empty: each loss is the mean over its own labels.

    counted: what each objective that has labels counts.
    """
    if num_items_in_batch is None:
        return {}
    needed = set(counted.values())
    if isinstance(num_items_in_batch, dict):
        if missing := needed - set(num_items_in_batch):
            raise ValueError(f"Transformer: num_items_in_batch lacks {sorted(missing)}, which {sorted(counted)} need")
        return num_items_in_batch
    if len(needed) > 1:
        raise ValueError(
            'Transformer: num_items_in_batch must be a dict {"tokens": labelled tokens, "sequences": labelled pairs} '
            f"where losses count different things: {sorted(counted)}"
        )
    return {"tokens": num_items_in_batch, "sequences": num_items_in_batch}


def _has_holes(mask: Tensor) -> bool:
    """Whether padding lies between the tokens of a row."""
    real = mask.bool()
    starts = real[:, 1:] & ~real[:, :-1]
    return bool((starts.sum(1) + real[:, 0] > 1).any())


def _integers(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"Transformer: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in INTEGERS:
        raise ValueError(f"Transformer: {name} has dtype {x.dtype}; allowed: int64, int32")


def _range(name: str, x: Tensor, below: int, limit: str, *, label: bool = False) -> None:
    if not readable(x) or x.numel() == 0:
        return
    low, high = (int(bound) for bound in x.aminmax())
    if label and low < 0:
        negative = x[(x < 0) & (x != IGNORED)]
        low = int(negative.min()) if len(negative) else 0
    if low < 0 or high >= below:
        wrong = low if low < 0 else high
        also = f", or {IGNORED} for no loss" if label else ""
        raise ValueError(f"Transformer: {name} holds {wrong}; allowed: 0 to {below - 1} ({limit} {below}){also}")


def _length(config: TransformerConfig, length: int, source: str) -> None:
    if config.max_positions is not None and length > config.max_positions:
        raise ValueError(
            f"Transformer: {source} has a sequence of {length} tokens; max_positions is {config.max_positions}"
        )
