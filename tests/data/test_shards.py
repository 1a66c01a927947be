"""Tokenised corpora on disk: the same tokens as in memory, whatever the shards, interruptions and damage."""

from __future__ import annotations

import json
import shutil
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmengine import objectives
from llmengine.data import Tokenizer, open_shards, read_corpus, split_corpus, write_shards
from llmengine.data import shard_writer as writer
from llmengine.data.shards import corpus_tokens

DOCUMENTS = ["Emma ran home. Yes, she did!", " ", "No, never, it is unbelievable!", "a b c d e f g", "One. Two. Three."]
ARRAYS = ("ids", "bounds", "documents", "words")


@pytest.fixture(scope="module")
def paragraphs(novels) -> list[str]:
    return [paragraph for novel in novels for paragraph in novel[:20_000].split("\n\n") if paragraph.strip()]


def assert_same(got, wanted) -> None:
    for name in ARRAYS:
        one, other = getattr(got, name), getattr(wanted, name)
        if other is None:
            assert one is None
            continue
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), other)


def files_of(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("shard_tokens", [1, 20, 10_000])
@pytest.mark.parametrize("sentences", [False, True])
@pytest.mark.parametrize("words", [False, True])
def test_the_same_tokens_as_in_memory(wordpiece, tmp_path, shard_tokens, sentences, words):
    shards = write_shards(
        iter(DOCUMENTS), wordpiece, tmp_path / "a", sentences=sentences, words=words, shard_tokens=shard_tokens
    )
    kind = {"sentences": sentences, "words": words}
    assert len(shards) == 4 and len(shards.index.shards) == {1: 4, 20: 2, 10_000: 1}[shard_tokens]
    opened = read_corpus(tmp_path / "a")
    for longest in (None, 3):
        wanted = corpus_tokens(DOCUMENTS, wordpiece, longest=longest, **kind)
        assert_same(corpus_tokens(opened, wordpiece, longest=longest, **kind), wanted)
    assert read_corpus([str(tmp_path / "a")]).digest == shards.digest
    assert corpus_tokens(opened, wordpiece, sentences=sentences).words is None
    if shard_tokens == 10_000:
        base = opened.tokens.ids
        while base is not None and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap), "ids are mapped, not read"


def test_end_tokens_are_for_those_who_ask(bpe, tmp_path):
    shards = write_shards(DOCUMENTS, bpe, tmp_path / "a", shard_tokens=30)
    assert_same(corpus_tokens(shards, bpe, end=bpe.eos_id), corpus_tokens(DOCUMENTS, bpe, end=bpe.eos_id))
    assert corpus_tokens(shards, bpe).tail == 1 and corpus_tokens(shards, bpe, end=bpe.eos_id).tail == 0


OBJECTIVES = {
    "clm": ("bpe", {}, {}),
    "mlm": ("wordpiece", {"words": True}, {"whole_word": True}),
    "electra": ("wordpiece", {}, {}),
    "bert": ("wordpiece", {"sentences": True}, {}),
    "sop": ("wordpiece", {"sentences": True, "words": True}, {"spans": True}),
    "denoising": ("bart", {"words": True}, {}),
    "span_corruption": ("t5", {}, {}),
    "plm": ("xlnet", {"words": True}, {}),
}


def test_every_objective_is_here():
    """All but "tlm", whose corpus is pairs of texts."""
    assert OBJECTIVES.keys() == objectives.OBJECTIVES.keys() - {"tlm"}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_makes_the_same_examples(objective, paragraphs, tmp_path, request):
    name, kind, options = OBJECTIVES[objective]
    tokenizer = (
        request.getfixturevalue(name)
        if name in ("bpe", "wordpiece")
        else Tokenizer.train(paragraphs, "bpe", 700, family=name)
    )
    shards = write_shards(paragraphs, tokenizer, tmp_path / "a", shard_tokens=3000, **kind)
    assert len(shards.index.shards) > 2
    made = [
        objectives.build(objective, corpus, tokenizer, sequence_length=32, seed=5, **options)
        for corpus in (paragraphs, shards)
    ]
    for epoch in (0, 3):
        np.testing.assert_array_equal(*(examples.lengths(epoch) for examples in made))
        for index in range(0, len(made[0].lengths(epoch)), 7):
            one, other = (examples[epoch, index] for examples in made)
            assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


