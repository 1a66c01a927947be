"""BERT (Devlin et al. 2019) as Hugging Face stores it: BertForPreTraining, BertForMaskedLM, BertModel and the like."""

from __future__ import annotations

from llmengine.convert.family import Family, Rule, concatenate, copy

_LAYER = "bert.encoder.layer.{i}."


def _both(ours: str, theirs: str) -> tuple[Rule, Rule]:
    return copy(f"{ours}.weight", f"{theirs}.weight"), copy(f"{ours}.bias", f"{theirs}.bias")


def _qkv(leaf: str) -> Rule:
    parts = (f"{_LAYER}attention.self.{part}.{leaf}" for part in ("query", "key", "value"))
    return concatenate(f"layers.{{i}}.attention.qkv.{leaf}", *parts)


BERT = Family(
    name="bert",
    prefix="bert.",
    heads=("cls.",),
    fields=(
        ("vocab_size", "vocab_size"),
        ("hidden_size", "d_model"),
        ("num_hidden_layers", "n_layers"),
        ("num_attention_heads", "n_heads"),
        ("intermediate_size", "d_ff"),
        ("max_position_embeddings", "max_positions"),
        ("type_vocab_size", "type_vocab_size"),
        ("hidden_act", "activation"),
        ("layer_norm_eps", "norm_eps"),
        ("hidden_dropout_prob", "dropout"),
        ("hidden_dropout_prob", "embed_dropout"),
        ("attention_probs_dropout_prob", "attention_dropout"),
        ("initializer_range", "init_std"),
        ("tie_word_embeddings", "tie_embeddings"),
        ("pad_token_id", "pad_token_id"),
        ("bos_token_id", "bos_token_id"),
        ("eos_token_id", "eos_token_id"),
    ),
    constants={
        "architecture": "encoder",
        "norm_place": "post",
        "embed_norm": True,
        "final_norm": False,
        "head_transform": True,
        "head_bias": True,
        "activation_dropout": 0.0,
        "scale_residual_init": False,
        "freeze_padding_row": True,
    },
    defaults={
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    demanded={
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "is_encoder_decoder": (False,),
        "position_embedding_type": ("absolute", None),
        "pruned_heads": (None, {}),
    },
    without_effect=frozenset(
        "directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head "
        "pooler_type cross_attention_hidden_size".split()
    ),
    classes={
        "BertForPreTraining": ("mlm", "nsp"),
        "BertForMaskedLM": ("mlm",),
        "BertForNextSentencePrediction": ("nsp",),
        "BertModel": (),
    },
    evidence={"mlm": "cls.predictions.transform.dense.weight", "nsp": "cls.seq_relationship.weight"},
    poolers={"cls_tanh": "bert.pooler.dense.weight"},
    tensors=(
        copy("embeddings.word.weight", "bert.embeddings.word_embeddings.weight"),
        copy("embeddings.position.weight", "bert.embeddings.position_embeddings.weight"),
        copy("embeddings.token_type.weight", "bert.embeddings.token_type_embeddings.weight"),
        *_both("embeddings.norm", "bert.embeddings.LayerNorm"),
        _qkv("weight"),
        _qkv("bias"),
        *_both("layers.{i}.attention.out", f"{_LAYER}attention.output.dense"),
        *_both("layers.{i}.attention_norm", f"{_LAYER}attention.output.LayerNorm"),
        *_both("layers.{i}.feed_forward.up", f"{_LAYER}intermediate.dense"),
        *_both("layers.{i}.feed_forward.down", f"{_LAYER}output.dense"),
        *_both("layers.{i}.feed_forward_norm", f"{_LAYER}output.LayerNorm"),
        *_both("pooler.dense", "bert.pooler.dense"),
        *_both("token_head.dense", "cls.predictions.transform.dense"),
        *_both("token_head.norm", "cls.predictions.transform.LayerNorm"),
        copy("token_head.bias", "cls.predictions.bias"),
        copy("token_head.weight", "cls.predictions.decoder.weight"),
        *_both("nsp_head", "cls.seq_relationship"),
    ),
    tied={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    skipped=r"embeddings\.(position_ids|token_type_ids)$",
    renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
)
