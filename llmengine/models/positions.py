"""Where tokens stand: sinusoidal tables, rotary angles, ALiBi slopes, buckets of distances."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Embedding, Module

from llmengine.models.config import Rotary, TransformerConfig


def sinusoid(kind: str, rows: int, features: int) -> Tensor:
    """A fixed table (rows, features), float32, of the positions 0, 1, …; see `waves`."""
    return waves(kind, torch.arange(rows), features)


def waves(kind: str, positions: Tensor, features: int) -> Tensor:
    """Sine and cosine of positions (n,) at geometric frequencies, (n, features) float32.

    kind: "sinusoid" (sine and cosine in turns, Vaswani et al. 2017), "sinusoid_halves" (all sines, then all cosines)
    or "sinusoid_fairseq" (halves; the last frequency is 1/10000 exactly).
    """
    half = features // 2
    last = max(half - 1, 1) if kind == "sinusoid_fairseq" else features / 2
    places = torch.arange((features + 1) // 2, dtype=torch.float64, device=positions.device)
    angles = positions.double()[:, None] * torch.exp(places * (-math.log(10000.0) / last))
    sine, cosine = angles.sin(), angles[:, :half].cos()
    if kind == "sinusoid":
        table = torch.empty(len(positions), features, dtype=torch.float64, device=positions.device)
        table[:, 0::2], table[:, 1::2] = sine, cosine
    elif kind == "sinusoid_halves":
        table = torch.cat([sine, cosine], 1)
    else:
        table = torch.nn.functional.pad(torch.cat([sine[:, :half], cosine], 1), (0, features % 2))
    return table.float()


# ---- rotary ----------------------------------------------------------------------------------------------------------


def rotary_frequencies(rotary: Rotary, head_dim: int, windowed: bool) -> tuple[Tensor, float]:
    """The angle by which each pair of features turns from a token to the next (R/2,), float32; and a factor on
    cosine and sine, 1 except for "yarn"."""
    turned = int(head_dim * rotary.fraction)
    theta = rotary.window_theta if windowed and rotary.window_theta is not None else rotary.theta
    frequencies = theta ** -(torch.arange(0, turned, 2, dtype=torch.float64) / turned)
    if rotary.scaling == "none" or (windowed and rotary.window_theta is not None):
        return frequencies.float(), 1.0
    if rotary.scaling == "linear":
        return (frequencies / rotary.factor).float(), 1.0
    assert rotary.original_positions is not None  # the config has checked
    if rotary.scaling == "llama3":
        # wavelengths that fit `high` times into the trained length stay, those above it / `low` are stretched
        fits = rotary.original_positions * frequencies / (2 * math.pi)
        low, high = rotary.low_frequency, rotary.high_frequency
        keep = ((fits - low) / (high - low)).clamp(0.0, 1.0)
        return (frequencies * (keep + (1 - keep) / rotary.factor)).float(), 1.0
    return _yarn(rotary, frequencies, turned, theta)


def _yarn(rotary: Rotary, frequencies: Tensor, turned: int, theta: float) -> tuple[Tensor, float]:
    def pair_of(turns: float) -> float:
        """The pair of features that turns so often over the trained length."""
        assert rotary.original_positions is not None
        return turned * math.log(rotary.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = max(math.floor(pair_of(rotary.beta_fast)), 0), min(math.ceil(pair_of(rotary.beta_slow)), turned - 1)
    pairs = torch.arange(turned // 2, dtype=torch.float64)
    stretch = ((pairs - first) / max(last - first, 0.001)).clamp(0.0, 1.0)
    frequencies = frequencies * (1 - stretch) + frequencies / rotary.factor * stretch
    factor = rotary.attention_factor
    return frequencies.float(), 0.1 * math.log(rotary.factor) + 1.0 if factor is None else factor


class Angles:
    """Cosines and sines of rotary positions, for full and for windowed layers."""

    def __init__(self, config: TransformerConfig) -> None:
        # made on the CPU whatever the default device: a model that is read from a file is first made on "meta"
        with torch.device("cpu"):
            self.full = rotary_frequencies(config.rotary, config.head_dim, windowed=False)
            self.windowed = rotary_frequencies(config.rotary, config.head_dim, windowed=True)
        self.same = self.full[1] == self.windowed[1] and torch.equal(self.full[0], self.windowed[0])

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """positions (tokens,) -> (cos, sin) of full layers and of windowed ones, (tokens, R/2) each; made in float32,
        and of float64 where the hidden states' dtype is."""
        wide = torch.promote_types(dtype, torch.float32)
        full = _cos_sin(positions, *self.full, wide)
        return full, full if self.same else _cos_sin(positions, *self.windowed, wide)


def _cos_sin(positions: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = positions.float()[:, None] * frequencies.to(positions.device, non_blocking=True)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


# ---- biases on scores ------------------------------------------------------------------------------------------------


def alibi_slopes(heads: int) -> list[float]:
    """Geometric slopes (Press et al. 2022): 2^(-8/n), 2^(-16/n), … for n heads, n a power of two; beyond it every other
    slope of twice as many heads."""

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    whole = 2 ** int(math.log2(heads))
    return geometric(whole) + geometric(2 * whole)[0::2][: heads - whole]


class DistanceBuckets(Module):
    """A learned number per bucket of distances and head, added to the scores (Raffel et al. 2020).

    Half of an encoder's buckets are for keys to the right. Of a direction's buckets the first half holds one distance
    each; the others grow geometrically up to position_bucket_distance, from where on all distances share the last.
    """

    def __init__(self, config: TransformerConfig, causal: bool) -> None:
        super().__init__()
        self.embedding = Embedding(config.position_buckets, config.n_heads)
        self.reach = config.position_bucket_distance
        self.causal = causal

    def forward(self) -> Tensor:
        """(heads, 2 reach + 1): the bias at distances key - query of -reach … reach."""
        distances = torch.arange(-self.reach, self.reach + 1, device=self.embedding.weight.device)
        return self.embedding(self.bucket(distances)).T

    def bucket(self, distance: Tensor) -> Tensor:
        count, first = self.embedding.num_embeddings, torch.zeros_like(distance)
        if self.causal:
            distance = (-distance).clamp(min=0)
        else:
            count //= 2
            first, distance = (distance > 0) * count, distance.abs()
        exact = count // 2
        ratio = (distance.clamp(min=1).float() / exact).log() / math.log(self.reach / exact)
        geometric = (exact + (ratio * (count - exact)).long()).clamp(max=count - 1)
        return first + torch.where(distance < exact, distance, geometric)
