from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmengine.data.sentences import split_sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two!  Three?\nFour", ["One.", "Two!", "Three?", "Four"]),
        ("A line\nthat is wrapped. Next", ["A line that is wrapped.", "Next"]),
        ("A heading\n\nA paragraph.", ["A heading", "A paragraph."]),
        (
            '"Is he married?" asked she. "Oh! single, my dear."',
            ['"Is he married?" asked she.', '"Oh! single, my dear."'],
        ),
        ("Mr. Bennet met Mrs. Long. J. Smith, too.", ["Mr. Bennet met Mrs. Long.", "J. Smith, too."]),
        ("It cost 3.50 in all. Really?!", ["It cost 3.50 in all.", "Really?!"]),
        ("“Gone.” He left (at last.) Then rain.", ["“Gone.”", "He left (at last.)", "Then rain."]),
        ("今天很好。“走吧！”他说。好？", ["今天很好。", "“走吧！”", "他说。", "好？"]),
        ("Wait... no. Yes", ["Wait... no.", "Yes"]),
        ("...", ["..."]),
        ("", []),
        (" \r\n\r\n\t", []),
    ],
)
def test_examples(text, sentences):
    assert split_sentences(text) == sentences


@given(st.text(alphabet=st.sampled_from("aB1 .!?\"'。”\n\r\tMrS—é"), max_size=200))
def test_every_character_is_kept_in_order(text):
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence and sentence == sentence.strip() and "\n" not in sentence for sentence in sentences)


def test_a_novel(novels):
    lengths = [len(sentence.split()) for novel in novels for sentence in split_sentences(novel)]
    assert 18 < sum(lengths) / len(lengths) < 32
    assert max(lengths) < 300
