"""Transformers' auto classes for our own Transformer: AutoModelForMaskedLM.from_pretrained(directory), and so on.

The directory is one that `Transformer.save_pretrained` wrote in our own layout, and what these classes write is read by
`Transformer.from_pretrained`. Each class is a `Transformer` with one objective, behind Transformers' arguments, outputs
and methods, so that Trainer, pipelines, `generate` and PEFT take it for one of theirs.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar, cast

import torch
import transformers
from torch import Tensor
from torch.nn import Embedding, Module
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from llmengine.convert import OWN
from llmengine.integrations.transformers import attention
from llmengine.integrations.transformers.cached import Columns
from llmengine.integrations.transformers.configuration import LlmengineConfig
from llmengine.models.initial import initialise
from llmengine.models.inputs import Tokens, check_like, shift_right
from llmengine.models.output import TransformerOutput
from llmengine.models.relative_generation import predicting_next
from llmengine.models.stack import Stack
from llmengine.models.transformer import Transformer

# The cache's name in outputs, which Transformers 5 changed on its way; forward knows both.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
PREFIX = "transformer."
HEADS = ("heads.", "token_head.", "pooler.")
# Fields of their outputs that ours has; an encoder-decoder's decoder_hidden_states are our hidden_states.
SHARED = frozenset(
    "loss logits start_logits end_logits last_hidden_state pooler_output hidden_states encoder_last_hidden_state "
    "encoder_hidden_states".split()
)


class LlmenginePreTrainedModel(PreTrainedModel):
    """A Transformer as a PreTrainedModel; its parameters are `transformer`'s.

    from_pretrained is Transformers' (dtype, quantisation, shards, ...). Heads that the file lacks start fresh, a
    backbone that it lacks is a ValueError. In training with labels the token head's logits are not computed and not in
    the output (return_logits=True asks for them); `output_attentions` is a ValueError, as nothing here holds them.
    """

    config: LlmengineConfig
    config_class = LlmengineConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    objective: ClassVar[str | None] = None
    output: ClassVar[type[ModelOutput]]

    def __init__(self, config: LlmengineConfig) -> None:
        super().__init__(config)
        self.has_weights = False
        own = config.own(self.objectives(config))
        config.config = own.to_dict()
        self.transformer = Transformer(own)
        self.loss_type = self.transformer.loss_type
        self.post_init()
        self.has_weights = True
        self.register_load_state_dict_pre_hook(_prefixed)

    @classmethod
    def objectives(cls, config: LlmengineConfig) -> tuple[str, ...]:
        """The heads that this class gives a model of this config."""
        return () if cls.objective is None else (cls.objective,)

    @property
    def accepts_loss_kwargs(self) -> bool:
        return self.transformer.accepts_loss_kwargs

    def _run(
        self, has_labels: bool, return_dict: bool | None, *, output_hidden_states: bool | None = None,
        output_attentions: bool | None = None, return_logits: bool | None = None, **inputs: Any,
    ) -> Any:  # fmt: skip
        check_attentions(output_attentions)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wanted = not (has_labels and self.training) if return_logits is None else return_logits
        out = self.transformer(**inputs, output_hidden_states=bool(keep), return_logits=wanted)
        return self._returned(self._translated(out, wanted or self.transformer.token_head is None), return_dict)

    def _translated(self, out: TransformerOutput, logits: bool) -> ModelOutput:
        names = {field.name for field in fields(self.output)}  # type: ignore[arg-type]  # all of them are dataclasses
        values = {name: getattr(out, name) for name in names & SHARED if logits or name != "logits"}
        if "decoder_hidden_states" in names:
            values["decoder_hidden_states"] = out.hidden_states
        return self.output(**values)

    def _returned(self, output: ModelOutput, return_dict: bool | None) -> Any:
        whole = self.config.return_dict if return_dict is None else return_dict
        return output if whole else output.to_tuple()

    # ---- weights -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Fresh weights for heads that a file did not hold; a new Transformer has made its own."""
        if not self.has_weights:
            return
        parameters = self.transformer.named_parameters()
        missing = [name for name, parameter in parameters if not getattr(parameter, "_is_hf_initialized", False)]
        if lost := [name for name in missing if not name.startswith(HEADS)]:
            raise ValueError(f"from_pretrained: the file lacks {', '.join(lost)}")
        if missing:
            initialise(self.transformer, only=tuple(f"{name.rpartition('.')[0]}." for name in missing))

    def save_pretrained(  # type: ignore[override]
        self, save_directory: Any, *, state_dict: dict[str, Tensor] | None = None, **options: Any
    ) -> None:
        """Transformers' own, but for the names, which are those of `Transformer.save_pretrained`."""
        if not getattr(self, "_hf_peft_config_loaded", False):  # adapters have PEFT's names
            state_dict = self.state_dict() if state_dict is None else state_dict
            state_dict = {name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items()}
        super().save_pretrained(save_directory, state_dict=state_dict, **options)

    def get_input_embeddings(self) -> Embedding:
        stack = self.transformer.decoder if self.transformer.encoder is None else self.transformer.encoder
        return cast("Embedding", cast("Stack", stack).embeddings.word)

    def set_input_embeddings(self, value: Module) -> None:
        stack = self.transformer.decoder if self.transformer.encoder is None else self.transformer.encoder
        assert stack is not None
        stack.embeddings.word = value  # type: ignore[assignment]

    def resize_token_embeddings(self, *args: Any, **options: Any) -> Embedding:
        raise NotImplementedError("resize_token_embeddings: the vocabulary of a llmengine model has a fixed size")


