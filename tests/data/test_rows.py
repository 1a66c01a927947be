"""Rows of labelled data: what was written is read, whatever the format; what is wrong is named and never lost."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmengine.data import iterate_rows, read_rows
from tests.data.test_corpus import write

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("rows")


# ---- what was written is read ----------------------------------------------------------------------------------------


@given(st.lists(st.dictionaries(TEXT, JSON, max_size=4), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_json_comes_back(scratch, rows, ascii_only, as_list):
    written = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    path = scratch / ("a.json" if as_list else "a.jsonl")
    path.write_text(f"[{','.join(written)}]" if as_list else "\n".join(written), encoding="utf-8", newline="")
    squad_like = as_list and "paragraphs" in rows[0]
    assert squad_like or read_rows(path) == rows


@given(
    st.lists(st.lists(TEXT, min_size=2, max_size=2), min_size=1, max_size=6),
    st.sampled_from(["csv", "tsv", "semicolon"]), st.sampled_from(["\n", "\r\n"]), st.booleans(),
)  # fmt: skip
def test_tables_come_back(scratch, cells, kind, line_end, bom):
    delimiter = {"csv": ",", "tsv": "\t", "semicolon": ";"}[kind]
    file = io.StringIO(newline="")
    # a writer of lines that end in \n alone leaves a carriage return without marks: nobody can tell it from \r\n
    style = csv.QUOTE_MINIMAL if line_end == "\r\n" else csv.QUOTE_ALL
    csv.writer(file, delimiter=delimiter, lineterminator=line_end, quoting=style).writerows([["a", "b c"], *cells])
    path = scratch / f"a.{'tsv' if kind == 'tsv' else 'csv'}"
    path.write_bytes(("\ufeff" * bom + file.getvalue()).encode())
    options = {"delimiter": ";"} if kind == "semicolon" else {}
    assert read_rows(path, **options) == [{"a": a, "b c": b} for a, b in cells]


@given(st.lists(st.text(st.characters(exclude_characters="\0\n\r", exclude_categories=["Cs"]), min_size=1, max_size=9)))
def test_lines_come_back(scratch, texts):
    texts = [text for text in texts if text.strip()] or ["x"]
    (scratch / "a.txt").write_bytes("".join(text + "\r\n" for text in texts).encode())
    rows = list(iterate_rows(scratch / "a.txt", notice=lambda _: None))
    # a byte-order mark at the beginning is none of the text
    wanted = [texts[0].removeprefix("\ufeff"), *texts[1:]]
    assert [row["text"] for row in rows] == [text for text in wanted if text.strip()]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_compressed_files_and_several(tmp_path, suffix):
    write(tmp_path / f"a.jsonl{suffix}", '{"text": "one"}\n\n{"text": "two"}\n')
    write(tmp_path / f"b.csv{suffix}", 'text\n"th\nree"\n\n""\n')
    rows = [{"text": "one"}, {"text": "two"}, {"text": "th\nree"}, {"text": ""}]
    assert read_rows([tmp_path / f"a.jsonl{suffix}", str(tmp_path / f"b.csv{suffix}")]) == rows


def test_long_cells_and_the_limit_of_the_csv_module(tmp_path):
    limit = csv.field_size_limit()
    assert read_rows(write(tmp_path / "a.csv", f"a,b\n{'x' * 300_000},y\n")) == [{"a": "x" * 300_000, "b": "y"}]
    assert csv.field_size_limit() == limit


def test_tables_without_header_or_quotation_marks(tmp_path):
    path = write(tmp_path / "a.tsv", 'the 5" pipe\t1\n"so\t0\n')
    assert read_rows(path, quoting=False, header=False, columns={"text": 0, "label": 1}) == [
        {"text": 'the 5" pipe', "label": "1"}, {"text": '"so', "label": "0"},
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"a\.tsv, line 2: a quotation mark is not closed; .* quoting=False"):
        read_rows(path)


def test_columns_are_renamed(tmp_path):
    path = write(tmp_path / "a.csv", "id,sentence,label,stars\n1,good,x,5\n")
    assert read_rows(path, columns={"text": "sentence", "label": "stars"}) == [
        {"text": "good", "label": "5", "id": "1"}
    ]
    assert read_rows(path, columns={"label": "stars", "stars": "label"})[0]["stars"] == "x"
    with pytest.raises(ValueError, match=r"a\.csv, line 2 has no column 'text'; its columns: 'id', 'sentence', "):
        read_rows(path, columns={"text": "text"})


def test_parallel_files(tmp_path):
    one, other = write(tmp_path / "a.en", "Good day.\r\nYes.\n"), write(tmp_path / "a.de.gz", "Guten Tag.\nJa.")
    rows = [{"source": "Good day.", "target": "Guten Tag."}, {"source": "Yes.", "target": "Ja."}]
    assert read_rows([one, other], kind="parallel") == rows
    with pytest.raises(ValueError, match=r"a\.en has 2 lines and .*b\.de has 3: line by line they do not belong"):
        read_rows([one, write(tmp_path / "b.de", "Guten Tag.\nJa.\nNein.\n")], kind="parallel")
    blank = write(tmp_path / "c.de", " \nJa.\n")
    with pytest.raises(ValueError, match=r"c\.de, line 1 is blank"):
        read_rows([one, blank], kind="parallel")
    assert list(iterate_rows([one, blank], kind="parallel", bad="skip", notice=lambda _: None)) == rows[1:]
    with pytest.raises(ValueError, match='"parallel" takes two files, source and target; got 1'):
        iterate_rows(one, kind="parallel")


# ---- SQuAD -----------------------------------------------------------------------------------------------------------

CONTEXT = "Ada Lovelace wrote the first program; Ada 🎉 was 27."


def squad(**question) -> dict:
    return {"data": [{"title": "Ada", "paragraphs": [{"context": CONTEXT, "qas": [{"question": "Who?", **question}]}]}]}


@pytest.mark.parametrize("kind", [None, "squad"])
def test_squad(tmp_path, kind):
    data = squad(
        id="1", answers=[{"text": "Ada", "answer_start": 0}, {"text": "27", "answer_start": CONTEXT.index("27")}]
    )
    questions = data["data"][0]["paragraphs"][0]["qas"]
    questions += [
        {"id": "2", "question": "Why?", "answers": [], "is_impossible": True, "plausible_answers": [{}]},
        {"id": "3", "question": "When?"},
    ]
    rows = read_rows(write(tmp_path / "a.json", json.dumps(data)), kind=kind)
    shared = {"title": "Ada", "context": CONTEXT}
    assert rows == [
        {"id": "1", "question": "Who?", "answers": {"text": ["Ada", "27"], "answer_start": [0, 48]}, **shared},
        {"id": "2", "question": "Why?", "answers": {"text": [], "answer_start": []}, **shared},
        {"id": "3", "question": "When?", **shared},
    ]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        # the place counted in UTF-16 units, or in bytes
        (
            squad(answers=[{"text": "27", "answer_start": 49}]),
            r"a\.json, data\[0\]\.paragraphs\[0\]\.qas\[0\] has the answer '27' at character 49 .* but it is at 48",
        ),
        (squad(answers=[{"text": "Bob", "answer_start": 0}]), "it is nowhere in the context"),
        (squad(answers=[{"text": "27", "answer_start": -3}]), "at character -3"),
        (squad(answers=[{"text": "", "answer_start": 0}]), 'an answer 0 without a "text" or a whole number'),
        (squad(answers=[], is_impossible=False), "has 0 answers, but is_impossible is False"),
        (squad(answers=[{"text": "Ada", "answer_start": 0}], is_impossible=True), "has 1 answers, but is_impossible"),
        (squad(answers={"text": ["Ada"]}), "has an object with 'text' for \"answers\"; expected a list"),
        (squad(question=3), 'has no string "question"'),
        ({"data": [{"paragraphs": [{"qas": [{"question": "Who?"}]}]}]}, "a paragraph without a context"),
        (
            {"data": [{"paragraphs": [3]}]},
            r"data\[0\]\.paragraphs\[0\] has a int; expected an object with a list 'qas'",
        ),
        ({"version": 1}, "has an object with 'version'; expected SQuAD's layout"),
        ([], "has a list; expected SQuAD's layout"),
    ],
)
def test_what_is_wrong_with_squad(tmp_path, document, message):
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path / "a.json", json.dumps(document)), kind="squad")


# ---- data sets -------------------------------------------------------------------------------------------------------


class ClassLabel:
    """As `datasets.ClassLabel`: what is read of it."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)


