"""Tokenizers read from the files of before tokenizer.json: the ids are those of sentencepiece and of transformers."""

from __future__ import annotations

import functools
import io
import json
import shutil
from typing import Any

import pytest
import sentencepiece
import transformers
from hypothesis import given
from hypothesis import strategies as st

from llmengine.data import Tokenizer
from llmengine.data.sentencepiece_model import SentencePiece

CHINESE = "今天天气很好，我们去公园散步吧。他说：“你好吗？”她笑了。北京是中国的首都，上海是最大的城市。"
UNIGRAMS = {
    "plain": {},
    "t5": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "xlnet": {"control_symbols": "<cls>,<sep>,<pad>,<mask>", "user_defined_symbols": ["<eop>", ".", "(", ")"]},
    "albert": {"normalization_rule_name": "nfkc_cf", "control_symbols": "[CLS],[SEP],[MASK]"},
    "bytes": {"byte_fallback": True, "character_coverage": 0.99},
    "phrases": {"split_by_whitespace": False},
}
LLAMA = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
BPES = {
    "bpe": {"model_type": "bpe"},
    "llama": {"model_type": "bpe", **LLAMA, "allow_whitespace_only_pieces": True, "split_digits": True},
    "gemma": {"model_type": "bpe", **LLAMA, "add_dummy_prefix": False, "user_defined_symbols": "<turn>,\n\n"},
}
SPELT = ["<s>", "</s>", "<unk>", "<pad>", "<mask>", "[CLS]", "<0x41>", "<turn>", "<eop>", "\n\n", "   ", "▁"]
# the character before a combining mark must be one that tables do not replace: see sentencepiece_model.py
PIECES = st.one_of(
    st.sampled_from(
        [*SPELT, *CHINESE, "Emma", "Woodhouse", "handsome", "e\u0301", "ﬁ", "①", "Ａ", "½", "각", "😀", "\u3000"]
    ),
    st.text("abcdefghijklmnopqrstuvwxyzABCDE .,!?()<>/-\"'0123456789\t\n", max_size=5),
    st.text(st.characters(exclude_categories=["Cs", "M", "Cn", "Co", "Cc"]), max_size=3),
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)


@pytest.fixture(scope="module")
def model(novels, tmp_path_factory):
    """Trains a small SentencePiece model, once each; gives its file and its own processor."""
    directory = tmp_path_factory.mktemp("models")
    lines = [line for novel in novels for line in novel[:30_000].split("\n") if line.strip()]
    lines += [CHINESE[i:] + CHINESE[:i] for i in range(40)]

    @functools.cache
    def made(name: str):
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=out, minloglevel=2, num_threads=1,
            **{"model_type": "unigram", "vocab_size": 700, **(UNIGRAMS | BPES)[name]},
        )  # fmt: skip
        path = directory / f"{name}.model"
        path.write_bytes(out.getvalue())
        return path, sentencepiece.SentencePieceProcessor(model_file=str(path)), Tokenizer.load(path)

    return made


@pytest.mark.parametrize("name", BPES)
@given(TEXTS)
def test_bpe_ids_are_sentencepieces(model, name, text):
    _, theirs, ours = model(name)
    ids = theirs.encode(text)
    assert ours.encode_many([text]) == [ids]
    if theirs.unk_id() not in ids:
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("name", UNIGRAMS)
@given(TEXTS)
def test_unigram_ids_are_sentencepieces(model, name, text):
    path, theirs, ours = model(name)
    (ids,), wanted = ours.encode_many([text]), theirs.encode(text)
    if ids == wanted:
        assert theirs.unk_id() in ids or ours.decode(ids).lstrip() == theirs.decode(ids).lstrip()
        return
    # equal scores, or a control piece that is spelt out: the same text in other pieces
    pieces = SentencePiece.read(path).pieces
    scores = [sum(pieces[i][1] for i in each) for each in (ids, wanted)]
    assert all(pieces[i][2] != 3 for i in ids), "a text gives no control piece"
    texts = ["".join(pieces[i][0] for i in each) for each in (ids, wanted)]
    assert texts[0] == texts[1]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3) or any(each in text for each in SPELT)


