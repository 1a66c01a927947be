"""Texts beside sacreBLEU."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF

from llmengine.metrics import texts
from llmengine.metrics.characters import CJK

CHINESE = (
    "床前明月光，疑是地上霜。", "举头望明月，低头思故乡。", "春眠不觉晓，处处闻啼鸟。", "夜来风雨声，花落知多少。",
)  # fmt: skip
text = st.one_of(
    st.text("ab c.,&'-9", max_size=20), st.text(max_size=12), st.sampled_from(CHINESE), st.sampled_from(["", " ", "a"])
)


def check(hypotheses: list[str], references: list[list[str]], tokenizer: str | None = None) -> None:
    """references: the same number of each row."""
    judged = texts(hypotheses, references)
    columns = [list(column) for column in zip(*references, strict=True)]
    used = judged.tables[0].rows[0][0]
    assert tokenizer is None or used == tokenizer
    bleu = BLEU(tokenize=used, force=True).corpus_score(hypotheses, columns)
    for name, expected in (("bleu", bleu.score), ("chrf", CHRF().corpus_score(hypotheses, columns).score)):
        assert judged.scores[name].value == pytest.approx(expected, abs=1e-9)
        assert not math.isnan(judged.scores[name].low + judged.scores[name].high)
    assert judged.tables[0].rows[0][1:] == pytest.approx([*bleu.precisions, bleu.bp, bleu.sys_len, bleu.ref_len])
    assert judged.scores["length_ratio"].value == pytest.approx(bleu.ratio)


@settings(max_examples=60)
@given(st.lists(st.tuples(text, st.tuples(text, text)), min_size=1, max_size=6))
def test_scores_are_sacrebleus(rows):
    check([row[0] for row in rows], [list(row[1]) for row in rows])


def test_real_text(novels):
    """Sentences with some words gone, and some swapped, beside what they were."""
    sentences = [line for novel in novels for line in novel.split("\n") if len(line.split()) > 5][:80]
    generator = np.random.default_rng(0)
    damaged = []
    for sentence in sentences:
        words = [word for word in sentence.split() if generator.random() > 0.15]
        i = int(generator.integers(len(words) - 1))
        words[i : i + 2] = words[i : i + 2][::-1]
        damaged.append(" ".join(words))
    check(damaged, [[sentence] for sentence in sentences], "13a")
    check(
        damaged, [[sentence, other] for sentence, other in zip(sentences, sentences[1:] + sentences[:1], strict=True)]
    )
    assert texts(damaged, sentences).scores["bleu"] == texts(damaged, [[s] for s in sentences]).scores["bleu"]


def test_chinese_and_japanese_are_cut_into_characters():
    check([line[:-3] for line in CHINESE], [[line] for line in CHINESE], "zh")
    check(["いろはにほへど", "散りぬる"], [["いろはにほへと"], ["散りぬるを"]], "char")
    check(["one", "two three", "春"], [["one"], ["two four"], ["春"]], "13a")  # most rows decide
    assert all(CJK.search(character) for character in "春𠀀々ひカ") and not any(map(CJK.search, ["é", "，", "한"]))


def test_the_interval_is_of_sacrebleu_on_resampled_rows():
    references = [f"the {i} small cats sat on mat number {i}" for i in range(30)]
    hypotheses = [f"the {i} cats sat on a mat {i + i % 3}" for i in range(30)]
    score = texts(hypotheses, references).scores["bleu"]
    draws, drawn = np.random.default_rng(0), []
    for _ in range(1000):
        rows = draws.integers(0, 30, 30)
        drawn.append(
            BLEU(force=True).corpus_score([hypotheses[i] for i in rows], [[references[i] for i in rows]]).score
        )
    assert (score.low, score.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=1e-9)


def test_exact_match_takes_white_space_as_equal_and_any_reference():
    judged = texts(["a  b ", "c", "d"], [["x", "a b"], ["c"], ["D"]])
    assert judged.scores["exact_match"].value == pytest.approx(2 / 3)
    assert judged.main == "chrf" and judged.rows == 3


def test_no_rows_and_empty_texts():
    judged = texts([], [])
    assert judged.rows == 0 and all(math.isnan(score.value) for score in judged.scores.values())
    silent = texts(["", ""], ["a b", "c"])
    assert {score.value for score in silent.scores.values()} == {0.0}


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="texts: row 2 has no reference"):
        texts(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="got hypotheses 1, references 2"):
        texts(["a"], ["a", "b"])
