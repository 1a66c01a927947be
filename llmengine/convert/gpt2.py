"""GPT-2 (Radford et al. 2019) as Hugging Face stores it: Conv1D weights are (in, out), the transpose of nn.Linear's."""

from __future__ import annotations

from llmengine.convert.family import Family, Rule, copy, transpose

_LAYER = "transformer.h.{i}."


def _norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
    return copy(f"{ours}.weight", f"{theirs}.weight"), copy(f"{ours}.bias", f"{theirs}.bias")


def _conv(ours: str, theirs: str) -> tuple[Rule, Rule]:
    return transpose(f"{ours}.weight", f"{theirs}.weight"), copy(f"{ours}.bias", f"{theirs}.bias")


GPT2 = Family(
    name="gpt2",
    prefix="transformer.",
    heads=("lm_head.",),
    fields=(
        ("vocab_size", "vocab_size"),
        ("n_embd", "d_model"),
        ("n_layer", "n_layers"),
        ("n_head", "n_heads"),
        ("n_inner", "d_ff"),
        ("n_positions", "max_positions"),
        ("activation_function", "activation"),
        ("layer_norm_epsilon", "norm_eps"),
        ("resid_pdrop", "dropout"),
        ("embd_pdrop", "embed_dropout"),
        ("attn_pdrop", "attention_dropout"),
        ("initializer_range", "init_std"),
        ("tie_word_embeddings", "tie_embeddings"),
        ("pad_token_id", "pad_token_id"),
        ("bos_token_id", "bos_token_id"),
        ("eos_token_id", "eos_token_id"),
    ),
    constants={
        "architecture": "decoder",
        "type_vocab_size": 0,
        "norm_place": "pre",
        "embed_norm": False,
        "final_norm": True,
        "pooler": "none",
        "head_transform": False,
        "head_bias": False,
        "activation_dropout": 0.0,
        "scale_residual_init": True,
        "freeze_padding_row": False,
    },
    defaults={
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "n_positions": 1024,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "pad_token_id": None,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    derived={"n_inner": lambda config: 4 * config["n_embd"]},
    demanded={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "is_encoder_decoder": (False,),
        "pruned_heads": (None, {}),
    },
    # reorder_and_upcast_attn asks for float32 scores, which ours are anyway; summary_* belong to classification heads
    without_effect=frozenset(
        "reorder_and_upcast_attn n_ctx is_decoder summary_type summary_use_proj summary_activation "
        "summary_proj_to_labels summary_first_dropout".split()
    ),
    classes={"GPT2LMHeadModel": ("clm",), "GPT2Model": ()},
    evidence={"clm": "transformer.wte.weight"},
    tensors=(
        copy("embeddings.word.weight", "transformer.wte.weight"),
        copy("embeddings.position.weight", "transformer.wpe.weight"),
        *_norm("layers.{i}.attention_norm", f"{_LAYER}ln_1"),
        *_conv("layers.{i}.attention.qkv", f"{_LAYER}attn.c_attn"),
        *_conv("layers.{i}.attention.out", f"{_LAYER}attn.c_proj"),
        *_norm("layers.{i}.feed_forward_norm", f"{_LAYER}ln_2"),
        *_conv("layers.{i}.feed_forward.up", f"{_LAYER}mlp.c_fc"),
        *_conv("layers.{i}.feed_forward.down", f"{_LAYER}mlp.c_proj"),
        *_norm("final_norm", "transformer.ln_f"),
        copy("token_head.weight", "lm_head.weight"),
    ),
    tied={"lm_head.weight": "transformer.wte.weight"},
    skipped=r"\.attn\.(bias|masked_bias)$",
)
