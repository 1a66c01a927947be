"""Transformer: encoders and decoders of every family from one TransformerConfig, with heads, losses and generation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import cast

import torch
from torch import Tensor
from torch.nn import Linear, ModuleList
from torch.utils import checkpoint as checkpointing

from llmengine import convert
from llmengine.models.config import TransformerConfig
from llmengine.models.generation import Generation
from llmengine.models.heads import Pooler, TokenHead, sequence_loss
from llmengine.models.initial import initialise
from llmengine.models.inputs import check_like, check_sequence_labels, denominators, layout_of
from llmengine.models.layers import Embeddings, Layer, add, next_norm
from llmengine.models.layout import Attending, Layout
from llmengine.models.output import TransformerOutput, in_this_mode
from llmengine.nn.fusing import touched
from llmengine.nn.norm import LayerNorm


class Transformer(Generation):
    """A language model: embeddings, layers, and the heads that `config.objectives` names.

    Parameters live in ordinary nn.Linear, nn.Embedding and LayerNorm leaves; fused operators read them while they are
    plain and the leaves are called where someone replaced or watches them (`explain()` tells). Padding is taken out at
    the door. A gradient-accumulating caller gives num_items_in_batch; Hugging Face's Trainer does so (for its
    evaluation losses it needs TrainingArguments(label_names=["labels"]), as forward knows other labels too).
    """

    def __init__(self, config: TransformerConfig, *, device=None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if not isinstance(config, TransformerConfig):
            raise TypeError(f"Transformer: config must be a TransformerConfig, got {type(config).__name__}")
        self.config = config
        self.gradient_checkpointing = False
        self.embeddings = Embeddings(config)
        self.layers = ModuleList(Layer(config, i) for i in range(config.n_layers))
        self.final_norm = LayerNorm(config.d_model, config.norm_eps) if config.final_norm else None
        self.pooler = Pooler(config) if config.pooler != "none" else None
        self.token_head = TokenHead(config) if {"mlm", "clm"} & set(config.objectives) else None
        self.nsp_head = Linear(config.d_model, 2) if "nsp" in config.objectives else None
        self.to(device=device, dtype=dtype)
        self.reset_parameters()

    # ---- what Hugging Face's Trainer asks ----------------------------------------------------------------------------

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether Trainer gives num_items_in_batch. It counts `labels` alone, so not where sentence pairs count too."""
        return "nsp" not in self.config.objectives

    @property
    def loss_type(self) -> str:
        """Hugging Face's name of the token loss: where labels are shifted, Trainer counts those that remain."""
        return "ForCausalLM" if self.config.causal else "ForMaskedLM"

    # ---- initial weights and files -----------------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Fresh weights: N(0, init_std), zero biases, unit norms, and what config.init asks for (models/initial.py)."""
        initialise(self)

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike, *, objectives: list[str] | tuple[str, ...] | None = None, device=None,
        dtype: torch.dtype | None = None,
    ) -> Transformer:  # fmt: skip
        """A model from a Hugging Face directory (config.json and safetensors, sharded or not) or from our own.

        objectives: keep only these heads of the file (None: all that it has). dtype None: as stored. Raises
        FileNotFoundError, or ValueError naming fields and tensors that llmengine does not know or that are missing.
        """
        checkpoint = convert.Checkpoint(directory)
        fields = checkpoint.fields if objectives is None else {**checkpoint.fields, "objectives": list(objectives)}
        config = TransformerConfig.from_dict(fields)
        with torch.device("meta"):
            model = cls(config)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        state = checkpoint.tensors(shapes, config.n_layers, config.tie_embeddings)
        for name, tensor in state.items():
            if tensor.shape != shapes[name]:
                raise ValueError(
                    f"from_pretrained: {name} in {directory} has shape {tuple(tensor.shape)}; "
                    f"its config.json says {tuple(shapes[name])}"
                )
        model.load_state_dict(state, assign=True)
        return model.to(device=device, dtype=dtype).eval()

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes config.json and model.safetensors as `config.family` has them: a directory that Hugging Face's
        from_pretrained loads ("bert", "gpt2"), or our own layout ("custom"). A file is replaced whole or not at all.
        """
        convert.save(directory, self.config.to_dict(), self.state_dict())

    # ---- forward -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        num_items_in_batch: Tensor | int | dict[str, Tensor | int] | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        *,
        output_hidden_states: bool = False,
        return_logits: bool | None = None,
    ) -> TransformerOutput:
        """Runs the model on a batch; with labels, also its losses.

        input_ids (batch, length) int64 or int32, with attention_mask (batch, length) of 1 and 0 (padding, on any
            side); or a packed batch: (tokens,) or (1, tokens) with cu_seqlens int32 (sequences + 1,) and max_seqlen.
        token_type_ids, position_ids: like input_ids; default zeros, and the column (in a packed batch, the place in
            the sequence).
        labels: like input_ids, -100 for no loss, padding never has one. For next-token prediction they are
            input_ids themselves: the shift happens here, never across sequences.
        next_sentence_label: (sequences,), 0 where the second segment follows the first.
        num_items_in_batch: what the losses are divided by, for gradient accumulation: labelled tokens of the whole
            optimiser step (after the shift), or {"tokens": n, "sequences": m} where nsp is trained too. None: each loss
            is the mean over this batch's labels. A mean over no labels is 0.
        return_logits: None computes logits at once without labels, and at first access with labels (under
            torch.compile: not at all). True: at once. False: only at access.
        """
        layout = layout_of(self.config, input_ids, attention_mask, cu_seqlens, max_seqlen)
        self._check(input_ids, token_type_ids, position_ids, labels, next_sentence_label)
        position_ids = self._positions(layout, input_ids, position_ids)
        types = None if token_type_ids is None else layout.enter(token_type_ids)
        x, hidden = self._hidden(layout, layout.enter(input_ids), position_ids, types, output_hidden_states)

        pooled = None if self.pooler is None else self.pooler(layout.first(x))
        relation = None if self.nsp_head is None else self.nsp_head(pooled)
        losses = self._losses(layout, x, relation, labels, next_sentence_label, num_items_in_batch)
        logits = self._logits(layout, x, labels is None if return_logits is None else return_logits)
        last = self._later(lambda: layout.leave(x), at_once=torch.compiler.is_compiling())
        loss = sum(losses.values()) if losses else None
        backbone = self.token_head is None and self.nsp_head is None
        keyed = {"loss": loss, "logits": logits, "seq_relationship_logits": relation}
        others = {"losses": losses, "last_hidden_state": last, "pooler_output": pooled}
        if backbone:
            keyed = {"last_hidden_state": others.pop("last_hidden_state"), "pooler_output": others.pop("pooler_output")}
        if hidden is not None:
            keyed["hidden_states"] = tuple(layout.leave(state) for state in hidden)
        return TransformerOutput(keyed, others)

    def each_layer(self) -> Iterable[Layer]:
        """`layers`, by their type."""
        return cast("Iterable[Layer]", self.layers)

    def _hidden(
        self, layout: Attending, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None, keep: bool
    ) -> tuple[Tensor, list[Tensor] | None]:
        """(tokens,) -> the last hidden state (tokens, d_model), and, if they are to be kept, all of them."""
        dropout_p = self.config.dropout if self.training else 0.0
        x, residual = self.embeddings(input_ids, position_ids, token_type_ids), None
        kept = [x]
        for layer in self.layers:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x, residual = checkpointing.checkpoint(layer, x, residual, layout, use_reentrant=False)
            else:
                x, residual = layer(x, residual, layout)
            if keep:
                x, residual = add(x, residual, dropout_p), None
                kept.append(x)
        if self.final_norm is not None:
            x = next_norm(x, residual, self.final_norm, dropout_p)[0]
        else:
            x = add(x, residual, dropout_p)
        kept[-1] = x
        return x, kept if keep else None

    def _losses(
        self,
        layout: Layout,
        x: Tensor,
        relation: Tensor | None,
        labels: Tensor | None,
        next_sentence_label: Tensor | None,
        num_items_in_batch: Tensor | int | dict | None,
    ) -> dict[str, Tensor]:
        task = "clm" if self.config.causal else "mlm"
        heads = [name for name, given in ((task, labels), ("nsp", next_sentence_label)) if given is not None]
        items = denominators(num_items_in_batch, heads)
        losses = {}
        if labels is not None and self.token_head is not None:
            targets = layout.next_labels(labels) if self.config.causal else layout.labels(labels)
            losses[task] = self.token_head.loss(x, self.embeddings.word.weight, targets, items.get("tokens"))
        if next_sentence_label is not None and relation is not None:
            targets = check_sequence_labels("next_sentence_label", next_sentence_label, *relation.shape)
            losses["nsp"] = sequence_loss(relation, targets, items.get("sequences"))
        return losses

    def _logits(self, layout: Layout, x: Tensor, at_once: bool) -> Tensor | Callable[[], Tensor] | None:
        head = self.token_head
        if head is None:
            return None
        return self._later(lambda: layout.leave(head(x, self.embeddings.word.weight)), at_once)

    def _later(self, compute: Callable[[], Tensor], at_once: bool) -> Tensor | Callable[[], Tensor] | None:
        if at_once:
            return compute()
        # a compiled graph returns tensors, not functions
        return None if torch.compiler.is_compiling() else in_this_mode(self.embeddings.word.weight.device.type, compute)

    # ---- checks and explanations -------------------------------------------------------------------------------------

    def _check(self, input_ids, token_type_ids, position_ids, labels, next_sentence_label) -> None:
        config = self.config
        if token_type_ids is not None and not config.type_vocab_size:
            raise ValueError("Transformer: token_type_ids given, but this model has no token types (type_vocab_size 0)")
        check_like("token_type_ids", token_type_ids, input_ids, config.type_vocab_size, "type_vocab_size")
        check_like("labels", labels, input_ids, config.vocab_size, "vocab_size", label=True)
        if labels is not None and self.token_head is None:
            raise ValueError(f"Transformer: labels given, but objectives {list(config.objectives)} have no token head")
        if next_sentence_label is not None and self.nsp_head is None:
            raise ValueError(
                f"Transformer: next_sentence_label given, but objectives {list(config.objectives)} lack 'nsp'"
            )

    def _positions(self, layout: Layout, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        if position_ids is None:
            return layout.positions()
        if position_ids.shape == (1, input_ids.shape[-1]):
            position_ids = position_ids.expand(input_ids.shape)
        check_like("position_ids", position_ids, input_ids, self.config.max_positions, "max_positions")
        return layout.enter(position_ids)

    def explain(self) -> str:
        """Which parts of which layers run as fused operators, and why the others do not.

        Which backend runs an operator, and why others refuse, tells `llmengine.explain(model, input_ids, ...)`.
        """
        lines = []
        explained = enumerate(layer.explain() for layer in self.each_layer())
        for texts, group in groupby(explained, key=lambda pair: pair[1]):
            numbers = [i for i, _ in group]
            span = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
            lines += [f"layers.{span}.{text}" for text in texts]
        for name, norm in (("embeddings.norm", self.embeddings.norm), ("final_norm", self.final_norm)):
            if norm is not None:
                why = touched(norm=norm)
                lines.append(f"{name}: {'fused' if why is None else f'leaf by leaf ({why})'}")
        return "\n".join(lines)
