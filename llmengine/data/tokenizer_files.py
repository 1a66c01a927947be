"""Tokenizers as files hold them: tokenizer.json, or the files of before it, read as their own library would.

    tokenizer.json                               any tokenizer of the `tokenizers` library
    spiece.model, tokenizer.model, *.spm         SentencePiece (sentencepiece_model.py)
    vocab.txt                                    BERT's WordPiece
    vocab.json and merges.txt                    byte-level BPE of GPT-2 and RoBERTa

Beside them tokenizer_config.json, special_tokens_map.json and added_tokens.json are read where they are there. Families
that number or split the same files in another way are refused by name: let transformers write their tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from llmengine.data import sentencepiece_model
from llmengine.data.special_tokens import AROUND, BPE, FAMILIES, ROLES, SENTINEL, SENTINELS, WORDPIECE
from llmengine.files import read_json

FILE, CONFIG, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SENTENCEPIECE = ("spiece.model", "tokenizer.model", "*.spm")
MERGES, WORDS = "merges.txt", "vocab.txt"
# families (of tokenizer_class, else of the model_type beside it) that read these files as they are
FAMILIES_OF = {
    "sentencepiece": "t5 mt5 umt5 albert xlnet llama codellama gemma gemma2 gemma3 mistral mixtral bigbird".split(),
    WORDS: "bert distilbert electra mobilebert convbert funnel layoutlm lxmert squeezebert".split(),
    MERGES: "gpt2 roberta bart longformer led gptneo gptj gptbigcode opt".split(),
}
Parts = tuple[tokenizers.Tokenizer, dict[str, str], dict[str, Any]]  # backend, special tokens by role, configuration


def load(path: Path) -> Parts:
    """A tokenizer's parts, from a directory or one of its files. Raises FileNotFoundError, ValueError."""
    file = path if path.is_file() else _find(path)
    # of a file that is named alone, its directory says what it means
    directory = file.parent
    config = read_json(directory / CONFIG, "Tokenizer.load") if (directory / CONFIG).is_file() else {}
    if (directory / CHAT_TEMPLATE).is_file():
        config["chat_template"] = (directory / CHAT_TEMPLATE).read_text("utf-8")
    if file.suffix == ".json" and file.name != "vocab.json":
        backend = _from_json(file)
        roles = _roles(backend, directory, config, WORDPIECE | BPE)
        _hide(backend, roles.get("unk_token"))
        return backend, roles, config
    kind = MERGES if file.name in (MERGES, "vocab.json") else WORDS if file.suffix == ".txt" else "sentencepiece"
    _check_family(file, kind, config)
    if kind == "sentencepiece":
        backend, defaults = sentencepiece_model.load(file)
    elif kind == WORDS:
        backend, defaults = _from_words(file, config)
    else:
        backend, defaults = _from_merges(directory, config)
    _add_tokens(backend, directory, config)
    return backend, _roles(backend, directory, config, defaults), config


def files_in(directory: Path) -> list[Path]:
    """A directory's files of tokenizers, the one that decides first."""
    return [file for name in (FILE, *SENTENCEPIECE, WORDS, MERGES) for file in sorted(directory.glob(name))]


def _find(directory: Path) -> Path:
    """The file that decides, if a directory has one."""
    found = files_in(directory)
    if not found:
        raise FileNotFoundError(
            f"Tokenizer.load: {directory} has no {FILE}; give a Hugging Face tokenizer directory, or one with "
            f"{', '.join(SENTENCEPIECE)}, {WORDS}, or vocab.json and {MERGES}"
        )
    models_found = [file.name for file in found if file.suffix == ".spm"]
    if found[0].suffix == ".spm" and len(models_found) > 1:
        raise ValueError(f"Tokenizer.load: {directory} has {', '.join(models_found)}; give one of these files")
    return found[0]


