"""Generation against recomputation without a cache, against Hugging Face, and by its properties."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmengine import Transformer, TransformerConfig
from llmengine.models.decoding import forbid_repeated_ngrams, restrict
from llmengine.testing import poison

from .peers import SHAPES, VOCABULARY, hf_model, ours_of, padding_mask, random_ids

LENGTHS, LONGEST, NEW = [5, 1, 8], 8, 9
EOS = SHAPES["gpt2"]["eos_token_id"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[transformers.PreTrainedModel, Transformer]:
    """Hugging Face's and ours, of equal weights; sharp enough that no two tokens tie, and that eos happens."""
    theirs = hf_model("GPT2LMHeadModel", seed=3)
    with torch.no_grad():
        theirs.transformer.wte.weight *= 3.0
    return theirs, ours_of(theirs, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def model(models) -> Transformer:
    return models[1]


def prompts() -> list[Tensor]:
    return [random_ids(n, seed=i + 10) for i, n in enumerate(LENGTHS)]


def padded(side: str) -> dict[str, Tensor]:
    mask = padding_mask(side, LENGTHS, LONGEST)
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    ids[mask == 1] = torch.cat(prompts())
    return {"input_ids": ids, "attention_mask": mask}


def recomputed(model: Transformer, prompt: Tensor, steps: int, eos: int | None) -> list[int]:
    """Greedy, one whole pass for each token."""
    ids = prompt.tolist()
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("eos", [None, "often"])
def test_greedy_equals_recomputation(model, side, eos):
    if eos == "often":
        eos = recomputed(model, prompts()[0], NEW, None)[3]  # a token that the first prompt does produce
    expected = [recomputed(model, prompt, NEW, EOS if eos is None else eos) for prompt in prompts()]
    batch = padded(side)
    with poison():  # an unused slot of the cache must not show
        out = model.generate(**batch, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=0)
    assert torch.equal(out[:, :LONGEST], batch["input_ids"])
    longest = max(map(len, expected))
    assert out[:, LONGEST:].tolist() == [row + [0] * (longest - len(row)) for row in expected]


def test_greedy_and_beams_equal_hugging_faces(models):
    theirs, ours = models
    batch = padded("left")
    ended = 0
    for seed in range(8):
        batch["input_ids"] = torch.where(batch["attention_mask"] == 1, random_ids(3, LONGEST, seed=seed), 0)
        free = ours.generate(**batch, max_new_tokens=NEW, eos_token_id=60)
        eos = int(free[seed % 3, LONGEST + seed % 4])  # one that does appear
        for beams in (1, 2, 4):
            # not pad token 0, which Hugging Face's beam search takes for none
            options = {"max_new_tokens": NEW, "num_beams": beams, "pad_token_id": 1, "eos_token_id": eos}
            expected = theirs.generate(**batch, do_sample=False, **options)
            got = ours.generate(**batch, **options)
            assert torch.equal(got, expected), f"seed {seed}, {beams} beams"
            ended += int((got[:, LONGEST:] == eos).any())
    assert ended >= 6, "hardly a sequence ended: the test says little about eos"


def test_beams_with_many_ends_equal_hugging_faces(models):
    """Where a quarter of the tokens end a text, most of the best candidates do; and some only in the last step."""
    theirs, ours = models
    for seed in (2, 13, 16, 20):
        ids = random_ids(3, 6, seed=seed)
        options = {
            "max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 3, "early_stopping": True,
            "eos_token_id": list(range(3, VOCABULARY, 4)), "pad_token_id": 1,
        }  # fmt: skip
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
        assert torch.equal(ours.generate(ids, **options), expected), f"seed {seed}"


@pytest.mark.parametrize("beams", [1, 3])
def test_marian_never_writes_padding(beams, tmp_path):
    """As published directories ask of Transformers, by bad_words_ids."""
    theirs = hf_model("MarianMTModel", seed=3)
    theirs.final_logits_bias[0, theirs.config.pad_token_id] = 5.0
    ours, ids = ours_of(theirs, tmp_path), random_ids(3, 6)
    options = {"max_new_tokens": 5, "num_beams": beams}
    expected = theirs.generate(ids, do_sample=False, bad_words_ids=[[theirs.config.pad_token_id]], **options)
    assert torch.equal(ours.generate(ids, **options), expected)


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_a_prompt_gives_the_same_alone_and_in_a_batch(model, beams):
    for eos in (5, 14, 41):
        options = {"max_new_tokens": NEW, "num_beams": beams, "eos_token_id": eos, "pad_token_id": 1}
        together = model.generate(**padded("right"), **options)[:, LONGEST:]
        for row, prompt in enumerate(prompts()):
            alone = model.generate(prompt[None], **options)[0, len(prompt) :]
            assert torch.equal(together[row, : len(alone)], alone)
            assert (together[row, len(alone) :] == 1).all()


def test_beams_never_find_less_than_greedy(model):
    """The best hypothesis of a wide search has at least greedy's mean log-probability here, and one beam is greedy."""

    def score(row: Tensor, prompt: int) -> float:
        logs = model(row[None]).logits[0].log_softmax(-1)
        return logs[prompt - 1 : -1].gather(1, row[prompt:, None]).mean().item()

    for seed in range(3):
        ids = random_ids(1, 4, seed=seed)
        options = {"max_new_tokens": 6, "eos_token_id": 60}
        greedy, wide = (model.generate(ids, num_beams=n, **options)[0] for n in (1, 10))
        assert score(wide, 4) >= score(greedy, 4) - 1e-6


def test_a_seed_reproduces_samples(model):
    ids = random_ids(4, 5)
    options = {"max_new_tokens": NEW, "do_sample": True, "temperature": 2.0}
    first = model.generate(ids, seed=1, **options)
    torch.manual_seed(99)
    assert torch.equal(model.generate(ids, seed=1, **options), first)
    assert torch.equal(model.generate(ids, generator=torch.Generator().manual_seed(1), **options), first)
    assert not torch.equal(model.generate(ids, seed=2, **options), first)
    torch.manual_seed(5)
    global_first = model.generate(ids, **options)
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids, **options), global_first)