def check_attentions(output_attentions: bool | None) -> None:
    if output_attentions:
        raise ValueError("output_attentions: llmengine's kernels hold no attention weights")


def _prefixed(module: Module, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """load_state_dict takes the names of files too: Trainer goes on from a checkpoint so."""
    inner = prefix + PREFIX
    for name in [name for name in state_dict if name.startswith(prefix) and not name.startswith(inner)]:
        state_dict[inner + name.removeprefix(prefix)] = state_dict.pop(name)


class Reading(LlmenginePreTrainedModel):
    """What all share that neither generate nor answer: labels under one name."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None, labels: Tensor | None = None, return_dict: bool | None = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        """As `Transformer.forward`, whose other arguments are options here; beside them output_attentions. Returns the
        class's `output`, or a tuple where return_dict is False."""
        return self._run(
            labels is not None, return_dict, input_ids=input_ids, attention_mask=attention_mask,
            token_type_ids=token_type_ids, position_ids=position_ids, labels=labels, **options,
        )  # fmt: skip


class LlmengineModel(Reading):
    output: ClassVar[type[ModelOutput]] = BaseModelOutputWithPooling

    def __init__(self, config: LlmengineConfig) -> None:
        super().__init__(config)
        if config.is_encoder_decoder:
            self.output = Seq2SeqModelOutput  # type: ignore[misc]


class LlmengineForMaskedLM(Reading):
    objective = "mlm"
    output = MaskedLMOutput


class LlmengineForSequenceClassification(Reading):
    objective = "classification"
    output = SequenceClassifierOutput


class LlmengineForTokenClassification(Reading):
    objective = "tagging"
    output = TokenClassifierOutput


class LlmengineForMultipleChoice(Reading):
    objective = "choice"
    output = MultipleChoiceModelOutput


class LlmengineForQuestionAnswering(LlmenginePreTrainedModel):
    objective = "qa"
    output = QuestionAnsweringModelOutput

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None, start_positions: Tensor | None = None, end_positions: Tensor | None = None,
        return_dict: bool | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        return self._run(
            start_positions is not None, return_dict, input_ids=input_ids, attention_mask=attention_mask,
            token_type_ids=token_type_ids, position_ids=position_ids, start_positions=start_positions,
            end_positions=end_positions, **options,
        )  # fmt: skip


# ---- models that generate --------------------------------------------------------------------------------------------


class Generating(LlmenginePreTrainedModel, GenerationMixin):
    """What decoders and encoder-decoders share: the pass over new tokens behind a cache of Transformers'."""

    def __init__(self, config: LlmengineConfig) -> None:
        super().__init__(config)
        self._take_tokens()

    def adjust_generation_fn(self, *args: Any, **options: Any) -> None:
        super().adjust_generation_fn(*args, **options)  # type: ignore[misc]  # their annotation of self
        self._take_tokens()  # Transformers makes a generation_config anew where the directory has none

    def _take_tokens(self) -> None:
        """What the generation_config leaves open and our config says."""
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            if getattr(self.generation_config, name) is None:
                setattr(self.generation_config, name, getattr(self.config, name))

    def _continue(
        self, ids: Tensor, layout: Columns, position_ids: Tensor | None, memory: Tensor | None, logits_to_keep: int,
        output_hidden_states: bool | None = None, output_attentions: bool | None = None, **others: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:  # fmt: skip
        """Of ids (batch, new): logits (batch, new or logits_to_keep, vocab_size), and the hidden states if asked for.

        memory: (batch, source, d_model), what an encoder made of the source. others: what must not be given.
        """
        check_attentions(output_attentions)
        if given := sorted(name for name, value in others.items() if value is not None and value is not False):
            raise ValueError(f"{type(self).__name__}: {', '.join(given)} given, which does not go with a cache")
        model, config = self.transformer, self.transformer.config
        assert model.decoder is not None and model.token_head is not None  # these classes have them
        Tokens(ids, side="" if memory is None else "decoder_").layout(config, causal=True)  # checks
        positions = layout.positions if position_ids is None else position_ids.expand(ids.shape).flatten()
        most = 2**31 if config.max_positions is None else config.max_positions
        check_like("position_ids", positions.view(ids.shape), ids, most, "max_positions")
        words: dict[str, Any] = {} if memory is None else {"word": model.words, "memory": memory.flatten(0, 1)}
        x, kept = model.decoder(layout, ids.flatten(), positions, keep=bool(output_hidden_states), **words)
        last = x.unflatten(0, ids.shape)[:, -logits_to_keep:]
        logits = model.token_head(last.flatten(0, 1), model.words.weight).unflatten(0, last.shape[:2])
        return logits, None if kept is None else tuple(state.unflatten(0, ids.shape) for state in kept)


class LlmengineForCausalLM(Generating):
    """Of a decoder; or of XLNet, which has no cache and reads all again for each token."""

    output = CausalLMOutputWithPast

    @classmethod
    def objectives(cls, config: LlmengineConfig) -> tuple[str, ...]:
        return ("plm",) if config.own().positions == "relative" else ("clm",)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None, labels: Tensor | None = None, cache: Cache | None = None,
        past_key_values: Cache | None = None, use_cache: bool | None = None, logits_to_keep: int = 0,
        return_dict: bool | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """Beside `Transformer.forward`'s arguments: `cache` (past_key_values is its older name) holds what was before
        input_ids; attention_mask (batch, past + new) then covers both. use_cache asks for one, where there are no
        labels. logits_to_keep: logits of so many last places only, 0 for all."""
        cache = past_key_values if cache is None else cache
        if self.transformer.decoder is None and (cache is not None or options.get("use_mems")):
            raise ValueError("LlmengineForCausalLM: XLNet has no cache, and its mems are in no output here")
        if cache is not None or (use_cache and labels is None and self.transformer.decoder is not None):
            cache = DynamicCache(config=self.config) if cache is None else cache
            logits, hidden = self._continue(
                input_ids, Columns(input_ids, attention_mask, cache), position_ids, None, logits_to_keep,
                labels=labels, token_type_ids=token_type_ids, **options,
            )  # fmt: skip
            output = CausalLMOutputWithPast(logits=logits, hidden_states=hidden)
            output[CACHE] = cache
            return self._returned(output, return_dict)
        output = self._run(
            labels is not None, True, input_ids=input_ids, attention_mask=attention_mask,
            token_type_ids=token_type_ids, position_ids=position_ids, labels=labels, **options,
        )  # fmt: skip
        if logits_to_keep and output.logits is not None:
            output["logits"] = output.logits[:, -logits_to_keep:]
        return self._returned(output, return_dict)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        # generate() takes forward's arguments where it finds the name "kwargs" here
        if self.transformer.decoder is None:
            return predicting_next(input_ids, attention_mask)
        return super().prepare_inputs_for_generation(input_ids, *args, attention_mask=attention_mask, **kwargs)


class LlmengineForConditionalGeneration(Generating):
    objective = "seq2seq"
    output = Seq2SeqLMOutput

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None, decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None, encoder_outputs: Any = None, cache: Cache | None = None,
        past_key_values: Cache | None = None, use_cache: bool | None = None, logits_to_keep: int = 0,
        return_dict: bool | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """As `Transformer.forward`; or, behind a cache or an encoder's outputs, the decoder alone on its new tokens."""
        cache = past_key_values if cache is None else cache
        if cache is None and encoder_outputs is None and (not use_cache or labels is not None):
            return self._run(
                labels is not None, return_dict, input_ids=input_ids, attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids, decoder_attention_mask=decoder_attention_mask, labels=labels,
                **options,
            )  # fmt: skip
        if decoder_input_ids is None:
            raise ValueError(f"{type(self).__name__}: decoder_input_ids must be given with a cache or encoder_outputs")
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(input_ids, attention_mask)
        if cache is None and use_cache:
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        memory = encoder_outputs[0]
        layout = Columns(decoder_input_ids, decoder_attention_mask, cache, attention_mask)
        logits, hidden = self._continue(
            decoder_input_ids, layout, None, memory, logits_to_keep, labels=labels, **options
        )
        output = Seq2SeqLMOutput(logits=logits, decoder_hidden_states=hidden, encoder_last_hidden_state=memory)
        if cache is not None:
            output[CACHE] = cache
        return self._returned(output, return_dict)

    def get_encoder(self, *modality: str | None) -> EncoderAlone:
        return EncoderAlone(self.transformer)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """What the data collator of Transformers asks for."""
        return shift_right(labels, self.transformer.config)


class EncoderAlone(Module):
    """The encoder of an encoder-decoder, as `generate` calls it."""

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool | None = None,
        output_attentions: bool | None = None, return_dict: bool | None = None,
    ) -> BaseModelOutput:  # fmt: skip
        """last_hidden_state (batch, length, d_model); padding holds zeros."""
        check_attentions(output_attentions)
        config, encoder = self.transformer.config, self.transformer.encoder
        assert isinstance(encoder, Stack)  # an encoder-decoder has one
        layout = Tokens(input_ids, attention_mask).layout(config, causal=False)
        positions = layout.positions(config.position_of == "token")
        x, kept = encoder(layout, layout.enter(input_ids), positions, keep=bool(output_hidden_states))
        hidden = None if kept is None else tuple(layout.leave(state) for state in kept)
        return BaseModelOutput(last_hidden_state=layout.leave(x), hidden_states=hidden)


# ---- names -----------------------------------------------------------------------------------------------------------

AUTO = {
    "AutoModel": LlmengineModel,
    "AutoModelForMaskedLM": LlmengineForMaskedLM,
    "AutoModelForCausalLM": LlmengineForCausalLM,
    "AutoModelForSeq2SeqLM": LlmengineForConditionalGeneration,
    "AutoModelForSequenceClassification": LlmengineForSequenceClassification,
    "AutoModelForTokenClassification": LlmengineForTokenClassification,
    "AutoModelForQuestionAnswering": LlmengineForQuestionAnswering,
    "AutoModelForMultipleChoice": LlmengineForMultipleChoice,
}


def register(name: str = attention.NAME) -> None:
    """Makes Transformers know llmengine, once or again: the attention function and masks by `name`, for models of
    theirs; and our own models to their auto classes, for directories in our own layout (model_type "llmengine")."""
    attention.register(name)
    transformers.AutoConfig.register(OWN, LlmengineConfig, exist_ok=True)
    for auto, model in AUTO.items():
        getattr(transformers, auto).register(LlmengineConfig, model, exist_ok=True)
