"""What a model family's checkpoints look like, as data, and the two directions in which that data is read.

This room knows plain dictionaries only: config fields and tensors by name, theirs (Hugging Face's) and ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Fields of every Hugging Face config that do not change what the model computes.
WITHOUT_EFFECT = frozenset(
    """
    _attn_implementation _name_or_path architectures attn_implementation chunk_size_feed_forward
    classifier_dropout dtype finetuning_task gradient_checkpointing id2label label2id language license model_type
    name_or_path output_attentions output_hidden_states output_past problem_type return_dict task_specific_params
    torch_dtype torchscript transformers_version use_bfloat16 use_cache
    """.split()
)
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True)
class Rule:
    """One tensor of ours from theirs: a copy, a transpose, or several concatenated along the rows. {i} is a layer."""

    ours: str
    theirs: tuple[str, ...]
    transpose: bool = False

    def of_layer(self, i: int) -> Rule:
        ours, *theirs = (name.replace("{i}", str(i)) for name in (self.ours, *self.theirs))
        return Rule(ours, tuple(theirs), self.transpose)

    def read(self, theirs: list[Tensor]) -> Tensor:
        joined = theirs[0] if len(theirs) == 1 else torch.cat(theirs)
        return joined.T.contiguous() if self.transpose else joined

    def write(self, ours: Tensor) -> list[Tensor]:
        whole = ours.T if self.transpose else ours
        return [part.clone(memory_format=torch.contiguous_format) for part in whole.chunk(len(self.theirs))]


def copy(ours: str, theirs: str) -> Rule:
    return Rule(ours, (theirs,))


def transpose(ours: str, theirs: str) -> Rule:
    return Rule(ours, (theirs,), transpose=True)


def concatenate(ours: str, *theirs: str) -> Rule:
    return Rule(ours, theirs)


@dataclass(frozen=True)
class Family:
    """A family's config fields and tensors in Hugging Face's layout."""

    name: str
    prefix: str
    """What their backbone's tensors begin with; files of the bare backbone lack it."""
    heads: tuple[str, ...]
    """What their heads' tensors begin with."""
    fields: tuple[tuple[str, str], ...]
    """(theirs, ours): the same meaning. One of theirs may stand for two of ours, which must then be equal."""
    constants: Mapping[str, Any]
    """Our fields that all models of the family share."""
    defaults: Mapping[str, Any]
    """Values of their fields where a file leaves them out."""
    demanded: Mapping[str, tuple]
    """Their fields that change the mathematics, with the values that we compute."""
    without_effect: frozenset[str]
    classes: Mapping[str, tuple[str, ...]]
    """Their classes and the objectives of each."""
    evidence: Mapping[str, str]
    """The tensor whose presence tells that a file has this objective."""
    tensors: tuple[Rule, ...]
    poolers: Mapping[str, str] = field(default_factory=dict)
    """The tensor whose presence tells that a file has this pooler."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Their second names for a tensor, which files may repeat. Without tied embeddings they use the second."""
    skipped: str = "$^"
    """Pattern of tensors that hold no parameters."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Patterns of names in old files, and their replacements."""
    derived: Mapping[str, Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)
    """Values of their fields that default to a function of others."""

    def rules(self, layers: int) -> Iterator[Rule]:
        for rule in self.tensors:
            if "{i}" in rule.ours:
                yield from (rule.of_layer(i) for i in range(layers))
            else:
                yield rule

    def canonical(self, name: str, has_prefix: bool) -> str:
        """A tensor's name as a new file of the whole model has it."""
        for old, new in self.renamed:
            name = re.sub(old, new, name)
        return name if has_prefix or name.startswith(self.heads) else self.prefix + name

    # ---- configs -----------------------------------------------------------------------------------------------------

    def read_config(self, theirs: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, Any]:
        """Our fields from their config.json and the names of the file's tensors."""
        known = {name for name, _ in self.fields} | self.demanded.keys() | self.without_effect | WITHOUT_EFFECT
        if unknown := sorted(theirs.keys() - known):
            raise ValueError(f"config.json of family {self.name}: fields unknown to llmengine: {', '.join(unknown)}")
        for name, allowed in self.demanded.items():
            if theirs.get(name, allowed[0]) not in allowed:
                raise ValueError(
                    f"config.json of family {self.name}: {name} is {theirs[name]!r}; llmengine computes only "
                    + " or ".join(map(repr, allowed))
                )
        theirs = {**self.defaults, **theirs}
        for name, derive in self.derived.items():
            theirs[name] = derive(theirs) if theirs.get(name) is None else theirs[name]
        ours = {"family": self.name, **self.constants}
        for their_name, our_name in self.fields:
            value = theirs[their_name]
            ours[our_name] = self._activation(their_name, value) if our_name == "activation" else value
        names = set(tensors)
        ours["objectives"] = [objective for objective, tensor in self.evidence.items() if tensor in names]
        if self.poolers:
            ours["pooler"] = next((pooler for pooler, tensor in self.poolers.items() if tensor in names), "none")
        return ours

    def write_config(self, ours: Mapping[str, Any]) -> dict[str, Any]:
        """Their config.json for our fields; ValueError where the family cannot express one."""
        for name, value in self.constants.items():
            if ours[name] != value:
                raise self._inexpressible(name, ours[name], f"it has {value!r}")
        classes = {frozenset(objectives): name for name, objectives in self.classes.items()}
        architecture = classes.get(frozenset(ours["objectives"]))
        if architecture is None:
            known = list(self.classes.values())
            raise self._inexpressible("objectives", ours["objectives"], f"its models have {known}")
        theirs: dict[str, Any] = {"architectures": [architecture], "model_type": self.name}
        for their_name, our_name in self.fields:
            value = ours[our_name]
            if our_name == "activation":
                value = next(theirs_ for theirs_, ours_ in ACTIVATIONS.items() if ours_ == value)
            if theirs.setdefault(their_name, value) != value:
                raise self._inexpressible(our_name, value, f"its {their_name} is {theirs[their_name]!r} already")
        return theirs

    def _activation(self, name: str, value: str) -> str:
        if value not in ACTIVATIONS:
            raise ValueError(
                f"config.json of family {self.name}: {name} is {value!r}; llmengine computes {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[value]

    def _inexpressible(self, name: str, value: Any, why: str) -> ValueError:
        return ValueError(
            f'TransformerConfig: family "{self.name}" cannot express {name} {value!r} ({why}); set family to "custom"'
        )

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def write_tensors(self, ours: Mapping[str, Tensor], layers: int, tied: bool = True) -> dict[str, Tensor]:
        """Their tensors (or gradients) from ours; each stored once, and under its second name too where not tied."""
        theirs: dict[str, Tensor] = {}
        left = set(ours)
        for rule in self.rules(layers):
            if rule.ours in ours:
                theirs.update(zip(rule.theirs, rule.write(ours[rule.ours]), strict=True))
                left.discard(rule.ours)
        if left:
            raise ValueError(f'family "{self.name}" has no name for {", ".join(sorted(left))}')
        seconds = {} if tied else self._second_names()
        return theirs | {second: theirs[first].clone() for second, first in seconds.items() if first in theirs}

    def read_tensors(
        self, names: Iterable[str], get: Callable[[str], Tensor], wanted: Iterable[str], layers: int, tied: bool
    ) -> dict[str, Tensor]:
        """Our tensors `wanted` from a file's `names`; every tensor of the file must be known."""
        names, wanted = set(names), set(wanted)
        rules = {rule.ours: rule for rule in self.rules(layers)}
        if missing := sorted({t for ours in wanted for t in rules[ours].theirs} - names):
            raise ValueError(f"checkpoint of family {self.name} lacks {_some(missing)}")
        known = {t for rule in rules.values() for t in rule.theirs} | self.tied.keys()
        if unknown := sorted(name for name in names - known if not re.search(self.skipped, name)):
            raise ValueError(f"checkpoint of family {self.name} has tensors unknown to llmengine: {_some(unknown)}")
        for second, first in self.tied.items():
            if tied and {first, second} <= names and not torch.equal(get(first), get(second)):
                raise ValueError(
                    f"checkpoint of family {self.name}: {second} differs from {first}, but they are one parameter "
                    "(tie_word_embeddings)"
                )
        used = {} if tied else {first: second for second, first in self._second_names().items() if second in names}
        return {ours: rules[ours].read([get(used.get(name, name)) for name in rules[ours].theirs]) for ours in wanted}

    def _second_names(self) -> dict[str, str]:
        """Those of `tied` that no tensor of ours has to itself."""
        own = {name for rule in self.tensors for name in rule.theirs}
        return {second: first for second, first in self.tied.items() if second not in own}


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
