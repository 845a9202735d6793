"""Example inputs: those that were given, or that a graph remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from lora_fx.errors import ExportError
from lora_fx.frontend.root_call import shapes_by_argument
from lora_fx.graph.example import checked_call, example_of


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
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
    input_names: Sequence[str] | Mapping[str, str] | None = None,
    output_names: Sequence[str] | Mapping[str, str] | None = None,
) -> Inputs:
    """The inputs that were given, or else those that the graph was traced with.

    Raises:
        ExportError: neither is there, or what was given is no tuple and no dictionary.
    """
    example = example_of(gm)
    if input_names is None and example is not None:
        input_names = example.input_names
    names = input_names, output_names
    given = checked_call(tuple(args) if isinstance(args, list) else args, kwargs, ExportError)
    if any(given):
        return Inputs(*given, _shapes(gm, *given, dynamic_shapes), *names)
    if example is None or not (example.args or example.kwargs):
        raise ExportError(
            "no example inputs: the graph was traced without any; pass args=(x,) or kwargs={...} "
            'and, for sizes that may change, dynamic_shapes={"x": {0: "batch"}}'
        )
    given = example.args, dict(example.kwargs)
    return Inputs(*given, _shapes(gm, *given, dynamic_shapes), *names, example.generates)


def _shapes(
    gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> Any:
    """Those that were given, as the model that was traced has them, or else the graph's."""
    example = example_of(gm)
    if dynamic_shapes is None:
        return example.dynamic_shapes if example is not None else None
    model = example.model.modules[""] if example is not None and example.model is not None else gm
    return shapes_by_argument(model, args, kwargs, dynamic_shapes)
