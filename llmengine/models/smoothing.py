"""Label smoothing (Szegedy et al. 2016), in the three conventions that toolkits train with.

With e = label_smoothing, V classes and n_c = -log p(c), a token of class y has the loss
    torch      (1 - e) n_y + e / V sum_c n_c            PyTorch, Hugging Face, Eole: e is spread over all classes
    fairseq    (1 - e) n_y + e / (V - 1) sum_{c != y} n_c        over the others
    opennmt    sum_c q_c (log q_c + n_c), with q_y = 1 - e, q_pad = 0 and e / (V - 2) elsewhere      over the others but
               padding, as a Kullback-Leibler divergence (OpenNMT-py 1 and 2)
All three come from the first, which the fused operators know. With v the weight of a class that is not y:
    fairseq    v = e / (V - 1): (1 - V v) n_y + v sum_c n_c, so it is torch's of V v;
    opennmt    v = e / (V - 2): the same, without v (n_pad - n_y), which the logits z give as v (z_pad - z_y), and with
               the constant (1 - e) log(1 - e) + e log v.
So nothing but two logits of each labelled token is ever formed beside the fused loss.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmengine.models.layout import IGNORED

if TYPE_CHECKING:
    from llmengine.models.config import TransformerConfig

# how many classes each convention gives nothing: none; the label; the label and padding
LEFT_OUT = {"torch": 0, "fairseq": 1, "opennmt": 2}


class Smoothing:
    """What a config's label_smoothing and smoothing do to a loss. Only while a model trains: eval() measures n_y."""

    def __init__(self, config: TransformerConfig) -> None:
        self.epsilon = config.label_smoothing
        self.convention = config.smoothing
        self.pad = config.pad_token_id if self.epsilon and self.convention == "opennmt" else None

    def spread(self, classes: int) -> float:
        """The label_smoothing of `functional.cross_entropy` that gives this convention's, but for `remainder`."""
        return self.epsilon * classes / (classes - LEFT_OUT[self.convention]) if self.epsilon else 0.0

    def labels(self, labels: Tensor) -> Tensor:
        """Without those that have no loss in this convention: opennmt's padding."""
        return labels if self.pad is None else labels.masked_fill(labels == self.pad, IGNORED)

    def remainder(self, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float) -> Tensor:
        """(): what opennmt's sum over labels (tokens,) is beyond torch's, for a linear layer of x (tokens, d)."""
        assert self.pad is not None
        labelled = labels != IGNORED
        classes = torch.where(labelled, labels, 0)
        share = self.epsilon / (len(weight) - 2)

        def logits(rows: Tensor, shifts: Tensor | None) -> Tensor:
            """Of one class each, summed in float32 at least."""
            z = (_wide(x) * _wide(rows)).sum(-1)
            z = z if shifts is None else z + _wide(shifts)
            return softcap * torch.tanh(z / softcap) if softcap else z

        of_pad = logits(weight[self.pad], None if bias is None else bias[self.pad])
        of_label = logits(weight.index_select(0, classes), None if bias is None else bias.index_select(0, classes))
        constant = (1 - self.epsilon) * math.log(1 - self.epsilon) + self.epsilon * math.log(share)
        return torch.where(labelled, share * (of_pad - of_label) + constant, 0.0).sum()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def check_smoothing(config: TransformerConfig) -> None:
    """ValueError where a config's label_smoothing does not go with its other fields."""
    if not config.label_smoothing:
        return
    several = "classification" in config.objectives and config.problem != "single"
    if config.crf or several:
        raise ValueError(
            'label_smoothing is for one class each: neither for crf nor for problem "multi" or "regression"'
        )
    counts = {"vocab_size": config.vocab_size} if config.token_task else {}
    if {"classification", "tagging"} & set(config.objectives):
        counts["n_labels"] = config.n_labels
    if config.smoothing == "opennmt":
        _check_padding(config, "n_labels" in counts)
    for name, count in counts.items():
        most = 1 - LEFT_OUT[config.smoothing] / count
        if config.label_smoothing > most:
            raise ValueError(f"label_smoothing is {config.label_smoothing}; with {name} {count} at most {most:.4g}")


def _check_padding(config: TransformerConfig, classifies: bool) -> None:
    if classifies:
        raise ValueError('smoothing "opennmt" is for the token head; "classification" and "tagging" have no padding')
    pad, eos = config.pad_token_id, config.eos_token_id
    if pad is None:
        raise ValueError('smoothing "opennmt" needs pad_token_id')
    if pad in (eos if isinstance(eos, tuple) else (eos,)):
        raise ValueError(f'smoothing "opennmt" never trains pad_token_id, but {pad} ends texts too')
