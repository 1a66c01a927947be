"""Text generation of decoders: greedy, sampling, beam search, over a cache of keys and values.

Prompts may be padded on either side. They are unpadded at the door, and a sequence's n-th token lies in slot n of its
row of the cache: there is no padding inside, and every position is the token's place in its own sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from llmengine import functional
from llmengine.models.config import TransformerConfig
from llmengine.models.heads import TokenHead
from llmengine.models.inputs import layout_of
from llmengine.models.layers import Embeddings
from llmengine.models.layout import Attending, Packed


class Cache:
    """Keys and values of every layer, (batch, slots, heads, head_dim) each; row b holds lengths[b] tokens."""

    def __init__(self, layers: int, batch: int, slots: int, heads: int, head_dim: int, like: Tensor) -> None:
        # zeros: a slot that holds no token yet is masked, but a weight of 0 times a NaN that lay there would be NaN
        self.keys, self.values = ([like.new_zeros(batch, slots, heads, head_dim) for _ in range(layers)] for _ in "kv")
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=like.device)

    def write(self, layer: int, rows: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self.keys[layer][rows, slots] = k
        self.values[layer][rows, slots] = v

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was: repeats prompts for beams, reorders beams."""
        self.keys = [keys.index_select(0, rows) for keys in self.keys]
        self.values = [values.index_select(0, rows) for values in self.values]
        self.lengths = self.lengths.index_select(0, rows)


class Prompt:
    """The layout of the prompts' pass: packed sequences, whose keys and values are kept."""

    def __init__(self, packed: Packed, cache: Cache) -> None:
        self.packed = packed
        self.cache = cache
        tokens = torch.arange(int(packed.cu_seqlens[-1]), device=packed.cu_seqlens.device)
        self.rows = torch.bucketize(tokens, packed.cu_seqlens[1:], right=True)
        self.slots = tokens - packed.cu_seqlens[:-1].long()[self.rows]
        cache.lengths = packed.cu_seqlens.diff().long()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, dropout_p: float) -> Tensor:
        self.cache.write(layer, self.rows, self.slots, k, v)
        return self.packed.attend(q, k, v, layer, dropout_p)

    def last(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.packed.cu_seqlens[1:] - 1)


