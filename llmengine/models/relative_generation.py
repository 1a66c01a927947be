"""How XLNet reads a text that it continues: all of it again for each token, or each token once.

Its query stream predicts the token behind a text. The content stream sees in both directions, so that a new token
changes the states of all tokens before it; who wants these pays for them (`Rereading`). In the order "the prompt, and
then each new token" nothing changes that has been read: the states are those of one pass under that order, and their
keys and values are kept (`Continuing`). Hugging Face's XLNet does something between: with mems it reads the last two
tokens again, so that a token has seen one token behind it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Module

from llmengine.models.cache import Cache, packed_prompts
from llmengine.models.dtypes import into
from llmengine.models.inputs import Tokens
from llmengine.models.layout import Packed
from llmengine.models.relative import Projected, RelativeAttention, RelativeContext, RelativeStack, Rows

if TYPE_CHECKING:
    from llmengine.models.generation import Generation


class Rereading:
    """XLNet: the next token is what a query stream predicts behind all that has been, which sees each other but not it.

    Every step reads the whole sequence again: what stands before changes with what follows, from the second layer on,
    so that nothing can be kept and be the same.
    """

    def __init__(self, model: Generation, prompts: Tokens) -> None:
        packed_prompts(prompts, model.config, causal=False)  # checks
        ids, mask = prompts.input_ids, prompts.attention_mask
        mask = torch.ones_like(ids) if mask is None else mask.long()
        order = mask.argsort(dim=1, stable=True)  # padding to the left: new tokens follow the last real one
        self.model = model
        self.ids, self.mask = ids.gather(1, order), mask.gather(1, order)
        self.scores = self._scores()

    def step(self, tokens: Tensor) -> None:
        self.ids = torch.cat([self.ids, tokens[:, None].to(self.ids.dtype)], 1)
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        self.scores = self._scores()

    def select(self, rows: Tensor) -> None:
        self.ids, self.mask = self.ids.index_select(0, rows), self.mask.index_select(0, rows)

    def _scores(self) -> Tensor:
        return self.model(**predicting_next(self.ids, self.mask)).logits[:, 0].float()


class Continuing:
    """XLNet: every token is read once. A prompt's tokens see each other; a new token what is before it, and itself.

    A step runs two rows of each sequence: the newest token's content, whose keys and values join those that are kept,
    and the query at the place behind it.
    """

    def __init__(self, model: Generation, prompts: Tokens, steps: int) -> None:
        packed = packed_prompts(prompts, model.config, causal=False)
        lengths = packed.cu_seqlens.diff()
        assert isinstance(model.encoder, RelativeStack)
        self.model, self.stack = model, model.encoder
        self.cache = _Cache(lengths.long(), int(lengths.max()) + steps)
        self.distances: dict[Module, Tensor] = {}
        """Each layer's position keys, of the distances from 0 on."""
        self.scores = self._read_prompts(packed, packed.enter(prompts.input_ids))

    def step(self, tokens: Tensor) -> None:
        at, rows = self.cache.lengths, len(tokens)
        self.cache.lengths = at + 1
        longest = int(at.max()) + 1
        x = torch.stack([self.stack.embeddings.word(tokens), self._queries(rows)], 1).flatten(0, 1)
        both = torch.stack([at, at + 1], 1).flatten().int()
        # content and query see the slots up to the content's own; the causal mask spares looking beyond
        seen = (at + 1).repeat_interleave(2).int()
        slots = torch.arange(self.cache.slots, dtype=torch.int32, device=x.device)
        bounds = torch.arange(rows + 1, dtype=torch.int32, device=x.device)
        context = RelativeContext(
            (Rows(2 * rows, bounds * 2, 2, None, seen, both),), x.new_zeros(0), 0, bounds * self.cache.slots,
            self.cache.slots, None, slots.repeat(rows), causal=True, cached=_NewToken(self, at, longest),
        )  # fmt: skip
        for layer in self.stack.each_layer():
            x = into(layer.attention.q, x)
            x = layer(x, x[::2], context)
        self.scores = self._logits(x[1::2])

    def select(self, rows: Tensor) -> None:
        self.cache.select(rows)

    def _read_prompts(self, packed: Packed, ids: Tensor) -> Tensor:
        lengths, sequences = packed.cu_seqlens.diff(), packed.sequences
        x = torch.cat([self.stack.embeddings.word(ids), self._queries(sequences)])
        zero, longest = packed.max_seqlen - 1, packed.max_seqlen
        streams = (
            Rows(packed.tokens, packed.cu_seqlens, longest, None, None),
            Rows(sequences, torch.arange(sequences + 1, dtype=torch.int32, device=x.device), 1, None, None, lengths),
        )
        context = RelativeContext(
            streams, self.stack.encoding(-zero, max(self.cache.slots, longest), x), zero, packed.cu_seqlens, longest,
            None, None, causal=self.model.config.relative_causal, cached=_Prompts(self, packed),
        )  # fmt: skip
        for layer in self.stack.each_layer():
            x = into(layer.attention.q, x)
            x = layer(x, x[: packed.tokens], context)
        return self._logits(x[packed.tokens :])

    def _queries(self, rows: int) -> Tensor:
        """(rows, d_model): what every predicted token begins with."""
        embeddings = self.stack.embeddings
        return embeddings.query_stream.to(embeddings.word.weight.dtype).expand(rows, -1)

    def _logits(self, x: Tensor) -> Tensor:
        assert self.model.token_head is not None  # generate has checked
        return self.model.token_head(x, self.model.words.weight).float()


