"""What an adapter is: one update a layer, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch

from lora_fx.adapters.other_updates import Scaling, WeightUpdate, low_rank
from lora_fx.adapters.updates import AnyUpdate, Update
from lora_fx.adapters.value import Value
from lora_fx.choices import takes
from lora_fx.errors import AdapterError, shorten, within
from lora_fx.tables import table

if TYPE_CHECKING:
    from torch import nn

    from lora_fx.adapters.converted import Converted
    from lora_fx.adapters.target_rule import TargetRule


@dataclass(frozen=True, eq=False)
class Adapter(Value):
    """An immutable set of updates, by the path of the module that each acts on.

    Attributes:
        name: tells adapters apart in one graph.
        updates: module path -> what changes the layer there.
        replacements: parameter path (``classifier.weight``) -> full tensor that takes its place
            (PEFT's ``modules_to_save`` and trained biases).
        expects: which modules the adapter's config says it adapts; checked when it meets a model.
        moved: what was exchanged in the paths of its file to find the layers of a base, the old ->
            the new; None where it was held against no base.
    """

    name: str
    updates: Mapping[str, AnyUpdate]
    replacements: Mapping[str, torch.Tensor] = field(default_factory=dict)
    expects: TargetRule | None = None
    moved: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        """Checks the name and closes the mappings: an adapter is a value.

        Raises:
            AdapterError: the name could not be part of a parameter's name, or a tensor is on
                torch's meta device.
        """
        check_name(self.name)
        held = (t for update in self.updates.values() for t in update.tensors())
        if any(tensor.is_meta for tensor in (*held, *self.replacements.values())):
            raise AdapterError(
                f"adapter {self.name} is made of tensors without data, on torch's meta device: "
                "load its values first"
            )
        object.__setattr__(self, "updates", MappingProxyType(dict(self.updates)))
        object.__setattr__(self, "replacements", MappingProxyType(dict(self.replacements)))

    @takes(AdapterError)
    def to_rank(self, rank: int) -> Reduced:
        """The nearest adapter whose updates have at most this rank, and how near it is.

        Each layer by itself, as `Update.to_rank` says. Updates of this rank or less stay as they
        are, and so do the replacements.

        Args:
            rank: the highest rank to leave.

        Returns:
            The adapter, of the same name, and the relative error of each layer.

        Raises:
            AdapterError: the rank is no positive integer, an update holds NaN or infinity, or is
                no plain product of two factors.
        """
        if type(rank) is not int or rank < 1:
            raise AdapterError(f"rank is {rank!r:.80}, expected a positive integer")
        damaged = [path for path, update in self.updates.items() if not update.is_finite()]
        if damaged:
            raise AdapterError(
                f"adapter {self.name}: NaN or infinity in {shorten(damaged)}; save it again"
            )
        reduced = {}
        for path, update in self.updates.items():
            with within(path):
                reduced[path] = low_rank(update, "to_rank").to_rank(rank)
        adapter = replace(self, updates={path: update for path, (update, _) in reduced.items()})
        return Reduced(adapter, {path: error for path, (_, error) in reduced.items()})

    def to_lora(
        self,
        rank: int | None = None,
        energy: float | None = None,
        *,
        base: nn.Module | None = None,
    ) -> Converted:
        """The nearest adapter of plain LoRA, whatever its updates are, and how near each layer is.

        Each layer by itself: ``W' - W`` is cut off by singular value decomposition, a kernel's as
        (out, in * kernel), in float64 (of more than 64 million numbers in float32). Where factors
        say what it is (LoHa, LoKr, VeRA, trained tokens, LoRA of a higher rank), it is decomposed
        by these, exactly; what is large and has none is sketched by random columns, the error
        measured. Updates that are LoRA of this rank or less stay as they are. A replaced weight of
        a layer (PEFT's ``modules_to_save``) becomes LoRA too; so everything fits the slots of
        factors that a swappable file has. What an update adds to a bias is the LoRA's bias.

        An error is no reason to refuse: what one rank loses is told, as `to_rank` and `extract`
        tell theirs, in a record beside the adapter, whose ``str`` is a table. An adapter alone
        would hide it.

        Args:
            rank: the highest rank of a layer, of each expert where there are several, or
            energy: the fraction of the squared Frobenius norm of each ``W' - W`` to hold, in
                (0, 1]; 1 loses nothing but rounding.
            base: the model, or the traced graph. Not needed where W' - W does not depend on W;
                needed by DoRA, (IA)3, OFT, tokens and replaced weights. It also tells a table from
                a linear layer.

        Returns:
            The adapter, of the same name; rank, error and energy of each layer; and what stayed as
            it was, since it is no weight of a layer (replaced norms and biases), with the reason.

        Raises:
            AdapterError: not just one of rank and energy is given, an update needs the base and
                there is none, it does not fit the base, or it holds NaN or infinity.
        """
        from lora_fx.reference.low_rank_form import low_rank_form

        return low_rank_form(self, rank, energy, base)

    @property
    def moves(self) -> list[str]:
        """What was exchanged in the paths of its file, in words."""
        return [
            f"paths moved: {old or '(root)'} -> {new or '(root)'}"
            for old, new in (self.moved or {}).items()
        ]

    def __str__(self) -> str:
        """One line a target: path, kind, shape, rank, scale."""
        lines = [f"adapter {self.name}: {len(self.updates)} targets"]
        lines += [f"  {path}  {line_of(update)}" for path, update in self.updates.items()]
        lines += [f"  {move}" for move in self.moves]
        lines += [f"  {path}  replaced  {tuple(t.shape)}" for path, t in self.replacements.items()]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows: list[list[object]] = [
            [path, *_facts(update)] for path, update in self.updates.items()
        ]
        rows += [[p, "replaced", tuple(t.shape), *_NONE] for p, t in self.replacements.items()]
        caption = "; ".join([f"adapter {self.name}: {len(self.updates)} targets", *self.moves])
        return table(["layer", "kind", "size", "rank", "scale"], rows, caption)


_NONE = (None, None)  # neither rank nor scale


def line_of(update: AnyUpdate) -> str:
    """Kind, sizes, rank and scale, and the tokens from which on it acts."""
    kind, sizes, rank, scale = _facts(update)
    words = [kind, sizes] if rank is None else [kind, sizes, f"rank {rank}", f"scale {scale:g}"]
    words += [f"from tokens {list(update.invocation)}"] if update.invocation else []
    return "  ".join(words)


def _facts(update: AnyUpdate) -> tuple[str, str, int | None, float | None]:
    """Kind, sizes, and of two factors rank and scale."""
    out, *rest = ("?" if size is None else size for size in update.shape)
    into, kernel = rest[:1], tuple(rest[1:])
    sizes = f"{into[0]} -> {out}" if into else f"{out}"
    sizes += f" kernel {kernel}" if kernel else ""
    if isinstance(update, Update):
        return update.kind, sizes, update.rank, update.scale
    return update.kind, sizes, *_NONE


class Reduced(NamedTuple):
    """What `Adapter.to_rank` gives.

    Attributes:
        adapter: the adapter of lower rank.
        errors: module path -> Frobenius norm of what was cut off over that of the whole update;
            0 where nothing was.
    """

    adapter: Adapter
    errors: Mapping[str, float]


def check_name(name: object) -> None:
    """Refuses an adapter name that could not be a segment of a parameter's name."""
    if not isinstance(name, str) or not name.isascii() or not name.isidentifier():
        raise AdapterError(
            f"the adapter's name is {name!r}, expected letters, digits and underscores, "
            "not starting with a digit: it becomes part of parameter names"
        )


Adapter.__init__ = takes(AdapterError)(Adapter.__init__)  # type: ignore[method-assign]

__all__ = ["Adapter", "AnyUpdate", "Reduced", "Scaling", "Update", "WeightUpdate", "check_name"]