def test_samples_have_the_softmax_probabilities(model):
    """800 draws of one next token against softmax(logits / temperature) restricted by top_k and top_p."""
    draws, prompt = 800, random_ids(1, 5)
    scores = model(prompt).logits[0, -1:] / 3.0
    for options in ({}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 8, "top_p": 0.5}):
        expected = restrict(scores, options.get("top_k"), options.get("top_p")).softmax(-1)[0]
        drawn = model.generate(
            prompt.expand(draws, -1), max_new_tokens=1, do_sample=True, temperature=3.0, seed=0, **options
        )[:, -1]
        share = torch.bincount(drawn, minlength=VOCABULARY) / draws
        assert (share[expected == 0] == 0).all()
        deviation = (expected * (1 - expected) / draws).sqrt()
        assert ((share - expected).abs() <= 5 * deviation + 3 / draws).all()


def test_the_one_best_token_is_greedy(model):
    ids = random_ids(4, 5)
    greedy = model.generate(ids, max_new_tokens=NEW)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=True, **options), greedy)


logits = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12, unique=True)


@settings(max_examples=100, deadline=None)
@given(logits, st.integers(1, 15))
def test_top_k_keeps_the_k_best(values, k):
    scores = torch.tensor([values])
    kept = restrict(scores, k, None)[0].isfinite()
    assert kept.sum() == min(k, len(values))
    assert scores[0][kept].min() >= scores[0].sort(descending=True).values[: int(kept.sum())].min()


