"""torch.export: from a module to a program, and from a program to a graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.export import _trace
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from lora_fx.errors import TraceError
from lora_fx.frontend.data_reads import KnownCounts, data_detached, lengths_free, numbers_free
from lora_fx.frontend.diagnostics import (
    explain_failure,
    refuse_attributes,
    refuse_inputs,
    refuse_wrapped,
)
from lora_fx.frontend.dropouts_apart import dropouts_apart
from lora_fx.frontend.for_any_input import for_any_input
from lora_fx.frontend.isolated_run import as_in_eager, preserved
from lora_fx.frontend.one_row import call_with_one_row
from lora_fx.frontend.open_blocks import open_blocks
from lora_fx.frontend.root_call import shapes_by_argument, with_named_arguments
from lora_fx.graph.graph_module import copy_graph, split_shared_modules, without_guards
from lora_fx.graph.lean_tracing import lean_tracing


def export_program(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """Runs torch.export on a module.

    Raises:
        TraceError: the model cannot be exported; says where and what to try.
    """
    if not args and not kwargs:
        raise TraceError("torch.export needs example inputs: pass args or kwargs")
    refuse_inputs(kwargs)
    named = shapes_by_argument(model, args, kwargs, dynamic_shapes)
    shapes = pytree.tree_map(_dim, named, is_leaf=lambda leaf: leaf is None)
    root = (
        without_guards(model) if isinstance(model, fx.GraphModule) else split_shared_modules(model)
    )
    root = with_named_arguments(root, args, kwargs)
    args, kwargs = distinct((args, dict(kwargs)))
    has_free_axes = any(leaf is not None for leaf in pytree.tree_leaves(shapes))
    # Where shapes have symbols, an entry of this cache costs more than the calls that it saves.
    results_cached = torch._dynamo.config.patch(fake_tensor_cache_enabled=not has_free_axes)
    with (
        warnings.catch_warnings(),
        data_detached(),
        dropouts_apart(),
        for_any_input(has_free_axes),
        lengths_free(root),
        _without_partial_graphs(),
        lean_tracing(),
        results_cached,
    ):
        # torch.export warns about its own internals (deprecated pytree classes, logging).
        warnings.simplefilter("ignore")
        export = partial(
            torch.export.export, args=args, kwargs=kwargs, dynamic_shapes=shapes, strict=False
        )
        try:
            return export(root)
        except Exception as error:  # the model's own code runs in here and may raise anything
            call = partial(call_with_one_row, root, args, kwargs, named)
            program = _again(root, export, call, str(error))
            if program is None:  # what fails again is told of the model as it is
                raise TraceError(explain_failure(root, "export", error)) from error
            return program


def _again(
    root: nn.Module,
    export: Callable[[nn.Module], torch.export.ExportedProgram],
    call: Callable[[], None],
    reason: str,
) -> torch.export.ExportedProgram | None:
    """Exports behind another call, with the numbers of sizes left open, or with known counts."""
    if "specialized" in reason:
        with suppress(Exception), preserved(root, root.buffers()):
            with as_in_eager():
                call()
            return export(root)
        with suppress(Exception), numbers_free(root):
            return export(root)
    with suppress(Exception):
        known = KnownCounts(root)
        program = export(known.model) if known.names else None
        return None if known.is_written else program
    return None


@contextmanager
def _without_partial_graphs() -> Iterator[None]:
    """Where torch.export fails, it prints all that it had of the graph, before our message.

    And it logs warnings and the traceback; what TORCH_LOGS asks for is below these.
    """
    every = [*logging.root.manager.loggerDict.values()]
    own = [o for o in every if isinstance(o, logging.Logger) and o.name.startswith("torch.")]

    def asked_for(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING

    vars(_trace)["print"] = lambda *_, **__: None
    for logger in own:
        logger.addFilter(asked_for)
    try:
        yield
    finally:
        del vars(_trace)["print"]
        for logger in own:
            logger.removeFilter(asked_for)


def graph_of(program: torch.export.ExportedProgram) -> tuple[nn.Module, fx.Graph]:
    """The module of a program and a copy of its graph.

    Raises:
        TraceError: the program's code would not be Python, for the names in it, or a weight is no
            plain tensor.
    """
    refuse_wrapped(program)
    refuse_attributes(
        str(spec.target) for spec in program.graph_signature.input_specs if spec.target
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated pytree classes, inside torch.export
        with lean_tracing():
            gm = program.module()
    graph = copy_graph(gm.graph)
    open_blocks(gm, graph)
    return gm, graph


def outputs_of(program: torch.export.ExportedProgram) -> Any:
    """What a program returns, its tensors without values."""
    held = {node.name: node.meta.get("val") for node in program.graph.nodes}
    specs = program.graph_signature.output_specs
    returned = [spec.arg for spec in specs if spec.kind is OutputKind.USER_OUTPUT]
    flat = [getattr(arg, "value", held.get(arg.name)) for arg in returned]
    return pytree.tree_unflatten(flat, program.call_spec.out_spec)


def dynamic_axes(node: fx.Node) -> dict[int, Any] | None:
    """The axes of an input that a program leaves open, as dynamic shapes have them."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    sizes: list[object] = list(value.shape)
    axes = [axis for axis, size in enumerate(sizes) if isinstance(size, torch.SymInt)]
    return dict.fromkeys(axes, torch.export.Dim.DYNAMIC) or None


def distinct(inputs: Any) -> Any:
    """Tensors of their own on the same numbers; copies where one comes twice, or has gaps.

    torch.export would take the one for the other, and refuse inputs without the gaps. It notes on
    a tensor which axes were free, and would ask for them again at the next trace.
    """
    seen: set[int] = set()

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided:
            return leaf
        own = leaf.detach().clone() if id(leaf) in seen else leaf.detach().contiguous()
        seen.add(id(leaf))
        return own.requires_grad_(leaf.requires_grad)

    return pytree.tree_map(copied, inputs)


def _dim(axis: Any) -> Any:
    return torch.export.Dim.DYNAMIC if isinstance(axis, str) else axis
