"""What a tokenizer puts around texts, and how texts are cut, against what tokenizers does."""

from __future__ import annotations

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from llmengine.data import Tokenizer
from llmengine.data.template import Part, Template, longest_first, spans

COUNTS = st.integers(0, 40)


@pytest.fixture(scope="module")
def trained(novels, wordpiece, bpe) -> dict[str, Tokenizer]:
    families = ("bart", "t5", "xlnet")
    return {"bert": wordpiece, "gpt2": bpe} | {f: Tokenizer.train(novels, "bpe", 500, family=f) for f in families}


@pytest.mark.parametrize(
    ("family", "pair", "types"),
    [
        ("bert", "[CLS] A [SEP] B [SEP]", [0, 0, 0, 1, 1]),
        ("gpt2", "A B", [0, 1]),
        ("bart", "<s> A </s> </s> B </s>", [0] * 6),
        ("t5", "A </s> B </s>", [0] * 4),
        ("xlnet", "A <sep> B <sep> <cls>", [0, 0, 1, 1, 2]),
    ],
)
def test_pairs_of_trained_tokenizers(trained, family, pair, types, tmp_path):
    """As Hugging Face's tokenizers of the family have them; and the directory says whether token types are read."""
    tokenizer = trained[family]
    template = tokenizer.template(pair=True)
    assert [("A", "B")[p.text] if p.token is None else tokenizer.token(p.token) for p in template.parts] == pair.split()
    assert [part.type for part in template.parts] == types and template.added == len(types) - 2
    assert tokenizer.token_types == (family in ("bert", "xlnet"))
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for texts in (["She ran away."], ["She ran away.", "He did not."]):
        encoding = theirs(*texts)
        made = tokenizer.template(pair=len(texts) == 2).around(*(e.ids for e in tokenizer.encodings(texts)))
        assert made.ids == encoding["input_ids"]
        assert ("token_type_ids" in encoding) == tokenizer.token_types
        if tokenizer.token_types:
            assert made.types == encoding["token_type_ids"]
    assert Tokenizer.load(tmp_path).token_types == tokenizer.token_types


def test_where_texts_begin():
    template = Template([Part(7, -1, 0), Part(None, 0, 0), Part(8, -1, 0), Part(None, 1, 1), Part(8, -1, 1)])
    assert template.around([1, 2], [3]) == ([7, 1, 2, 8, 3, 8], [0, 0, 0, 0, 1, 1], (1, 4))
    assert template.around([], [3]) == ([7, 8, 3, 8], [0, 0, 1, 1], (1, 2))


@given(first=COUNTS, second=COUNTS, room=st.integers(2, 50))
def test_longest_first_is_that_of_tokenizers(wordpiece, first, second, room):
    wordpiece.backend.enable_truncation(room + 3)
    encoding = wordpiece.backend.encode("a " * first, "b " * second)
    wordpiece.backend.no_truncation()
    kept = longest_first(first, second, room)
    assert kept == (encoding.sequence_ids.count(0), encoding.sequence_ids.count(1))


@given(length=COUNTS, size=st.integers(1, 9), data=st.data())
def test_windows_are_those_of_tokenizers(wordpiece, length, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    encoding = wordpiece.backend.encode("a " * length, add_special_tokens=False)
    encoding.truncate(size, stride=overlap)
    windows = [part.offsets for part in (encoding, *encoding.overflowing) if part.offsets]
    assert [(2 * start, 2 * stop - 1) for start, stop in spans(length, size, overlap)] == [
        (offsets[0][0], offsets[-1][1]) for offsets in windows
    ]
    with pytest.raises(ValueError, match=f"overlap must be 0 to {size - 1}, got {size}"):
        spans(length, size, size)


def test_a_special_token_in_a_text_is_text(wordpiece):
    (encoding,) = wordpiece.encodings(["she [SEP] was"])
    assert wordpiece.sep_id not in encoding.ids and len(encoding.ids) > 3
    assert wordpiece.encodings([["she", "was"]], words=True)[0].word_ids == [0, 1]
