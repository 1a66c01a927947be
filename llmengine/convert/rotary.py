"""Hugging Face's rope_parameters, and the fields that older files have in their place, to and from our `rotary`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# theirs -> ours
_NUMBERS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_positions",
    "low_freq_factor": "low_frequency",
    "high_freq_factor": "high_frequency",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
_KINDS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
_USED = {
    "linear": ("factor",),
    "llama3": ("factor", "original_positions", "low_frequency", "high_frequency"),
    "yarn": ("factor", "original_positions", "beta_fast", "beta_slow", "attention_factor"),
}
_DEFAULTS: dict[str, Any] = {
    "theta": 10000.0, "window_theta": None, "fraction": 1.0, "interleaved": False, "scaling": "none", "factor": 1.0,
    "original_positions": None, "low_frequency": 1.0, "high_frequency": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "attention_factor": None,
}  # fmt: skip
FIELDS = frozenset(
    "rope_parameters rope_theta rope_scaling rotary_pct rotary_emb_base partial_rotary_factor global_rope_theta "
    "local_rope_theta rope_local_base_freq".split()
)


def read(
    theirs: Mapping[str, Any],
    *,
    theta: float = 10000.0,
    window_theta: float | None = None,
    partial: float | None = None,
) -> dict[str, Any]:
    """Our `rotary`; the arguments are the family's defaults. window_theta: where windowed layers turn by another.
    partial: which part of a head turns; None where it is always the whole."""
    parameters = theirs.get("rope_parameters") or {}
    by_type = "full_attention" in parameters or "sliding_attention" in parameters
    full = dict(parameters.get("full_attention") or {}) if by_type else dict(parameters)
    full |= theirs.get("rope_scaling") or {}
    given = next((theirs[k] for k in ("rope_theta", "rotary_emb_base", "global_rope_theta") if k in theirs), theta)
    rotary = _DEFAULTS | {"theta": float(full.pop("rope_theta", given))}
    fraction = full.pop("partial_rotary_factor", theirs.get("partial_rotary_factor", theirs.get("rotary_pct")))
    fraction = partial if fraction is None else fraction
    rotary["fraction"] = 1.0 if fraction is None else float(fraction)
    if rotary["fraction"] != 1.0 and partial is None:
        raise ValueError(f"config.json: partial_rotary_factor is {fraction}; in this family whole heads turn")
    kind = full.pop("rope_type", full.pop("type", "default"))
    full.pop("type", None)
    if kind not in _KINDS:
        raise ValueError(f"config.json: rope_type is {kind!r}; llmengine computes {', '.join(_KINDS)}")
    rotary["scaling"] = _KINDS[kind]
    for name, value in full.items():
        if name not in _NUMBERS:
            raise ValueError(f"config.json: rope_parameters has {name}, unknown to llmengine")
        if kind != "default":
            rotary[_NUMBERS[name]] = value if name == "original_max_position_embeddings" else float(value)
    if kind in ("llama3", "yarn") and rotary["original_positions"] is None:
        rotary["original_positions"] = theirs.get("max_position_embeddings")
    if window_theta is not None:
        sliding = dict(parameters.get("sliding_attention") or {})
        if sliding.get("rope_type", "default") != "default":
            raise ValueError(
                "config.json: rope_parameters stretches sliding_attention; llmengine computes only 'default'"
            )
        old = theirs.get("local_rope_theta", theirs.get("rope_local_base_freq", window_theta))
        rotary["window_theta"] = float(sliding.get("rope_theta", old))
    return rotary


def write(rotary: Mapping[str, Any], *, partial: bool = False) -> dict[str, Any]:
    """Their `rope_parameters` for ours; by layer type where windowed layers have a frequency of their own. partial:
    whether a part of a head may turn, so that a whole one must be said too."""
    full: dict[str, Any] = {"rope_theta": rotary["theta"]}
    full["rope_type"] = next(theirs for theirs, ours in _KINDS.items() if ours == rotary["scaling"])
    if partial or rotary["fraction"] != 1.0:
        full["partial_rotary_factor"] = rotary["fraction"]
    if rotary["scaling"] != "none":
        full |= {theirs: rotary[ours] for theirs, ours in _NUMBERS.items() if ours in _USED[rotary["scaling"]]}
        full = {name: value for name, value in full.items() if value is not None}
    if rotary["window_theta"] is None:
        return {"rope_parameters": full}
    sliding = {"rope_type": "default", "rope_theta": rotary["window_theta"]}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


def layer_types(theirs: Mapping[str, Any]) -> list[str] | None:
    """Our layer_types; None where all layers are windowed, or nothing is said."""
    types = theirs.get("layer_types")
    if not types:
        return None
    known = {"full_attention": "full", "sliding_attention": "window"}
    if unknown := sorted(set(types) - known.keys()):
        raise ValueError(f"config.json: layer_types has {', '.join(unknown)}; llmengine computes {', '.join(known)}")
    return [known[kind] for kind in types] if "full_attention" in types else None


def write_layer_types(ours: Mapping[str, Any]) -> list[str]:
    types = ours["layer_types"] or ["full" if ours["window"] is None else "window"] * ours["n_layers"]
    return [{"full": "full_attention", "window": "sliding_attention"}[kind] for kind in types]