# ---- held out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_tokens", [500, 10**6])
def test_documents_are_held_out(wordpiece, paragraphs, tmp_path, shard_tokens):
    paragraphs = list({bytes(ids_of(wordpiece, paragraph)): paragraph for paragraph in paragraphs}.values())
    shards = write_shards(paragraphs, wordpiece, tmp_path / "a", words=True, shard_tokens=shard_tokens)
    train, held_out = split_corpus(shards, 0.2, seed=3)
    assert len(train) + len(held_out) == len(shards)
    assert 0.2 <= len(held_out.tokens.ids) / len(shards.tokens.ids) < 0.25
    assert sorted(documents(train) + documents(held_out)) == sorted(documents(shards))
    both = iter(documents(shards))
    assert all(text in both for text in documents(train)), "in their order"
    again = split_corpus(read_corpus(tmp_path / "a"), 0.2, seed=3)
    assert documents(again[1]) == documents(held_out)
    assert documents(split_corpus(shards, 0.2, seed=4)[1]) != documents(held_out)
    # what an objective gets of a part is what it would get of the same texts
    trained = set(documents(train))
    kept = [paragraph for paragraph in paragraphs if bytes(ids_of(wordpiece, paragraph)) in trained]
    assert_same(corpus_tokens(train, wordpiece, words=True), corpus_tokens(kept, wordpiece, words=True))


def ids_of(tokenizer, text) -> np.ndarray:
    return np.array(tokenizer.encode_many([text])[0], np.uint16)


def documents(shards) -> list[bytes]:
    """Of each document its ids' bytes."""
    tokens = shards.tokens
    edges = tokens.bounds[tokens.documents].tolist()
    return [bytes(tokens.ids[a:b]) for a, b in pairwise(edges)]


def test_nothing_or_too_much_held_out(wordpiece, tmp_path):
    shards = write_shards(DOCUMENTS, wordpiece, tmp_path / "a")
    train, held_out = shards.split(0, seed=1)
    assert len(held_out) == 0 and not held_out
    assert_same(corpus_tokens(train, wordpiece), corpus_tokens(DOCUMENTS, wordpiece))
    with pytest.raises(
        ValueError, match=r"a has 4 documents of up to \d+ tokens, too few or too large to hold out 0\.1 .*--documents"
    ):
        shards.split(0.1, seed=1)
    with pytest.raises(ValueError, match=r"Shards\.split: fraction must be in \[0, 1\), got 1"):
        shards.split(1, seed=1)


@settings(max_examples=15)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), st.floats(0.05, 0.6), st.integers(0, 5))
def test_splitting_loses_no_document(bpe, tmp_path_factory, sizes, fraction, seed):
    texts = [" ".join(f"w{i}" for _ in range(size)) for i, size in enumerate(sizes)]
    shards = write_shards(texts, bpe, tmp_path_factory.mktemp("split") / "a", shard_tokens=40)
    try:
        parts = shards.split(fraction, seed)
    except ValueError as error:
        assert "too few or too large" in str(error)
        return
    assert sorted(documents(parts[0]) + documents(parts[1])) == sorted(documents(shards))
    share = len(parts[1].tokens.ids) / len(shards.tokens.ids)
    assert parts[0] and fraction <= share <= 1.2 * fraction


# ---- interrupted -----------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stopping(texts, after: int):
    yield from islice(texts, after)
    raise Stop


