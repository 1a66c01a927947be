"""What a model family's checkpoints look like, as data, and the two directions in which that data is read.

This room knows plain dictionaries only: config fields and tensors by name, theirs (Hugging Face's) and ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

# Fields that any Hugging Face config may have and that do not change what a model computes: of its loader, of its
# tokenizer, of Trainer, and generate's defaults, which files of Transformers 4 hold.
WITHOUT_EFFECT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled _name_or_path _num_labels
    architectures attn_implementation chunk_size_feed_forward classifier_dropout cross_attention_hidden_size
    decoder_start_token_id dtype finetuning_task gradient_checkpointing id2label label2id language license
    mask_token_id max_sequence_length model_max_length model_type name_or_path output_attentions output_hidden_states
    output_past prefix problem_type return_dict sbert_ce_default_activation_function sentence_transformers
    sep_token_id task_specific_params tf_legacy_loss tokenizer_class torch_dtype torchscript transformers.js_config
    transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache

    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    eos_token_ids exponential_decay_length_penalty force_bos_token_to_be_generated forced_bos_token_id
    forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate
    suppress_tokens temperature top_k top_p typical_p
    """.split()
)
# Others, that would change it, with the values that we compute.
DEMANDED: dict[str, tuple] = {
    "add_cross_attention": (False,),
    "is_decoder": (False, True),  # encoders, which it would change, allow less
    "is_encoder_decoder": (False,),
    "pruned_heads": (None, {}),
    "tie_encoder_decoder": (False,),
}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
}


# Fields of ours that no checkpoint of theirs holds: they belong to a training run, or follow from the tensors.
OF_A_RUN = frozenset(
    "objectives pooler n_labels labels problem loss_weights init classifier_dropout layer_dropout label_smoothing "
    "smoothing fp8".split()
)
OF_CLASSIFIERS = frozenset("classifier classifier_bias summary".split())
STACKS = ("encoder.", "decoder.")  # ours: what no choice of heads leaves out


@dataclass(frozen=True)
class Rule:
    """Tensors of ours from theirs, and back. {i} in the names is a layer, {j} a layer of an encoder-decoder's decoder.

    read and write get the tensors of the one side in order, and our config's fields; they return the other side's.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    read: Callable[[list[Tensor], Mapping[str, Any]], list[Tensor]]
    write: Callable[[list[Tensor], Mapping[str, Any]], list[Tensor]]

    def of_layer(self, i: int) -> Rule:
        def name(template: str) -> str:
            return template.replace("{i}", str(i)).replace("{j}", str(i))

        return replace(self, ours=tuple(map(name, self.ours)), theirs=tuple(map(name, self.theirs)))


def copy(ours: str, theirs: str) -> Rule:
    return Rule((ours,), (theirs,), lambda tensors, _: tensors, lambda tensors, _: tensors)


def transpose(ours: str, theirs: str) -> Rule:
    def turned(tensors: list[Tensor], _: Mapping) -> list[Tensor]:
        return [tensor.T for tensor in tensors]

    return Rule((ours,), (theirs,), turned, turned)


def concatenate(ours: str, *theirs: str, shares: tuple[str | int, ...] = ()) -> Rule:
    """Ours are theirs, one above the other. shares: how ours divides, numbers or fields of ours; default: equally."""

    def split(tensors: list[Tensor], fields: Mapping) -> list[Tensor]:
        parts = [fields[share] if isinstance(share, str) else share for share in shares] or [1] * len(theirs)
        unit = len(tensors[0]) // sum(parts)
        return list(tensors[0].split([unit * part for part in parts]))

    return Rule((ours,), theirs, lambda tensors, _: [torch.cat(tensors)], split)


def divide(ours: tuple[str, ...], theirs: str) -> Rule:
    """Ours lie one above the other in theirs, in equal parts."""
    return Rule(
        ours, (theirs,), lambda tensors, _: list(tensors[0].chunk(len(ours))), lambda tensors, _: [torch.cat(tensors)]
    )


def by_head(ours: str, theirs: str, parts: int = 3) -> Rule:
    """Theirs hold query, key and value head by head, ours all queries, all keys, all values."""

    def read(tensors: list[Tensor], fields: Mapping) -> list[Tensor]:
        return [tensors[0].unflatten(0, (fields["n_heads"], parts, -1)).transpose(0, 1).flatten(0, 2)]

    def write(tensors: list[Tensor], fields: Mapping) -> list[Tensor]:
        return [tensors[0].unflatten(0, (parts, fields["n_heads"], -1)).transpose(0, 1).flatten(0, 2)]

    return Rule((ours,), (theirs,), read, write)


def leaf(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """A leaf's weight and bias."""
    return copy(f"{ours}.weight", f"{theirs}.weight"), copy(f"{ours}.bias", f"{theirs}.bias")


