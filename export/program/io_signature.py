"""The tensors among a model's inputs: their names, and which sizes may change."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lora_fx.errors import ExportError

SYMBOL = re.compile(r"\b[a-z]+\d+\b")


@dataclass(frozen=True)
class Leaf:
    """One tensor among the example inputs.

    Attributes:
        name: the model's own argument name; parts of a nested argument are joined by ``_``.
        axes: axis -> the name that the user gave this dimension, or None if it has none.
        sizes: the traced sizes; a dynamic one is an expression of symbols.
    """

    name: str
    axes: dict[int, str | None]
    sizes: tuple[Any, ...]


def input_leaves(
    gm: fx.GraphModule, program: torch.export.ExportedProgram, dynamic_shapes: Any
) -> list[Leaf]:
    """The tensor inputs of a program, in the order of its graph inputs."""
    args, kwargs = program.example_inputs or ((), {})
    flat, _ = pytree.tree_flatten_with_path((args, kwargs))
    arguments = list(inspect.signature(gm.forward).parameters.values())
    shapes = _by_name(dynamic_shapes, arguments, kwargs)
    holders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    leaves = []
    for (path, value), user in zip(flat, program.graph_signature.user_inputs, strict=True):
        if not isinstance(value, torch.Tensor):
            continue
        keys = _argument(path, arguments)
        sizes = tuple(holders[str(user)].meta["val"].shape)
        leaves.append(Leaf("_".join(map(str, keys)), _axes(shapes, keys, sizes), sizes))
    return leaves


def dimension_names(leaves: Sequence[Leaf]) -> dict[str, str]:
    """Symbol -> the user's name for it, else the name of the first input that has it."""
    names: dict[str, str] = {}
    for leaf in leaves:
        for axis, label in leaf.axes.items():
            if label is not None and SYMBOL.fullmatch(str(leaf.sizes[axis])):
                names.setdefault(str(leaf.sizes[axis]), label)
    for leaf in leaves:
        for axis, size in enumerate(leaf.sizes):
            if SYMBOL.fullmatch(str(size)):
                names.setdefault(str(size), f"{leaf.name}_dim_{axis}")
    return names


def _by_name(shapes: Any, arguments: list[inspect.Parameter], kwargs: Any) -> dict[Any, Any]:
    if isinstance(shapes, tuple | list):
        given = [p.name for p in arguments if p.name not in kwargs][: len(shapes)]
        return dict(zip([*given, *kwargs], shapes, strict=False))
    return dict(shapes or {})


def _argument(path: Any, arguments: list[inspect.Parameter]) -> list[Any]:
    """(0, i, …) or (1, name, …) of (args, kwargs) as (argument name, …)."""
    first, *rest = [key_of(part) for part in path[1:]]
    if path[0].idx == 1:
        return [first, *rest]
    for place, parameter in enumerate(arguments):
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return [parameter.name, first - place, *rest]
        if place == first:
            return [parameter.name, *rest]
    raise ExportError(f"{first + 1} positional example inputs, the model takes {len(arguments)}")


def _axes(shapes: Any, keys: list[Any], sizes: tuple[Any, ...]) -> dict[int, str | None]:
    spec = shapes
    for key in keys:
        if spec is None:
            break
        spec = spec.get(key) if isinstance(spec, dict) else spec[key]
    items = spec.items() if isinstance(spec, dict) else enumerate(spec or ())
    labels = {axis: _label(dim) for axis, dim in items}
    return {a: labels.get(a) for a, s in enumerate(sizes) if isinstance(s, torch.SymInt)}


def _label(dim: Any) -> str | None:
    if isinstance(dim, str):
        return dim
    name = getattr(dim, "__name__", None)  # a Dim has one; Dim.AUTO and Dim.DYNAMIC do not
    return name if isinstance(name, str) and name.isidentifier() else None


def key_of(part: Any) -> Any:
    """A step of a pytree path: a dict key, an index or a field name."""
    for attribute in ("key", "idx", "name"):
        if hasattr(part, attribute):
            return getattr(part, attribute)
    return str(part)