@pytest.mark.parametrize("after", [0, 9, 40, 41])
def test_what_was_interrupted_goes_on(wordpiece, paragraphs, tmp_path, monkeypatch, after):
    monkeypatch.setattr(writer, "BLOCK", 700)
    texts = paragraphs[:41]
    kind = {"sentences": True, "shard_tokens": 300}
    write_shards(texts, wordpiece, tmp_path / "whole", **kind)
    with pytest.raises(Stop):
        write_shards(stopping(texts, after), wordpiece, tmp_path / "a", **kind)
    with pytest.raises(ValueError, match=r"a is not finished: .*--resume.*--force"):
        open_shards(tmp_path / "a")
    with pytest.raises(FileExistsError, match=r"holds a corpus half-way; go on with it \(--resume\), or replace it"):
        write_shards(texts, wordpiece, tmp_path / "a", **kind)
    seen: list[tuple[int, int]] = []
    write_shards(texts, wordpiece, tmp_path / "a", resume=True, progress=lambda *at: seen.append(at), **kind)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "whole")
    total = sum(shard.tokens for shard in open_shards(tmp_path / "a").index.shards)
    assert seen[-1] == (41, total) and seen == sorted(seen)
    if after == 40:
        assert seen[0][0] > 9, "what was done is not done again"


