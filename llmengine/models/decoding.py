"""What may come next: rules on logits, with Hugging Face's signature (ids so far, logits) -> logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Processor = Callable[[Tensor, Tensor], Tensor]
"""(rows, tokens so far) ids and (rows, vocab_size) logits -> logits."""


def processors_of(
    repetition_penalty: float, no_repeat_ngram_size: int, min_new_tokens: int, prompt: int, eos: Sequence[int],
    mask: Tensor | None = None, never: Sequence[int] = (),
) -> list[Processor]:  # fmt: skip
    """The rules that generate's options ask for. prompt: columns that are not new. mask (prompts, prompt): 0 where a
    prompt has padding. never: tokens that do not come."""
    found: list[Processor] = []
    if repetition_penalty != 1.0:
        found.append(lambda ids, scores: penalise_repetition(_but_padding(ids, mask), scores, repetition_penalty))
    if no_repeat_ngram_size:
        found.append(lambda ids, scores: forbid_repeated_ngrams(ids, scores, no_repeat_ngram_size))
    if min_new_tokens and eos:

        def not_yet(ids: Tensor, scores: Tensor) -> Tensor:
            if ids.shape[1] - prompt >= min_new_tokens:
                return scores
            return _without(scores, eos)

        found.append(not_yet)
    if never:
        found.append(lambda ids, scores: _without(scores, never))
    return found


def _without(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    return scores.index_fill(1, torch.tensor(list(tokens), device=scores.device), -torch.inf)


def penalise_repetition(ids: Tensor, scores: Tensor, penalty: float) -> Tensor:
    """Logits of tokens that have been: divided by the penalty where above 0, else multiplied (Keskar et al. 2019).
    An id below 0 is no token."""
    vocab = scores.shape[1]
    been = torch.zeros(len(scores), vocab + 1, dtype=torch.bool, device=scores.device)
    been = been.scatter(1, torch.where(ids < 0, vocab, ids), True)[:, :vocab]
    return torch.where(been, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _but_padding(ids: Tensor, mask: Tensor | None) -> Tensor:
    """The ids of rows, as many for each prompt, with -1 at the prompt's padding."""
    if mask is None:
        return ids
    real = mask.bool().repeat_interleave(len(ids) // len(mask), 0)
    return torch.where(torch.nn.functional.pad(real, (0, ids.shape[1] - real.shape[1]), value=True), ids, -1)


def forbid_repeated_ngrams(ids: Tensor, scores: Tensor, size: int) -> Tensor:
    """No n-gram of this size comes twice (Paulus et al. 2017)."""
    if ids.shape[1] < size:
        return scores
    grams = ids.unfold(1, size, 1)  # (rows, places, size)
    begun = ids[:, ids.shape[1] - size + 1 :]
    repeats = (grams[:, :, :-1] == begun[:, None, :]).all(2)
    rows, places = repeats.nonzero(as_tuple=True)
    scores = scores.clone()
    scores[rows, grams[rows, places, -1]] = -torch.inf
    return scores


def greedy(scores: Tensor) -> Tensor:
    return scores.argmax(-1)


def sampler(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    generator: torch.Generator | None,
) -> Callable[[Tensor], Tensor]:
    def choose(scores: Tensor) -> Tensor:
        # below 1e-30 logits would be infinite, and it is greedy already
        probabilities = restrict(scores / max(temperature, 1e-30), top_k, top_p, min_p).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)

    return choose


def restrict(scores: Tensor, top_k: int | None, top_p: float | None, min_p: float | None = None) -> Tensor:
    """Scores (batch, vocab) with -inf outside the top_k best, the smallest set of probability top_p, and the tokens
    at least min_p times as probable as the best one (Nguyen et al. 2024)."""
    if top_k is not None:
        least = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ordered, order = scores.sort(descending=True)
        probabilities = ordered.softmax(-1)
        # a token stays if those before it do not make up top_p yet: the first always stays
        out = probabilities.cumsum(-1) - probabilities >= top_p
        scores = scores.masked_fill(out.scatter(1, order, out), -torch.inf)
    if min_p is not None:
        probabilities = scores.softmax(-1)
        scores = scores.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
    return scores


class Hypotheses:
    """The best finished sequences of one prompt, by log-probability over length to the power of `length_penalty`.

    Once closed it takes no more: what a prompt gives must not depend on how long the others of its batch go on.
    """

    def __init__(self, most: int, length_penalty: float = 1.0, early_stopping: bool = False) -> None:
        self.most = most
        self.length_penalty = length_penalty
        self.early_stopping = early_stopping
        self.kept: list[tuple[float, list[int]]] = []
        self.closed = False

    def add(self, log_probability: float, tokens: list[int]) -> None:
        if not self.closed:
            score = log_probability / len(tokens) ** self.length_penalty
            self.kept = sorted([*self.kept, (score, tokens)], reverse=True)[: self.most]

    def close_if_complete(self, best_running: float, length: int) -> None:
        """Closes where no running beam, at its present score, would be kept; with early stopping once enough are."""
        if len(self.kept) == self.most:
            self.closed |= self.early_stopping or self.kept[-1][0] >= best_running / length**self.length_penalty
