"""The example inputs with one row, which torch.export takes for several without a guard."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx.graph.example import example_of
from lora_fx.graph.ops import sizes_of


def with_one_row(gm: fx.GraphModule, inputs: Any) -> Any | None:
    """Inputs of which the first free batch has one row, wherever that size is asked for.

    Args:
        gm: a graph.
        inputs: args and kwargs that it was traced with.

    Returns:
        Such inputs; None where no batch is free, or its least size is given as more.
    """
    example = example_of(gm)
    dims = pytree.tree_leaves(None if example is None else example.dynamic_shapes)
    if any((getattr(dim, "min", None) or 0) > 1 for dim in dims):
        return None
    flat, spec = pytree.tree_flatten(inputs)
    inputs_of = gm.graph.find_nodes(op="placeholder")
    shapes = [[*map(str, sizes_of(node) or ())] for node in inputs_of]  # free ones as symbols
    batch = next((sizes[0] for sizes in shapes if sizes and not sizes[0].isdecimal()), None)
    if batch is None or len(shapes) != len(flat):
        return None
    rows = [_cut(value, sizes, batch) for value, sizes in zip(flat, shapes, strict=True)]
    return pytree.tree_unflatten(rows, spec)


def call_with_one_row(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: Any
) -> None:
    """Calls a model with one row of each input whose first axis is free.

    What its code keeps of the last call's sizes, as detection heads keep their anchors, is then
    not of the sizes that are traced, which would be taken for constants.

    Args:
        model: a module.
        args: example inputs by position.
        kwargs: by name.
        shapes: by argument, as `shapes_by_argument` gives them.
    """
    call = inspect.signature(model.forward).bind(*args, **kwargs)
    rows = pytree.tree_map(_first_row, dict(call.arguments), dict(shapes))
    call.arguments.update(rows)
    model(*call.args, **call.kwargs)


def _first_row(value: Any, shape: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not shape:
        return value
    size = shape.get(0) if isinstance(shape, Mapping) else shape[0]
    return value if size is None else value[:1].clone()


def _cut(value: Any, sizes: list[str], batch: str) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    for axis, size in enumerate(sizes):
        value = value.narrow(axis, 0, 1) if size == batch else value
    return value.clone()
