"""CoNLL files and the schemes of their tags; the spans that tags mark are seqeval's."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.scheme import BILOU, IOB1, IOB2, IOBES, Entities

from llmengine.data import read_rows
from llmengine.data.formats.conll import find_scheme, to_bio
from tests.data.test_corpus import write

FILE = """\
-DOCSTART- -X- O O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
"""
ROWS = [
    {"words": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
    {"words": ["Peter", "Blackburn"], "tags": ["B-PER", "I-PER"]},
]


def quiet(_: str) -> None:
    pass


def test_columns(tmp_path):
    path = write(tmp_path / "a.conll", FILE)
    assert read_rows(path) == ROWS
    assert read_rows(write(tmp_path / "eng.txt.gz", FILE.replace("\n", "\r\n")), kind="conll") == ROWS
    parts = [row["tags"] for row in read_rows(path, columns={"tags": "1"})]
    assert parts == [["NNP", "VBZ"], ["NNP", "NNP"]], "tags of words stay as they are"
    assert read_rows(path, columns={"words": 1, "tags": -2})[1] == {"words": ["NNP", "NNP"], "tags": ["B-NP", "I-NP"]}


def test_tabs_words_without_tags_and_comments(tmp_path):
    path = write(tmp_path / "a.bio", "# id 1\nNew York\tB-LOC\n\u3000\u00a0x\tO\n \t \n#\tO\n")
    rows = [{"words": ["New York", "\u3000\u00a0x"], "tags": ["B-LOC", "O"]}, {"words": ["#"], "tags": ["O"]}]
    assert read_rows(path, comments="# id") == rows
    assert read_rows(write(tmp_path / "b.bio", "one\ntwo\n\nthree")) == [
        {"words": ["one", "two"]},
        {"words": ["three"]},
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a B-X\nb O O\n", r"line 2 has 3 columns, but the first line has 2"),
        ("a\tB-X\n\tO\n", r"line 2 has an empty word or tag"),
        (b"a B-X\n\xff O\n", r"line 2 is not UTF-8 text: byte 6 is 0xff"),
        ("a B-X\nb I-Y\n", r"line 2: I-Y cannot follow B-X: Y begins with B-, or, where not, give scheme=\"iob1\""),
        ("a B-X\nb B\n", r"line 2: B is no tag of BIO"),
    ],
)
def test_bad_sentences_are_refused_or_skipped(tmp_path, content, message):
    data = content.encode() if isinstance(content, str) else content
    good = b"\tB-Z\n" if b"\t" in data else b" B-Z\n"
    path, told = write(tmp_path / "a.conll", data + b"\ny" + good), []
    with pytest.raises(ValueError, match=re.escape(f"data: {path}, ") + message):
        read_rows(path, notice=quiet)
    assert read_rows(path, bad="skip", notice=told.append) == [{"words": ["y"], "tags": ["B-Z"]}]
    assert "1 bad row is skipped" in told[-1] and re.search(message, told[-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"tags": 4}}, "line 3 has 4 columns; tags cannot be column 4"),
        ({"columns": {"tags": "ner"}}, r"columns of a conll file are numbers from 0.*got {'tags': 'ner'}"),
        ({"columns": {"label": 1}}, "label is no column of a conll file; words, tags"),
        ({"scheme": "iob"}, "scheme must be one of bio, iob1, bioes, none, got 'iob'"),
        ({"scheme": "bioes"}, r"line 5: B-PER cannot follow|line 3: .*B-ORG|O cannot follow B-ORG"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path / "a.conll", FILE), **options)


def test_conll_is_not_mixed_with_tables(tmp_path):
    paths = [write(tmp_path / "a.conll", FILE), write(tmp_path / "b.csv", "a\n1\n")]
    with pytest.raises(
        ValueError, match='files of kind "conll" have no names of columns: read them without the others'
    ):
        read_rows(paths)


def test_another_scheme_is_told(tmp_path):
    told: list[str] = []
    path = write(tmp_path / "a.iob", "a I-X\nb B-X\nc O\n\nd I-Y\n")
    assert [row["tags"] for row in read_rows(path, notice=told.append)] == [["B-X", "B-X", "O"], ["B-Y"]]
    assert told == [f"data: {path}: the tags are IOB1; they are read as BIO"]
    path = write(tmp_path / "b.iob", "a B-X\nb E-X\nc S-Y\n")
    assert read_rows(path, notice=told.append)[0]["tags"] == ["B-X", "I-X", "B-Y"]
    assert told[1:] == [f"data: {path}: the tags are BIOES; they are read as BIO"]


# ---- schemes beside seqeval's ----------------------------------------------------------------------------------------

SPANS = st.lists(st.tuples(st.sampled_from(["X", "Y", None]), st.integers(1, 3)), min_size=1, max_size=6)


def tagged(spans, scheme: str) -> list[str]:
    """Tags of consecutive spans (kind, words); None: words outside."""
    tags: list[str] = []
    for kind, size in spans:
        if kind is None:
            tags += ["O"] * size
        elif scheme in ("bioes", "bilou"):
            end, single = "ES" if scheme == "bioes" else "LU"
            tags += [f"{single}-{kind}"] if size == 1 else [f"B-{kind}", *[f"I-{kind}"] * (size - 2), f"{end}-{kind}"]
        else:
            begins = scheme == "bio" or (tags and tags[-1][2:] == kind)
            tags += [f"{'B' if begins else 'I'}-{kind}", *[f"I-{kind}"] * (size - 1)]
    return tags


def spans_of(tags, scheme) -> list[tuple]:
    return [(e.tag, e.start, e.end) for e in Entities([tags], scheme).entities[0]]


@pytest.mark.parametrize(("scheme", "theirs"), [("bio", IOB2), ("iob1", IOB1), ("bioes", IOBES), ("bilou", BILOU)])
@given(spans=SPANS)
def test_spans_are_kept(scheme, theirs, spans):
    tags = tagged(spans, scheme)
    bio = to_bio(tags, "bioes" if scheme == "bilou" else scheme)
    assert bio == tagged(spans, "bio")
    assert spans_of(bio, IOB2) == spans_of(tags, theirs)


@pytest.mark.parametrize("scheme", ["bio", "iob1", "bioes"])
@given(sentences=st.lists(SPANS, min_size=1, max_size=4))
def test_the_scheme_is_found(scheme, sentences):
    found = find_scheme(iter([tagged(spans, scheme) for spans in sentences]))
    kinds = [(kind, size) for spans in sentences for kind, size in spans if kind]
    assert found == (scheme if kinds else "none")
    assert find_scheme(iter([["NN", "S-ADJ", "O"]])) == "none"


@given(st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"]), max_size=7))
def test_bio_is_valid_or_refused(tags):
    starts_well = all(a[2:] == b[2:] for a, b in zip(["O", *tags], tags) if b[0] == "I")  # noqa: B905
    if starts_well:
        assert to_bio(tags, "bio") == tags
    else:
        with pytest.raises(ValueError, match=r"cannot (follow|begin)"):
            to_bio(tags, "bio")


@given(st.lists(st.sampled_from(["O", "B-X", "I-X", "E-X", "S-X", "I-Y", "E-Y"]), min_size=1, max_size=6))
def test_bioes_is_valid_or_refused(tags):
    text = " ".join(tags)
    valid = re.fullmatch(r"(?:O|S-X|B-X(?: I-X)* E-X)(?: (?:O|S-X|B-X(?: I-X)* E-X))*", text)
    if valid:
        assert all(tag == "O" or tag[0] in "BI" for tag in to_bio(tags, "bioes"))
    else:
        with pytest.raises(ValueError, match=r"cannot (follow|begin|end)"):
            to_bio(tags, "bioes")
