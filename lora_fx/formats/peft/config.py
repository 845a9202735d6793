"""PEFT's ``adapter_config.json``: one record a type, read and written from the record's fields."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.scaling import checked_alphas, checked_rank, checked_ranks, scale_of
from lora_fx.adapters.target_rule import TargetRule, pattern_value
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError, shorten, within
from lora_fx.formats.peft.fields import Fields, checked, names, pattern, tokens
from lora_fx.formats.peft.wrappers import homes_of
from lora_fx.kinds import KINDS
from lora_fx.kinds.validation import check_rank
from lora_fx.layers.base_layers import BaseLayers

Tensors = Mapping[str, torch.Tensor]
Numbers = Mapping[str, tuple[int, float]]  # path of a layer -> its rank and its alpha
# PEFT lists these heads for every model of the task, whatever its own head is called.
_HEADS = frozenset({"classifier", "score"})
_TASK_HEADS = {
    "SEQ_CLS": _HEADS, "TOKEN_CLS": _HEADS, "QUESTION_ANS": frozenset({"qa_outputs"}),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The fields of a config that decide what its adapter computes, and what its type does.

    A type is a subclass: its fields are those of PEFT's config that are used, by PEFT's own names
    and with PEFT's defaults. Every other field is neutral, or refused if it is on.

    Attributes:
        peft_type: the name of the type.
        kinds: of its updates; the first is the key of ``KINDS`` that reads them. None of a type
            that PEFT itself reads.
        leaves: ends of the keys below a layer's path.
        ranked: the leaves whose first axis is the rank.
        rank_field: the name of the field of the rank.
        shared_keys: key of a tensor that all layers share -> its leaf.
        only_bias: what ``bias`` is called where biases of adapted layers alone are stored; "" where
            the type stores none.
        lacks: fields of this class that the type has not.
        neutral: fields that say nothing about the result.
        refused: features that would change it.
        written: neutral fields that PEFT wants to be told.
        options: fields that its updates keep as settings, and that all of them have to agree on.
        keeps_rule: whether targets are written as they were read, where they mean the layers.
        rule: which modules the adapter acts on, or None where the config leaves that to PEFT.
    """

    peft_type: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ()
    leaves: ClassVar[tuple[str, ...]]
    ranked: ClassVar[tuple[str, ...]] = ()
    rank_field: ClassVar[str] = "r"
    shared_keys: ClassVar[Mapping[str, str]] = {}
    only_bias: ClassVar[str] = ""
    lacks: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[frozenset[str]] = frozenset()
    written: ClassVar[Fields] = {}
    options: ClassVar[tuple[str, ...]] = ()
    keeps_rule: ClassVar[bool] = True

    task_type: Any = None
    target_modules: Any = None
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    modules_to_save: tuple[str, ...] = checked(names, ())
    bias: str = "none"
    trainable_token_indices: Mapping[str, tuple[int, ...]] | tuple[int, ...] | None = checked(
        tokens, None
    )
    ensure_weight_tying: bool = False
    rule: TargetRule | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Makes the rule, which refuses targets that PEFT would not run; checks the biases."""
        object.__setattr__(self, "rule", self._rule())
        modes = ("none", self.only_bias, "all") if self.only_bias else ("none",)
        if self.bias not in modes:
            expected = " or ".join(map(repr, modes))
            raise AdapterError(f"bias is {self.bias!r:.80}, expected {expected}")

    def _rule(self) -> TargetRule | None:
        if self.target_modules is None:
            return None
        return TargetRule(
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules or (),
            layers_to_transform=self.layers_to_transform,
            layers_pattern=self.layers_pattern or (),
            saved_modules=self.modules_to_save,
        )

    @classmethod
    def used(cls) -> list[dataclasses.Field[Any]]:
        """The fields of PEFT's config that are used."""
        return [f for f in dataclasses.fields(cls) if f.init and f.name not in cls.lacks]

    @classmethod
    def has(cls, name: str) -> bool:
        """Whether a field is used."""
        return any(entry.name == name for entry in cls.used())

    @property
    def optional_heads(self) -> frozenset[str]:
        """Those of ``modules_to_save`` that the model need not have."""
        return _TASK_HEADS.get(str(self.task_type), frozenset())

    @property
    def endings(self) -> tuple[str, ...]:
        """The leaves that this config gives a use."""
        return self.leaves

    def check(self, fields: Mapping[str, object], origin: str, strict: bool) -> None:
        """Refuses, or with ``strict=False`` warns of, what this type's other programs wrote."""

    def patterns(self) -> dict[str, Mapping[str, object]]:
        """The fields whose keys each mean a module, by name."""
        return {}

    def rank_of(self, path: str) -> int:
        """The rank of a layer; 0 where the type has none."""
        return int(getattr(self, self.rank_field, 0))

    def settings(self, path: str, tensors: Tensors) -> Fields:
        """What the kind wants to know of a layer."""
        return {name: getattr(self, name) for name in self.options}

    def read(
        self, layers: Mapping[str, Tensors], shared: Tensors, base: BaseLayers
    ) -> tuple[dict[str, AnyUpdate], list[str]]:
        """The updates of a file's layers.

        Gives the updates by path, and what the patterns may be asked about.
        """
        updates: dict[str, AnyUpdate] = {}
        for path, tensors in layers.items():
            with within(path):
                updates[path] = self._read_one(path, {**tensors, **shared}, base)
        return updates, list(updates)

    def _read_one(self, path: str, tensors: Tensors, base: BaseLayers) -> AnyUpdate:
        rank, shape = self.rank_of(path), base.shape_of(path)
        for leaf in self.ranked:
            if leaf in tensors:
                check_rank(leaf, tensors[leaf], (rank, f"{self.rank_field} or rank_pattern"))
        settings = self.settings(path, tensors) | ({"shape": shape} if shape else {})
        return KINDS[self.kinds[0]].read(tensors, settings)

    @classmethod
    def adopted(cls, layers: Mapping[str, AnyUpdate]) -> Mapping[str, AnyUpdate] | None:
        """The updates as this type writes them, or None where it cannot hold one of them."""
        kinds = {update.kind for update in layers.values()}
        fits = kinds <= set(cls.kinds) and all(map(cls.holds, layers.values()))
        return layers if fits else None

    @classmethod
    def holds(cls, update: AnyUpdate) -> bool:
        """Whether a type has all the tensors of an update; alpha is in its config."""
        if update.stored is None or (update.rank is not None and not update.is_plain):
            return False
        return update.stored_tensors.keys() <= {*cls.leaves, "alpha"}

    @classmethod
    def problems(cls, layers: Mapping[str, AnyUpdate]) -> dict[str, list[str]]:
        """What PEFT would not load, or not as it is meant -> the layers."""
        return {}

    @classmethod
    def described(cls, layers: Mapping[str, AnyUpdate]) -> Fields:
        """The type's own fields, out of what its updates were read with."""
        defaults = {entry.name: entry.default for entry in cls.used()}
        return {name: agreed(layers, name, defaults[name]) for name in cls.options}

    @classmethod
    def tensors_of(cls, layers: Mapping[str, AnyUpdate]) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of each layer, by leaf."""
        return {
            path: {leaf: t for leaf, t in u.stored_tensors.items() if leaf in cls.leaves}
            for path, u in layers.items()
        }

    @classmethod
    def shared_of(cls, layers: Mapping[str, AnyUpdate]) -> dict[str, torch.Tensor]:
        """What all layers share, by key."""
        return {}


def agreed(layers: Mapping[str, AnyUpdate], name: str, default: object = None) -> Any:
    """The setting of all updates."""
    values: dict[str, tuple[Any, list[str]]] = {}
    for path, update in layers.items():
        value = update.stored_settings.get(name, default)
        values.setdefault(repr(value), (value, []))[1].append(path)
    if len(values) > 1:
        told = "; ".join(f"{text} at {shorten(paths, 3)}" for text, (_, paths) in values.items())
        raise AdapterError(f"PEFT has one {name} for all layers, but it is {told}")
    [(value, _)] = values.values()
    return value


def low_rank(layers: Mapping[str, AnyUpdate]) -> dict[str, Update]:
    """The layers whose update is of two factors."""
    return {path: update for path, update in layers.items() if isinstance(update, Update)}


@dataclass(frozen=True, kw_only=True)
class Patterned(PeftConfig):
    """A config whose scale is alpha / r, after both patterns.

    Attributes:
        alpha_field: the name of the field of alpha.
    """

    alpha_field = "alpha"
    r: int = checked(checked_rank, 8, needed=True)
    rank_pattern: Mapping[str, int] = checked(pattern(checked_ranks), dict)
    alpha_pattern: Mapping[str, float] = checked(pattern(checked_alphas), dict)

    def patterns(self) -> dict[str, Mapping[str, object]]:
        """Both patterns."""
        return {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}

    def rank_of(self, path: str) -> int:
        """The rank of a layer."""
        return pattern_value(self.rank_pattern, path, self.r)

    def alpha_of(self, path: str) -> float:
        """The alpha of a layer."""
        alpha: float = getattr(self, self.alpha_field)
        return pattern_value(self.alpha_pattern, path, alpha)

    def rank_and_scale(self, path: str) -> tuple[int, float]:
        """The rank and the scale of a layer."""
        rank = self.rank_of(path)
        return rank, scale_of(self.alpha_of(path), rank, bool(getattr(self, "use_rslora", False)))

    @classmethod
    def described(cls, layers: Mapping[str, AnyUpdate]) -> Fields:
        """The most common rank and alpha, and patterns for the layers that differ."""
        numbers, homes = cls.numbers(layers), homes_of(layers)
        inside = [path for path in layers if not homes[path].asked]
        odd = [path for path in inside if numbers[path] != numbers[path.rpartition(".")[0]]]
        if odd:
            raise AdapterError(
                "PEFT has one rank and one alpha for an attention module and its output "
                f"projection, but these differ: {shorten(odd)}"
            )
        asked = {home.asked: numbers[path] for path, home in homes.items() if home.asked}
        rank, ranks = _with_pattern({name: rank for name, (rank, _) in asked.items()})
        alpha, alphas = _with_pattern({name: alpha for name, (_, alpha) in asked.items()})
        own = {"r": rank, cls.alpha_field: alpha, "rank_pattern": ranks, "alpha_pattern": alphas}
        return super().described(layers) | own

    @classmethod
    def numbers(cls, layers: Mapping[str, AnyUpdate]) -> Numbers:
        """Rank and alpha of each layer."""
        raise NotImplementedError


def _with_pattern(values: dict[str, float]) -> tuple[float, dict[str, float]]:
    """The most common value, and the others by PEFT's regex of a whole path."""
    [(common, _)] = Counter(values.values()).most_common(1)
    return common, {f"^{re.escape(p)}": v for p, v in values.items() if v != common}
