"""Tiny Transformers models of each family, their weights perturbed so that zero biases and unit norms hide nothing."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor

VOCABULARY = 61
_CLASSIC = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 40, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 40, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # fmt: skip
_BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40,
    "dropout": 0.0, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "bos_token_id": 1,
    "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
_WINDOW = {"sliding_window": 4}
# family: (model class, config class, fields, what accelerate swaps beside attention and the loss)
FAMILIES: dict[str, tuple[str, str, dict, set[str]]] = {
    "bert": ("BertForMaskedLM", "BertConfig", _CLASSIC, {"layer norm", "feed-forward", "dense layer"}),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _CLASSIC, {"layer norm", "feed-forward", "dense layer"}),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", _CLASSIC | {"embedding_size": 24, "hidden_act": "relu"},
                {"layer norm", "feed-forward", "dense layer"}),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", _CLASSIC | {"embedding_size": 24, "hidden_act": "gelu_new"},
               {"layer norm", "feed-forward"}),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig",
                   {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "dropout": 0.0,
                    "attention_dropout": 0.0, "max_position_embeddings": 40}, {"layer norm", "feed-forward"}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2, {"layer norm", "feed-forward"}),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", _GPT2 | {"rotary_dim": 4}, {"layer norm", "feed-forward"}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _CLASSIC | {"bos_token_id": 1, "eos_token_id": 2},
                 {"layer norm", "feed-forward"}),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART, {"layer norm", "encoder layer", "decoder layer"}),
    "marian": ("MarianMTModel", "MarianConfig", _BART | {"activation_function": "swish", "decoder_start_token_id": 1},
               {"layer norm", "encoder layer", "decoder layer"}),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", _BART, {"layer norm", "encoder layer", "decoder layer"}),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5, {"RMS norm", "feed-forward"}),
    "t5_gated": ("T5ForConditionalGeneration", "T5Config",
                 _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, {"RMS norm", "feed-forward"}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER, {"RMS norm", "feed-forward"}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _DECODER | _WINDOW, {"RMS norm", "feed-forward"}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER, {"RMS norm", "feed-forward"}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER | {"head_dim": 8}, {"RMS norm", "feed-forward"}),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config",
                   _DECODER | _WINDOW | {"residual_dropout": 0.0, "embedding_dropout": 0.0},
                   {"layer norm", "feed-forward"}),
    "cohere": ("CohereForCausalLM", "CohereConfig", _DECODER | {"logit_scale": 0.3}, {"layer norm", "feed-forward"}),
    "phi": ("PhiForCausalLM", "PhiConfig", _DECODER, {"layer norm", "feed-forward"}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _DECODER | _WINDOW, {"RMS norm", "feed-forward"}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config",
               _DECODER | _WINDOW | {"head_dim": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
               {"RMS norm with weight 1 + w", "feed-forward"}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _DECODER | _WINDOW | {"head_dim": 8},
               {"RMS norm with weight 1 + w", "feed-forward"}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig",
                _DECODER | _WINDOW | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, {"RMS norm"}),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig",
                   {**_CLASSIC, "num_hidden_layers": 3, "local_attention": 6, "global_attn_every_n_layers": 3,
                    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
                   {"layer norm", "feed-forward"}),
}  # fmt: skip
ENCODER_DECODERS = ("bart", "mbart", "marian", "t5", "t5_gated")
MASKED = ("bert", "distilbert", "roberta", "electra", "albert", "modernbert")
CAUSAL = tuple(name for name in FAMILIES if name not in MASKED + ENCODER_DECODERS)


def build(family: str, **fields) -> transformers.PreTrainedModel:
    """In training mode, without dropout, on Transformers' eager attention."""
    torch.manual_seed(0)
    name, config, own, _ = FAMILIES[family]
    model = getattr(transformers, name)._from_config(
        getattr(transformers, config)(**own | fields), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.train()


def batch(family: str, padding: str = "none", rows: int = 3, length: int = 11) -> dict[str, Tensor]:
    """Ids with labels; `padding` is none, right or left. Labels of encoder-decoders have a length of their own."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=g)
    real = torch.arange(length) < torch.tensor([length, 7, 4] + [length] * rows)[:rows, None]
    real = {"none": torch.ones_like(real), "right": real, "left": real.flip(1)}[padding]
    labels = torch.randint(3, VOCABULARY, (rows, 9 if family in ENCODER_DECODERS else length), generator=g)
    if family in MASKED:
        labels = labels.masked_fill(torch.rand(labels.shape, generator=g) < 0.6, -100)
    if family in ENCODER_DECODERS:
        labels[:, 6:] = -100 if padding != "none" else labels[:, 6:]
    else:
        labels = labels.masked_fill(~real, -100)
    if family in CAUSAL and padding == "left":  # the first token of a text would be foretold from padding
        labels = labels.masked_fill(real.cumsum(1) == 1, -100)
    inputs = {"input_ids": ids, "labels": labels}
    return inputs if padding == "none" else inputs | {"attention_mask": real.long()}


def run(model: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, logits at labelled places, gradients by name)."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    logits = output.logits.detach()[inputs["labels"] != -100]
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return output.loss.detach(), logits, gradients