def _check_family(file: Path, kind: str, config: Mapping[str, Any]) -> None:
    """That the family which a directory names takes the file as it is."""
    family = _family(file.parent, config)
    allowed = FAMILIES_OF[kind]
    # this name is XLM-R's: ids are moved by one against the file
    if (family and family not in allowed) or file.name == "sentencepiece.bpe.model":
        raise ValueError(
            f"Tokenizer.load: {file} is of the family {family or 'xlmroberta'!r}, which does not take it as it is "
            f"(those that do: {', '.join(allowed)}); let transformers write {FILE}: "
            "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
        )


def _family(directory: Path, config: Mapping[str, Any]) -> str:
    """ "t5", "xlmroberta", …; "" where nothing tells."""
    name = config.get("tokenizer_class")
    if name in (None, "PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend"):
        model = directory / "config.json"
        name = read_json(model, "Tokenizer.load").get("model_type", "") if model.is_file() else ""
    name = name.removesuffix("Fast").removesuffix("Tokenizer").lower()
    return name.replace("_", "").replace("-", "")


# ---- kinds -----------------------------------------------------------------------------------------------------------


def _from_json(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"Tokenizer.load: {file} is not a tokenizer: {error}") from None


def _hide(backend: tokenizers.Tokenizer, unknown: str | None) -> None:
    """Special tokens are among a unigram model's pieces, which it finds in any text: one that spells them out is parted
    within them, and so remains text. What is unknown may be so however it is written."""
    if not isinstance(backend.model, models.Unigram):
        return
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    pieces = set(backend.get_vocab(with_added_tokens=False))
    hidden = [piece for piece in sorted(special & pieces) if len(piece) > 1 and piece != unknown]
    backend.encode_special_tokens = True
    if any(backend.token_to_id(piece) in backend.encode(piece, add_special_tokens=False).ids for piece in hidden):
        steps = [backend.pre_tokenizer] if backend.pre_tokenizer is not None else []
        parting = sentencepiece_model.parting(hidden, pieces - special)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, parting])


