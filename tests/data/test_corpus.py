"""Reading and splitting corpora: what is accepted, and what an error says."""

from __future__ import annotations

import gzip
import json
import lzma
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmengine.data import iterate_documents, read_documents, split_documents

PROSE = "Anne walked home.\n\nShe said nothing.\n"


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        file.write(data)
    return path


def test_the_novels():
    novels = read_documents("austen")
    assert [novel.split("\n")[0].title() for novel in novels] == [
        "Emma", "Mansfield Park", "Northanger Abbey", "Persuasion", "Pride And Prejudice", "Sense And Sensibility",
    ]  # fmt: skip
    assert sum(map(len, novels)) == 4_024_595
    assert not any(re.search("gutenberg|signet|ebook", novel, re.IGNORECASE) for novel in novels)
    assert "It is a truth universally acknowledged, that a single man in possession\nof a good fortune" in novels[4]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "a.txt.gz"])
def test_a_text_file_is_one_document(tmp_path, name):
    assert read_documents(write(tmp_path / name, PROSE)) == [PROSE]
    assert read_documents(str(tmp_path / name)) == [PROSE]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz", "a.jsonl.gz"])
def test_a_jsonl_file_has_a_document_a_line(tmp_path, name):
    records = [{"text": PROSE, "id": 1}, {"text": "  "}, {"text": "Zweiter Satz: schön. 第二。"}]
    text = "\n".join(json.dumps(record) for record in records) + "\n\n"
    assert read_documents(write(tmp_path / name, text)) == [PROSE, "Zweiter Satz: schön. 第二。"]


