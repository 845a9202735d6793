"""The I/O signature of a model: names of inputs and outputs, and which axes may change."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

import onnx_ir as ir
import torch
from torch import fx
from torch.utils import _pytree as pytree

from lora_fx.errors import ExportError, shorten
from lora_fx.frontend.root_call import named_arguments, shapes_by_argument

SYMBOL = re.compile(r"\b[a-z]+\d+\b")


@dataclass(frozen=True)
class TensorInput:
    """One tensor among the example inputs.

    Attributes:
        name: the model's own argument name; parts of a nested argument are joined by ``_``.
        axes: axis -> the name that the user gave this dimension, or None if it has none.
        sizes: the traced sizes; a dynamic one is an expression of symbols.
        meant: axis -> its least and its largest size, where the user gave limits.
    """

    name: str
    axes: dict[int, str | None]
    sizes: tuple[Any, ...]
    meant: dict[int, tuple[Any, Any]] = field(default_factory=dict)


def input_leaves(
    gm: fx.GraphModule, program: torch.export.ExportedProgram, dynamic_shapes: Any
) -> list[TensorInput]:
    """The tensor inputs of a program, in the order of its graph inputs.

    Raises:
        ExportError: axes of one name are of two sizes.
    """
    args, kwargs = program.example_inputs or ((), {})
    flat, _ = pytree.tree_flatten_with_path((args, kwargs))
    arguments = [parameter.name for parameter in named_arguments(gm, args, kwargs)]
    shapes = shapes_by_argument(gm, args, kwargs, dynamic_shapes)
    holders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    leaves: list[TensorInput] = []
    given: list[torch.Tensor] = []
    for (path, value), user in zip(flat, program.graph_signature.user_inputs, strict=True):
        if not isinstance(value, torch.Tensor):
            continue
        by_name, first, *within = [key_of(part) for part in path]
        keys = [first if by_name else arguments[first], *within]
        sizes = tuple(holders[str(user)].meta["val"].shape)
        dims = _dims(shapes, keys)
        open_axes = [a for a, size in enumerate(sizes) if isinstance(size, torch.SymInt)]
        axes = {axis: _label(dims.get(axis)) for axis in open_axes}
        meant = {axis: limits for axis in open_axes if (limits := _limits(dims.get(axis)))}
        leaves.append(TensorInput("_".join(map(str, keys)), axes, sizes, meant))
        given.append(value)
    _refuse_two_sizes(leaves, given)
    return leaves


def _refuse_two_sizes(leaves: Sequence[TensorInput], given: Sequence[torch.Tensor]) -> None:
    """An axis' name stands for one size: onnxruntime reuses memory by it."""
    known: dict[str, tuple[str, int]] = {}
    for leaf, value in zip(leaves, given, strict=True):
        for axis, label in leaf.axes.items():
            found = (leaf.name, value.shape[axis])
            first = found if label is None else known.setdefault(label, found)
            if first[1] != found[1]:
                raise ExportError(
                    f"dynamic_shapes: {label!r} is {first[1]} in {first[0]} and {found[1]} in "
                    f"{leaf.name}: expected axes of one name to be of one size; name the other anew"
                )


def dimension_names(leaves: Sequence[TensorInput]) -> dict[str, str]:
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


def _dims(shapes: Any, keys: list[Any]) -> dict[int, Any]:
    """What the user said of the axes of one input."""
    spec = shapes
    for key in keys:
        if spec is None:
            break
        spec = spec.get(key) if isinstance(spec, dict) else spec[key]
    return dict(spec.items() if isinstance(spec, dict) else enumerate(spec or ()))


def _label(dim: Any) -> str | None:
    if isinstance(dim, str):
        return dim
    name = getattr(dim, "__name__", None)  # a Dim has one; Dim.AUTO and Dim.DYNAMIC do not
    return name if isinstance(name, str) and name.isidentifier() else None


def _limits(dim: Any) -> tuple[Any, Any] | None:
    """The sizes that a Dim of torch.export says it has, the least and the largest."""
    least, most = getattr(dim, "min", None), getattr(dim, "max", None)
    if least is None and most is None:
        return None
    return least or 0, math.inf if most is None else most


def key_of(part: Any) -> Any:
    """A step of a pytree path: a dict key, an index or a field name."""
    for attribute in ("key", "idx", "name"):
        if hasattr(part, attribute):
            return getattr(part, attribute)
    return str(part)


