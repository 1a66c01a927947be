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
        ("「好。」她說。『走！』", ["「好。」", "她說。", "『走！』"]),
        ("《走吧！》很好看。（真的。）对", ["《走吧！》", "很好看。", "（真的。）", "对"]),
        ('他说："你好。"她笑了。"再见!"他走了', ['他说："你好。"', "她笑了。", '"再见!"他走了']),
        ("真的？！……不会吧……我不信。", ["真的？！……", "不会吧……我不信。"]),
        ("是吗?是的!好。共3.14元。OK. 好", ["是吗?", "是的!", "好。", "共3.14元。", "OK.", "好"]),
        ("第一行。\n第二行\n还是它。\n\n第三", ["第一行。", "第二行 还是它。", "第三"]),
        ("Wait... no. Yes", ["Wait... no.", "Yes"]),
        ("...", ["..."]),
        ("", []),
        (" \r\n\r\n\t", []),
    ],
)
def test_examples(text, sentences):
    assert split_sentences(text) == sentences


@given(st.text(alphabet=st.sampled_from("aB1 .!?\"'。”》…？好\n\r\tMrS—é"), max_size=200))
def test_every_character_is_kept_in_order(text):
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence and sentence == sentence.strip() and "\n" not in sentence for sentence in sentences)


def test_a_novel(novels):
    lengths = [len(sentence.split()) for novel in novels for sentence in split_sentences(novel)]
    assert 18 < sum(lengths) / len(lengths) < 32
    assert max(lengths) < 300