class _Cache(Cache):
    """(batch, slots, heads, head_dim): relative attention takes the slots of all rows as packed tokens. It masks those
    that hold no token yet, but a weight of 0 times a NaN there would be NaN: they are zeros."""

    def write(self, layer: Hashable, rows: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        for kept, x in ((self.keys, k), (self.values, v)):
            if layer not in kept:
                kept[layer] = x.new_zeros(len(self.lengths), self.slots, *x.shape[1:])
            kept[layer][rows, slots] = x


class _Prompts:
    """Keys and values of the prompts, as they are; what later steps need of them is kept."""

    def __init__(self, reader: Continuing, packed: Packed) -> None:
        tokens = torch.arange(packed.tokens, device=packed.cu_seqlens.device)
        self.reader, self.rows = reader, packed.sequence(tokens)
        self.slots = tokens - packed.cu_seqlens[:-1].long()[self.rows]

    def project(self, attention: RelativeAttention, content: Tensor, context: RelativeContext) -> Projected:
        k, v, r = attention.project(content, context)
        self.reader.cache.write(attention, self.rows, self.slots, k, v)
        self.reader.distances[attention] = r[context.zero_distance :]
        return k, v, r


class _NewToken:
    """One more token of each sequence, which joins what is kept."""

    def __init__(self, reader: Continuing, slots: Tensor, longest: int) -> None:
        self.reader, self.slots, self.longest = reader, slots, longest
        self.rows = torch.arange(len(slots), device=slots.device)

    def project(self, attention: RelativeAttention, content: Tensor, context: RelativeContext) -> Projected:
        cache = self.reader.cache
        cache.write(attention, self.rows, self.slots, *attention.keys_and_values(content))
        keys, values = cache.keys[attention].flatten(0, 1), cache.values[attention].flatten(0, 1)
        return keys, values, self.reader.distances[attention][: self.longest + 1]


def predicting_next(ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """What XLNet's forward takes to predict the token behind these (batch, length), logits (batch, 1, vocab_size)."""
    mask = torch.ones_like(ids) if mask is None else mask
    ids, mask = (torch.nn.functional.pad(x, (0, 1), value=value) for x, value in ((ids, 0), (mask, 1)))
    query_ranks = torch.zeros_like(ids)
    key_ranks = query_ranks - 1
    key_ranks[:, -1] = 0
    last = torch.full((len(ids), 1), ids.shape[1] - 1, device=ids.device)
    return {
        "input_ids": ids, "attention_mask": mask, "query_ranks": query_ranks, "key_ranks": key_ranks,
        "target_positions": last,
    }  # fmt: skip
