"""Learning from preferences: a decoder learns to find the chosen of two answers more probable than the rejected one.

With log pi(y) the sum of the log-probabilities of an answer's n_y tokens after its prompt, c the chosen answer, r the
rejected one, and ref the model as it was before, the loss of a pair is
    dpo    -(1 - e) log sigmoid(m) - e log sigmoid(-m), m = beta (log pi(c) / ref(c) - log pi(r) / ref(r))
           (Rafailov et al. 2023, eq. 7; e = label_smoothing, the share of pairs whose labels are wrong: Mitchell 2023)
    ipo    (m / beta - 1 / (2 beta))^2, the same m (Azar et al. 2023, eq. 17, with tau = beta)
    orpo   -log p(c) - beta log sigmoid(m), m = log odds(c) - log odds(r), where log p(y) = log pi(y) / n_y and
           odds = p / (1 - p) (Hong et al. 2024, eq. 6 and 7, lambda = beta); no ref
    simpo  -log sigmoid(m - gamma), m = beta (log p(c) - log p(r)) (Meng et al. 2024, eq. 6); no ref
and m, the margin, says which answer a model prefers. The loss of a batch is the mean over its pairs.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, Module

from llmengine.models import Transformer, TransformerConfig
from llmengine.models.output import TransformerOutput
from llmengine.objectives.likelihood import log_likelihoods

LOSSES = ("dpo", "ipo", "orpo", "simpo")
WITH_REFERENCE = ("dpo", "ipo")
BETAS = {"dpo": 0.1, "ipo": 0.1, "orpo": 0.1, "simpo": 2.0}
_log_sigmoid = torch.nn.functional.logsigmoid


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """loss: "dpo", "ipo", "orpo" or "simpo". beta: None: 0.1, for simpo 2. label_smoothing: of dpo. gamma: of simpo."""

    loss: str = "dpo"
    beta: float | None = None
    label_smoothing: float = 0.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"preference: loss {self.loss!r} is not one of {', '.join(LOSSES)}")
        if self.beta is not None and not self.beta > 0:
            raise ValueError(f"preference: beta must be above 0, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"preference: label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing and self.loss != "dpo":
            raise ValueError(f'preference: label_smoothing is for loss "dpo"; this is {self.loss!r}')

    @property
    def strength(self) -> float:
        return BETAS[self.loss] if self.beta is None else self.beta

    @property
    def needs_reference(self) -> bool:
        return self.loss in WITH_REFERENCE

    def margins(self, sums: Tensor, counts: Tensor, reference: Tensor | None = None) -> Tensor:
        """(pairs,): m. sums (pairs, 2) log pi of the chosen and the rejected answers, counts (pairs, 2) their tokens,
        reference like sums; None: without it, as if ref were uniform."""
        if self.loss in WITH_REFERENCE:
            ratios = sums if reference is None else sums - reference
            return self.strength * (ratios[:, 0] - ratios[:, 1])
        means = sums / counts
        if self.loss == "simpo":
            return self.strength * (means[:, 0] - means[:, 1])
        odds = means - _log_of_rest(means)
        return odds[:, 0] - odds[:, 1]

    def of_pairs(self, sums: Tensor, counts: Tensor, reference: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(pairs,) losses and (pairs,) margins."""
        margins, beta, e = self.margins(sums, counts, reference), self.strength, self.label_smoothing
        if self.loss == "dpo":
            losses = -(1 - e) * _log_sigmoid(margins) - e * _log_sigmoid(-margins)
        elif self.loss == "ipo":
            losses = (margins / beta - 1 / (2 * beta)).square()
        elif self.loss == "orpo":
            losses = -sums[:, 0] / counts[:, 0] - beta * _log_sigmoid(margins)
        else:
            losses = -_log_sigmoid(margins - self.gamma)
        return losses, margins


def _log_of_rest(log_p: Tensor) -> Tensor:
    """log(1 - p); p is kept a little below 1, where its logarithm's gradient ends."""
    log_p = log_p.clamp(max=-1e-6)
    return torch.where(log_p > -0.6931, torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(log_p)))


class Preference(Module):
    """A model that learns from preferences: `policy`, beside the model that it was, which stays as it is.

    The latter is no part of state_dict() and parameters(): it is what this one is made of, and can be made again.
    """

    def __init__(self, policy: Transformer, loss: PreferenceLoss, *, passing: bool = False) -> None:
        """Makes ref, a copy of the policy, where the loss needs it. passing: it goes when training begins with batches
        that bring its log-probabilities."""
        super().__init__()
        if policy.config.token_task != "clm":
            raise ValueError(
                f"Preference: needs a decoder with objective 'clm'; this is {policy.config.architecture!r} with "
                f"{list(policy.config.objectives)}"
            )
        self.policy, self.loss, self.passing = policy, loss, passing
        # in a tuple it is no submodule
        self._kept: tuple[Transformer, ...] = ()
        if loss.needs_reference:
            self._kept = (copy.deepcopy(policy).eval().requires_grad_(False),)

    @property
    def reference(self) -> Transformer | None:
        return self._kept[0] if self._kept else None

    @property
    def config(self) -> TransformerConfig:
        return self.policy.config

    @property
    def words(self) -> Embedding:
        return self.policy.words

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes the policy."""
        self.policy.save_pretrained(directory)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Preference:
        """Moves ref along."""
        for model in self._kept:
            model._apply(function)
        return super()._apply(function, recurse)

    def forward(
        self, input_ids: Tensor, labels: Tensor, *, reference_sums: Tensor | None = None,
        num_items_in_batch: Mapping[str, Any] | None = None, **shape: Any,
    ) -> TransformerOutput:  # fmt: skip
        """A batch of 2 n sequences, prompt and answer each: the chosen one of every pair, and then the rejected one.

        input_ids (tokens,) with cu_seqlens and max_seqlen, or (2 n, length) with attention_mask; labels like input_ids,
        -100 but for answers. reference_sums (n, 2): log ref of both; None: ref is asked.
        num_items_in_batch: {"sequences": pairs of the optimizer step}; None: this batch's.

        Returns the loss, losses {"preference": loss}, and logits (n,), the margins.
        """
        sums, counts = log_likelihoods(self.policy, labels, input_ids=input_ids, **shape)
        if self.loss.needs_reference and reference_sums is None:
            reference_sums = self._reference_sums(input_ids, labels, **shape)
        elif self.passing and self.training:
            self._kept = ()
        losses, margins = self.loss.of_pairs(sums.view(-1, 2), counts.view(-1, 2), reference_sums)
        pairs = len(losses) if num_items_in_batch is None else num_items_in_batch["sequences"]
        loss = losses.sum() / pairs
        return TransformerOutput({"loss": loss, "logits": margins}, {"losses": {"preference": loss}})

    @torch.no_grad()
    def _reference_sums(self, input_ids: Tensor, labels: Tensor, **shape: Any) -> Tensor:
        if self.reference is None:
            raise ValueError(
                "Preference: the reference model is gone, as training began with batches that brought reference_sums; "
                "these do not"
            )
        return log_likelihoods(self.reference, labels, input_ids=input_ids, **shape)[0].view(-1, 2)
