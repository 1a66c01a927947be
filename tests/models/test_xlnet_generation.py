"""XLNet's two ways of reading what it continues: with every token again, or each token once, in an order that stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmengine import Transformer, TransformerConfig
from llmengine.models.inputs import Tokens
from llmengine.models.relative_generation import Continuing, Rereading
from llmengine.testing import assert_near

from .peers import hf_model, ours_of, padding_mask, random_ids

PROMPT, NEW = 6, 8


@pytest.fixture
def xlnet(tmp_path):
    """Of an attn_type: Hugging Face's model and ours, in which no two tokens tie."""

    def make(attention: str, **fields) -> tuple[torch.nn.Module, Transformer]:
        theirs = hf_model("XLNetLMHeadModel", seed=3, attn_type=attention, mem_len=None, **fields)
        with torch.no_grad():
            theirs.transformer.word_embedding.weight *= 2.0
        return theirs, ours_of(theirs, tmp_path / attention)

    return make


def in_order(model: Transformer, prompt: Tensor, new: Tensor) -> Tensor:
    """(vocab_size,) what follows prompt (n,) and new tokens (m,), by one pass: the prompt is seen by all, and then each
    new token by those behind it."""
    ids = torch.cat([prompt, new, prompt.new_zeros(1)])
    key_ranks = torch.cat([torch.full((len(prompt),), -1), torch.arange(len(new) + 1)])
    at = torch.tensor([[len(ids) - 1]])
    return model(
        ids[None], query_ranks=key_ranks.clamp(min=0)[None], key_ranks=key_ranks[None], target_positions=at
    ).logits[0, 0]


@pytest.mark.parametrize("clamp", [-1, 5], ids=["", "clamped"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("attention", ["bi", "uni"])
@torch.no_grad()
def test_cached_equals_uncached(attention, side, clamp, xlnet):
    """Logits of each step, of prompts of several lengths whose rows are repeated and change places between steps."""
    _, ours = xlnet(attention, clamp_len=clamp)
    lengths = [6, 6, 6] if side == "none" else [6, 1, 4]
    ids, mask = random_ids(3, PROMPT), padding_mask(side, lengths, PROMPT)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    prompts = [row[kept] for row, kept in zip(ids, real, strict=True)]
    news = [prompt[:0] for prompt in prompts]
    reader = Continuing(ours, Tokens(ids, mask), NEW)
    generator = torch.Generator().manual_seed(0)
    for step in range(NEW):
        for row, (prompt, new) in enumerate(zip(prompts, news, strict=True)):
            assert_near(reader.scores[row], in_order(ours, prompt, new), 1e-5, f"step {step}, row {row}")
        if step in (2, 5):
            rows = [1, 1, 0, 2] if step == 2 else [3, 0, 1]
            reader.select(torch.tensor(rows))
            prompts, news = ([each[row] for row in rows] for each in (prompts, news))
        if step + 1 < NEW:
            tokens = torch.randint(3, 61, (len(prompts),), generator=generator)
            reader.step(tokens)
            news = [torch.cat([new, token[None]]) for new, token in zip(news, tokens, strict=True)]


@torch.no_grad()
def test_as_hugging_faces_mems(xlnet):
    """Their model, given the mems of all tokens but the dummy, which no one sees: "purely auto-regressive"."""
    theirs, ours = xlnet("bi")
    ids, mems = random_ids(2, PROMPT), None
    reader = Continuing(ours, Tokens(ids), NEW)
    for step in range(NEW):
        given = torch.cat([ids, ids.new_zeros(2, 1)], 1)
        unseen = torch.zeros(2, given.shape[1], given.shape[1])
        unseen[:, :, -1] = 1
        last = torch.zeros(2, 1, given.shape[1])
        last[:, :, -1] = 1
        out = theirs(given, perm_mask=unseen, target_mapping=last, mems=mems, use_mems=True)
        mems = [past[:-1] for past in out.mems]
        assert len(mems[0]) == PROMPT + step
        assert_near(reader.scores, out.logits[:, 0], 1e-5, f"step {step}")
        if step + 1 < NEW:
            ids = random_ids(2, 1, seed=step)
            reader.step(ids[:, 0])


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "seed": 5, "num_return_sequences": 2}],
    ids=["greedy", "beams", "samples"],
)
def test_where_tokens_never_see_what_is_behind_them_both_are_the_same(options, xlnet):
    _, ours = xlnet("uni")
    ids, mask = random_ids(2, PROMPT), padding_mask("left", [6, 4], PROMPT)
    read, again, default = (
        ours.generate(ids, mask, NEW, reread=reread, eos_token_id=(), **options) for reread in (False, True, None)
    )
    assert torch.equal(read, again) and torch.equal(read, default)


def test_where_they_do_the_states_of_old_tokens_change(xlnet):
    """Why nothing can be kept: a new token moves the prediction through the states of the tokens before it."""
    _, ours = xlnet("bi")
    ids, tokens = random_ids(2, PROMPT), torch.tensor([7, 9])
    again, once = Rereading(ours, Tokens(ids)), Continuing(ours, Tokens(ids), 2)
    assert_near(once.scores, again.scores, 1e-5, "prompts are read alike")
    once.step(tokens), again.step(tokens)
    assert (once.scores - again.scores).abs().amax(1).min() > 1e-3
    generated = [ours.generate(ids, max_new_tokens=NEW, eos_token_id=(), reread=reread) for reread in (None, True)]
    assert torch.equal(*generated), "the default reads again"


def test_greedy_text_is_the_order_s_best(xlnet):
    _, ours = xlnet("bi")
    ids = random_ids(1, PROMPT)
    found = ours.generate(ids, max_new_tokens=NEW, eos_token_id=(), reread=False)[0]
    for n in range(PROMPT, PROMPT + NEW):
        assert found[n] == in_order(ours, found[:PROMPT], found[PROMPT:n]).argmax()


def test_parts_with_dtypes_of_their_own(xlnet):
    _, ours = xlnet("bi")
    ours.to_dtype({"default": torch.bfloat16, "layers.1": torch.float32})
    found = ours.generate(random_ids(2, PROMPT), max_new_tokens=NEW, eos_token_id=(), reread=False)
    assert found.shape == (2, PROMPT + NEW)


def test_decoders_do_not_read_again():
    model = Transformer(TransformerConfig.preset("gpt-tiny", vocab_size=50, d_model=16, n_heads=2, d_ff=16))
    with pytest.raises(ValueError, match="generate: reread is for XLNet; got False"):
        model.generate(random_ids(1, 3), reread=False)
