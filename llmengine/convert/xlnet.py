"""XLNet (Yang et al. 2019) as Hugging Face stores it: projections are (d_model, heads, head_dim)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmengine.convert.family import Family, Rule, copy, leaf

_OURS, _LAYER = "encoder.layers.{i}.", "transformer.layer.{i}."
_ATTENTION = f"{_LAYER}rel_attn."


def _split(fields: Mapping[str, Any]) -> tuple[int, int, int]:
    return fields["d_model"], fields["n_heads"], fields["d_head"] or fields["d_model"] // fields["n_heads"]


def _projections(ours: str, *theirs: str) -> Rule:
    """A Linear's weight, (heads * head_dim, d_model), or several of them one above the other."""

    def read(tensors: list[Tensor], _: Mapping) -> list[Tensor]:
        return [torch.cat([tensor.flatten(1).T for tensor in tensors])]

    def write(tensors: list[Tensor], fields: Mapping) -> list[Tensor]:
        return [part.T.unflatten(1, _split(fields)[1:]) for part in tensors[0].chunk(len(theirs))]

    return Rule((ours,), theirs, read, write)


def _out(ours: str, theirs: str) -> Rule:
    """Their output projection is applied transposed: flattened it is a Linear's weight."""

    def read(tensors: list[Tensor], _: Mapping) -> list[Tensor]:
        return [tensors[0].flatten(1)]

    def write(tensors: list[Tensor], fields: Mapping) -> list[Tensor]:
        return [tensors[0].unflatten(1, _split(fields)[1:])]

    return Rule((ours,), (theirs,), read, write)


def _query_stream() -> Rule:
    def read(tensors: list[Tensor], _: Mapping) -> list[Tensor]:
        return [tensors[0].flatten()]

    def write(tensors: list[Tensor], _: Mapping) -> list[Tensor]:
        return [tensors[0][None, None]]

    return Rule(("encoder.embeddings.query_stream",), ("transformer.mask_emb",), read, write)


def _translate(theirs: Mapping[str, Any]) -> dict[str, Any]:
    head = theirs["d_model"] // theirs["n_head"]
    if theirs.get("d_head", head) != head:
        raise ValueError(f"config.json of family xlnet: d_head is {theirs['d_head']}, not d_model / n_head ({head})")
    return {
        "relative_causal": {"bi": False, "uni": True}[theirs["attn_type"]],
        "position_clamp": theirs["clamp_len"] if theirs["clamp_len"] > 0 else None,
        "memory_length": theirs["mem_len"] or 0,
        "memory_reuse": theirs["reuse_len"] or 0,
    }


def _write_back(ours: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "d_head": ours["d_model"] // ours["n_heads"],
        "attn_type": "uni" if ours["relative_causal"] else "bi",
        "clamp_len": ours["position_clamp"] or -1,
        "mem_len": ours["memory_length"] or None,
        "reuse_len": ours["memory_reuse"] or None,
    }


XLNET = Family(
    name="xlnet",
    prefix="transformer.",
    heads=("lm_loss.", "sequence_summary.", "logits_proj.", "classifier.", "qa_outputs."),
    fields=(
        ("vocab_size", "vocab_size"),
        ("d_model", "d_model"),
        ("n_layer", "n_layers"),
        ("n_head", "n_heads"),
        ("d_inner", "d_ff"),
        ("ff_activation", "activation"),
        ("layer_norm_eps", "norm_eps"),
        ("dropout", "dropout"),
        ("dropout", "embed_dropout"),
        ("dropout", "attention_dropout"),
        ("dropout", "activation_dropout"),
        ("dropout", "final_dropout"),
        ("initializer_range", "init_std"),
        ("tie_word_embeddings", "tie_embeddings"),
        ("pad_token_id", "pad_token_id"),
        ("bos_token_id", "bos_token_id"),
        ("eos_token_id", "eos_token_id"),
    ),
    constants={
        "architecture": "encoder",
        "positions": "relative",
        "max_positions": None,
        "norm_place": "post",
        "final_norm": False,
        "head_bias": True,
        "summary": "last",
        "classifier": "dense_tanh",
    },
    defaults={
        "vocab_size": 32000,
        "d_model": 1024,
        "n_layer": 24,
        "n_head": 16,
        "d_inner": 4096,
        "ff_activation": "gelu",
        "layer_norm_eps": 1e-12,
        "dropout": 0.1,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "pad_token_id": 5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_type": "bi",
        "clamp_len": -1,
        "mem_len": 512,
        "reuse_len": None,
    },
    demanded={
        "is_decoder": (False,),
        "bi_data": (False,),
        "same_length": (False,),
        "untie_r": (True,),
        "summary_type": ("last",),
        "summary_use_proj": (True,),
        "summary_activation": ("tanh",),
    },
    without_effect=frozenset(
        "use_mems_eval use_mems_train summary_last_dropout start_n_top end_n_top use_mems n_token "
        "max_position_embeddings".split()
    ),
    translated=frozenset("attn_type clamp_len mem_len reuse_len d_head".split()),
    translate=_translate,
    write_back=_write_back,
    classes={
        "XLNetLMHeadModel": ("plm",),
        "XLNetModel": (),
        "XLNetForSequenceClassification": ("classification",),
        "XLNetForTokenClassification": ("tagging",),
        "XLNetForMultipleChoice": ("choice",),
        "XLNetForQuestionAnsweringSimple": ("qa",),
    },
    evidence={"plm": "lm_loss.bias"},
    tensors=(
        copy("encoder.embeddings.word.weight", "transformer.word_embedding.weight"),
        _query_stream(),
        _projections(f"{_OURS}attention.q.weight", f"{_ATTENTION}q"),
        _projections(f"{_OURS}attention.kv.weight", f"{_ATTENTION}k", f"{_ATTENTION}v"),
        _projections(f"{_OURS}attention.r.weight", f"{_ATTENTION}r"),
        _out(f"{_OURS}attention.out.weight", f"{_ATTENTION}o"),
        copy(f"{_OURS}attention.content_bias", f"{_ATTENTION}r_w_bias"),
        copy(f"{_OURS}attention.position_bias", f"{_ATTENTION}r_r_bias"),
        copy(f"{_OURS}attention.segment_bias", f"{_ATTENTION}r_s_bias"),
        copy(f"{_OURS}attention.segment_key", f"{_ATTENTION}seg_embed"),
        *leaf(f"{_OURS}attention_norm", f"{_ATTENTION}layer_norm"),
        *leaf(f"{_OURS}feed_forward.up", f"{_LAYER}ff.layer_1"),
        *leaf(f"{_OURS}feed_forward.down", f"{_LAYER}ff.layer_2"),
        *leaf(f"{_OURS}feed_forward_norm", f"{_LAYER}ff.layer_norm"),
        copy("token_head.weight", "lm_loss.weight"),
        copy("token_head.bias", "lm_loss.bias"),
    ),
    heads_of={
        "classification": (
            *leaf("heads.classification.dense", "sequence_summary.summary"),
            *leaf("heads.classification.out", "logits_proj"),
        ),
        "choice": (*leaf("heads.choice.dense", "sequence_summary.summary"), *leaf("heads.choice.out", "logits_proj")),
        "tagging": leaf("heads.tagging.out", "classifier"),
        "qa": leaf("heads.qa", "qa_outputs"),
    },
    tied={"lm_loss.weight": "transformer.word_embedding.weight"},
)
