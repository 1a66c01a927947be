"""Texts beside reference texts: chrF (Popović 2015), BLEU (Papineni et al. 2002), exact matches and lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmengine.metrics.characters import HAN, KANA
from llmengine.metrics.score import Judgement, Table, check_paired, intervals, ratio

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEUScore

CHARACTERS, BETA = 6, 2  # chrF2: n-grams of up to six characters, recall counts twice as much as precision
WORDS = 4  # BLEU's longest n-grams


def texts(hypotheses: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]]) -> Judgement:
    """chrf (the main score) and bleu, from 0 to 100 as sacreBLEU gives them; exact_match; length_ratio.

    references: one text of each row, or several, of which the most fitting counts. chrf is the main score as it needs
    no words, hence no tokenizer, and tells poor texts apart, where BLEU is near 0. BLEU's words are those of
    sacreBLEU's "13a", or its "zh" where most rows' references hold Chinese characters, or "char" where they
    hold kana; the table names which. exact_match takes white space as equal. length_ratio: words by words of the
    references that are nearest in length.
    """
    check_paired("texts", hypotheses=hypotheses, references=references)
    rows = [[row] if isinstance(row, str) else list(row) for row in references]
    if [] in rows:
        raise ValueError(f"texts: row {rows.index([]) + 1} has no reference")
    tokenizer = _tokenizer(rows)
    bleu_counts = _BleuCounts(tokenizer)
    counts = np.array(
        [
            [*_chrf_counts(text, row), *bleu_counts(text, row), _among(text, row), 1]
            for text, row in zip(hypotheses, rows, strict=True)
        ],
        np.float64,
    ).reshape(-1, 3 * CHARACTERS + 2 * WORDS + 4)
    bleu = slice(3 * CHARACTERS, -2)
    scores = intervals(
        counts,
        {
            "chrf": lambda sums: _chrf(sums[..., : 3 * CHARACTERS]),
            "bleu": lambda sums: _bleu(sums[..., bleu]),
            "exact_match": lambda sums: sums[..., -2] / sums[..., -1],
            "length_ratio": lambda sums: ratio(sums[..., -4], sums[..., -3]),
        },
    )
    return Judgement(scores, "chrf", len(rows), tables=(_bleu_table(counts[:, bleu].sum(0), tokenizer),))


def _among(text: str, references: Sequence[str]) -> bool:
    return text.split() in [reference.split() for reference in references]


# ---- chrF ------------------------------------------------------------------------------------------------------------


def chrf(text: str, references: Sequence[str]) -> float:
    """Of one row."""
    return float(_chrf(_chrf_counts(text, references)))


def _chrf_counts(text: str, references: Sequence[str]) -> np.ndarray:
    """(18,): n-grams of the text, of the reference and of both, for n = 1 … 6; of the reference with the best chrF."""
    given = _character_ngrams(text)
    counts = np.array([_shared(given, _character_ngrams(reference)) for reference in references], np.float64)
    return counts[int(_chrf(counts).argmax())]


def _shared(given: list[Counter[str]], right: list[Counter[str]]) -> list[int]:
    """An order whose n-grams the reference is too short for is not held against the text."""
    found = []
    for a, b in zip(given, right, strict=True):
        found += [a.total() if b else 0, b.total(), (a & b).total()]
    return found


def _character_ngrams(text: str) -> list[Counter[str]]:
    text = "".join(text.split())
    return [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for n in range(1, CHARACTERS + 1)]


def _chrf(sums: np.ndarray) -> np.ndarray:
    """sums (…, 18) -> (…,): F of the mean precision and recall over the orders that both have, in percent."""
    given, right, both = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    orders = ((given > 0) & (right > 0)).sum(-1)
    precision, recall = (ratio(ratio(both, whole).sum(-1), orders) for whole in (given, right))
    return 100 * ratio((1 + BETA**2) * precision * recall, BETA**2 * precision + recall)


# ---- BLEU ------------------------------------------------------------------------------------------------------------


def _tokenizer(rows: Sequence[Sequence[str]]) -> str:
    for script, name in ((KANA, "char"), (HAN, "zh")):
        if 2 * sum(any(script.search(text) for text in row) for row in rows) > len(rows):
            return name
    return "13a"


class _BleuCounts:
    """(10,): right n-grams for n = 1 … 4, n-grams for n = 1 … 4, words, and words of the nearest reference."""

    def __init__(self, tokenizer: str) -> None:
        from sacrebleu.metrics.bleu import BLEU

        # the counts do not depend on effective_order, which only silences advice on scores of sentences
        self._metric = BLEU(tokenize=tokenizer, effective_order=True)

    def __call__(self, text: str, references: Sequence[str]) -> list[int]:
        score = self._metric.sentence_score(text, references)
        return [*score.counts, *score.totals, score.sys_len, score.ref_len]


def _bleu(sums: np.ndarray) -> np.ndarray:
    """sums (…, 10) -> (…,)."""
    flat = sums.reshape(-1, sums.shape[-1])
    return np.array([_bleu_score(row).score for row in flat]).reshape(sums.shape[:-1])


def _bleu_score(sums: np.ndarray) -> BLEUScore:
    from sacrebleu.metrics.bleu import BLEU

    right, given = (list(map(int, sums[n : n + WORDS])) for n in (0, WORDS))
    return BLEU.compute_bleu(right, given, int(sums[-2]), int(sums[-1]), smooth_method="exp")


def _bleu_table(sums: np.ndarray, tokenizer: str) -> Table:
    score = _bleu_score(sums)
    columns = (
        "tokens",
        *(f"{n}-grams right, %" for n in range(1, WORDS + 1)),
        "brevity penalty",
        "words",
        "of references",
    )
    return Table("BLEU", columns, ((tokenizer, *score.precisions, score.bp, score.sys_len, score.ref_len),))
