"""Encoder-decoders whose sides have words of their own: what they are made of, and what does not go with them."""

from __future__ import annotations

import json

import pytest
import torch

from llmengine import Transformer, TransformerConfig
from llmengine.training import train
from tests.training.finetunes import pretrained, rows, tiny

from .peers import random_ids

SHAPE = {
    "preset": "transformer-base", "d_model": 16, "n_heads": 2, "d_ff": 24, "n_layers": 2, "vocab_size": 40,
    "encoder_vocab_size": 61, "share_embeddings": False, "pad_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2,
}  # fmt: skip


def model_of(**fields) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig.from_dict(SHAPE | fields)).eval()


def test_each_side_has_its_words():
    model = model_of(freeze_padding_row=True)
    words = {name: p for name, p in model.named_parameters() if name.endswith("embeddings.word.weight")}
    assert {name: tuple(p.shape) for name, p in words.items()} == {
        "encoder.embeddings.word.weight": (61, 16), "decoder.embeddings.word.weight": (40, 16),
    }  # fmt: skip
    assert model.words.weight is words["decoder.embeddings.word.weight"], "the head's, where they are tied"
    assert all((p[1] == 0).all() and (p[2] != 0).any() for p in words.values())
    target = random_ids(2, 5) % 40
    model(random_ids(2, 7), labels=target).loss.backward()
    assert all(p.grad is not None and (p.grad[1] == 0).all() for p in words.values() if p.shape[0] == 61)
    assert words["decoder.embeddings.word.weight"].grad.abs().sum() > 0


def test_each_side_knows_its_range():
    model, source, target = model_of(), torch.tensor([[60, 3]]), torch.tensor([[39, 4]])
    model(source, decoder_input_ids=target)
    with pytest.raises(ValueError, match=r"input_ids holds 61; allowed: 0 to 60 \(encoder_vocab_size 61\)"):
        model(source + 1, decoder_input_ids=target)
    with pytest.raises(ValueError, match=r"decoder_input_ids holds 40; allowed: 0 to 39 \(vocab_size 40\)"):
        model(source, decoder_input_ids=target + 1)
    with pytest.raises(ValueError, match=r"labels holds 40; allowed: 0 to 39 \(vocab_size 40\)"):
        model(source, labels=torch.tensor([[4, 40]]))  # the shift takes the last one away


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_writes_the_targets_words(beams):
    """As the model's own logits say, step by step."""
    model = model_of(init_std=0.3)
    source = random_ids(2, 7)
    written = model.generate(source, max_new_tokens=5, eos_token_id=(), num_beams=beams)
    assert written.shape == (2, 6) and written.max() < 40
    if beams == 1:
        logits = model(source, decoder_input_ids=written[:, :-1]).logits
        assert torch.equal(logits.argmax(-1), written[:, 1:])


def test_a_decoder_cannot_read_the_source():
    """A classifier's decoder reads the source shifted, unless it is given a text of its own."""
    model = model_of(objectives=["classification"], summary="last")
    with pytest.raises(ValueError, match="an encoder-decoder needs decoder_input_ids"):
        model(random_ids(2, 7))
    assert model(random_ids(2, 7), decoder_input_ids=random_ids(2, 7) % 40).logits.shape == (2, 2)


def test_families_with_one_embedding_refuse(tmp_path):
    model = Transformer(TransformerConfig.preset(
        "bart-tiny", vocab_size=40, encoder_vocab_size=61, share_embeddings=False, d_model=16, n_heads=2, d_ff=24,
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r'family "bart" cannot express (share_embeddings|encoder_vocab_size)'):
        model.save_pretrained(tmp_path)


def test_noise_on_one_embedding_is_refused(tmp_path):
    """What NEFTune and FGM disturb is one embedding; without them such a model is fine-tuned."""
    pairs = [{"source": row["text"], "target": row["label"]} for row in rows(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    fields = {"family": "custom", "share_embeddings": False, "objectives": ["seq2seq"], "decoder_start_token_id": 2}
    pretrained(tmp_path / "base", "bart-tiny", eos_token_id=3, **fields)
    for name in ("neftune", "fgm"):
        config = tiny(tmp_path, "task=seq2seq", f"{name}=1.0")
        with pytest.raises(ValueError, match="this model's encoder and decoder have their own"):
            train(config, tmp_path / name)
    assert train(tiny(tmp_path, "task=seq2seq", "steps=1"), tmp_path / "plain").step == 1
