"""Text generation: greedy, sampling, beam search, over a cache of keys and values; decoders and encoder-decoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import Embedding, Module

from llmengine.models.cache import Cache, Prompt, Source, Step, packed_prompts
from llmengine.models.config import TransformerConfig
from llmengine.models.decoding import Hypotheses, Processor, greedy, processors_of, sampler
from llmengine.models.heads import TokenHead
from llmengine.models.inputs import Tokens
from llmengine.models.modes import resting
from llmengine.models.relative import RelativeStack
from llmengine.models.relative_generation import Continuing, Rereading

if TYPE_CHECKING:
    from llmengine.models.stack import Stack

Stop = Callable[[Tensor, Tensor], Tensor | bool]
"""Hugging Face's stopping criterion: ids so far and the last logits -> which rows end, (rows,) bool, or all or none."""


class Generation(Module):
    """`generate`, for the model that has these parts."""

    config: TransformerConfig
    encoder: Stack | RelativeStack | None
    decoder: Stack | None
    token_head: TokenHead | None

    @property
    def words(self) -> Embedding:
        raise NotImplementedError  # each model has its own

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        *,
        decoder_input_ids: Tensor | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
        num_return_sequences: int = 1,
        repetition_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
        min_new_tokens: int = 0,
        logits_processor: Sequence[Processor] = (),
        stopping_criteria: Sequence[Stop] = (),
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        reread: bool | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Continues the prompts; returns (batch * num_return_sequences, prompt + new) token ids, dropout off.

        input_ids (batch, length), padded on either side as attention_mask (1 and 0) tells; the new tokens follow the
        prompts' last column. An encoder-decoder reads input_ids and continues decoder_input_ids (batch, length), by
        default decoder_start_token_id; it returns the decoder's tokens. A sequence ends with one of eos_token_id
        (default: the config's) or where a stopping criterion says so; pad_token_id follows (default: the config's, or
        else eos).

        Greedy by default. do_sample draws from softmax(logits / temperature), restricted to the top_k most probable
        tokens, to the fewest that together have probability top_p (Holtzman et al. 2020), and to those at least min_p
        times as probable as the best; draws come from `generator`, or one made from `seed`, or PyTorch's.
        num_beams > 1: beam search, the best log-probability over (new tokens) ** length_penalty.

        repetition_penalty, no_repeat_ngram_size, min_new_tokens and logits_processor change logits before the choice;
        a processor is called with (ids so far, float32 logits), as Hugging Face's are. Marian never writes its padding.

        reread: of XLNet, whose tokens see those behind them too. True: for each new token the whole text is read
            again, and all of it sees the tokens that came last. False: what was read stays, so that a step costs one
            token: the prompt sees itself, and a new token the prompt and the new ones before it, as in training a
            predicted token sees what is not predicted and what precedes it in the order. None: True, but False where
            tokens never see what is behind them (relative_causal) and both are the same.
        """
        config = self.config
        if config.token_task not in ("clm", "seq2seq", "plm"):
            raise ValueError(
                f"generate: needs a decoder with objective 'clm' or 'seq2seq', or XLNet's 'plm'; this is "
                f"{config.architecture!r} with {list(config.objectives)}"
            )
        ends = _ends(config.eos_token_id if eos_token_id is None else eos_token_id)
        pad = next((t for t in (pad_token_id, config.pad_token_id, *ends) if t is not None), 0)
        _check_options(max_new_tokens, do_sample, temperature, top_k, top_p, min_p, num_beams, num_return_sequences,
                       repetition_penalty, ends, pad, config.vocab_size)  # fmt: skip
        if generator is not None and seed is not None:
            raise ValueError("generate: give generator or seed, not both")
        if seed is not None:
            if not 0 <= seed < 2**63:
                raise ValueError(f"generate: seed is {seed}; it must be in [0, 2**63)")
            generator = torch.Generator(input_ids.device).manual_seed(seed)
        with resting(self):
            source, prompts = self._read_source(input_ids, attention_mask, decoder_input_ids)
            reader = self._reader(source, prompts, max_new_tokens, reread)
            run = _Run(reader, prompts.input_ids.long(), max_new_tokens, ends, pad, stopping_criteria)
            rules = processors_of(
                repetition_penalty, no_repeat_ngram_size, min_new_tokens, run.ids.shape[1], ends,
                prompts.attention_mask, _never(config, ends),
            )  # fmt: skip
            run.processors = [*rules, *logits_processor]
            if num_beams > 1:
                new = run.beams(num_beams, length_penalty, early_stopping, num_return_sequences)
            else:
                run.repeat(num_return_sequences)
                choose = sampler(temperature, top_k, top_p, min_p, generator) if do_sample else greedy
                new = run.one_by_one(choose)
        ids = prompts.input_ids.repeat_interleave(num_return_sequences, 0)
        return torch.cat([ids, new.to(ids.dtype)], dim=1)

    def _reader(self, source: Source | None, prompts: Tokens, steps: int, reread: bool | None) -> Reader:
        if self.config.token_task != "plm":
            if reread is not None:
                raise ValueError(f"generate: reread is for XLNet; got {reread}, but decoders never read anything twice")
            return Cached(self, source, prompts, steps)
        if not self.config.relative_causal if reread is None else reread:
            return Rereading(self, prompts)
        return Continuing(self, prompts, steps)

    def _read_source(
        self, input_ids: Tensor, attention_mask: Tensor | None, decoder_input_ids: Tensor | None
    ) -> tuple[Source | None, Tokens]:
        """What the encoder made of input_ids, if there is one; and the decoder's prompts."""
        tokens = Tokens(input_ids, attention_mask)
        if self.encoder is None or isinstance(self.encoder, RelativeStack):
            return None, tokens
        packed = packed_prompts(tokens, self.config, causal=False)
        memory, _ = self.encoder(packed, packed.enter(input_ids), packed.positions(self.config.position_of == "token"))
        if decoder_input_ids is None:
            start = self.config.decoder_start_token_id
            if start is None:
                raise ValueError("generate: this model has no decoder_start_token_id; give decoder_input_ids")
            decoder_input_ids = input_ids.new_full((input_ids.shape[0], 1), start)
        if decoder_input_ids.dim() != 2 or len(decoder_input_ids) != packed.sequences:
            raise ValueError(
                f"generate: decoder_input_ids has shape {tuple(decoder_input_ids.shape)}; expected "
                f"({packed.sequences}, length)"
            )
        return Source(packed, memory), Tokens(decoder_input_ids, side="decoder_")


