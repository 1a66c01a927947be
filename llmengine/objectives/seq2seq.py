"""What objectives of encoder-decoders give."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def source_and_target(source: np.ndarray, target: np.ndarray, start: int) -> dict[str, Tensor]:
    """Arguments of the model: the decoder reads `start` and the target less its last token, and writes the target."""
    shifted = np.concatenate([[start], target[:-1]])
    arrays = {"input_ids": source, "decoder_input_ids": shifted, "labels": target}
    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
