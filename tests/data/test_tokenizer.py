"""Tokenizers: deterministic training, round trips, and a directory that transformers loads."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from llmengine import Transformer, TransformerConfig
from llmengine.data import Tokenizer
from llmengine.data.tokenizer import UNSPACED

KINDS = pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
TEXTS = ["She had [MASK] it<|endoftext|>, [CLS] you know.", "Très cher Émile,\n\n  naïve — 你好!", "", " ", "x" * 300]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


@pytest.fixture
def tokenizer(kind, request) -> Tokenizer:
    return request.getfixturevalue(kind)


@KINDS
def test_special_tokens(kind, tokenizer):
    ids = {role: getattr(tokenizer, f"{role}_id") for role in ("pad", "unk", "cls", "sep", "mask", "bos", "eos")}
    wordpiece = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4, "bos": None, "eos": None}
    assert ids == (wordpiece if kind == "wordpiece" else dict.fromkeys(wordpiece) | {"bos": 0, "eos": 0})
    assert tokenizer.vocab_size == 1000
    assert [tokenizer.token(i) for i in range(tokenizer.vocab_size)] != []
    with pytest.raises(ValueError, match=r"1000 is not in \[0, 1000\)"):
        tokenizer.token(1000)


@given(UNICODE)
def test_bpe_gives_every_text_back(bpe, text):
    (ids,) = bpe.encode_many([text])
    assert bpe.decode(ids) == text


def test_wordpiece_gives_words_back(wordpiece):
    text = "emma woodhouse, handsome, clever, and rich, with a comfortable home"
    assert (
        wordpiece.decode(wordpiece.encode("Emma Woodhouse, handsome, clever, and rich, with a comfortable home"))
        == text
    )
    assert wordpiece.decode([2, *wordpiece.encode(text), 3]) == text
    assert wordpiece.decode([2, *wordpiece.encode(text), 3], skip_special=False) == f"[CLS] {text} [SEP]"


@KINDS
def test_only_prompts_have_special_tokens(tokenizer):
    special = {tokenizer.mask_id, tokenizer.cls_id, tokenizer.eos_id} - {None}
    assert special <= set(tokenizer.encode(TEXTS[0]))
    assert not special & set(tokenizer.encode_many(TEXTS)[0])
    assert special <= set(tokenizer.encode(TEXTS[0])), "encode_many leaves no trace"


@KINDS
@given(texts=st.lists(UNICODE, min_size=1, max_size=3))
def test_words_begin_where_the_pre_tokenizer_splits(wordpiece, bpe, kind, texts):
    tokenizer = {"wordpiece": wordpiece, "bpe": bpe}[kind]
    encoded = tokenizer.encode_words(texts)
    assert [ids for ids, _ in encoded] == tokenizer.encode_many(texts)
    for text, (ids, begins) in zip(texts, encoded, strict=True):
        assert begins.dtype == bool and len(begins) == len(ids)
        normalized = tokenizer.backend.normalizer.normalize_str(text) if kind == "wordpiece" else text
        words = tokenizer.backend.pre_tokenizer.pre_tokenize_str(normalized)
        if not UNSPACED.search(text):
            assert begins.sum() == len(words)
        if kind == "wordpiece":
            continues = [tokenizer.token(i).startswith("##") for i in ids]
            assert not np.any(begins & np.array(continues, bool))


@pytest.mark.parametrize("lowercase", [True, False])
def test_lowercase(novels, lowercase):
    tokenizer = Tokenizer.train(novels, "wordpiece", 500, lowercase=lowercase)
    assert (tokenizer.encode("Émma") == tokenizer.encode("emma")) is lowercase


@KINDS
def test_training_is_deterministic(kind, tmp_path):
    """In processes whose hash tables have different seeds, and whatever ran before."""
    script = (
        "import sys; from llmengine.data import Tokenizer, read_documents;"
        "Tokenizer.train([d[:60000] for d in read_documents('austen')[:3]], sys.argv[1], 1000).save(sys.argv[2])"
    )
    files = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", script, kind, str(tmp_path / seed)], check=True, env=environment)
        files.append({path.name: path.read_bytes() for path in (tmp_path / seed).iterdir()})
    assert set(files[0]) == {"tokenizer.json", "tokenizer_config.json"}
    assert files[0] == files[1]


@KINDS
def test_saved_and_loaded(kind, tokenizer, tmp_path):
    tokenizer.encode_many(TEXTS)
    tokenizer.save(tmp_path / "new" / "directory")
    loaded = Tokenizer.load(tmp_path / "new" / "directory")
    assert loaded.roles == tokenizer.roles
    assert loaded.encode_many(TEXTS) == tokenizer.encode_many(TEXTS)
    loaded.save(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "new" / "directory" / name).read_text()
    assert len(list((tmp_path / "again").iterdir())) == 2, "no temporary file stays"


@KINDS
@pytest.mark.parametrize("beside_model", [False, True])
def test_transformers_loads_it(kind, tokenizer, tmp_path, beside_model):
    if beside_model:
        preset = {"wordpiece": "bert-base", "bpe": "gpt2"}[kind]
        shape = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 16, "vocab_size": 1000}
        special = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("pad", "bos", "eos")}
        Transformer(TransformerConfig.preset(preset, **shape, **special)).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert (theirs.mask_token_id, theirs.pad_token_id) == (tokenizer.mask_id, tokenizer.pad_id)
    assert theirs.eos_token_id == tokenizer.eos_id
    pair = theirs("She ran.", "He did not.")
    if kind == "wordpiece":
        first, second = tokenizer.encode("She ran."), tokenizer.encode("He did not.")
        assert pair["input_ids"] == [2, *first, 3, *second, 3]
        assert pair["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)


@pytest.mark.parametrize(
    ("family", "around", "first"),
    [
        ("bart", ("<s>", "</s>"), ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]),
        ("t5", ("", "</s>"), ["<pad>", "</s>", "<unk>"]),
        ("xlnet", ("", "<sep> <cls>"), ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>"]),
    ],
)
def test_families(family, around, first, novels, tmp_path):
    """Special tokens come first, sentinels last; transformers puts the family's tokens around a text."""
    tokenizer = Tokenizer.train(novels, "bpe", 700, family=family)
    assert tokenizer.vocab_size == 700 and [tokenizer.token(i) for i in range(len(first))] == first
    assert tokenizer.sentinel_ids == (list(range(699, 599, -1)) if family == "t5" else [])
    special = {token: role for role, token in tokenizer.roles.items()}
    assert set(special) == set(first)
    for text in TEXTS:
        (ids,) = tokenizer.encode_many([text])
        assert tokenizer.decode(ids) == text and not {tokenizer.token(i) for i in ids} & set(first)
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.roles == tokenizer.roles and loaded.sentinel_ids == tokenizer.sentinel_ids
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs("She ran.")["input_ids"]
    before, after = (part.split() for part in around)
    assert theirs.convert_ids_to_tokens(ids) == [*before, *map(tokenizer.token, tokenizer.encode("She ran.")), *after]
    again = Tokenizer.train(novels, "bpe", 700, family=family)
    assert again.encode_many(TEXTS) == tokenizer.encode_many(TEXTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "unigram"}, 'kind must be "wordpiece" or "bpe", got \'unigram\''),
        ({"vocab_size": 30}, r"vocab_size 30 is too small: .* alone are \d+; give \d+ or more"),
        ({"kind": "bpe", "vocab_size": 256}, "vocab_size 256 is too small; byte-level BPE needs 256 bytes"),
        ({"kind": "bpe", "family": "bert"}, "family 'bert' is not one of gpt2, bart, t5, xlnet"),
        (
            {"kind": "bpe", "family": "t5", "vocab_size": 300},
            "BPE needs 256 bytes, <pad>, </s>, <unk>, 100 sentinels and some merges",
        ),
        ({"documents": [" ", ""]}, "documents hold no text"),
        ({"documents": []}, "documents hold no text"),
    ],
)
def test_bad_arguments(novels, arguments, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.train(**{"documents": novels, "kind": "wordpiece", "vocab_size": 1000} | arguments)


def test_the_size_that_an_error_asks_for_is_enough(novels):
    with pytest.raises(ValueError, match="too small") as error:
        Tokenizer.train(novels, "wordpiece", 10)
    size = int(str(error.value).split("give ")[1].split()[0])
    assert Tokenizer.train(novels, "wordpiece", size).vocab_size == size


def test_many_characters_do_not_fill_the_vocabulary():
    """Of 1000 Chinese characters the frequent ones get tokens, and merges of Latin ones still find room."""
    rare = "".join(chr(0x4E00 + i) for i in range(1000))
    text = rare + "".join(chr(0x4E00 + i) for i in range(300)) * 5000 + " the theme then" * 5000
    tokenizer = Tokenizer.train([text], "wordpiece", 1000)
    assert tokenizer.vocab_size <= 1000
    assert len(tokenizer.encode("theme")) == 1
    assert tokenizer.unk_id not in tokenizer.encode(rare[:300])
    assert tokenizer.encode(rare[-1]) == [tokenizer.unk_id]


def test_bad_directories(tmp_path, wordpiece):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json; give a Hugging Face tokenizer directory"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)
    wordpiece.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json holds a list; expected an object"):
        Tokenizer.load(tmp_path)


def test_a_foreign_directory(tmp_path, wordpiece):
    """Roles as dictionaries, padding and truncation switched on, or no configuration at all."""
    wordpiece.save(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": {"content": "[MASK]", "lstrip": True}}))
    text = "a sentence of more than four tokens"
    assert Tokenizer.load(tmp_path).encode(text) == wordpiece.encode(text)
    assert Tokenizer.load(tmp_path).mask_id == 4
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path).roles == wordpiece.roles


# ---- Chinese ---------------------------------------------------------------------------------------------------------

CHINESE = "今天天气很好，我们去公园散步吧。他说：“你好吗？”她笑了。北京是中国的首都，上海是最大的城市。"


@pytest.fixture(scope="module")
def chinese() -> dict[str, Tokenizer]:
    texts = [CHINESE[i:] + CHINESE[:i] for i in range(40)] + ["Emma 和 GPT 在北京 100 天。"] * 10
    return {kind: Tokenizer.train(texts, kind, size) for kind, size in (("wordpiece", 200), ("bpe", 400))}


def test_chinese_vocabularies_cover_their_text(chinese):
    """WordPiece: every character of the text is a token, none has a form inside words. BPE: every text comes back."""
    wordpiece, bpe = chinese["wordpiece"], chinese["bpe"]
    (ids,) = wordpiece.encode_many([CHINESE])
    assert [wordpiece.token(i) for i in ids] == list(CHINESE)
    tokens = [wordpiece.token(i) for i in range(wordpiece.vocab_size)]
    assert not any(UNSPACED.search(token) for token in tokens if token.startswith("##") or len(token) > 1)
    assert wordpiece.encode("龘") == [wordpiece.unk_id]
    (ids,) = bpe.encode_many([CHINESE + "龘"])
    assert bpe.decode(ids) == CHINESE + "龘" and len(ids) < len(CHINESE)


@given(st.text(CHINESE + "ab 龘カな", max_size=30))
def test_words_of_chinese(chinese, text):
    """WordPiece: each character. BPE: tokens that do not go on with a character; Latin words stay whole."""
    (ids, begins), (parts, starts) = (chinese[kind].encode_words([text])[0] for kind in ("wordpiece", "bpe"))
    tokens = [chinese["wordpiece"].token(i) for i in ids]
    assert [not token.startswith("##") for token in tokens] == begins.tolist()
    # bytes up to each token that begins a word are whole characters
    written = [chinese["bpe"].decode(parts[:i]) for i in np.flatnonzero(starts)]
    assert all(text.startswith(before) for before in written)
    ends = [len(before) for before in written] + [len(text)]
    words = [text[a:b] for a, b in itertools.pairwise(ends)]
    assert "".join(words) == text
    for word in words:
        assert not (UNSPACED.search(word) and re.search("[ab ]", word.lstrip(" "))), "scripts do not share a word"


def test_a_clause_of_chinese_is_several_words(chinese):
    text = "上海天气好我们散步"
    for kind, tokenizer in chinese.items():
        _, begins = tokenizer.encode_words([text])[0]
        assert (len(text) if kind == "wordpiece" else 3) <= begins.sum() <= len(text)