class Reader(Protocol):
    """Reads sequences, and gives the logits after each one's last token, (rows, vocab_size) float32."""

    scores: Tensor

    def step(self, tokens: Tensor) -> None:
        """One more token (rows,) of each sequence."""

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was: repeats prompts for beams, reorders beams."""


class Cached:
    """A decoder, over a cache of keys and values."""

    def __init__(self, model: Generation, source: Source | None, prompts: Tokens, steps: int) -> None:
        config = model.config
        packed = packed_prompts(prompts, config, causal=True)
        longest = int(packed.cu_seqlens.diff().max())
        if config.max_positions is not None and longest + steps > config.max_positions:
            raise ValueError(
                f"generate: {longest} prompt tokens and max_new_tokens {steps} exceed max_positions "
                f"{config.max_positions}"
            )
        self.model, self.source = model, source
        self.cache = Cache(packed.cu_seqlens.diff().long(), longest + steps)
        layout = Prompt(packed, self.cache, source)
        self.scores = self._scores(layout, packed.enter(prompts.input_ids), layout.slots)

    def step(self, tokens: Tensor) -> None:
        layout = Step(self.cache, self.source)
        self.scores = self._scores(layout, tokens, layout.slots)

    def select(self, rows: Tensor) -> None:
        self.cache.select(rows)

    def _scores(self, layout: Prompt | Step, tokens: Tensor, positions: Tensor) -> Tensor:
        model, source = self.model, self.source
        assert model.decoder is not None and model.token_head is not None  # generate has checked
        if source is None:
            x, _ = model.decoder(layout, tokens, positions)
        else:
            x, _ = model.decoder(layout, tokens, positions, word=model.words, memory=source.memory)
        return model.token_head(layout.last(x), model.words.weight).float()


class _Run:
    """One call of generate: what has been, what may come next, and the loops."""

    def __init__(
        self, reader: Reader, ids: Tensor, steps: int, ends: list[int], pad: int, stops: Sequence[Stop]
    ) -> None:  # fmt: skip
        self.reader, self.ids, self.steps, self.ends, self.pad, self.stops = reader, ids, steps, ends, pad, stops
        self.processors: list[Processor] = []

    def processed(self, scores: Tensor, ids: Tensor) -> Tensor:
        for processor in self.processors:
            scores = processor(ids, scores)
        return scores

    def repeat(self, times: int) -> None:
        """Each prompt so often, next to each other."""
        if times > 1:
            rows = torch.arange(len(self.ids), device=self.ids.device).repeat_interleave(times)
            self.reader.select(rows)
            self.ids, self.reader.scores = (x.index_select(0, rows) for x in (self.ids, self.reader.scores))

    def ended(self, tokens: Tensor) -> Tensor:
        """Which of these tokens are ends."""
        return torch.isin(tokens, torch.tensor(self.ends, device=tokens.device, dtype=tokens.dtype))

    def one_by_one(self, choose: Callable[[Tensor], Tensor]) -> Tensor:
        prompt, done = self.ids.shape[1], torch.zeros(len(self.ids), dtype=torch.bool, device=self.ids.device)
        for step in range(self.steps):
            token = torch.where(done, self.pad, choose(self.processed(self.reader.scores, self.ids)))
            self.ids = torch.cat([self.ids, token[:, None]], 1)
            done = done | self.ended(token)
            for stop in self.stops:
                done = done | stop(self.ids, self.reader.scores)
            if done.all():
                break
            if step + 1 < self.steps:
                self.reader.step(token)
        return self.ids[:, prompt:]

    def beams(self, beams: int, length_penalty: float, early_stopping: bool, wanted: int) -> Tensor:
        """Beam search (Sutskever et al. 2014), for each prompt its `wanted` best hypotheses.

        So many candidates are looked at in each step that beams remain which no end token ends.
        """
        batch, vocab = self.reader.scores.shape
        looked_at = beams * min(1 + max(len(self.ends), 1), vocab)
        device = self.reader.scores.device
        prompts = self.ids.repeat_interleave(beams, 0)
        self.repeat(beams)
        first = torch.arange(batch, device=device)[:, None] * beams
        # all beams of a prompt start equal: let only the first one speak
        total = torch.full((batch, beams), -torch.inf, device=device)
        total[:, 0] = 0.0
        tokens = torch.empty(batch, beams, 0, dtype=torch.int64, device=device)
        finished = [Hypotheses(beams, length_penalty, early_stopping) for _ in range(batch)]
        for step in range(self.steps):
            so_far = torch.cat([prompts, tokens.flatten(0, 1)], 1)
            logs = self.processed(self.reader.scores.log_softmax(-1), so_far)
            candidates = total[:, :, None] + logs.view(batch, beams, vocab)
            best, places = candidates.flatten(1).topk(looked_at, dim=1)
            beam, token = places // vocab, places % vocab
            ends = self.ended(token)
            if self.stops:
                longer = torch.cat([so_far[(first + beam).flatten()], token.view(-1, 1)], 1)
                for stop in self.stops:
                    stopped = torch.as_tensor(stop(longer, self.reader.scores), device=device).expand(len(longer))
                    ends = ends | stopped.view(ends.shape)
            reached = ends[:, :beams] & best[:, :beams].isfinite()
            for b, rank in reached.nonzero().tolist():
                finished[b].add(best[b, rank].item(), [*tokens[b, beam[b, rank]].tolist(), int(token[b, rank])])
            # the beams that go on: the best candidates that do not end
            keep = best.masked_fill(ends, -torch.inf).topk(beams, dim=1).indices
            total, beam, token = best.gather(1, keep), beam.gather(1, keep), token.gather(1, keep)
            tokens = torch.cat([tokens.gather(1, beam[:, :, None].expand(-1, -1, step)), token[:, :, None]], dim=2)
            if step + 1 == self.steps:  # all beams end here, and the best count, early stopping or not
                break
            for b, hypotheses in enumerate(finished):
                hypotheses.close_if_complete(total[b, 0].item(), step + 1)
            if all(hypotheses.closed for hypotheses in finished):
                break
            self.reader.select((first + beam).flatten())
            self.reader.step(token.flatten())
        rows = []
        for b, hypotheses in enumerate(finished):
            for rank in range(beams):
                hypotheses.add(total[b, rank].item(), tokens[b, rank].tolist())
            rows += [row for _, row in hypotheses.kept[:wanted]]
        length = max(map(len, rows))
        return torch.tensor([row + [self.pad] * (length - len(row)) for row in rows], device=device)


def _ends(eos: int | Sequence[int] | None) -> list[int]:
    return [] if eos is None else [eos] if isinstance(eos, int) else [int(token) for token in eos]


def _never(config: TransformerConfig, ends: Sequence[int]) -> list[int]:
    """Tokens that no text has: Marian's padding was no class when it was trained, and its logit, 0, says nothing."""
    pad = config.pad_token_id
    return [pad] if config.family == "marian" and pad is not None and pad not in ends else []