def stacked(ours: str, *theirs: str, shares: tuple[str | int, ...] = ()) -> tuple[Rule, Rule]:
    """As `concatenate`, of leaves' weights and biases."""

    def rule(kind: str) -> Rule:
        return concatenate(f"{ours}.{kind}", *(f"{name}.{kind}" for name in theirs), shares=shares)

    return rule("weight"), rule("bias")


GROUPED = ("n_heads", "n_kv_heads", "n_kv_heads")  # shares of queries, keys and values


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
    constants: dict[str, Any]
    """Our fields that all models of the family share."""
    defaults: dict[str, Any]
    """Values of their fields where a file leaves them out."""
    demanded: dict[str, tuple]
    """Their fields that change the mathematics, with the values that we compute, beyond DEMANDED."""
    without_effect: frozenset[str]
    classes: dict[str, tuple[str, ...]]
    """Their classes and the objectives of each; the classes that differ in nothing else come by order."""
    evidence: Mapping[str, str]
    """The tensor whose presence tells that a file has this objective, where config.json names no class."""
    tensors: tuple[Rule, ...]
    variants: Callable[[Mapping[str, Any]], tuple[Rule, ...]] = lambda ours: ()
    """Rules that depend on our fields."""
    heads_of: dict[str, tuple[Rule, ...]] = field(default_factory=dict)
    """Rules that only models with this objective have."""
    unprefixed: frozenset[str] = frozenset()
    """The classes whose backbone's tensors lack the prefix."""
    class_fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Our fields that models of one of their classes have, instead of what `constants` says."""
    poolers: Mapping[str, str] = field(default_factory=dict)
    """The tensor whose presence tells that a file has this pooler."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Their second names for a tensor, which files may repeat. Without tied embeddings they use the second."""
    tied_apart: Mapping[str, str] = field(default_factory=dict)
    """`tied` of an encoder-decoder whose sides have words of their own."""
    apart: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Our fields, true by config.json, that are false where a file has both tensors and they differ."""
    skipped: str = "$^"
    """Pattern of tensors that hold no parameters."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Patterns of names in old files, and their replacements."""
    derived: Mapping[str, Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)
    """Values of their fields that default to a function of others."""
    translated: frozenset[str] = frozenset()
    """Their fields that `translate` reads, beyond those of `fields`."""
    translate: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda theirs: {}
    """Our fields that are no plain copies of theirs."""
    write_back: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda ours: {}
    """The inverse of `translate`."""

    def rules(self, fields: Mapping[str, Any]) -> Iterator[Rule]:
        depths = {"{i}": fields["n_layers"], "{j}": fields["n_decoder_layers"]}
        heads = (rule for objective in fields["objectives"] for rule in self.heads_of.get(objective, ()))
        for rule in (*self.tensors, *self.variants(fields), *heads):
            depth = next((n for mark, n in depths.items() if mark in rule.ours[0]), None)
            if depth is None:
                yield rule
            else:
                yield from (rule.of_layer(i) for i in range(depth))

    def canonical(self, name: str, has_prefix: bool) -> str:
        """A tensor's name as a new file of the whole model has it."""
        for old, new in self.renamed:
            name = re.sub(old, new, name)
        return name if has_prefix or name.startswith(self.heads) else self.prefix + name

    # ---- configs -----------------------------------------------------------------------------------------------------

    def read_config(self, theirs: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, Any]:
        """Our fields from their config.json and the names of the file's tensors."""
        demanded = DEMANDED | self.demanded
        known = {name for name, _ in self.fields} | demanded.keys() | self.without_effect | WITHOUT_EFFECT
        if unknown := sorted(theirs.keys() - known - self.translated):
            raise ValueError(
                f"config.json of family {self.name}: fields unknown to llmengine: {', '.join(unknown)}; delete those "
                "that do not change what the model computes"
            )
        for name, allowed in demanded.items():
            if theirs.get(name, allowed[0]) not in allowed:
                raise ValueError(
                    f"config.json of family {self.name}: {name} is {theirs[name]!r}; llmengine computes only "
                    + " or ".join(map(repr, allowed))
                )
        none = {name: None for name, value in theirs.items() if name.endswith("_token_id") and value == -1}
        given, theirs = theirs, {**self.defaults, **theirs, **none}
        for name, derive in self.derived.items():
            theirs[name] = derive(theirs) if theirs.get(name) is None else theirs[name]
        ours = {"family": self.name, **self.constants}
        for their_name, our_name in self.fields:
            value = theirs[their_name]
            ours[our_name] = self._activation(their_name, value) if our_name == "activation" else value
        ours |= self.translate(theirs)
        names = set(tensors)
        if self.poolers:
            ours["pooler"] = next((pooler for pooler, tensor in self.poolers.items() if tensor in names), "none")
        classes = [name for name in theirs.get("architectures") or () if name in self.classes]
        if classes:
            objectives: Iterable[str] = self.classes[classes[0]]
            ours |= self.class_fields.get(classes[0], {})
        else:
            objectives = (objective for objective, tensor in self.evidence.items() if tensor in names)
        ours["objectives"] = list(objectives)
        if {"classification", "tagging"} & set(ours["objectives"]):
            ours |= _labels(given, self.defaults.get("num_labels", 2))
        return ours

    def read_ties(self, names: Iterable[str], get: Callable[[str], Tensor], ours: Mapping[str, Any]) -> dict[str, bool]:
        """Our fields that a file's tensors tell, whatever its config.json says."""
        names = set(names)
        differ = {
            name
            for name, (first, second) in self.apart.items()
            if {first, second} <= names and not torch.equal(get(first), get(second))
        }
        tied = ours["tie_embeddings"] and "tie_embeddings" not in differ
        return dict.fromkeys(differ - ({"share_embeddings"} if tied else set()), False)

    def write_config(self, ours: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Their config.json for our fields; ValueError where the family cannot express one. defaults: of our fields."""
        ours = resolved(ours)
        architecture = self._class_of(ours)
        if architecture is None:
            known = list(self.classes.values())
            raise self._inexpressible("objectives", ours["objectives"], f"its models have {known}")
        for name, value in {**self.constants, **self.class_fields.get(architecture, {})}.items():
            if ours[name] != value:
                raise self._inexpressible(name, ours[name], f"it has {value!r}")
        theirs: dict[str, Any] = {"architectures": [architecture], "model_type": self.name}
        for their_name, our_name in self.fields:
            value = ours[our_name]
            if our_name == "activation":
                value = next(theirs_ for theirs_, ours_ in ACTIVATIONS.items() if ours_ == value)
            if theirs.setdefault(their_name, value) != value:
                raise self._inexpressible(our_name, value, f"its {their_name} is {theirs[their_name]!r} already")
        theirs |= self.write_back(ours)
        again = resolved({**defaults, **self.read_config(theirs, ())})
        untold = OF_A_RUN if set(ours["objectives"]) & {"classification", "choice"} else OF_A_RUN | OF_CLASSIFIERS
        for name in ours.keys() - untold - (set() if ours["tie_embeddings"] else self.apart.keys()):
            if ours[name] != again[name]:
                raise self._inexpressible(name, ours[name], f"it has {again[name]!r}")
        if {"classification", "tagging"} & set(ours["objectives"]):
            names = ours["labels"] or _default_names(ours["n_labels"])
            theirs["id2label"] = {str(i): name for i, name in enumerate(names)}
            theirs["label2id"] = {name: i for i, name in enumerate(names)}
            theirs["problem_type"] = {ours_: theirs_ for theirs_, ours_ in PROBLEMS.items()}[ours["problem"]]
        return theirs

    def fields_of_heads(self, objectives: Iterable[str]) -> dict[str, Any]:
        """Our fields that their models with these heads have, and others of the family may not."""
        return dict(self.class_fields.get(self._class_of({"objectives": objectives}) or "", {}))

    def _class_of(self, ours: Mapping[str, Any]) -> str | None:
        """The first of their classes with these objectives."""
        wanted = set(ours["objectives"])
        return next((name for name, objectives in self.classes.items() if set(objectives) == wanted), None)

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

    def write_tensors(self, ours: Mapping[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
        """Their tensors (or gradients) from ours; each stored once, and under its second name too where not tied."""
        theirs: dict[str, Tensor] = {}
        left = set(ours)
        fields = resolved(fields)
        for rule in self.rules(fields):
            if set(rule.ours) <= ours.keys():
                written = rule.write([ours[name] for name in rule.ours], fields)
                parts = (part.clone(memory_format=torch.contiguous_format) for part in written)
                theirs.update(zip(rule.theirs, parts, strict=True))
                left -= set(rule.ours)
        if left:
            raise ValueError(f'family "{self.name}" has no name for {", ".join(sorted(left))}')
        seconds = {} if fields["tie_embeddings"] else self._second_names(fields)
        theirs |= {second: theirs[first].clone() for second, first in seconds.items() if first in theirs}
        if self._class_of(fields) in self.unprefixed:
            return {name.removeprefix(self.prefix): tensor for name, tensor in theirs.items()}
        return theirs

    def read_tensors(
        self, names: Iterable[str], get: Callable[[str], Tensor], wanted: Iterable[str], fields: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Our tensors `wanted` from a file's `names`; every tensor of the file must be known."""
        names, wanted, fields = set(names), set(wanted), resolved(fields)
        every = {**fields, "objectives": [*fields["objectives"], *self.heads_of]}
        rules = [rule for rule in self.rules(fields) if wanted & set(rule.ours)]
        made = {ours for rule in rules for ours in rule.ours}
        if nameless := sorted(wanted - made):
            raise ValueError(f'family "{self.name}" has no name for {_some(nameless)}')
        if missing := sorted({theirs for rule in rules for theirs in rule.theirs} - names):
            raise ValueError(f"checkpoint of family {self.name} lacks {_some(missing)}")
        known = {theirs for rule in self.rules(every) for theirs in rule.theirs} | self._tied(fields).keys()
        if unknown := sorted(name for name in names - known if not re.search(self.skipped, name)):
            raise ValueError(f"checkpoint of family {self.name} has tensors unknown to llmengine: {_some(unknown)}")
        left_out = (rule for rule in self.rules(every) if not wanted & set(rule.ours))
        stacks = {theirs for rule in left_out if any(o.startswith(STACKS) for o in rule.ours) for theirs in rule.theirs}
        in_use = {theirs for rule in rules for theirs in rule.theirs} | self._tied(fields).keys()
        if placeless := sorted(names & stacks - in_use):
            raise ValueError(
                f"checkpoint of family {self.name} has {_some(placeless)}, for which a model of its config has no place"
            )
        tied, second_of = fields["tie_embeddings"], self._tied(fields)
        for second, first in second_of.items():
            if tied and {first, second} <= names and not torch.equal(get(first), get(second)):
                raise ValueError(
                    f"checkpoint of family {self.name}: {second} differs from {first}, but they are one parameter "
                    "(tie_word_embeddings)"
                )
        used = (
            {} if tied else {first: second for second, first in self._second_names(fields).items() if second in names}
        )
        state: dict[str, Tensor] = {}
        for rule in rules:
            read = rule.read([get(used.get(name, name)) for name in rule.theirs], fields)
            state.update((name, tensor.contiguous()) for name, tensor in zip(rule.ours, read, strict=True))
        return {name: state[name] for name in wanted}

    def _second_names(self, fields: Mapping[str, Any]) -> dict[str, str]:
        """Those of `tied` that no tensor of ours has to itself."""
        own = {name for rule in self.rules(fields) for name in rule.theirs}
        return {second: first for second, first in self._tied(fields).items() if second not in own}

    def _tied(self, fields: Mapping[str, Any]) -> Mapping[str, str]:
        return self.tied if fields["share_embeddings"] else self.tied_apart


PROBLEMS = {"single_label_classification": "single", "multi_label_classification": "multi", "regression": "regression"}


def _labels(theirs: Mapping[str, Any], usual: int) -> dict[str, Any]:
    """Number and names of the classes, and what is asked of them. usual: how many where a file does not say."""
    names = {int(i): str(name) for i, name in (theirs.get("id2label") or {}).items()}
    count = len(names) or theirs.get("num_labels", usual)
    if sorted(names) not in ([], list(range(count))):
        raise ValueError(f"config.json: id2label names the classes {sorted(names)}; expected 0 to {count - 1}")
    if theirs.get("num_labels", count) != count:
        raise ValueError(f"config.json: num_labels is {theirs['num_labels']}, but id2label has {count} names")
    problem = theirs.get("problem_type")
    if problem is not None and problem not in PROBLEMS:
        raise ValueError(f"config.json: problem_type is {problem!r}; known: {', '.join(PROBLEMS)}")
    ordered = [names[i] for i in range(len(names))]
    return {
        "n_labels": count,
        "labels": None if ordered in ([], _default_names(count)) else ordered,
        "problem": PROBLEMS[problem] if problem else "regression" if count == 1 else "single",
    }


def _default_names(count: int) -> list[str]:
    """What Hugging Face calls classes that have no names."""
    return [f"LABEL_{i}" for i in range(count)]


def resolved(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields with numbers in place of "None: as many as …"."""
    heads = fields["n_heads"]
    return {
        **fields,
        "n_kv_heads": fields["n_kv_heads"] or heads,
        "d_head": fields["d_head"] or fields["d_model"] // heads,
        "n_decoder_layers": fields["n_decoder_layers"] or fields["n_layers"],
        "n_decoder_heads": fields["n_decoder_heads"] or heads,
        "d_decoder_ff": fields["d_decoder_ff"] or fields["d_ff"],
        "encoder_vocab_size": fields["encoder_vocab_size"] or fields["vocab_size"],
    }


def unless_equal(decoder: int, encoder: int) -> int | None:
    """A number of a decoder's, where it is not the encoder's: so our fields have it."""
    return None if decoder == encoder else decoder


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