def test_what_cannot_go_on(wordpiece, bpe, paragraphs, tmp_path):
    texts = paragraphs[:20]

    def begin():
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        with pytest.raises(Stop):
            write_shards(stopping(texts, 15), wordpiece, tmp_path / "a", shard_tokens=100)

    begin()
    before = files_of(tmp_path / "a")
    for tokenizer, kind in ((bpe, {}), (wordpiece, {"words": True}), (wordpiece, {"sentences": True})):
        with pytest.raises(ValueError, match="begun with another tokenizer, --sentences or --words"):
            write_shards(texts, tokenizer, tmp_path / "a", resume=True, **kind)
    for changed in (texts[1:], ["x" + texts[0], *texts[1:]], texts[:1], []):
        with pytest.raises(ValueError, match=r"the corpus has changed since .* shard 00000 is of another text"):
            write_shards(changed, wordpiece, tmp_path / "a", shard_tokens=100, resume=True)
    assert files_of(tmp_path / "a") == before
    (tmp_path / "a" / "00000.ids.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"00000\.ids\.npy is missing"):
        write_shards(texts, wordpiece, tmp_path / "a", resume=True)
    with pytest.raises(ValueError, match="not both"):
        write_shards(texts, wordpiece, tmp_path / "a", resume=True, replace_old=True)
    write_shards(texts, bpe, tmp_path / "a", replace_old=True)
    write_shards(texts, bpe, tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b"), "nothing of the old one stays"
    with pytest.raises(FileExistsError, match=r"a holds a corpus; replace it \(--force\)"):
        write_shards(texts, bpe, tmp_path / "a", resume=True)


def test_what_a_killed_process_leaves(wordpiece, paragraphs, tmp_path):
    """A file half-written is swept away; a corpus whose last file was not removed yet is whole."""
    texts = paragraphs[:20]
    with pytest.raises(Stop):
        write_shards(stopping(texts, 15), wordpiece, tmp_path / "a", shard_tokens=100)
    (tmp_path / "a" / ".00001.ids.npy.123").write_bytes(b"half")
    write_shards(texts, wordpiece, tmp_path / "a", shard_tokens=100, resume=True)
    whole = files_of(tmp_path / "a")
    assert not [name for name in whole if name.startswith(".")]
    shutil.copy(tmp_path / "a" / "index.json", tmp_path / "a" / "unfinished.json")
    assert len(read_corpus(tmp_path / "a")) == 20
    with pytest.raises(FileExistsError, match="holds a corpus; replace it"):
        write_shards(texts, wordpiece, tmp_path / "a", resume=True)


def test_a_folder_of_texts_with_an_index_is_no_corpus_of_tokens(tmp_path):
    (tmp_path / "index.json").write_text("{}")
    (tmp_path / "a.txt").write_text("text")
    assert read_corpus(tmp_path) == ["text"]


def test_other_directories_are_left_alone(wordpiece, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("mine")
    for again in (False, True):
        with pytest.raises(FileExistsError, match="a holds something else; give a new directory"):
            write_shards(DOCUMENTS, wordpiece, tmp_path / "a", replace_old=again)
    assert files_of(tmp_path / "a") == {"mine.txt": b"mine"}
    with pytest.raises(ValueError, match="shard_tokens must be 1 or more, got 0"):
        write_shards(DOCUMENTS, wordpiece, tmp_path / "b", shard_tokens=0)
    with pytest.raises(ValueError, match="hold no token"):
        write_shards([" ", ""], wordpiece, tmp_path / "c")


# ---- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.fixture
def written(wordpiece, tmp_path):
    write_shards(DOCUMENTS, wordpiece, tmp_path / "a", shard_tokens=20)
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sentences": True}, "has documents as segments, but this objective takes sentences: .* with --sentences"),
        ({"words": True}, "does not tell where words begin.*--words"),
        ({"end": 3}, "has None after each document, but this objective wants 3"),
    ],
)
def test_a_corpus_that_lacks_what_is_asked(wordpiece, written, asked, message):
    with pytest.raises(ValueError, match=f"{written} {message}"):
        corpus_tokens(open_shards(written), wordpiece, **asked)


def test_another_tokenizer(wordpiece, bpe, novels, written, tmp_path):
    shards = open_shards(written)
    with pytest.raises(ValueError, match="by another tokenizer than the model's"):
        corpus_tokens(shards, bpe)
    with pytest.raises(ValueError, match="by another tokenizer than the model's"):
        corpus_tokens(shards, Tokenizer.train(novels, "wordpiece", 1000, lowercase=False))
    wordpiece.save(tmp_path / "same")
    assert len(corpus_tokens(shards, Tokenizer.load(tmp_path / "same")).ids) == len(shards.tokens.ids)
    bpe.save(written / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not as it was written: its SHA-256 differs"):
        open_shards(written)


def test_sentences_are_no_documents(wordpiece, tmp_path):
    shards = write_shards(DOCUMENTS, wordpiece, tmp_path / "a", sentences=True)
    with pytest.raises(ValueError, match="has sentences as segments, but this objective takes documents"):
        corpus_tokens(shards, wordpiece)


@pytest.mark.parametrize("name", [f"00001.{array}.npy" for array in ARRAYS[:3]])
def test_damaged_files(written, name):
    path = written / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{name} has {len(whole) - 1:,} bytes, but was written with {len(whole):,}"):
        open_shards(written)
    path.write_bytes(b"x" * len(whole))
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        open_shards(written)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"SHA-256 differs|are damaged"):
        open_shards(written, verify=True)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing; copy the whole directory"):
        open_shards(written)
    path.write_bytes(whole)
    open_shards(written, verify=True)


def test_a_bad_index(written, tmp_path):
    index = json.loads((written / "index.json").read_text())
    for changed, message in (
        ({"version": 2}, r"index\.json is of format 'llmengine tokens', version 2; this program reads .* version 1"),
        ({"format": "x"}, "is of format 'x'"),
        ({"shards": 3}, r"index\.json is damaged"),
        ({"more": 3}, r"index\.json is damaged"),
        ({"dtype": "uint32"}, r"00000\.ids\.npy is of another conversion: .*uint16, but the index says .* uint32"),
    ):
        (written / "index.json").write_text(json.dumps(index | changed))
        with pytest.raises(ValueError, match=message):
            open_shards(written)
    (written / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is not JSON"):
        open_shards(written)
    with pytest.raises(FileNotFoundError, match=r"has no index\.json; give a directory that llmengine tokenize wrote"):
        open_shards(tmp_path / "nothing")
    with pytest.raises(ValueError, match="a is tokenised: a tokenised corpus stands alone"):
        read_corpus(["austen", written])