@pytest.mark.parametrize("name", [*UNIGRAMS, *BPES])
def test_known_texts_and_special_tokens(model, name):
    _, theirs, ours = model(name)
    assert ours.vocab_size == len(theirs)
    assert [ours.token(i) for i in range(len(theirs))] == [theirs.id_to_piece(i) for i in range(len(theirs))]
    for text in (
        "Emma Woodhouse, handsome, clever, and rich",
        "  two  spaces ",
        CHINESE,
        "naïve e\u0301",
        "",
        " ",
        "😀 x",
    ):
        assert ours.encode_many([text]) == [theirs.encode(text)]
    roles = {"unk": theirs.unk_id(), "bos": theirs.bos_id(), "eos": theirs.eos_id(), "pad": theirs.pad_id()}
    if name == "xlnet":
        roles |= {role: theirs.piece_to_id(f"<{role}>") for role in ("cls", "sep", "mask", "pad")}
    if name == "albert":
        roles |= {role: theirs.piece_to_id(f"[{role.upper()}]") for role in ("cls", "sep", "mask")}
    for role, i in roles.items():
        assert getattr(ours, f"{role}_id") == (None if i < 0 else i)
    special = ours.token(ours.unk_id)
    assert ours.unk_id in ours.encode(f"Emma {special}") and ours.encode_words(["Emma ran"])[0][1][0]
    if name in ("plain", "llama"):
        words = ours.encode_words(["Emma ran home"])[0][1]
        assert words.sum() == 3, "whole words are known"


def test_saved_and_loaded_again(model, tmp_path):
    for name in ("xlnet", "llama"):
        _, theirs, ours = model(name)
        ours.save(tmp_path / name)
        for again in (Tokenizer.load(tmp_path / name), Tokenizer.load(tmp_path / name / "tokenizer.json")):
            assert again.roles == ours.roles and again.digest == ours.digest
            assert again.encode_many([CHINESE, " a <s> b"]) == [theirs.encode(CHINESE), theirs.encode(" a <s> b")]
        hugging = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert hugging("Emma ran", add_special_tokens=False)["input_ids"] == theirs.encode("Emma ran")


def test_a_directory_of_t5(model, tmp_path):
    path, theirs, _ = model("t5")
    shutil.copy(path, tmp_path / "spiece.model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 10}')
    ours = Tokenizer.load(tmp_path)
    assert ours.vocab_size == len(theirs) + 10
    assert ours.sentinel_ids == list(range(len(theirs) + 9, len(theirs) - 1, -1))
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert len(Tokenizer.load(tmp_path).sentinel_ids) == 100
    ours = Tokenizer.load(tmp_path / "spiece.model")
    assert len(ours.sentinel_ids) == 100, "a file alone is what its directory says"
    added = {str(len(theirs)): {"content": "<mask>", "special": True, "lstrip": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, "mask_token": "<mask>"}))
    ours = Tokenizer.load(tmp_path)
    assert ours.mask_id == len(theirs) and ours.encode("Emma <mask>")[-1] == ours.mask_id
    added = {"7": {"content": "<mask>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(ValueError, match="adds '<mask>' as token 7, but the vocabulary has 700 tokens"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        (
            "spiece.model",
            {"config.json": '{"model_type": "xlm-roberta"}'},
            "family 'xlmroberta', which does not take it",
        ),
        ("spiece.model", {"tokenizer_config.json": '{"tokenizer_class": "PegasusTokenizer"}'}, "family 'pegasus'"),
        ("sentencepiece.bpe.model", {}, r"family 'xlmroberta'.*AutoTokenizer\.from_pretrained"),
    ],
)
def test_families_that_number_otherwise_are_refused(model, tmp_path, name, files, message):
    shutil.copy(model("plain")[0], tmp_path / name)
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path / name)


def test_damaged_models(model, tmp_path):
    whole = model("plain")[0].read_bytes()
    for content in (b"", b"text", whole[:-3], whole[: len(whole) // 2], b"\x0a\x03\x0a\x01\xff"):
        (tmp_path / "a.spm").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.spm is no SentencePiece model: "):
            Tokenizer.load(tmp_path)
    (tmp_path / "b.spm").write_bytes(whole)
    with pytest.raises(ValueError, match=r"has a\.spm, b\.spm; give one of these files"):
        Tokenizer.load(tmp_path)
    assert Tokenizer.load(tmp_path / "b.spm").vocab_size == 700


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "char"}, "neither a unigram nor a BPE model"),
        ({"model_type": "bpe", "user_defined_symbols": "<x>"}, "user-defined symbols in a BPE model with a prefix"),
        ({"treat_whitespace_as_suffix": True}, "writes spaces in an unusual way"),
    ],
)
def test_models_that_are_not_read(novels, tmp_path, fields, message):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(novels[0][:20_000].split("\n")), model_prefix=str(tmp_path / "a"), minloglevel=2,
        **{"vocab_size": 120, "hard_vocab_limit": False, **fields},
    )  # fmt: skip
    with pytest.raises(ValueError, match=message + ", which is not read; let transformers write it"):
        Tokenizer.load(tmp_path / "a.model")


# ---- BERT's vocab.txt ------------------------------------------------------------------------------------------------