def test_a_folder_is_read_in_the_order_of_paths(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/c.jsonl", ".hidden/x.txt", "notes.md"):
        write(tmp_path / name, json.dumps({"text": name}) if name.endswith("l") else name)
    assert read_documents(tmp_path) == ["a/c.jsonl", "a/z.txt", "b.txt"]
    assert read_documents([tmp_path / "b.txt", str(tmp_path / "a")]) == ["b.txt", "a/c.jsonl", "a/z.txt"]


def test_line_ends_and_byte_order_mark(tmp_path):
    assert read_documents(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\rthree\n")) == ["one\n\ntwo\nthree\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9 au lait", r"a\.txt is not UTF-8 text: byte 3 is 0xe9; convert it first"),
        ("a.txt.xz", b"caf\xe9 au lait", r"a\.txt\.xz is not UTF-8 text: byte 3 is 0xe9"),
        ("a.txt", "text".encode("utf-16"), r"byte 0 is 0xff"),
        ("a.txt", b"abc\0def", r"a\.txt is not text: byte 3 is zero"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2 is not UTF-8 text: byte 24 is 0xff"),
        ("a.jsonl", '{"text": "a"}\n\n{"txt": "b"}', r"a\.jsonl, line 3 has keys \['txt'\]; expected .* \"text\""),
        ("a.jsonl", '{"text": 3}', r"line 1 has keys \['text'\]; expected an object with a string"),
        ("a.jsonl", '["text"]', r"line 1 has a list"),
        ("a.jsonl", '{"text": "a"', r"a\.jsonl, line 1 is not JSON"),
        ("a.jsonl", r'{"text": "a\ud800"}', r"line 1 has half a surrogate pair"),
        ("a.txt", " \n\t\n", r"a\.txt: holds no text"),
        ("a.jsonl", "", r"holds no text"),
        ("a.pdf", "text", r"a\.pdf is not a kind of file that is read; allowed: \*\.txt"),
    ],
)
def test_what_a_bad_file_says(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_documents(write(tmp_path / name, content))


@pytest.mark.parametrize("name", ["a.txt.xz", "a.txt.gz"])
def test_what_a_damaged_file_says(tmp_path, name):
    whole = write(tmp_path / name, PROSE * 100).read_bytes()
    for damaged in (b"not compressed", whole[: len(whole) // 2], whole[:20] + b"\xff" * 8 + whole[28:]):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(name) + " cannot be uncompressed"):
            read_documents(tmp_path / name)


def test_what_a_missing_or_unreadable_file_says(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt does not exist; give a file .* built-in corpus: austen"):
        read_documents(tmp_path / "nothing.txt")
    (tmp_path / "a.txt").symlink_to("/proc/self/mem")  # opens, but its first page cannot be read
    with pytest.raises(OSError, match=r"a\.txt cannot be read: "):
        read_documents(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"has no file named \*\.txt"):
        read_documents(write(tmp_path / "folder/a.md", "text").parent)
    with pytest.raises(ValueError, match="no source: holds no text"):
        read_documents([])


# ---- held-out parts --------------------------------------------------------------------------------------------------


def test_many_documents_are_held_out_whole():
    documents = [f"document {i} " * (1 + i % 7) for i in range(500)]
    train, held_out = split_documents(documents, 0.1, seed=3)
    assert sorted(train + held_out) == sorted(documents)
    assert train == [document for document in documents if document in set(train)], "in their order"
    assert 0.1 <= sum(map(len, held_out)) / sum(map(len, documents)) < 0.11
    assert split_documents(documents, 0.1, seed=3) == (train, held_out)
    assert split_documents(documents, 0.1, seed=4) != (train, held_out)


def test_few_documents_are_cut_at_a_paragraph(novels):
    train, held_out = split_documents(novels, 0.05, seed=0)
    assert [a + b for a, b in zip(train, held_out, strict=True)] == novels
    assert all(part.endswith("\n\n") for part in train)
    assert 0.03 < sum(map(len, held_out)) / sum(map(len, novels)) < 0.07


@pytest.mark.parametrize("space", ["\n", " "])
def test_without_paragraphs_lines_and_words_are_whole(space):
    document = space.join(["word"] * 1000)
    train, held_out = split_documents([document], 0.25, seed=0)
    assert train[0] + held_out[0] == document
    assert len(train[0]) == 3750


def test_nothing_held_out():
    assert split_documents(["a b", "c"], 0, seed=0) == (["a b", "c"], [])


@pytest.mark.parametrize("documents", [[], ["word"], ["  word  "]])
def test_too_little_to_hold_out(documents):
    with pytest.raises(ValueError, match=r"too few to hold out 0\.1 of them"):
        split_documents(documents, 0.1, seed=0)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2])
def test_fraction_is_checked(fraction):
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\), got"):
        split_documents(["a b"], fraction, seed=0)


@given(
    st.lists(st.text(alphabet="ab.\n \t", max_size=60).filter(str.strip), min_size=1, max_size=40),
    st.floats(0.01, 0.9),
)
def test_splitting_loses_nothing(documents, fraction):
    try:
        train, held_out = split_documents(documents, fraction, seed=1)
    except ValueError:
        # only where no document can be parted, and they are not many
        assert all(len(document.split()) < 2 for document in documents) or len(documents) < 2
        return
    assert all(part.strip() for part in train + held_out)
    assert sorted("".join("".join(train + held_out).split())) == sorted("".join("".join(documents).split()))


# ---- one by one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "documents"),
    [
        ("file", ["One.\nTwo.\n \n\nThree."]),
        ("paragraph", ["One.\nTwo.\n", "Three."]),
        ("line", ["One.\n", "Two.\n", "Three."]),
    ],
)
def test_what_a_document_of_a_text_file_is(tmp_path, unit, documents):
    write(tmp_path / "a.txt", "\ufeffOne.\r\nTwo.\n \n\nThree.")
    write(tmp_path / "b.jsonl.gz", '{"text": "Four.\\n\\nFive."}\n')
    assert list(iterate_documents(tmp_path, unit=unit)) == [*documents, "Four.\n\nFive."]


def test_documents_are_read_when_they_are_asked_for(tmp_path):
    write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "two"}\nno JSON')
    documents = iterate_documents(tmp_path)
    assert [next(documents), next(documents)] == ["one", "two"]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3 is not JSON"):
        next(documents)
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        iterate_documents([tmp_path, "nothing"])
    with pytest.raises(ValueError, match="unit must be one of file, paragraph, line, got 'page'"):
        iterate_documents(tmp_path, unit="page")
    with pytest.raises(ValueError, match=r"b\.txt, line 2 is not UTF-8 text: byte 4 is 0xff"):
        list(iterate_documents(write(tmp_path / "b.txt", b"one\n\xff\n"), unit="line"))