@settings(max_examples=100, deadline=None)
@given(logits, st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_of_that_probability(values, p):
    scores = torch.tensor([values], dtype=torch.float64)
    probabilities = scores.softmax(-1)[0]
    kept = restrict(scores, None, p)[0].isfinite()
    assert kept.any() and probabilities[kept].max() == probabilities.max()
    assert probabilities[kept].sum() >= p - 1e-9
    assert not kept.all() or p > 0
    if kept.sum() > 1:  # one token fewer would not do
        assert probabilities[kept].sum() - probabilities[kept].min() < p + 1e-9
    if (~kept).any():  # the others are the less probable ones
        assert probabilities[~kept].max() <= probabilities[kept].min()


def test_top_k_is_applied_before_top_p():
    """The nucleus is that of the renormalised k best, as in Hugging Face's order of the two."""
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    both = restrict(scores, 2, 0.55)[0].isfinite().tolist()
    assert both == [True, False, False, False]
    assert restrict(scores, None, 0.55)[0].isfinite().tolist() == [True, True, False, False]


def test_after_eos_comes_padding_and_generation_stops(model):
    ids = random_ids(1, 5)
    free = model.generate(ids, max_new_tokens=NEW, eos_token_id=60, pad_token_id=0)[0, 5:].tolist()
    eos = free[2]
    stop = free.index(eos)
    out = model.generate(torch.cat([ids, random_ids(1, 5, seed=8)]), max_new_tokens=NEW, eos_token_id=eos)
    assert out[0, 5 : 6 + stop].tolist() == free[: stop + 1]
    assert (out[0, 6 + stop :] == eos).all()  # without a pad token, eos pads
    assert model.generate(ids, max_new_tokens=NEW, eos_token_id=eos).shape == (1, 6 + stop)


def test_it_leaves_the_model_as_it_was(model):
    torch.manual_seed(0)
    noisy = Transformer(TransformerConfig.preset("gpt-tiny", vocab_size=61, max_positions=24, dropout=0.5))
    ids = random_ids(2, 5)
    noisy.train()
    first = noisy.generate(ids, max_new_tokens=NEW)
    assert torch.equal(noisy.generate(ids, max_new_tokens=NEW), first), "dropout must be off"
    assert noisy.training and all(module.training for module in noisy.modules())
    noisy.eval()
    noisy.generate(ids, max_new_tokens=3)
    assert not noisy.training
    assert not first.requires_grad and all(p.grad is None for p in noisy.parameters())
    assert noisy.generate(ids.int(), max_new_tokens=3).dtype == torch.int32


def test_under_autocast(model):
    ids = random_ids(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.generate(ids, max_new_tokens=NEW)
        beams = model.generate(ids, max_new_tokens=NEW, num_beams=3)
    assert out.shape[1] > 5 and beams.shape[1] > 5
    assert out.max() < VOCABULARY and out.min() >= 0


IDS = random_ids(2, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"max_new_tokens": 20}, "5 prompt tokens and max_new_tokens 20 exceed max_positions 24"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"do_sample": True, "top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"do_sample": True, "top_p": 0.0}, r"top_p is 0.0; it must be in \(0, 1\]"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5"),
        ({"num_beams": 0}, r"num_beams is 0; it must be from 1 to vocab_size \(61\)"),
        ({"num_beams": 62}, "num_beams is 62"),
        ({"num_beams": 2, "do_sample": True}, "num_beams > 1 with do_sample is not supported"),
        ({"temperature": 0.5}, "temperature, top_k, top_p and min_p need do_sample=True"),
        ({"top_k": 5}, "temperature, top_k, top_p and min_p need do_sample=True"),
        ({"do_sample": True, "seed": 1, "generator": torch.Generator()}, "give generator or seed, not both"),
        ({"eos_token_id": 61}, r"eos_token_id is 61; it must be from 0 to 60"),
        ({"pad_token_id": -1}, r"pad_token_id is -1; it must be from 0 to 60"),
        ({"input_ids": IDS[0]}, r"input_ids has shape \(5,\)"),
        ({"input_ids": IDS + 61}, "input_ids holds"),
        ({"attention_mask": torch.zeros(2, 5)}, "attention_mask has no token in row 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_options_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": IDS, "max_new_tokens": 3} | options)


def test_only_decoders_with_a_token_head_generate():
    for options in ({"preset": "bert-tiny"}, {"preset": "gpt-tiny", "family": "custom", "objectives": []}):
        with pytest.raises(
            ValueError, match="generate: needs a decoder with objective 'clm' or 'seq2seq', or XLNet's 'plm'; this is "
        ):
            Transformer(TransformerConfig.from_dict(options | {"vocab_size": 61})).generate(IDS)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_repeated_ngrams_are_those_of_hugging_face(size, length):
    ids = torch.randint(4, (5, length), generator=torch.Generator().manual_seed(length))
    expected = transformers.NoRepeatNGramLogitsProcessor(size)(ids, torch.zeros(5, 4))
    assert torch.equal(forbid_repeated_ngrams(ids, torch.zeros(5, 4), size), expected)