class Sequence:
    """As `datasets.Sequence` and `datasets.List`."""

    def __init__(self, feature) -> None:
        self.feature = feature


class Dataset:
    """As `datasets.Dataset`: column_names, features, and rows as dicts."""

    def __init__(self, rows: list[dict], **features) -> None:
        self.rows, self.features, self.column_names = rows, features, list(rows[0])

    def __iter__(self):
        return iter(self.rows)


def test_data_sets():
    tags = ClassLabel("O", "B-PER")
    data = Dataset(
        [{"sentence": "good", "stars": 1, "ner_tags": [1, 0]}, {"sentence": "bad", "stars": 0, "ner_tags": []}],
        sentence=object(), stars=ClassLabel("neg", "pos"), ner_tags=Sequence(tags),
    )  # fmt: skip
    rows = read_rows(data, columns={"text": "sentence", "label": "stars", "tags": "ner_tags"})
    assert rows == [
        {"text": "good", "label": "pos", "tags": ["B-PER", "O"]},
        {"text": "bad", "label": "neg", "tags": []},
    ]
    old = Dataset([{"tags": [1]}], tags=[tags])
    assert read_rows(old) == [{"tags": ["B-PER"]}], "a list of one feature is a list of such"
    untold = Dataset([{"label": -1, "tags": None}, {"label": None, "tags": [1, -1]}], label=tags, tags=Sequence(tags))
    assert read_rows(untold) == [{"label": None, "tags": None}, {"label": None, "tags": ["B-PER", None]}]
    for number in (2, -2):
        with pytest.raises(ValueError, match=f"row 0 has the label {number}, which none of the 2 classes has"):
            read_rows(Dataset([{"label": number}], label=ClassLabel("neg", "pos")))
    with pytest.raises(ValueError, match="kind and options are for files"):
        read_rows(data, kind="csv")
    data.column_names = {"train": [], "test": []}
    with pytest.raises(ValueError, match="several parts; give one of them: train, test"):
        read_rows(data)


