"""A pretrained model with other heads: what its config becomes, and which parameters are made fresh."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmengine.convert import Checkpoint
from llmengine.models.config import TASKS


def with_heads(
    checkpoint: Checkpoint, objectives: Iterable[str] | None, chosen: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Config fields of a file's model with the heads `objectives` (None: the file's), and the modules, by name, that
    the file lacks.

    chosen: fields that someone asked for. Of the others those follow that models of the file's family have with a fresh
    head (what its classifier reads), so that its layout can hold the new model too.
    """
    fields = {**checkpoint.fields, **chosen}
    if objectives is not None:
        fields["objectives"] = list(objectives)
    heads = fields["objectives"]
    fresh = [f"heads.{name}" for name in heads if name in TASKS and name not in checkpoint.fields["objectives"]]
    if not fresh:
        return fields, ()
    fields |= {"labels": None, **_of_family(checkpoint, heads), **chosen}
    if "pooler" not in chosen:
        pooled = fields.get("classifier") == "pooled" and {"classification", "choice"} & set(heads)
        fields["pooler"] = "cls_tanh" if pooled or {"nsp", "sop"} & set(heads) else "none"
    if fields["pooler"] != "none" and checkpoint.fields.get("pooler", "none") == "none":
        fresh.append("pooler")
    return fields, tuple(fresh)


def _of_family(checkpoint: Checkpoint, heads: Iterable[str]) -> dict[str, Any]:
    summed_up = checkpoint.fields["architecture"] == "decoder" and {"classification", "choice"} & set(heads)
    # a decoder's first token, which sees no other, stands for nothing
    last = {"summary": "last"} if summed_up else {}
    return last if checkpoint.family is None else {**last, **checkpoint.family.fields_of_heads(heads)}