class Step:
    """The layout of one more token per sequence, which sees the cache and itself."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.slots = cache.lengths
        self.rows = torch.arange(len(self.slots), device=self.slots.device)
        self.longest = int(self.slots.max()) + 1
        reach = torch.arange(self.longest, device=self.slots.device)
        self.mask = (reach <= self.slots[:, None])[:, None, None, :]
        cache.lengths = cache.lengths + 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, dropout_p: float) -> Tensor:
        self.cache.write(layer, self.rows, self.slots, k, v)
        keys = self.cache.keys[layer][:, : self.longest].transpose(1, 2)
        values = self.cache.values[layer][:, : self.longest].transpose(1, 2)
        return functional.scaled_dot_product_attention(q.unsqueeze(2), keys, values, self.mask).squeeze(2)

    def last(self, x: Tensor) -> Tensor:
        return x


class Generation(Module):
    """`generate`, for the model that has these parts."""

    config: TransformerConfig
    embeddings: Embeddings
    token_head: TokenHead | None

    def _hidden(
        self, layout: Attending, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None, keep: bool
    ) -> tuple[Tensor, list[Tensor] | None]:
        raise NotImplementedError  # each model has its own

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_beams: int = 1,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Continues the prompts; returns (batch, prompt + new) token ids, dropout off.

        input_ids (batch, length), padded on either side as attention_mask (1 and 0) tells; the new tokens follow the
        prompts' last column. A sequence ends with eos_token_id (default: the config's); pad_token_id follows (default:
        the config's, or else eos). Greedy by default. do_sample draws from softmax(logits / temperature), restricted to
        the top_k most probable tokens and to the fewest that together have probability top_p (Holtzman et al. 2020);
        draws come from `generator`, or one made from `seed`, or PyTorch's. num_beams > 1: beam search, the best mean
        log-probability per new token.
        """
        config = self.config
        if self.token_head is None or not config.causal:
            raise ValueError(f"generate: needs a decoder with objective 'clm'; this is {config.architecture!r}")
        eos = config.eos_token_id if eos_token_id is None else eos_token_id
        pad = next((t for t in (pad_token_id, config.pad_token_id, eos) if t is not None), 0)
        _check_options(max_new_tokens, do_sample, temperature, top_k, top_p, num_beams, eos, pad, config.vocab_size)
        packed = layout_of(config, input_ids, attention_mask, None, None)
        if not isinstance(packed, Packed):
            raise RuntimeError("generate: torch.compile may trace forward, but not generate; call it uncompiled")
        if generator is not None and seed is not None:
            raise ValueError("generate: give generator or seed, not both")
        if seed is not None:
            generator = torch.Generator(input_ids.device).manual_seed(seed)
        prompt = int(packed.cu_seqlens.diff().max())
        if prompt + max_new_tokens > config.max_positions:
            raise ValueError(
                f"generate: {prompt} prompt tokens and max_new_tokens {max_new_tokens} exceed max_positions "
                f"{config.max_positions}"
            )
        training = self.training
        self.eval()
        try:
            scores, cache = self._read_prompts(packed, input_ids, prompt + max_new_tokens)
            if num_beams > 1:
                new = self._beams(scores, cache, max_new_tokens, num_beams, eos, pad)
            else:
                choose = _sampler(temperature, top_k, top_p, generator) if do_sample else _greedy
                new = self._one_by_one(scores, cache, max_new_tokens, choose, eos, pad)
        finally:
            self.train(training)
        return torch.cat([input_ids, new.to(input_ids.dtype)], dim=1)

    def _read_prompts(self, packed: Packed, input_ids: Tensor, slots: int) -> tuple[Tensor, Cache]:
        """Logits after each prompt (batch, vocab_size), and the cache that holds it."""
        config, weight = self.config, self.embeddings.word.weight
        like = weight.new_empty(0, dtype=_compute_dtype(weight))
        cache = Cache(config.n_layers, len(packed.cu_seqlens) - 1, slots, config.n_heads, config.head_dim, like)
        layout = Prompt(packed, cache)
        return self._scores(layout, packed.enter(input_ids), layout.slots), cache

    def _step(self, cache: Cache, tokens: Tensor) -> Tensor:
        """Logits after one more token (batch,) per sequence."""
        layout = Step(cache)
        return self._scores(layout, tokens, layout.slots)

    def _scores(self, layout: Prompt | Step, tokens: Tensor, positions: Tensor) -> Tensor:
        x, _ = self._hidden(layout, tokens, positions, None, keep=False)
        assert self.token_head is not None  # generate has checked
        return self.token_head(layout.last(x), self.embeddings.word.weight).float()

    def _one_by_one(self, scores: Tensor, cache: Cache, steps: int, choose, eos: int | None, pad: int) -> Tensor:
        ended = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        new = []
        for step in range(steps):
            token = torch.where(ended, pad, choose(scores))
            new.append(token)
            if eos is not None:
                ended = ended | (token == eos)
                if ended.all():
                    break
            if step + 1 < steps:
                scores = self._step(cache, token)
        return torch.stack(new, dim=1)

    def _beams(self, scores: Tensor, cache: Cache, steps: int, beams: int, eos: int | None, pad: int) -> Tensor:
        """Beam search (Sutskever et al. 2014), for each prompt the hypothesis of best mean log-probability.

        2 * beams candidates are looked at in each step, so that beams that do not end always remain.
        """
        batch, vocab = scores.shape
        device = scores.device
        cache.select(torch.arange(batch, device=device).repeat_interleave(beams))
        first = torch.arange(batch, device=device)[:, None] * beams
        # all beams of a prompt start equal: let only the first one speak
        total = torch.full((batch, beams), -torch.inf, device=device)
        total[:, 0] = 0.0
        scores = scores.repeat_interleave(beams, 0)
        tokens = torch.empty(batch, beams, 0, dtype=torch.int64, device=device)
        finished = [Hypotheses(beams) for _ in range(batch)]
        for step in range(steps):
            candidates = total[:, :, None] + scores.log_softmax(-1).view(batch, beams, vocab)
            best, places = candidates.flatten(1).topk(min(2 * beams, beams * vocab), dim=1)
            beam, token = places // vocab, places % vocab
            ends = token == eos if eos is not None else torch.zeros_like(token, dtype=torch.bool)
            for b, rank in ends[:, :beams].nonzero().tolist():
                finished[b].add(best[b, rank].item(), [*tokens[b, beam[b, rank]].tolist(), eos])
            # the beams that go on: the best candidates that do not end
            keep = best.masked_fill(ends, -torch.inf).topk(beams, dim=1).indices
            total, beam, token = best.gather(1, keep), beam.gather(1, keep), token.gather(1, keep)
            tokens = torch.cat([tokens.gather(1, beam[:, :, None].expand(-1, -1, step)), token[:, :, None]], dim=2)
            for b, hypotheses in enumerate(finished):
                hypotheses.close_if_complete(total[b, 0].item(), step + 1)
            if step + 1 == steps or all(hypotheses.closed for hypotheses in finished):
                break
            cache.select((first + beam).flatten())
            scores = self._step(cache, token.flatten())
        rows = []
        for b, hypotheses in enumerate(finished):
            for rank in range(beams):
                hypotheses.add(total[b, rank].item(), tokens[b, rank].tolist())
            rows.append(max(hypotheses.kept)[1])
        length = max(map(len, rows))
        return torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=device)


