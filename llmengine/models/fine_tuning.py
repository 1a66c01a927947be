"""A pretrained model with other heads: what its config becomes, and which parameters are made fresh."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmengine.convert import Family
from llmengine.models.config import TASKS


def with_heads(
    known: Mapping[str, Any], family: Family | None, objectives: Iterable[str] | None, chosen: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Config fields of a file's model with the heads `objectives` (None: the file's), and the modules, by name, that
    the file lacks.

    known: the fields that the file gives, of this family (None: our own layout). chosen: fields that someone asked for.
    Of the others those follow that models of the family have with a fresh head (what its classifier reads), so that its
    layout can hold the new model too.
    """
    fields = {**known, **chosen}
    if objectives is not None:
        fields["objectives"] = list(objectives)
    heads = fields["objectives"]
    fresh = [f"heads.{name}" for name in heads if name in TASKS and name not in known["objectives"]]
    if not fresh:
        return fields, ()
    fields |= {"labels": None, **_of_family(known, family, heads), **chosen}
    if "pooler" not in chosen:
        pooled = fields.get("classifier") == "pooled" and {"classification", "choice"} & set(heads)
        fields["pooler"] = "cls_tanh" if pooled or {"nsp", "sop"} & set(heads) else "none"
    if fields["pooler"] != "none" and known.get("pooler", "none") == "none":
        fresh.append("pooler")
    return fields, tuple(fresh)


def _of_family(known: Mapping[str, Any], family: Family | None, heads: Iterable[str]) -> dict[str, Any]:
    summed_up = known["architecture"] == "decoder" and {"classification", "choice"} & set(heads)
    # a decoder's first token, which sees no other, stands for nothing
    last = {"summary": "last"} if summed_up else {}
    return last if family is None else {**last, **family.fields_of_heads(heads)}
