"""Layer-wise learning rates: the further a layer is from the head, the less it learns.

Howard & Ruder 2018 (discriminative fine-tuning); Clark et al. 2020, appendix B.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor
from torch.nn import Module

from llmengine.models import Transformer, TransformerConfig

_PLACE = re.compile(r"(?:^|\.)(encoder|decoder)\.(?:layers\.(\d+)\.|(embeddings|final_norm|distance_buckets)\.)")


def shares(model: Module, decay: float) -> Callable[[Tensor], float]:
    """What a parameter's learning rate is of the step's: decay ** depth, depths being those of `depth`. Parameters that
    belong to no Transformer in `model`: 1."""
    found: dict[int, float] = {}
    if decay != 1.0:
        for part in model.modules():
            if isinstance(part, Transformer):
                for name, parameter in part.named_parameters():
                    found.setdefault(id(parameter), decay ** depth(name, part.config))
    return lambda parameter: found.get(id(parameter), 1.0)


def depth(name: str, config: TransformerConfig) -> int:
    """How far a parameter of a Transformer is from its output.

    0 for heads, pooler and the last norm, 1 for the last layer, and so on down; embeddings are below all layers. An
    encoder-decoder's encoder is below its decoder: its layers go on counting, and its last norm counts as its last
    layer. Biases of distances, which all layers of a stack share, count as its first layer. A layer that is applied
    again and again is one layer.
    """
    place = _PLACE.search(name)
    if place is None:
        return 0
    side, layer, part = place.groups()
    encoder, decoder = (1 if config.share_layers else n for n in (config.n_layers, config.decoder_layers))
    if config.architecture != "encoder_decoder":
        encoder, decoder = (0, decoder) if config.causal else (encoder, 0)
    layers, above = (decoder, 0) if side == "decoder" else (encoder, decoder)
    if part == "embeddings":
        return encoder + decoder + 1
    if part == "final_norm":
        return above + 1 if above else 0
    return above + layers - (0 if part else int(layer))
