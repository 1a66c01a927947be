"""Public operators, named and shaped as in torch.nn.functional; everything more is keyword-only."""

from __future__ import annotations

from llmengine.functional.attention import scaled_dot_product_attention, varlen_attention
from llmengine.functional.chain_field import chain_field_decode, chain_field_loss
from llmengine.functional.cross_entropy import cross_entropy
from llmengine.functional.decode_attention import decode_attention
from llmengine.functional.embedding import TiedEmbedding, embedding
from llmengine.functional.ffn import ffn
from llmengine.functional.fp8_linear import Fp8Weight, fp8_linear
from llmengine.functional.linear import linear
from llmengine.functional.linear_cross_entropy import linear_cross_entropy
from llmengine.functional.linear_cross_entropy_shard import VocabularyShard
from llmengine.functional.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from llmengine.functional.relative_attention import relative_attention
from llmengine.functional.rotary import rotary_embedding
from llmengine.functional.softmax import softmax

__all__ = [
    "Fp8Weight",
    "TiedEmbedding",
    "VocabularyShard",
    "add_layer_norm",
    "add_rms_norm",
    "chain_field_decode",
    "chain_field_loss",
    "cross_entropy",
    "decode_attention",
    "embedding",
    "ffn",
    "fp8_linear",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "relative_attention",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "softmax",
    "varlen_attention",
]
