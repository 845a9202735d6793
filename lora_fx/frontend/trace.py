"""From a module to a graph in normal form: the only caller of a tracer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx.choices import Frontend, check_choice, takes
from lora_fx.errors import TraceError
from lora_fx.frontend.check_trace import CallError, call_once, check_faithful
from lora_fx.frontend.diagnostics import (
    refuse_attributes,
    refuse_inputs,
    refuse_scripted,
    refuse_uninitialised,
    refuse_wrapped,
)
from lora_fx.frontend.isolated_run import preserved, random_kept
from lora_fx.frontend.leaked_fakes import clear_caches
from lora_fx.frontend.lent_parameters import note_holders
from lora_fx.frontend.normalize import normalise
from lora_fx.frontend.root_call import is_hooked, shapes_by_argument
from lora_fx.frontend.symbolic import symbolic_graph
from lora_fx.frontend.torch_export import dynamic_axes, export_program, graph_of
from lora_fx.graph.example import Example, checked_call, example_of, remember_example
from lora_fx.graph.graph_module import build_graph_module, copy_graph, split_shared_modules, targets
from lora_fx.graph.module_state import untouched
from lora_fx.graph.one_thread import one_at_a_time
from lora_fx.graph.ops import GUARDS
from lora_fx.graph.retracing import Again, Source, mark, remember
from lora_fx.graph.traced_module import TracedModule
from lora_fx.graph.train_eval import in_mode
from lora_fx.graph.wrappers import bare, named_modules, unwrapped


@takes(TraceError)
@one_at_a_time
def trace(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    frontend: Frontend = "auto",
    check: bool = True,
) -> fx.GraphModule:
    """Traces a model into a graph that passes can rewrite.

    Args:
        model: any module, a GraphModule, or an ExportedProgram. It is not changed.
        args: example inputs by position. Optional under symbolic tracing.
        kwargs: example inputs by name.
        dynamic_shapes: as torch.export takes it; an axis may also be given a name
            (``{"input_ids": {0: "batch", 1: "sequence"}}``), whose range is then inferred; axes of
            one name are of one size. What a dictionary leaves out has the sizes of the example.
            What ``*args`` and ``**kwargs`` take may be given as one (``{"rest": (..., ...)}``) or
            by argument (``{"rest_0": ..., "rest_1": ...}``).
        frontend: ``"symbolic"`` (torch.fx, shapes stay general),
            ``"export"`` (torch.export, almost any model), or ``"auto"``: ``"export"`` when
            example inputs are given, else ``"symbolic"``.

        check: run model and graph on the example inputs, and with one row where the batch is
            free, and compare, bit for bit. Without example inputs nothing can be compared.

    Returns:
        A GraphModule called as the model is called, bit-equal to it, or to what it has for exports
        (``torch.compiler.is_exporting()``) if both give the same to rounding. Its ``.train()`` and
        ``.eval()`` switch what was recorded of a mode; the first to ask for another mode than the
        model was traced in traces it again. It shares the model's tensors, so torch's ``.half()``
        and ``.to(...)`` on it convert the model's parameters too, in place. Convert the model
        before it is traced, or a ``copy.deepcopy`` of the graph.

    Raises:
        TraceError: the model cannot be traced, or its graph computes something else; says where
            and what to try.
    """
    if not isinstance(model, nn.Module | torch.export.ExportedProgram):
        raise TraceError(
            f"{model!r:.80} is a {type(model).__name__}: trace takes a torch.nn.Module or an "
            "ExportedProgram; a directory is loaded by lora_fx.tasks.load, and an .onnx file gets "
            "slots by lora_fx.export.add_lora"
        )
    check_choice("frontend ", frontend, Frontend, TraceError)
    args, kwargs = checked_call(args, kwargs, TraceError)
    if isinstance(model, torch.export.ExportedProgram):
        return _from_program(model, check)
    model = bare(model)
    refuse_scripted(model)
    refuse_uninitialised(model)
    refuse_wrapped(model)
    kwargs = _in_signature_order(model, kwargs)
    names = _output_embedding(model), _aliases(model)
    model_then = TracedModule(model) if isinstance(model, nn.Module) else None
    shapes = shapes_by_argument(model, args, kwargs, dynamic_shapes)
    example = Example(args, kwargs, shapes, *names, model_then)
    if frontend == "auto":
        frontend = "export" if args or kwargs else "symbolic"
    once = partial(_once, model, example, frontend, check and bool(args or kwargs))
    gm, unsteady = once()
    _remember(gm, model, once, unsteady)
    return gm


def _once(
    model: nn.Module, example: Example, frontend: str, check: bool
) -> tuple[fx.GraphModule, str | None]:
    """The graph of a model in the mode that it is in, and why two calls of it may differ."""
    inputs = example.args, dict(example.kwargs)
    with unwrapped(model):
        gm = _made(model, example, frontend)
        if not check:
            return gm, None
        try:
            return gm, check_faithful(model, gm, inputs)
        except CallError:
            if not clear_caches():
                raise
        call_once(model, gm, inputs)  # caches that the trace filled are now filled for good
        gm = _made(model, example, frontend)
        return gm, check_faithful(model, gm, inputs)


def _made(model: nn.Module, example: Example, frontend: str) -> fx.GraphModule:
    with random_kept(), preserved(model, ()):
        return _traced(model, example, frontend)


def _traced(model: nn.Module, example: Example, frontend: str) -> fx.GraphModule:
    args, kwargs, dynamic_shapes = example.args, example.kwargs, example.dynamic_shapes
    if frontend == "export":
        program = export_program(model, args, kwargs, dynamic_shapes)
        return _finish(*graph_of(program), example, model.training)
    if isinstance(model, fx.GraphModule) and _opened(model) and not is_hooked(model):
        return _finish(model, copy_graph(model.graph), example, model.training)
    root = split_shared_modules(model)
    graph, made = symbolic_graph(root, args, kwargs)
    return _finish(root, graph, example, model.training, made)


def _remember(
    gm: fx.GraphModule,
    model: nn.Module,
    once: Callable[[], tuple[fx.GraphModule, str | None]],
    unsteady: str | None,
) -> None:
    """Lets a graph follow the modes of its model."""

    def again(mode: bool) -> Again:
        with unwrapped(model), untouched(model), in_mode(model, mode) as modes:
            other, unsteady = once()
        return Again(other.graph, modes, unsteady)

    mark(gm)
    modes = {path: module.training for path, module in named_modules(model)}
    graph = copy_graph(gm.graph)
    graph.owning_module = gm  # holds the blocks that it runs
    remember(gm, Source(type(model).__name__, graph, modes, again, unsteady))


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
    gm = build_graph_module(root, graph, training, made)
    remember_example(gm, example)
    if example.model is not None:
        note_holders(gm, example.model)
    return gm


def _parameters(graph: fx.Graph) -> list[str]:
    """What the code of a graph calls its inputs."""
    info = getattr(graph._codegen, "pytree_info", None)
    nodes = (node for node in graph.nodes if node.op == "placeholder")
    return list(info.orig_args) if info else [str(node.target).lstrip("*") for node in nodes]


def _from_program(program: torch.export.ExportedProgram, check: bool) -> fx.GraphModule:
    args, kwargs = program.example_inputs or ((), {})
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    users = [placeholders[name] for name in program.graph_signature.user_inputs if name]
    shapes = [dynamic_axes(node) for node in users]
    spec = pytree.tree_structure((tuple(args), dict(kwargs)))
    by_args, by_kwargs = pytree.tree_unflatten(shapes, spec)
    names = list(inspect.signature(program.module().forward).parameters)
    dynamic = dict(zip(names, by_args, strict=False)) | by_kwargs
    module, graph = graph_of(program)
    shapes_or_none = dynamic if any(shapes) else None
    example = Example(tuple(args), dict(kwargs), shapes_or_none, model=TracedModule(module))
    gm = _finish(module, graph, example, training=False)
    if check and (args or kwargs):
        check_faithful(module, gm, (tuple(args), dict(kwargs)))
    return gm


def _opened(gm: fx.GraphModule) -> bool:
    calls = (n for n in gm.graph.nodes if n.op == "call_module" and n.target != GUARDS)
    return example_of(gm) is not None or not any(calls)


def _in_signature_order(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(model.forward).parameters)
    place = {name: index for index, name in enumerate(names)}
    return dict(sorted(kwargs.items(), key=lambda item: place.get(item[0], len(names))))


def _output_embedding(model: nn.Module) -> str | None:
    head = getattr(model, "get_output_embeddings", None)
    found = head() if callable(head) else None
    module = bare(found) if isinstance(found, nn.Module) else None
    return next((path for path, m in named_modules(model) if m is module), None)


def _aliases(model: object) -> dict[str, tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    modules = named_modules(model) if isinstance(model, nn.Module) else ()
    for path, module in modules:
        names.setdefault(id(module), []).append(path)
    return {
        path: tuple(other for other in several if other != path)
        for several in names.values()
        if len(several) > 1
        for path in several
    }
