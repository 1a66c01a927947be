"""BERT (Devlin et al. 2019) and its kin as Hugging Face stores them: RoBERTa (Liu et al. 2019), XLM-RoBERTa (Conneau et
al. 2019), ELECTRA (Clark et al. 2020), ALBERT (Lan et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmengine.convert.family import Family, Rule, copy, leaf, stacked

_OURS = "encoder.layers.{i}."


def _backbone(prefix: str) -> tuple[Rule, ...]:
    """The tensors that BERT, RoBERTa and ELECTRA have under the same names."""
    layer = f"{prefix}encoder.layer.{{i}}."
    return (
        copy("encoder.embeddings.word.weight", f"{prefix}embeddings.word_embeddings.weight"),
        copy("encoder.embeddings.position.weight", f"{prefix}embeddings.position_embeddings.weight"),
        copy("encoder.embeddings.token_type.weight", f"{prefix}embeddings.token_type_embeddings.weight"),
        *leaf("encoder.embeddings.norm", f"{prefix}embeddings.LayerNorm"),
        *stacked(f"{_OURS}attention.qkv", *(f"{layer}attention.self.{part}" for part in ("query", "key", "value"))),
        *leaf(f"{_OURS}attention.out", f"{layer}attention.output.dense"),
        *leaf(f"{_OURS}attention_norm", f"{layer}attention.output.LayerNorm"),
        *leaf(f"{_OURS}feed_forward.up", f"{layer}intermediate.dense"),
        *leaf(f"{_OURS}feed_forward.down", f"{layer}output.dense"),
        *leaf(f"{_OURS}feed_forward_norm", f"{layer}output.LayerNorm"),
    )


_FIELDS = (
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
)
# Of older files, or of the tokenizer.
_NOTHING = frozenset(
    "directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type "
    "layer_norm_type gap_size net_structure_type num_memory_blocks down_scale_factor "
    "summary_type summary_use_proj summary_activation summary_last_dropout".split()
)

BERT = Family(
    name="bert",
    prefix="bert.",
    heads=("cls.", "classifier.", "qa_outputs."),
    fields=_FIELDS,
    constants={
        "architecture": "encoder",
        "norm_place": "post",
        "embed_norm": True,
        "final_norm": False,
        "head_transform": True,
        "head_bias": True,
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
        "position_embedding_type": ("absolute", None),
    },
    without_effect=_NOTHING,
    classes={
        "BertForPreTraining": ("mlm", "nsp"),
        "BertForMaskedLM": ("mlm",),
        "BertForNextSentencePrediction": ("nsp",),
        "BertForSequenceClassification": ("classification",),
        "BertForTokenClassification": ("tagging",),
        "BertForQuestionAnswering": ("qa",),
        "BertForMultipleChoice": ("choice",),
        "BertModel": (),
    },
    class_fields={
        "BertForSequenceClassification": {"classifier": "pooled"},
        "BertForMultipleChoice": {"classifier": "pooled"},
    },
    evidence={"mlm": "cls.predictions.transform.dense.weight", "nsp": "cls.seq_relationship.weight"},
    poolers={"cls_tanh": "bert.pooler.dense.weight"},
    tensors=(
        *_backbone("bert."),
        *leaf("pooler.dense", "bert.pooler.dense"),
        *leaf("token_head.dense", "cls.predictions.transform.dense"),
        *leaf("token_head.norm", "cls.predictions.transform.LayerNorm"),
        copy("token_head.bias", "cls.predictions.bias"),
        copy("token_head.weight", "cls.predictions.decoder.weight"),
        *leaf("heads.nsp", "cls.seq_relationship"),
    ),
    heads_of={
        "classification": leaf("heads.classification.out", "classifier"),
        "choice": leaf("heads.choice.out", "classifier"),
        "tagging": leaf("heads.tagging.out", "classifier"),
        "qa": leaf("heads.qa", "qa_outputs"),
    },
    tied={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    skipped=r"embeddings\.(position_ids|token_type_ids)$",
    renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
)


def _roberta_positions(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens are counted from the row after padding's, so that the table has pad_token_id + 1 rows to spare."""
    offset = theirs["pad_token_id"] + 1
    return {"position_offset": offset, "max_positions": theirs["max_position_embeddings"] - offset}


