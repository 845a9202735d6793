"""Gives a model the names that its user knows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, count
from typing import Any

import onnx_ir as ir
import torch
from torch.utils import _pytree as pytree

from lora_fx.errors import ExportError
from lora_fx.export.program.io_signature import SYMBOL, Leaf, dimension_names, key_of


def output_names(outputs: Any) -> list[str]:
    """Names of what a model returned: field names and keys, else ``output``, ``output_0``, ….

    Raises:
        ExportError: an output is no tensor.
    """
    flat, _ = pytree.tree_flatten_with_path(outputs)
    names = []
    for path, value in flat:
        name = "_".join(str(key_of(part)) for part in path)
        if value is None:
            continue
        if not isinstance(value, torch.Tensor):
            found = type(value).__name__
            raise ExportError(f"output {name!r} is a {found}: ONNX returns tensors; leave it out")
        names.append(f"output_{name}".rstrip("_") if not name or name[0].isdigit() else name)
    return names


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


def rename(model: ir.Model, leaves: Sequence[Leaf], outputs: Sequence[str]) -> None:
    """Gives graph inputs, outputs and dynamic dimensions the user's names, in place."""
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
    _rename_dims(model, dimension_names(leaves))


def _rename_dims(model: ir.Model, names: dict[str, str]) -> None:
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])


def _renamed(dim: Any, names: dict[str, str]) -> Any:
    if isinstance(dim, int) or dim.value is None:
        return dim
    return SYMBOL.sub(lambda found: names.get(found[0], found[0]), dim.value)