class Hypotheses:
    """The best finished sequences of one prompt, by mean log-probability.

    Once closed it takes no more: what a prompt gives must not depend on how long the others of its batch go on.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.kept: list[tuple[float, list[int]]] = []
        self.closed = False

    def add(self, log_probability: float, tokens: list[int]) -> None:
        if not self.closed:
            self.kept = sorted([*self.kept, (log_probability / len(tokens), tokens)], reverse=True)[: self.most]

    def close_if_complete(self, best_running: float, length: int) -> None:
        """Closes where no running beam, at its present mean, would be kept."""
        self.closed |= len(self.kept) == self.most and self.kept[-1][0] >= best_running / length


def _greedy(scores: Tensor) -> Tensor:
    return scores.argmax(-1)


def _sampler(temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None):
    def choose(scores: Tensor) -> Tensor:
        probabilities = restrict(scores / temperature, top_k, top_p).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)

    return choose


def restrict(scores: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Scores (batch, vocab) with -inf outside the top_k best and the smallest set of probability top_p."""
    if top_k is not None:
        least = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ordered, order = scores.sort(descending=True)
        probabilities = ordered.softmax(-1)
        # a token stays if those before it do not make up top_p yet: the first always stays
        out = probabilities.cumsum(-1) - probabilities >= top_p
        scores = scores.masked_fill(out.scatter(1, order, out), -torch.inf)
    return scores


def _compute_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _check_options(max_new_tokens, do_sample, temperature, top_k, top_p, num_beams, eos, pad, vocab_size) -> None:
    for name, value, right, allowed in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, temperature > 0, "above 0 (greedy: do_sample=False)"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "in (0, 1]"),
        ("num_beams", num_beams, 1 <= num_beams <= vocab_size, f"from 1 to vocab_size ({vocab_size})"),
        ("eos_token_id", eos, eos is None or 0 <= eos < vocab_size, f"from 0 to {vocab_size - 1}"),
        ("pad_token_id", pad, 0 <= pad < vocab_size, f"from 0 to {vocab_size - 1}"),
    ):
        if not right:
            raise ValueError(f"generate: {name} is {value}; it must be {allowed}")
    if num_beams > 1 and do_sample:
        raise ValueError("generate: num_beams > 1 with do_sample is not supported; choose one")
    if not do_sample and (temperature != 1.0 or top_k is not None or top_p is not None):
        raise ValueError("generate: temperature, top_k and top_p need do_sample=True")