def _from_words(file: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """BERT's. Where nothing tells, a vocabulary without capital letters is of lower-cased text."""
    vocabulary: dict[str, int] = {}
    with file.open(encoding="utf-8", newline="\n") as lines:
        try:
            for number, line in enumerate(lines, 1):
                token = line.rstrip("\r\n")
                if token in vocabulary:
                    raise ValueError(
                        f"Tokenizer.load: {file}, line {number} has {token!r} again, after line {vocabulary[token] + 1}"
                    )
                vocabulary[token] = len(vocabulary)
        except UnicodeDecodeError as error:
            raise ValueError(f"Tokenizer.load: {file} is not UTF-8 text: {error.reason}") from None
    unknown = WORDPIECE["unk_token"]
    if unknown not in vocabulary:
        raise ValueError(f"Tokenizer.load: {file} has no {unknown}: it is no vocabulary of BERT's kind")
    words = (token for token in vocabulary if not (token.startswith("[") and token.endswith("]")))
    lowercase = config.get("do_lower_case", not any(token.lower() != token for token in words))
    backend = wordpiece_backend(
        models.WordPiece(vocabulary, unk_token=unknown), lowercase, config.get("strip_accents"),
        config.get("tokenize_chinese_chars", True),
    )  # fmt: skip
    defaults = {role: token for role, token in WORDPIECE.items() if token in vocabulary}
    backend.add_special_tokens(list(defaults.values()))
    if {"[CLS]", "[SEP]"} <= vocabulary.keys():
        backend.post_processor = around(backend, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    return backend, defaults


def _from_merges(directory: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """GPT-2's, and RoBERTa's, whose vocabulary has <s> and <mask>."""
    for name in ("vocab.json", MERGES):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"Tokenizer.load: {directory} has no {name}, which belongs to byte-level BPE")
    vocabulary = read_json(directory / "vocab.json", "Tokenizer.load")
    if missing := sorted(set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.keys()):
        raise ValueError(
            f"Tokenizer.load: {directory / 'vocab.json'} lacks {len(missing)} of the 256 bytes ({missing[0]!r}, …): it "
            "is no vocabulary of byte-level BPE"
        )
    if any(token.endswith("</w>") for token in vocabulary):
        raise ValueError(
            f"Tokenizer.load: {directory / 'vocab.json'} marks the ends of words (</w>), which GPT-2's does not"
        )
    try:
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(directory / "vocab.json"), str(directory / MERGES)))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"Tokenizer.load: {directory / MERGES} does not belong to its vocab.json: {error}") from None
    prefix = bool(config.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    table = FAMILIES["bart"] if {"<s>", "</s>"} <= vocabulary.keys() else BPE
    defaults = {role: token for role, token in table.items() if token in vocabulary}
    mask = config.get("mask_token")
    # RoBERTa's mask takes the space before it, so that " word" can be predicted in its place
    takes_space = mask.get("lstrip", False) if isinstance(mask, dict) else True
    special = [
        AddedToken(token, special=True, lstrip=token == "<mask>" and takes_space, normalized=False)
        for token in dict.fromkeys(defaults.values())
    ]
    backend.add_special_tokens(special)
    if table is not BPE:
        backend.post_processor = around(backend, *AROUND["bart"])
    return backend, defaults


def wordpiece_backend(
    model: models.WordPiece, lowercase: bool, strip_accents: bool | None = None, chinese: bool = True
) -> tokenizers.Tokenizer:
    """BERT's tokenizer over a vocabulary. strip_accents: None: as lowercase. chinese: each character is a word."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=chinese
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def around(backend: tokenizers.Tokenizer, single: str, pair: str) -> processors.TemplateProcessing:
    """What transformers puts around a text and a pair: "[CLS] $A [SEP]"."""
    tokens = {token.split(":")[0] for token in f"{single} {pair}".split() if not token.startswith("$")}
    ids = [(token, backend.token_to_id(token)) for token in sorted(tokens)]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


# ---- special tokens --------------------------------------------------------------------------------------------------


def _add_tokens(backend: tokenizers.Tokenizer, directory: Path, config: Mapping[str, Any]) -> None:
    """Tokens that files beside the vocabulary add to it, at the ids that they say."""
    added = {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    if (directory / "added_tokens.json").is_file():
        listed = read_json(directory / "added_tokens.json", "Tokenizer.load")
        added = {i: {"content": token} for token, i in listed.items()} | added
    is_t5 = _family(directory, config) in ("t5", "mt5", "umt5")
    if is_t5 and not added and backend.token_to_id(SENTINEL.format(0)) is None:
        first, count = backend.get_vocab_size(), config.get("extra_ids", SENTINELS)
        added = {first + i: {"content": SENTINEL.format(count - 1 - i)} for i in range(count)}
    for i, token in sorted(added.items()):
        name = token["content"]
        known = backend.token_to_id(name)
        if known != i and (known is not None or i != backend.get_vocab_size()):
            raise ValueError(
                f"Tokenizer.load: {directory} adds {name!r} as token {i}, but the vocabulary has "
                f"{f'it as {known}' if known is not None else f'{backend.get_vocab_size()} tokens'}"
            )
        fields = {key: token[key] for key in ("lstrip", "rstrip", "single_word") if key in token}
        special = token.get("special", True)
        add = backend.add_special_tokens if special else backend.add_tokens
        add([AddedToken(name, special=special, normalized=token.get("normalized", False), **fields)])


def _roles(
    backend: tokenizers.Tokenizer, directory: Path, config: Mapping[str, Any], defaults: Mapping[str, str]
) -> dict[str, str]:
    """Special tokens by role: as the directory says, else as their usual names."""
    mapped = directory / "special_tokens_map.json"
    says = {**(read_json(mapped, "Tokenizer.load") if mapped.is_file() else {}), **config}
    roles = {}
    for role in (f"{role}_token" for role in ROLES):
        token = says.get(role) or defaults.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and backend.token_to_id(token) is not None:
            roles[role] = token
    return roles
