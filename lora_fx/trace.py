"""From a module to a graph in normal form: the only caller of a tracer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx.errors import TraceError
from lora_fx.graphs import assemble, copy_graph, targets
from lora_fx.normal_form import normalise
from lora_fx.ops import GUARDS
from lora_fx.program import dynamic_axes, export_program, graph_of, shapes_by_argument
from lora_fx.shells import unshared
from lora_fx.symbolic import symbolic_graph
from lora_fx.trace_errors import refuse_attributes, refuse_inputs

_META = "lora_fx.example"


@dataclass(frozen=True)
class Example:
    """What a graph was traced with, kept for export.

    Attributes:
        args: positional example inputs.
        kwargs: example inputs by name, in the order of the model's signature.
        dynamic_shapes: as given to `trace`.
        output_embedding: module path of the output head that PEFT's "all-linear" leaves out.
        aliases: path of a module that has several names -> its other names.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    output_embedding: str | None = None
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def trace(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    frontend: str = "auto",
) -> fx.GraphModule:
    """Traces a model into a graph that passes can rewrite.

    Args:
        model: any module, a GraphModule, or an ExportedProgram. It is not changed.
        args: example inputs by position. Optional under symbolic tracing.
        kwargs: example inputs by name.
        dynamic_shapes: as torch.export takes it; an axis may also be given a name
            (``{"input_ids": {0: "batch", 1: "sequence"}}``), whose range is then inferred.
        frontend: ``"symbolic"`` (torch.fx, shapes stay general, dropout stays live),
            ``"export"`` (torch.export, almost any model), or ``"auto"``: ``"export"`` when
            example inputs are given, else ``"symbolic"``.

    Returns:
        A GraphModule called as the model is called, bit-equal to it, sharing its tensors.

    Raises:
        TraceError: the model cannot be traced; says where and what to try.
    """
    if frontend not in ("auto", "symbolic", "export"):
        raise TraceError(f"frontend {frontend!r}: expected 'auto', 'symbolic' or 'export'")
    if not isinstance(args, tuple):
        raise TraceError(f"args is a {type(args).__name__}: give a tuple, such as (x,)")
    if isinstance(model, torch.export.ExportedProgram):
        return _from_program(model)
    kwargs = _in_signature_order(model, dict(kwargs or {}))
    example = Example(args, kwargs, dynamic_shapes, _output_embedding(model), _aliases(model))
    if frontend == "auto":
        frontend = "export" if args or kwargs else "symbolic"
    if frontend == "export":
        program = export_program(model, args, kwargs, dynamic_shapes)
        flat = shapes_by_argument(model, args, kwargs, dynamic_shapes)
        example = replace(example, dynamic_shapes=flat)
        return _finish(*graph_of(program), example, model.training)
    if isinstance(model, fx.GraphModule) and _opened(model):
        return _finish(model, copy_graph(model.graph), example, model.training)
    root = unshared(model)
    graph, made = symbolic_graph(root, args, kwargs)
    return _finish(root, graph, example, model.training, made)


def example_of(gm: fx.GraphModule) -> Example | None:
    """The example inputs that a graph was traced with, if it remembers any."""
    example = gm.meta.get(_META)
    return example if isinstance(example, Example) else None


def _finish(
    root: nn.Module,
    graph: fx.Graph,
    example: Example,
    training: bool,
    made: Mapping[str, torch.Tensor] | None = None,
) -> fx.GraphModule:
    normalise(graph)
    refuse_attributes(targets(graph))
    refuse_inputs(_parameters(graph))
    gm = assemble(root, graph, training, made)
    gm.meta[_META] = example
    return gm


def _parameters(graph: fx.Graph) -> list[str]:
    """What the code of a graph calls its inputs."""
    info = getattr(graph._codegen, "pytree_info", None)
    nodes = (node for node in graph.nodes if node.op == "placeholder")
    return list(info.orig_args) if info else [str(node.target).lstrip("*") for node in nodes]


def _from_program(program: torch.export.ExportedProgram) -> fx.GraphModule:
    args, kwargs = program.example_inputs or ((), {})
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    users = [placeholders[name] for name in program.graph_signature.user_inputs if name]
    shapes = [dynamic_axes(node) for node in users]
    spec = pytree.tree_structure((tuple(args), dict(kwargs)))
    by_args, by_kwargs = pytree.tree_unflatten(shapes, spec)
    names = list(inspect.signature(program.module().forward).parameters)
    dynamic = dict(zip(names, by_args, strict=False)) | by_kwargs
    example = Example(tuple(args), dict(kwargs), dynamic if any(shapes) else None)
    return _finish(*graph_of(program), example, training=False)


def _opened(gm: fx.GraphModule) -> bool:
    calls = (n for n in gm.graph.nodes if n.op == "call_module" and n.target != GUARDS)
    return _META in gm.meta or not any(calls)


def _in_signature_order(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(model.forward).parameters)
    place = {name: index for index, name in enumerate(names)}
    return dict(sorted(kwargs.items(), key=lambda item: place.get(item[0], len(names))))


def _output_embedding(model: nn.Module) -> str | None:
    head = getattr(model, "get_output_embeddings", None)
    module = head() if callable(head) else None
    return next((path for path, m in model.named_modules() if m is module), None)


def _aliases(model: object) -> dict[str, tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    modules = model.named_modules(remove_duplicate=False) if isinstance(model, nn.Module) else ()
    for path, module in modules:
        names.setdefault(id(module), []).append(path)
    return {
        path: tuple(other for other in several if other != path)
        for several in names.values()
        if len(several) > 1
        for path in several
    }
