"""Transformer: encoders and decoders of every family from one TransformerConfig, with heads, losses and generation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Embedding

from llmengine import convert
from llmengine.models import dtypes
from llmengine.models.config import TransformerConfig
from llmengine.models.dtypes import Policy, into_head
from llmengine.models.fine_tuning import with_heads
from llmengine.models.generation import Generation
from llmengine.models.heads import Head, Pooler, Tagger, TokenHead, by_question, make_heads
from llmengine.models.initial import initialise
from llmengine.models.inputs import (
    Tokens,
    check_choices,
    check_labels,
    check_like,
    denominators,
    layouts_of,
    positions_of,
    target_of,
)
from llmengine.models.layers import Words, words_of_pass
from llmengine.models.layout import Layout, Packed
from llmengine.models.memory import Memory, as_given, check_memory
from llmengine.models.orders import order_of
from llmengine.models.output import TransformerOutput, in_this_mode
from llmengine.models.relative import RelativeStack
from llmengine.models.stack import Stack
from llmengine.nn.feed_forward import FeedForward
from llmengine.nn.fusing import touched

COUNTED = dict.fromkeys(("nsp", "sop", "classification", "choice", "qa"), "sequences")


class Transformer(Generation):
    """A language model: an `encoder`, a `decoder` or both, and the heads that `config.objectives` names.

    Parameters live in ordinary nn.Linear, nn.Embedding and norm leaves; fused operators read them while they are
    plain and the leaves are called where someone replaced or watches them (`explain()` tells). Padding is taken out at
    the door. A gradient-accumulating caller gives num_items_in_batch; Hugging Face's Trainer does so (for its
    evaluation losses it needs TrainingArguments(label_names=["labels"]), as forward knows other labels too).
    """

    def __init__(self, config: TransformerConfig, *, device=None, dtype: Policy | None = None) -> None:
        super().__init__()
        if not isinstance(config, TransformerConfig):
            raise TypeError(f"Transformer: config must be a TransformerConfig, got {type(config).__name__}")
        self.config = config
        self.gradient_checkpointing = False
        self.encoder: Stack | RelativeStack | None = None
        if config.positions == "relative":
            self.encoder = RelativeStack(config)
        elif config.architecture != "decoder":
            self.encoder = Stack(config, "encoder")
        self.decoder = Stack(config.decoder_side, "decoder") if config.architecture != "encoder" else None
        self.pooler = Pooler(config) if config.pooler != "none" else None
        self.token_head = TokenHead(config) if config.token_task else None
        self.heads = make_heads(config)
        self.to(device=device).to_dtype(dtype)
        self.reset_parameters()

    @property
    def stack(self) -> Stack | RelativeStack:
        """Whose hidden states the heads read: the decoder's, where there is one."""
        stack = self.encoder if self.decoder is None else self.decoder
        assert stack is not None
        return stack

    def each_head(self) -> Iterable[tuple[str, Head]]:
        """`heads`, by their type: all but the token head."""
        return cast("Iterable[tuple[str, Head]]", self.heads.items())

    @property
    def words(self) -> Embedding:
        """The word embedding of both stacks, or the decoder's where each has its own."""
        stack = self.stack if self.encoder is None or not self.config.share_embeddings else self.encoder
        word = stack.embeddings.word
        assert word is not None
        return word

    def recompute_feed_forward(self, on: bool = True) -> None:
        """Memory or speed: whether feed-forward blocks make their pre-activations again in the backward, by one product
        (`functional.ffn`), instead of keeping them, where blocks are fused (in 8-bit floats they are not).
        `gradient_checkpointing` keeps nothing of a layer, for its time."""
        for block in self.modules():
            if isinstance(block, FeedForward):
                block.recompute = on

    # ---- what Hugging Face's Trainer asks ----------------------------------------------------------------------------

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether Trainer gives num_items_in_batch. It counts `labels`, all numbers of them, and nothing else."""
        config = self.config
        elsewhere = {"nsp", "sop", "qa"} & set(config.objectives)
        several_numbers = "classification" in config.objectives and config.problem != "single" and config.n_labels > 1
        return not elsewhere and not several_numbers and len(config.objectives) <= 1

    @property
    def loss_type(self) -> str:
        """Hugging Face's name of the token loss: where labels are shifted, Trainer counts those that remain."""
        return "ForCausalLM" if self.config.token_task == "clm" else "ForMaskedLM"

    # ---- initial weights and files -----------------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Fresh weights: N(0, init_std), zero biases, unit norms, and what config.init asks for (models/initial.py)."""
        initialise(self)

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike, *, objectives: list[str] | tuple[str, ...] | None = None, device=None,
        dtype: Policy | None = None, **fields: Any,
    ) -> Transformer:  # fmt: skip
        """A model from a directory of Hugging Face (config.json and safetensors, sharded or not), Eole or our own; or
        from a file of Fairseq, OpenNMT-py or llama.cpp (GGUF, Llama models; needs the package gguf).

        objectives: keep only these heads of the file (None: all that it has); a fine-tuning head that the file lacks is
        made fresh, as the file's family has it. fields: other fields of the config to replace (n_labels, dropout, …).
        dtype: as `to_dtype` takes it; None: as stored. Raises FileNotFoundError, or ValueError naming fields and
        tensors that llmengine does not know or that are missing.
        """
        checkpoint = convert.Checkpoint(directory)
        given, fresh = with_heads(checkpoint.fields, checkpoint.family, objectives, fields)
        config = TransformerConfig.from_dict(given)
        with torch.device("meta"):
            model = cls(config)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        made = tuple(f"{module}." for module in fresh)
        state = checkpoint.tensors([name for name in shapes if not name.startswith(made)], config.to_dict())
        for name, tensor in state.items():
            if tensor.shape != shapes[name]:
                raise ValueError(
                    f"from_pretrained: {name} in {directory} has shape {tuple(tensor.shape)}; "
                    f"its config.json says {tuple(shapes[name])}"
                )
        model.load_state_dict(state, assign=True, strict=False)
        for name in fresh:
            model.get_submodule(name).to_empty(device="cpu").to(model.words.weight.dtype)
        if fresh:
            initialise(model, only=made)
        return model.to(device=device).to_dtype(dtype).eval()

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes config.json and model.safetensors as `config.family` has them: a directory that Hugging Face's
        from_pretrained loads, or our own layout ("custom"). A file is replaced whole or not at all.
        """
        convert.save(directory, self.config.to_dict(), TransformerConfig.defaults(), dict(self.named_parameters()))

    def to_dtype(self, policy: Policy | None) -> Transformer:
        """Casts all parameters to a dtype, or parts of the model each to its own; in place, returns the model.

        policy {part: torch.float32, torch.bfloat16 or torch.float16}: "default" is what no other entry names (without
        it: stays as it is); "embeddings", "layers", "layers.0" and "layers.0-1" (also as "encoder.layers.0", …), of
        which later entries win; "head", all heads and the pooler; "norm", all norms, float32 or their part's dtype. A
        tied token head computes in the head's dtype, the word embedding keeps its own. Gradients and files have each
        parameter's dtype. Raises ValueError naming a part that the model lacks, and changes nothing then.
        """
        if policy is not None:
            dtypes.apply(self, policy)
        return self

    # ---- forward -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | dict[str, Tensor] | None = None,
        next_sentence_label: Tensor | None = None,
        num_items_in_batch: Tensor | int | dict[str, Tensor | int] | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_cu_seqlens: Tensor | None = None,
        decoder_max_seqlen: int | None = None,
        sentence_order_label: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        choices: Tensor | None = None,
        query_ranks: Tensor | None = None,
        key_ranks: Tensor | None = None,
        target_positions: Tensor | None = None,
        perm_mask: Tensor | None = None,
        target_mapping: Tensor | None = None,
        mems: Sequence[Tensor] | Memory | None = None,
        use_mems: bool = False,
        output_hidden_states: bool = False,
        return_logits: bool | None = None,
    ) -> TransformerOutput:
        """Runs the model on a batch; with labels, also its losses.

        input_ids (batch, length) int64 or int32, with attention_mask (batch, length) of 1 and 0 (padding, on any
            side); or a packed batch: (tokens,) or (1, tokens) with cu_seqlens int32 (sequences + 1,) and max_seqlen.
            Multiple choice: (batch, choices, length), or the choices of all questions as sequences of either batch.
        token_type_ids, position_ids: like input_ids; default zeros, and what config.position_of says (in a packed
            batch the place in the sequence).
        decoder_input_ids, decoder_attention_mask, decoder_cu_seqlens, decoder_max_seqlen: the same of an
            encoder-decoder's target. Without decoder_input_ids, labels shifted right by one begin with
            decoder_start_token_id (packed ones each on its own, as decoder_cu_seqlens tells).
        labels: of the token head, like input_ids (an encoder-decoder: like decoder_input_ids), -100 for no loss,
            padding never has one. For next-token prediction they are input_ids themselves: the shift happens here,
            never across sequences. Without a token head, of the only other head: "rtd" and "tagging" like input_ids,
            "classification" (sequences,), or (sequences, n_labels) where config.problem is "multi" or "regression",
            "choice" (questions,). A dict {objective: labels} where the model has several.
        next_sentence_label, sentence_order_label: (sequences,), 0 where the second segment follows the first.
        start_positions, end_positions: (sequences,), the answer's first and last token, columns of the batch or places
            in a packed batch's sequence; outside of the text: no loss.
        choices: (questions,) int, how many of the batch's sequences are each question's; None: equally many.
        XLNet: query_ranks and key_ranks, like input_ids, are the order of prediction: a token sees the keys whose rank
            is lower than its own query rank (rank -1: all see it), and itself unless it is predicted.
            target_positions (batch, targets): the columns that are predicted, -1 for none; logits and labels are then
            of this shape. perm_mask and target_mapping say the same as Hugging Face's dense tensors. mems: what an
            earlier segment's output holds, for each layer (length, batch, d_model), or a `Memory` where the batch is
            packed or padded; use_mems asks for it.
        num_items_in_batch: what the losses are divided by, for gradient accumulation: labelled tokens of the whole
            optimiser step (after the shift), or {"tokens": n, "sequences": m} where losses count both. None: each loss
            is the mean over this batch's labels. A mean over no labels is 0.
        return_logits: None computes the token head's logits at once without labels, and at first access with labels
            (under torch.compile: not at all). True: at once. False: only at access.
        """
        given = self._labels(labels, next_sentence_label, sentence_order_label, start_positions, end_positions)
        questions = len(given.get("choice", [0]) if choices is None else choices)
        if isinstance(input_ids, Tensor) and input_ids.dim() == 3 and "choice" in self.config.objectives:
            questions = input_ids.shape[0]
            input_ids = input_ids.flatten(0, 1)
            attention_mask, token_type_ids, position_ids = (
                x if x is None else x.flatten(0, 1) for x in (attention_mask, token_type_ids, position_ids)
            )
        sides = [Tokens(input_ids, attention_mask, cu_seqlens, max_seqlen)]
        if self.config.architecture == "encoder_decoder":
            shape = (decoder_attention_mask, decoder_cu_seqlens, decoder_max_seqlen, "decoder_")
            if decoder_input_ids is not None:
                sides.append(Tokens(decoder_input_ids, *shape))
            else:
                sides.append(target_of(sides[0], given.get("seq2seq"), self.config, *shape))
        elif decoder_input_ids is not None:
            raise ValueError(f"Transformer: decoder_input_ids given to architecture {self.config.architecture!r}")
        layouts = layouts_of(self.config, *sides)
        layout, ids = layouts[-1], sides[-1].input_ids
        if "choice" in self.config.objectives:
            check_choices(choices, given.get("choice"), questions, layout.sequences)
        elif choices is not None:
            raise ValueError(f"Transformer: choices given, but objectives {list(self.config.objectives)} lack 'choice'")
        tokens = sum(side.input_ids.numel() for side in sides)
        words = words_of_pass(self.words, self.config, tokens) if self.config.token_task in given else self.words
        x: Tensor
        others: dict[str, Any] = {}
        xlnet = (query_ranks, key_ranks, perm_mask, target_positions, target_mapping)
        if isinstance(self.encoder, RelativeStack):
            x, layout, hidden, others["mems"] = self._relative(
                layouts[0], input_ids, token_type_ids, xlnet, mems, use_mems, output_hidden_states
            )
            ids = ids if layout is layouts[0] else ids.new_empty(layout.shape)
        else:
            if any(given is not None for given in (*xlnet, mems)) or use_mems:
                raise ValueError('Transformer: orders, targets and mems need positions "relative" (XLNet)')
            x, hidden = self._encode(layouts[0], input_ids, token_type_ids, position_ids, words, output_hidden_states)
        if len(sides) == 2:
            memory, source, encoded = x, layouts[0], hidden
            others["encoder_last_hidden_state"] = self._later(
                lambda: source.leave(memory), at_once=torch.compiler.is_compiling()
            )
            x, hidden = self._decode(layout, ids, memory, words, output_hidden_states)
            if encoded is not None:
                others["encoder_hidden_states"] = tuple(source.leave(state) for state in encoded)
        if hidden is not None:
            of_all = layouts[-1]
            others["hidden_states"] = tuple(of_all.leave(state) for state in hidden)
        asked = (questions, choices)
        return self._output(layout, ids, x, words.weight, asked, given, num_items_in_batch, return_logits, others)

    def _encode(
        self, layout: Layout, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None,
        words: Words, keep: bool,
    ) -> tuple[Tensor, list[Tensor] | None]:  # fmt: skip
        """The encoder, or a decoder that stands alone."""
        config = self.config
        if token_type_ids is not None and not config.type_vocab_size:
            raise ValueError("Transformer: token_type_ids given, but this model has no token types (type_vocab_size 0)")
        check_like("token_type_ids", token_type_ids, input_ids, config.type_vocab_size, "type_vocab_size")
        types = None if token_type_ids is None else layout.enter(token_type_ids)
        stack = self.stack if self.encoder is None else self.encoder
        positions = positions_of(config, layout, input_ids, position_ids)
        return stack(
            layout, layout.enter(input_ids), positions, types, keep=keep, checkpoint=self.gradient_checkpointing,
            word=words if stack.embeddings.word is self.words else None,
        )  # fmt: skip

    def _relative(
        self, layout: Layout, input_ids: Tensor, segments: Tensor | None, xlnet: tuple[Tensor | None, ...],
        mems: Sequence[Tensor] | Memory | None, use_mems: bool, keep: bool,
    ) -> tuple[Tensor, Layout, list[Tensor] | None, list[Tensor] | Memory | None]:  # fmt: skip
        """XLNet's stack: the last hidden states and their layout, all of them, and the memory for the next segment."""
        if not isinstance(layout, Packed):
            raise ValueError('Transformer: positions "relative" takes no holes of padding, and compiled no padding')
        check_like("token_type_ids", segments, input_ids, 2**31, "int32")
        past = check_memory(self.config, layout, mems)
        order, predicted = order_of(layout, *xlnet)
        segments = None if segments is None else layout.enter(segments)
        x, hidden, remembered = self.encoder(  # type: ignore[misc]
            layout, layout.enter(input_ids), segments, order, past, keep=keep, remember=use_mems,
            checkpoint=self.gradient_checkpointing,
        )  # fmt: skip
        return x, layout if predicted is None else predicted, hidden, as_given(remembered, layout, mems)

    def _decode(
        self, layout: Layout, input_ids: Tensor, memory: Tensor, words: Words, keep: bool
    ) -> tuple[Tensor, list[Tensor] | None]:
        """An encoder-decoder's decoder."""
        assert self.decoder is not None
        return self.decoder(
            layout, layout.enter(input_ids), positions_of(self.config, layout, input_ids, None), word=words,
            memory=memory, keep=keep, checkpoint=self.gradient_checkpointing,
        )  # fmt: skip

    def _output(
        self, layout: Layout, input_ids: Tensor, x: Tensor, tied: Tensor, asked: tuple[int, Tensor | None],
        given: dict[str, Tensor], num_items_in_batch: Tensor | int | dict | None, return_logits: bool | None,
        others: dict[str, Any],
    ) -> TransformerOutput:  # fmt: skip
        pooled = None if self.pooler is None else self.pooler(into_head(self.pooler, layout.first(x)))
        entering = into_head(self.heads, x)
        head_logits = {name: head.logits(layout, entering, pooled) for name, head in self.each_head()}
        if "choice" in head_logits:
            head_logits["choice"] = by_question(head_logits["choice"], *asked)
        losses = self._losses(layout, input_ids, x, tied, head_logits, given, num_items_in_batch)
        weights = self.config.loss_weights
        loss = sum(weights.get(name, 1.0) * value for name, value in losses.items()) if losses else None
        logits: Any = None
        if (head := self.token_head) is not None:
            at_once = not losses if return_logits is None else return_logits
            logits = self._later(lambda: layout.leave(head(x, self.words.weight)), at_once)
        last = self._later(lambda: layout.leave(x), at_once=torch.compiler.is_compiling())
        keyed: dict[str, Any] = {"loss": loss, "logits": logits}
        for name, value in head_logits.items():
            if name in ("nsp", "sop"):
                keyed["seq_relationship_logits" if name == "nsp" else "sop_logits"] = value
            elif name == "qa":
                keyed |= {"start_logits": value[..., 0], "end_logits": value[..., 1]}
            elif keyed["logits"] is None:
                keyed["logits"] = value
        others |= {"losses": losses, "last_hidden_state": last, "pooler_output": pooled, "head_logits": head_logits}
        if self.token_head is None and not self.heads:
            keyed = {name: others.pop(name) for name in ("last_hidden_state", "pooler_output")}
        if "hidden_states" in others:
            keyed["hidden_states"] = others.pop("hidden_states")
        return TransformerOutput(keyed, others)

    @torch.no_grad()
    def tags(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, among: Tensor | None = None, **inputs: Any
    ) -> Tensor:
        """The most probable tag of every token, like input_ids; -1 at padding, and where `among` (like input_ids, 1 at
        each word's first piece, say) is 0. With config.crf the best sequence of tags, by Viterbi's algorithm."""
        if "tagging" not in self.heads:
            raise ValueError(f'tags: needs objective "tagging"; this model has {list(self.config.objectives)}')
        check_like("among", among, input_ids, 2, "0 or 1")
        logits = self(input_ids, attention_mask, **inputs).head_logits["tagging"]
        tokens = Tokens(input_ids, attention_mask, inputs.get("cu_seqlens"), inputs.get("max_seqlen"))
        layout = tokens.layout(self.config, causal=self.config.causal)
        return cast("Tagger", self.heads["tagging"]).tags(layout, logits, among)

    # ---- labels and losses -------------------------------------------------------------------------------------------

    def _labels(self, labels, next_sentence_label, sentence_order_label, start, end) -> dict[str, Tensor]:
        """Every objective's labels."""
        config = self.config
        if (start is None) != (end is None):
            raise ValueError("Transformer: start_positions and end_positions go together, but only one was given")
        given: dict[str, Tensor] = dict(labels) if isinstance(labels, dict) else {}
        if isinstance(labels, Tensor) or (labels is not None and not isinstance(labels, dict)):
            named_elsewhere = ("nsp", "sop", "qa")
            owners = [config.token_task] if config.token_task else [n for n in self.heads if n not in named_elsewhere]
            if len(owners) != 1:
                what = "have no token head" if not owners else f"have several: give {{objective: labels}} of {owners}"
                raise ValueError(f"Transformer: labels given, but objectives {list(config.objectives)} {what}")
            given[str(owners[0])] = labels
        for objective, value, name in (
            ("nsp", next_sentence_label, "next_sentence_label"),
            ("sop", sentence_order_label, "sentence_order_label"),
            ("qa", start, "start_positions"),
        ):
            if value is not None:
                if objective not in config.objectives:
                    raise ValueError(
                        f"Transformer: {name} given, but objectives {list(config.objectives)} lack '{objective}'"
                    )
                given[objective] = value if objective != "qa" else torch.stack([value.flatten(), end.flatten()], 1)
        if unknown := sorted(given.keys() - set(config.objectives)):
            raise ValueError(f"Transformer: labels of {unknown}, but objectives are {list(config.objectives)}")
        return given

    def _losses(
        self, layout: Layout, input_ids: Tensor, x: Tensor, tied: Tensor, logits: dict[str, Tensor],
        given: dict[str, Tensor], num_items_in_batch: Tensor | int | dict | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        items = denominators(num_items_in_batch, {name: COUNTED.get(name, "tokens") for name in given})
        losses = {}
        for name, labels in given.items():
            labels = check_labels(name, labels, input_ids, layout.sequences, self.config)
            divisor = items.get(COUNTED.get(name, "tokens"))
            if name == self.config.token_task:
                assert self.token_head is not None
                targets = layout.next_labels(labels) if self.config.causal else layout.labels(labels)
                losses[name] = self.token_head.loss(x, tied, targets, divisor)
            else:
                losses[name] = dict(self.each_head())[name].loss(layout, logits[name], labels, divisor)
        return losses

    def _later(self, compute: Callable[[], Tensor], at_once: bool) -> Tensor | Callable[[], Tensor] | None:
        if at_once:
            return compute()
        # a compiled graph returns tensors, not functions
        return None if torch.compiler.is_compiling() else in_this_mode(self.words.weight.device.type, compute)

    def explain(self) -> str:
        """Which parts of which layers run as fused operators, and why the others do not.

        Which backend runs an operator, and why others refuse, tells `llmengine.explain(model, input_ids, ...)`.
        """
        lines = []
        for name, stack in (("encoder", self.encoder), ("decoder", self.decoder)):
            if stack is None:
                continue
            explained = enumerate(layer.explain() for layer in stack.each_layer())
            for texts, group in groupby(explained, key=lambda pair: pair[1]):
                numbers = [i for i, _ in group]
                span = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
                lines += [f"{name}.layers.{span}.{text}" for text in texts]
            for leaf, norm in (("embeddings.norm", stack.embeddings.norm), ("final_norm", stack.final_norm)):
                if norm is not None:
                    why = touched(norm=norm)
                    lines.append(f"{name}.{leaf}: {'fused' if why is None else f'leaf by leaf ({why})'}")
        return "\n".join(lines)