SAMPLES = [
    "She had [MASK] it, naïve É 12.5!",
    "Emma Woodhouse, 你好世界。 😀",
    "x" * 120,
    "",
    " \u00a0 a\u0301 ",
    "[CLS] ok [SEP]",
]


@pytest.fixture
def bert(novels, tmp_path):
    def made(**config):
        lowercase = config.get("do_lower_case", True)
        backend = Tokenizer.train([*novels, CHINESE * 50], "wordpiece", 900, lowercase=lowercase)
        tokens = [backend.token(i) for i in range(backend.vocab_size)]
        (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
        if config:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **config}))
        return tmp_path

    return made


@pytest.mark.parametrize(
    "config",
    [{}, {"do_lower_case": False}, {"do_lower_case": True, "strip_accents": False}, {"tokenize_chinese_chars": False}],
)
def test_vocab_txt_is_berts(bert, config):
    directory = bert(**config)
    ours, theirs = Tokenizer.load(directory), transformers.BertTokenizer.from_pretrained(directory)
    for text in SAMPLES:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert (ours.pad_id, ours.cls_id, ours.mask_id) == (theirs.pad_token_id, theirs.cls_token_id, theirs.mask_token_id)
    around = ours.backend.encode("She ran.", "He did.", add_special_tokens=True)
    pair = theirs("She ran.", "He did.")
    assert (around.ids, around.type_ids) == (pair["input_ids"], pair["token_type_ids"])
    assert Tokenizer.load(directory / "vocab.txt").digest == ours.digest


def test_a_vocabulary_with_capitals_is_not_lower_cased(bert):
    directory = bert(do_lower_case=False)
    (directory / "tokenizer_config.json").unlink()
    ours = Tokenizer.load(directory)
    assert ours.encode("Emma") != ours.encode("emma")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[UNK]\na\nb\na\n", r"vocab\.txt, line 4 has 'a' again, after line 2"),
        (b"a\nb\n", r"vocab\.txt has no \[UNK\]"),
        (b"[UNK]\n\xff\n", r"vocab\.txt is not UTF-8 text"),
    ],
)
def test_bad_vocab_txt(tmp_path, content, message):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "roformer"}')
    with pytest.raises(ValueError, match="family 'roformer'"):
        Tokenizer.load(tmp_path)


# ---- byte-level BPE --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["gpt2", "bart"])
def bytelevel(novels, tmp_path, request):
    made = Tokenizer.train([*novels, CHINESE * 50], "bpe", 700, family=request.param)
    made.backend.model.save(str(tmp_path))
    if request.param == "bart":  # as RoBERTa's: the model's vocabulary has the special tokens too
        assert "<mask>" in json.loads((tmp_path / "vocab.json").read_text())
    return request.param, tmp_path


@pytest.mark.parametrize(("prefix", "takes_space"), [(False, True), (True, False)])
def test_merges_are_gpt2s_and_robertas(bytelevel, prefix, takes_space):
    family, directory = bytelevel
    config: dict[str, Any] = {"add_prefix_space": prefix}
    if family == "bart":  # as released models have it, and transformers once did without being told
        mask = {"__type": "AddedToken", "content": "<mask>", "lstrip": takes_space}
        config["mask_token"] = mask | dict.fromkeys(["rstrip", "single_word", "normalized"], False)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    cls: Any = {"gpt2": transformers.GPT2Tokenizer, "bart": transformers.RobertaTokenizer}[family]
    ours, theirs = Tokenizer.load(directory), cls.from_pretrained(directory)
    for text in (*SAMPLES, "so <mask> it<|endoftext|>", " leading", "\n\nlines\t"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text), skip_special=False) == theirs.decode(
            ours.encode(text), clean_up_tokenization_spaces=False
        )
    assert (ours.eos_id, ours.mask_id) == (theirs.eos_token_id, getattr(theirs, "mask_token_id", None))
    around = ours.backend.encode("She ran.", "He did.", add_special_tokens=True).ids
    assert around == theirs("She ran.", "He did.")["input_ids"]


def test_bad_merges(bytelevel):
    _, directory = bytelevel
    vocabulary = json.loads((directory / "vocab.json").read_text())
    (directory / "merges.txt").write_text("#version: 0.2\nĠ qqq\n")
    with pytest.raises(ValueError, match=r"merges\.txt does not belong to its vocab\.json"):
        Tokenizer.load(directory)
    (directory / "vocab.json").write_text(json.dumps(vocabulary | {"a</w>": len(vocabulary)}))
    with pytest.raises(ValueError, match="marks the ends of words"):
        Tokenizer.load(directory)
    (directory / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(ValueError, match=r"vocab\.json lacks 255 of the 256 bytes"):
        Tokenizer.load(directory)
    (directory / "vocab.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no vocab\.json, which belongs to byte-level BPE"):
        Tokenizer.load(directory)
