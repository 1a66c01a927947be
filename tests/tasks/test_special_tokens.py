"""Special tokens that somebody wrote into a row are text: no task reads them as what its template puts around texts."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from llmengine.data import Tokenizer
from llmengine.tasks import make

from .conftest import KINDS

TASKS = ("classification", "tagging", "qa", "choice", "seq2seq", "chat", "preference")


def rows_of(task: str, text: str) -> list[dict]:
    """A row that has `text` in all of its columns."""
    answer = {"text": [text], "answer_start": [0]}
    pair = {"prompt": text, "chosen": text + " yes", "rejected": text + " no"}
    row = {
        "classification": {"text": text, "text_pair": text, "label": "a"},
        "tagging": {"words": ["she", text, "it"], "tags": ["a", "b", "a"]},
        "qa": {"question": text, "context": text, "answers": answer},
        "choice": {"question": text, "choices": [text, text], "label": 0},
        "seq2seq": {"source": text, "target": text},
        "chat": {"prompt": text, "response": text},
        "preference": pair,
    }
    return [row[task]]


def specials(task: str, tokenizer: Tokenizer, text: str, **options) -> Counter[int]:
    """Special tokens of a row's example, but those that stand for unknown characters."""
    labels = ["a", "b"] if task in ("classification", "tagging") else []
    made = make(task, tokenizer, [], labels=labels, max_length=256, **options)
    example = made.examples(rows_of(task, text))[0, 0]
    ids = torch.cat([x for name, x in example.items() if name == "input_ids" or (task, name) == ("seq2seq", "labels")])
    return Counter(i for i in ids.tolist() if i in tokenizer.special_ids and i != tokenizer.unk_id)


def written_out(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.token(i) for i in tokenizer.special_ids if i != tokenizer.unk_id]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_text_gives_no_special_token(of_family, kind, task):
    tokenizer = of_family[kind].ours
    plain = specials(task, tokenizer, "she said it")
    for token in written_out(tokenizer):
        assert specials(task, tokenizer, f"she{token} said {token}") == plain, token


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_out_is_kept_and_its_characters_known(of_family, kind):
    tokenizer = of_family[kind].ours
    for token in written_out(tokenizer):
        (encoding,) = tokenizer.encodings([f"it was{token}it"])
        covered = {place for start, end in encoding.offsets for place in range(start, end)}
        assert set(range(len("it was"), len("it was" + token))) <= covered
        assert tokenizer.encode_many([f"it was{token}it"]) == [encoding.ids]


@pytest.mark.parametrize("kind", ["xlnet", "t5"])
def test_a_vocabulary_that_has_them_as_pieces_stays_what_it_was(of_family, kind, tmp_path):
    """Prompts have special tokens, other texts are tokenised as transformers does it, and saving changes nothing."""
    ours, theirs = of_family[kind].ours, of_family[kind].theirs
    token = theirs.eos_token
    assert theirs.convert_tokens_to_ids(token) in ours.encode(f"she said{token}")
    for text in ("she said it, and left.", "a < b > c", "x" * 40):
        assert ours.encode_many([text]) == [theirs(text, add_special_tokens=False)["input_ids"]]
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.digest == ours.digest
    assert again.encode_many([f"she said{token}"]) == ours.encode_many([f"she said{token}"])


def test_what_the_template_has_is_a_token(of_family):
    """The separator and the prefix of seq2seq are a template's part, as the Jinja text of chat is."""
    bart = of_family["roberta"].ours
    options = {"prefix": "<mask> she ", "architecture": "decoder", "separator": "<pad>"}
    plain = specials("seq2seq", bart, "said it", architecture="decoder")
    found = specials("seq2seq", bart, "said it", **options)
    assert found == plain + Counter([bart.mask_id, bart.pad_id])
    template = (
        "{% for m in messages %}{{ '<mask>' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    )
    found = specials("chat", bart, "said <mask> it", template=template)
    assert found[bart.mask_id] == 2 and found[bart.eos_id] == 1