def _check_options(
    max_new_tokens, do_sample, temperature, top_k, top_p, min_p, num_beams, num_return_sequences, repetition_penalty,
    ends, pad, vocab_size,
) -> None:  # fmt: skip
    for name, value, right, allowed in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, temperature > 0, "above 0 (greedy: do_sample=False)"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "in (0, 1]"),
        ("min_p", min_p, min_p is None or 0 <= min_p <= 1, "in [0, 1]"),
        ("num_beams", num_beams, 1 <= num_beams <= vocab_size, f"from 1 to vocab_size ({vocab_size})"),
        ("num_return_sequences", num_return_sequences, num_return_sequences >= 1, "at least 1"),
        ("repetition_penalty", repetition_penalty, repetition_penalty > 0, "above 0 (1: off)"),
        *(("eos_token_id", eos, 0 <= eos < vocab_size, f"from 0 to {vocab_size - 1}") for eos in ends),
        ("pad_token_id", pad, 0 <= pad < vocab_size, f"from 0 to {vocab_size - 1}"),
    ):
        if not right:
            raise ValueError(f"generate: {name} is {value}; it must be {allowed}")
    if num_beams > 1 and do_sample:
        raise ValueError("generate: num_beams > 1 with do_sample is not supported; choose one")
    if num_return_sequences > 1 and not do_sample and num_return_sequences > num_beams:
        raise ValueError(
            f"generate: num_return_sequences {num_return_sequences} needs do_sample=True or as many num_beams"
        )
    if not do_sample and (temperature != 1.0 or top_k is not None or top_p is not None or min_p is not None):
        raise ValueError("generate: temperature, top_k, top_p and min_p need do_sample=True")
