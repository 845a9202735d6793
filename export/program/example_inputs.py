"""Example inputs: those that were given, or that a graph remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from lora_fx.errors import ExportError
from lora_fx.graph.example import example_of


@dataclass(frozen=True)
class Inputs:
    """What a graph is traced with.

    Attributes:
        args: example inputs by position.
        kwargs: example inputs by name.
        dynamic_shapes: as `lora_fx.trace` takes it.
        input_names: what to call the tensors among them, in order; None: as the model does.
        output_names: what to call the outputs; None: as the model does.
        generates: whether it is one step of a decoder with a cache.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dynamic_shapes: Any
    input_names: Sequence[str] | Mapping[str, str] | None = None
    output_names: Sequence[str] | Mapping[str, str] | None = None
    generates: bool = False


def example_inputs(
    gm: fx.GraphModule,
    args: tuple[Any, ...] | None,
    kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
    input_names: Sequence[str] | Mapping[str, str] | None = None,
    output_names: Sequence[str] | Mapping[str, str] | None = None,
) -> Inputs:
    """The inputs that were given, or else those that the graph was traced with.

    Raises:
        ExportError: neither is there.
    """
    example = example_of(gm)
    if dynamic_shapes is None and example is not None:
        dynamic_shapes = example.dynamic_shapes
    if input_names is None and example is not None:
        input_names = example.input_names
    if args or kwargs:
        given = tuple(args or ()), dict(kwargs or {})
        return Inputs(*given, dynamic_shapes, input_names, output_names)
    if example is None or not (example.args or example.kwargs):
        raise ExportError(
            "no example inputs: the graph was traced without any; pass args=(x,) or kwargs={...} "
            'and, for sizes that may change, dynamic_shapes={"x": {0: "batch"}}'
        )
    names = input_names, output_names
    return Inputs(example.args, example.kwargs, dynamic_shapes, *names, example.generates)