# ---- what is wrong ---------------------------------------------------------------------------------------------------

BAD_ROWS = [
    ("a.jsonl", b'{"a": 1}\n{"a": \n{"a": 2}\n', r"line 2 is not JSON: Expecting value"),
    ("a.jsonl", b'{"a": 1}\n[1]\n{"a": 2}\n', r"line 2 has a list; expected an object"),
    ("a.jsonl", b'{"a": 1}\n{"a": 5, "a": 6}\n{"a": 2}\n', r"line 2 has 'a' twice in one object"),
    ("a.jsonl", b'{"a": 1}\n{"a": NaN}\n{"a": 2}\n', r"line 2 has NaN, which is no number of JSON"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\\ud83d"}\n{"a": 2}\n', r"line 2 has half a surrogate pair"),
    ("a.jsonl", b'{"a": 1}\n{"\\udc00": 2}\n{"a": 2}\n', r"line 2 has half a surrogate pair"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n{"a": 2}\n', r"line 2 is not UTF-8 text: byte 16 is 0xe9"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\0"}\n{"a": 2}\n', r"line 2 is not text: byte 16 is zero"),
    ("a.jsonl", b'{"a": 1}\n' + b"[" * 100_000 + b'\n{"a": 2}\n', r"line 2 is not JSON: it is nested too deeply"),
    ("a.jsonl", b'{"a": 1}\n{"a": 2}\n{"a": "trunca', r"line 3 is not JSON"),
    ("a.csv", b"a\n1\n5,6\n2\n", r"line 3 has 2 cells, but the header has 1"),
    ("a.csv", b'a\n1\n"x" y\n2\n', r"line 3 is no record: ',' expected after '\"'; .* quoting=False"),
    ("a.csv", b"a\n1\nx\ry\n2\n", r"line 3 is no record: a carriage return is not in quotation marks"),
    ("a.csv", b"a\n1\n\xff\n2\n", r"line 3 is not UTF-8 text: byte 4 is 0xff"),
    ("a.csv", b'a\n1\n"x\n\xff\ny"\n2\n', r"lines 3 to 5 is not UTF-8 text: byte 7 is 0xff"),
    ("a.csv", b"a\n1\n\0\n2\n", r"line 3 is not text: byte 4 is zero"),
    ("a.json", b'[{"a": 1}, 5, {"a": 2}]', r"a\.json, row 1 has a int; expected an object"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_ROWS)
def test_bad_rows_are_refused_or_skipped(tmp_path, name, content, message):
    path, told = write(tmp_path / name, content), []
    with pytest.raises(ValueError, match=re.escape(f"data: {path.parent}") + ".*" + message):
        read_rows(path)
    rows = read_rows(path, bad="skip", notice=told.append)
    assert [str(row["a"]) for row in rows] == ["1", "2"]
    assert len(told) == 1 and told[0].startswith("data: 1 bad row is skipped:\n") and re.search(message, told[0])


def test_the_first_skipped_rows_are_told(tmp_path):
    path = write(tmp_path / "a.jsonl", "x\n" * 1005 + "{}\n")
    told: list[str] = []
    assert read_rows(path, bad="skip", notice=told.append) == [{}]
    assert told[0].splitlines()[0] == "data: 1,005 bad rows are skipped:"
    assert all(f"a.jsonl, line {i} is not JSON" in told[0].splitlines()[i] for i in (1, 2, 3))
    assert told[0].splitlines()[-1] == "  and 1,002 more"
    with pytest.warns(UserWarning, match="1,005 bad rows are skipped"):
        read_rows(path, bad="skip")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", r"a\.csv is empty: it has no header"),
        ("a.csv", b"a,b,a\n1,2,3\n", r"line 1 names 'a' twice; give each column a name of its own.*header=False"),
        ("a.csv", b"\xff,b\n1,2\n", r"line 1 is not UTF-8 text: byte 0 is 0xff"),
        ("a.csv", b'a,b\n1,"2\n3,4\n', r"lines 2 to 3: a quotation mark is not closed"),
        ("a.csv", b"a,b\n", r"a\.csv: no row; give data with rows"),
        ("a.jsonl", b"", r"a\.jsonl: no row"),
        ("a.json", b"{", r"a\.json is not JSON"),
        ("a.json", b"3", r"a\.json has a int; expected a list of objects"),
        ("a.json", b'{"a": 1}', r"a\.json has an object with 'a'; expected a list of objects"),
        ("a.tar", b"", r"a\.tar: its name does not tell its kind \(\*\.jsonl .*give kind: jsonl, json"),
        ("a.csv.gz", gzip.compress(b"a\n" + b"x\n" * 999, mtime=0)[:30], r"a\.csv\.gz cannot be uncompressed"),
    ],
)
@pytest.mark.parametrize("bad", ["raise", "skip"])
def test_bad_files_are_always_refused(tmp_path, name, content, message, bad):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name, bad=bad, notice=lambda _: None)