def output_names(outputs: Any) -> list[str]:
    """Names of what a model returned: field names and keys, else ``output``, ``output_0``, ….

    What a class holds that was registered without names is numbered.

    Raises:
        ExportError: an output is no tensor, or there is none.
    """
    names = []
    for keys, value in _leaves(outputs):
        name = "_".join(map(str, keys))
        if value is None:
            continue
        if not name.isprintable():
            raise ExportError(
                f"output {name!r:.80}: expected a name that can be printed: change it"
            )
        if not isinstance(value, torch.Tensor):
            found = type(value).__name__
            raise ExportError(f"output {name!r} is a {found}: ONNX returns tensors; leave it out")
        if value.is_complex():
            raise ExportError(
                f"output {name!r} is {value.dtype}, and onnxruntime gives no complex numbers: "
                "return its parts, torch.view_as_real(...)"
            )
        names.append(f"output_{name}".rstrip("_") if not name or name[0].isdigit() else name)
    if not names:
        raise ExportError("the model returns no tensor: ONNX needs an output: return one")
    return names


def _leaves(tree: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The leaves of what a model returned, each with the keys that lead to it."""

    def is_inside(part: Any) -> bool:
        return part is not tree

    parts, spec = pytree.tree_flatten(tree, is_leaf=is_inside)
    if spec == pytree.tree_structure(0):
        yield keys, tree
        return
    try:
        pairs, _ = pytree.tree_flatten_with_path(tree, is_leaf=is_inside)
        own = [key_of(path[0]) for path, _ in pairs]
    except Exception:  # a class may be registered without names of its parts, or with wrong ones
        own = [*range(len(parts))]
    for key, part in zip(own, parts, strict=True):
        yield from _leaves(part, (*keys, key))


def checked_names(
    option: str, given: Sequence[str] | Mapping[str, str] | None, known: Sequence[str]
) -> Sequence[str]:
    """The names that were given, one for each tensor or by the model's name, or else the model's.

    Raises:
        ExportError: their number differs, one is there twice, or there is none to rename.
    """
    if given is None:
        return known
    if isinstance(given, Mapping):
        if strange := [name for name in given if name not in known]:
            raise ExportError(f"{option}: no {shorten(strange)}; there are {shorten(list(known))}")
        given = [given.get(name, name) for name in known]
    is_list = isinstance(given, Sequence) and not isinstance(given, str)
    if not is_list or len(given) != len(known) or len({*map(str, given)}) < len(given):
        found = list(given) if is_list else given
        raise ExportError(
            f"{option} is {found!r:.200}: expected {len(known)} different names, for "
            f"{shorten(list(known))}"
        )
    if odd := [n for n in given if not isinstance(n, str) or not n.isprintable() or not n.strip()]:
        raise ExportError(f"{option}: {odd[0]!r:.80}: expected a name that can be printed")
    return given


def check_apart(given: Sequence[str], taken: Sequence[str]) -> None:
    """Refuses names that were asked for of outputs and are inputs' already.

    Raises:
        ExportError: says which.
    """
    if both := [name for name in given if name in taken]:
        raise ExportError(
            f"output_names: {shorten(both)} is an input too, and a file has each name once: "
            f"expected others than {shorten(list(taken))}"
        )


def free_names(wanted: Sequence[str], taken: Sequence[str]) -> list[str]:
    """The wanted names; one that is taken, or wanted twice, becomes ``x_out``, ``x_out_2``, …."""
    used, names = {*taken, *wanted}, []
    seen = set(taken)
    for name in wanted:
        if name in seen:
            numbered = (f"{name}_out_{number}" for number in count(2))
            name = next(n for n in chain([f"{name}_out"], numbered) if n not in used)
        seen.add(name)
        used.add(name)
        names.append(name)
    return names


def rename(model: ir.Model, leaves: Sequence[TensorInput], outputs: Sequence[str]) -> None:
    """Gives graph inputs and outputs the user's names, in place."""
    inputs, initializers = model.graph.inputs[: len(leaves)], model.graph.initializers
    wanted = {leaf.name for leaf in leaves} | set(outputs)
    inner = [*initializers.values(), *(v for node in model.graph.all_nodes() for v in node.outputs)]
    for value in inner:
        if value.name in wanted:
            value.name = f"{value.name}_inner"
    # By way of names that nothing has: the new name of one may be the old name of another.
    for values, names in ((inputs, [leaf.name for leaf in leaves]), (model.graph.outputs, outputs)):
        for place, value in enumerate(values):
            value.name = f"renamed.{id(value)}.{place}"
        for value, name in zip(values, names, strict=True):
            value.name = name


def rename_axes(model: ir.Model, leaves: Sequence[TensorInput]) -> None:
    """Gives dynamic dimensions the user's names, in place: axes of one name are of one size."""
    names = dimension_names(leaves)
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])


def _renamed(dim: Any, names: dict[str, str]) -> Any:
    if isinstance(dim, int) or dim.value is None:
        return dim
    return SYMBOL.sub(lambda found: names.get(found[0], found[0]), dim.value)