def _roberta(name: str, prefix: str = "Roberta", **defaults: Any) -> Family:
    return replace(
        BERT,
        name=name,
        prefix="roberta.",
        heads=("lm_head.", "classifier.", "qa_outputs."),
        fields=tuple((theirs, ours) for theirs, ours in _FIELDS if ours != "max_positions"),
        constants={**BERT.constants, "position_of": "token"},
        demanded={**BERT.demanded, "hidden_act": ("gelu",)},  # what its token head has, whatever the config says
        defaults=BERT.defaults
        | {"vocab_size": 50265, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
        | defaults,
        classes={
            f"{prefix}ForMaskedLM": ("mlm",),
            f"{prefix}Model": (),
            f"{prefix}ForSequenceClassification": ("classification",),
            f"{prefix}ForTokenClassification": ("tagging",),
            f"{prefix}ForQuestionAnswering": ("qa",),
            f"{prefix}ForMultipleChoice": ("choice",),
        },
        class_fields={
            f"{prefix}ForSequenceClassification": {"classifier": "dense_tanh"},
            f"{prefix}ForMultipleChoice": {"classifier": "pooled"},
        },
        evidence={"mlm": "lm_head.dense.weight"},
        poolers={"cls_tanh": "roberta.pooler.dense.weight"},
        tensors=(
            *_backbone("roberta."),
            *leaf("pooler.dense", "roberta.pooler.dense"),
            *leaf("token_head.dense", "lm_head.dense"),
            *leaf("token_head.norm", "lm_head.layer_norm"),
            copy("token_head.bias", "lm_head.bias"),
            copy("token_head.weight", "lm_head.decoder.weight"),
        ),
        heads_of={
            **BERT.heads_of,
            "classification": (
                *leaf("heads.classification.dense", "classifier.dense"),
                *leaf("heads.classification.out", "classifier.out_proj"),
            ),
        },
        tied={
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        },
        translated=frozenset({"max_position_embeddings"}),
        translate=_roberta_positions,
        write_back=lambda ours: {"max_position_embeddings": ours["max_positions"] + ours["position_offset"]},
    )


ROBERTA = _roberta("roberta")
XLM_ROBERTA = _roberta("xlm-roberta", "XLMRoberta", vocab_size=30522)


def _embedding_size(theirs: Mapping[str, Any]) -> dict[str, Any]:
    width = theirs["embedding_size"]
    return {"d_embed": None if width == theirs["hidden_size"] else width}


ELECTRA = replace(
    BERT,
    name="electra",
    prefix="electra.",
    heads=("discriminator_predictions.", "generator_predictions.", "generator_lm_head.", "classifier.", "qa_outputs."),
    defaults=BERT.defaults
    | {"hidden_size": 256, "embedding_size": 128, "num_attention_heads": 4, "intermediate_size": 1024},
    demanded={**BERT.demanded, "hidden_act": ("gelu",)},  # what its heads have, whatever the config says
    classes={
        "ElectraForPreTraining": ("rtd",),
        "ElectraForMaskedLM": ("mlm",),
        "ElectraModel": (),
        "ElectraForSequenceClassification": ("classification",),
        "ElectraForTokenClassification": ("tagging",),
        "ElectraForQuestionAnswering": ("qa",),
    },
    class_fields={"ElectraForSequenceClassification": {"classifier": "dense_gelu"}},
    evidence={"mlm": "generator_predictions.dense.weight", "rtd": "discriminator_predictions.dense.weight"},
    poolers={},
    tensors=(
        *_backbone("electra."),
        *leaf("encoder.embeddings.project", "electra.embeddings_project"),
        *leaf("token_head.dense", "generator_predictions.dense"),
        *leaf("token_head.norm", "generator_predictions.LayerNorm"),
        copy("token_head.bias", "generator_lm_head.bias"),
        copy("token_head.weight", "generator_lm_head.weight"),
    ),
    heads_of={
        **ROBERTA.heads_of,
        "rtd": (
            *leaf("heads.rtd.dense", "discriminator_predictions.dense"),
            *leaf("heads.rtd.out", "discriminator_predictions.dense_prediction"),
        ),
    },
    tied={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    translated=frozenset({"embedding_size"}),
    translate=_embedding_size,
    write_back=lambda ours: {"embedding_size": ours["d_embed"] or ours["d_model"]},
)

_SHARED = "albert.encoder.albert_layer_groups.0.albert_layers.0."
ALBERT = replace(
    BERT,
    name="albert",
    prefix="albert.",
    heads=("predictions.", "sop_classifier.", "classifier.", "qa_outputs."),
    fields=(*_FIELDS, ("embedding_size", "d_embed")),
    constants={**BERT.constants, "share_layers": True},
    defaults=BERT.defaults
    | {
        "vocab_size": 30000,
        "hidden_size": 4096,
        "embedding_size": 128,
        "num_attention_heads": 64,
        "intermediate_size": 16384,
        "hidden_act": "gelu_new",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    demanded={**BERT.demanded, "num_hidden_groups": (1,), "inner_group_num": (1,), "layers_to_keep": ([],)},
    without_effect=_NOTHING | {"classifier_dropout_prob"},
    classes={
        "AlbertForPreTraining": ("mlm", "sop"),
        "AlbertForMaskedLM": ("mlm",),
        "AlbertModel": (),
        "AlbertForSequenceClassification": ("classification",),
        "AlbertForTokenClassification": ("tagging",),
        "AlbertForQuestionAnswering": ("qa",),
        "AlbertForMultipleChoice": ("choice",),
    },
    class_fields={
        "AlbertForSequenceClassification": {"classifier": "pooled"},
        "AlbertForMultipleChoice": {"classifier": "pooled"},
    },
    evidence={"mlm": "predictions.dense.weight", "sop": "sop_classifier.classifier.weight"},
    poolers={"cls_tanh": "albert.pooler.weight"},
    tensors=(
        copy("encoder.embeddings.word.weight", "albert.embeddings.word_embeddings.weight"),
        copy("encoder.embeddings.position.weight", "albert.embeddings.position_embeddings.weight"),
        copy("encoder.embeddings.token_type.weight", "albert.embeddings.token_type_embeddings.weight"),
        *leaf("encoder.embeddings.norm", "albert.embeddings.LayerNorm"),
        *leaf("encoder.embeddings.project", "albert.encoder.embedding_hidden_mapping_in"),
        *stacked(
            "encoder.layers.0.attention.qkv", *(f"{_SHARED}attention.{part}" for part in ("query", "key", "value"))
        ),
        *leaf("encoder.layers.0.attention.out", f"{_SHARED}attention.dense"),
        *leaf("encoder.layers.0.attention_norm", f"{_SHARED}attention.LayerNorm"),
        *leaf("encoder.layers.0.feed_forward.up", f"{_SHARED}ffn"),
        *leaf("encoder.layers.0.feed_forward.down", f"{_SHARED}ffn_output"),
        *leaf("encoder.layers.0.feed_forward_norm", f"{_SHARED}full_layer_layer_norm"),
        *leaf("pooler.dense", "albert.pooler"),
        *leaf("token_head.dense", "predictions.dense"),
        *leaf("token_head.norm", "predictions.LayerNorm"),
        copy("token_head.bias", "predictions.bias"),
        copy("token_head.weight", "predictions.decoder.weight"),
        *leaf("heads.sop", "sop_classifier.classifier"),
    ),
    tied={
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    },
)