def test_blank_lines_of_a_text_are_told(tmp_path):
    told: list[str] = []
    assert read_rows(write(tmp_path / "a.txt", "one\n \n\ntwo\n"), notice=told.append) == [
        {"text": "one"},
        {"text": "two"},
    ]
    assert told == [f"data: {tmp_path / 'a.txt'} has 2 blank lines: no rows"]


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("a.csv", {"bad": "ignore"}, ValueError, 'bad must be "raise" or "skip", got \'ignore\''),
        ("a.csv", {"kind": "xml"}, ValueError, "kind 'xml' is not one of jsonl, json, csv"),
        ("a.csv", {"scheme": "bio"}, ValueError, "'csv' has no option scheme; options: delimiter, quoting, header"),
        ("a.jsonl", {"scheme": "bio"}, ValueError, "'jsonl' has no option scheme; options: none"),
        ("no.csv", {}, FileNotFoundError, r"no\.csv does not exist; give files"),
        (".", {}, FileNotFoundError, "is a folder; give files"),
        ([], {}, ValueError, "no file; give one or several"),
    ],
)
def test_arguments_are_checked_at_once(tmp_path, source, options, error, message):
    for name in ("a.csv", "a.jsonl"):
        write(tmp_path / name, "")
    with pytest.raises(error, match=message):
        iterate_rows(tmp_path / source if isinstance(source, str) else source, **options)
    with pytest.raises(ValueError, match="delimiter must be one character, got ';;'"):
        read_rows(tmp_path / "a.csv", delimiter=";;")


def test_rows_are_read_when_they_are_asked_for(tmp_path):
    rows = iterate_rows(write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2}\nx'))
    assert [next(rows), next(rows)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(ValueError, match="line 3 is not JSON"):
        next(rows)
