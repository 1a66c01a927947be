"""Low-rank adaptation (Hu et al. 2021) by the package peft: adapters beside a model's linear maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import Linear

from llmengine.models import Transformer

if TYPE_CHECKING:
    from peft import PeftModel

    from llmengine.training.finetune_config import LoraSection


def adapt(model: Transformer, section: LoraSection) -> PeftModel:
    """Puts adapters into the layers of `model`, which stays the Transformer that it is; what is trained from now on are
    they and its head, unless that is the token head. Returns peft's handle, to save and to merge them."""
    try:
        import peft
    except ImportError:
        raise ValueError(
            "lora needs the package peft: pip install peft; or train all weights: leave lora out"
        ) from None
    maps = linear_maps(model)
    wanted = sorted({name.rpartition(".")[2] for name in maps}) if section.targets is None else section.targets
    if unknown := [name for name in wanted if name not in {place.rpartition(".")[2] for place in maps}]:
        known = sorted({name.rpartition(".")[2] for name in maps})
        raise ValueError(
            f"lora.targets: this model's layers have no {', '.join(unknown)}; they have {', '.join(known)}"
        )
    config = peft.LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,  # type: ignore[arg-type]  # peft multiplies by it, whole or not
        lora_dropout=section.dropout,
        target_modules=[name for name in maps if name.rpartition(".")[2] in wanted],
        modules_to_save=_head(model) or None,
    )
    return peft.get_peft_model(model, config)


def _head(model: Transformer) -> list[str]:
    """The modules that are trained whole: heads, and the pooler where one reads it, as it may be as new as they are."""
    read = model.config.classifier == "pooled" and {"classification", "choice"} & set(model.config.objectives)
    pooler = ["pooler"] if read and model.pooler is not None else []
    return [*pooler, *(f"heads.{name}" for name in model.heads)]


def linear_maps(model: Transformer) -> list[str]:
    """Names of the linear maps in the layers."""
    return [name for name, module in model.named_modules() if isinstance(module, Linear) and ".layers." in name]
