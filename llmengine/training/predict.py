"""What a trained model says about a text: masked words, whether a sentence follows another, how a text goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmengine.data.examples import pack
from llmengine.data.tokenizer import Tokenizer
from llmengine.models import Transformer
from llmengine.models.modes import evaluating
from llmengine.objectives.electra import Electra
from llmengine.tasks.writing import continued


@dataclass(frozen=True)
class Filling:
    """candidates[m]: (token id, probability) of the m-th mask, best first. ids: the text with each mask's best one."""

    ids: list[int]
    candidates: list[list[tuple[int, float]]]


def fill(
    model: Transformer, ids: Sequence[int], mask_id: int, *, token_type_ids: Sequence[int] | None = None, top: int = 5
) -> Filling:
    """The `top` most probable tokens of every mask in ids, special tokens included in ids; each mask on its own."""
    if "mlm" not in model.config.objectives:
        raise ValueError(f'fill: needs a model with objective "mlm"; this has {list(model.config.objectives)}')
    if mask_id not in ids:
        raise ValueError("fill: the text has no mask")
    _check_length("fill", len(ids), model)
    with evaluating(model) as device:
        types = None if token_type_ids is None else torch.tensor([list(token_type_ids)], device=device)
        logits = model(torch.tensor([list(ids)], device=device), token_type_ids=types).logits[0]
    places = [i for i, token in enumerate(ids) if token == mask_id]
    probabilities, tokens = logits[places].float().softmax(-1).topk(min(top, logits.shape[-1]))
    candidates = [list(zip(*row, strict=True)) for row in zip(tokens.tolist(), probabilities.tolist(), strict=True)]
    best = dict(zip(places, (found[0][0] for found in candidates), strict=True))
    return Filling([best.get(i, token) for i, token in enumerate(ids)], candidates)


def fill_text(model: Transformer, tokenizer: Tokenizer, text: str, top: int = 5) -> Filling:
    """`fill` of a text in which masks are written as the tokenizer's mask token."""
    if tokenizer.mask_id is None or tokenizer.cls_id is None or tokenizer.sep_id is None:
        raise ValueError("fill: the tokenizer has no mask, cls and sep tokens; give a model trained to fill masks")
    ids = [tokenizer.cls_id, *tokenizer.encode(text), tokenizer.sep_id]
    if tokenizer.mask_id not in ids:
        mask = tokenizer.token(tokenizer.mask_id)
        raise ValueError(f"fill: the text has no {mask}; write it where a word is missing")
    return fill(model, ids, tokenizer.mask_id, top=top)


def follows(model: Transformer, input_ids: Tensor, token_type_ids: Tensor) -> float:
    """The probability that the second segment of a pair (tokens,) follows the first (label 0)."""
    with evaluating(model) as device:
        out = model(input_ids[None].to(device), token_type_ids=token_type_ids[None].to(device))
    (logits,) = (out.head_logits[head] for head in ("nsp", "sop") if head in out.head_logits)
    return float(logits[0].float().softmax(-1)[0])


def written(model: Transformer, example: dict[str, Tensor]) -> Tensor:
    """What an encoder-decoder writes for a packed example's input_ids, greedily, as long as its target at most."""
    longest = min(len(example["labels"]), _longest(model) - 1)
    with evaluating(model) as device:
        tokens = model.generate(example["input_ids"][None].to(device), max_new_tokens=longest)
    return tokens[0, 1:].cpu()


def guesses(model: Transformer, example: dict[str, Tensor], top: int = 5) -> list[list[tuple[int, float]]]:
    """(token id, probability), best first, of each target of a packed permutation example."""
    with evaluating(model) as device:
        arguments = {name: value.to(device) for name, value in pack([example]).items() if isinstance(value, Tensor)}
        labels = arguments.pop("labels")
        logits = model(**arguments, max_seqlen=len(example["input_ids"])).logits
    probabilities, tokens = logits.view(len(labels), -1).float().softmax(-1).topk(min(top, logits.shape[-1]))
    return [list(zip(*row, strict=True)) for row in zip(tokens.tolist(), probabilities.tolist(), strict=True)]


def suspicions(model: Electra, example: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(tokens,) the text with the generator's samples, always the same; and how probable each is not the original."""
    with evaluating(model) as device, torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        ids, labels = (example[name][None].to(device) for name in ("input_ids", "labels"))
        replaced, _ = model.replace(ids, labels, model.generator(ids).last_hidden_state)
        logits = model.discriminator(replaced).logits
    return replaced[0].cpu(), logits[0].float().sigmoid().cpu()


def continuations(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    new_tokens: int | None = None,
    begins: bool = False,
    **options: Any,
) -> list[str]:
    """Each prompt with what the model adds to it, up to its end token; `options` are those of `model.generate`.

    An encoder-decoder reads the prompt, with the special tokens that its tokenizer puts around a text, and what it
    writes is given alone. new_tokens: the most new ones of each; None: 100, or as many as the model has room for.
    begins: whether a decoder's text begins with the tokens that its tokenizer puts before one, as Llama's and Gemma's
    were trained; not as `objectives.clm` trains.
    """
    texts = [tokenizer.encode(prompt) for prompt in prompts]
    if not all(texts):
        raise ValueError("generate: the prompt is empty; give the beginning of a text")
    reads_source = model.config.architecture == "encoder_decoder"
    before = tokenizer.template().sides[0] if begins else []
    rows = [tokenizer.template().around(text).ids if reads_source else [*before, *text] for text in texts]
    longest, most = max(map(len, rows)), _longest(model) - (not reads_source)
    if longest > most:
        raise ValueError(f"generate: the prompt has {longest} tokens; the model reads {most}")
    room = _longest(model) - (1 if reads_source else longest)
    written = continued(model, rows, _ends(model, tokenizer), new_tokens or min(100, room), **options)
    return [tokenizer.decode(new if reads_source else [*row, *new]) for row, new in zip(rows, written, strict=True)]


def _ends(model: Transformer, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a text, by the tokenizer and by the model's config, which may name more."""
    eos = model.config.eos_token_id
    named = eos if isinstance(eos, tuple) else (eos,)
    return [token for token in dict.fromkeys((tokenizer.eos_id, *named)) if token is not None]


def _check_length(name: str, length: int, model: Transformer) -> None:
    if length > _longest(model):
        raise ValueError(f"{name}: the text has {length} tokens; the model reads {_longest(model)} at most")


def _longest(model: Transformer) -> int:
    """The longest sequence that a model reads."""
    return 2**31 if model.config.max_positions is None else model.config.max_positions
