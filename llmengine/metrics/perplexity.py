"""How surprised a language model is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmengine.metrics.score import Judgement, Score, check_paired, interval


def perplexity(nll: Sequence[float], tokens: Sequence[int]) -> Judgement:
    """perplexity (the main score; lower is better), exp(loss), and loss, the mean negative log-likelihood of a token.

    nll: the sum over each row's tokens, in nats. tokens: how many they are. Rows without tokens say nothing.
    """
    check_paired("perplexity", nll=nll, tokens=tokens)
    table = np.array([nll, tokens], np.float64).T
    for name, column in (("nll", table[:, 0]), ("tokens", table[:, 1])):
        if bad := np.flatnonzero(~np.isfinite(column) | (column < 0)).tolist():
            raise ValueError(
                f"perplexity: {name} of row {bad[0] + 1} is {column[bad[0]]}; expected a finite number >= 0"
            )

    told = table[table[:, 1] > 0]
    loss = interval(told, lambda sums: sums[..., 0] / sums[..., 1])
    with np.errstate(over="ignore"):  # beyond 1e308: infinite
        scores = {"perplexity": Score(*np.exp([loss.value, loss.low, loss.high]).tolist()), "loss": loss}
    return Judgement(scores, "perplexity", len(table), lower_is_better=True)
