"""The reference run in eager mode: eval, no gradients, each run as if it were the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lora_fx.errors import ExportError, LoraFxError
from lora_fx.export.program.shape_variants import Case
from lora_fx.graph.aliasing import written
from lora_fx.graph.graph_module import assign, build_graph_module, copy_graph, targets
from lora_fx.graph.lazy_tensor import LazyTensor, evaluate, get_all_unevaluated, get_unevaluated
from lora_fx.graph.retracing import source_of
from lora_fx.graph.train_eval import EVAL_FLAGS, flags
from lora_fx.reference.reference_run import WeightForm

Tensors = list[torch.Tensor]
# What a model's own code raises where a shape is none of its.
EAGER_ERRORS = (RuntimeError, ValueError, IndexError, AssertionError)
# Where inputs were given that nobody has tried: no tensors, or more than are taken.
_ANY_ERRORS = (*EAGER_ERRORS, TypeError, AttributeError)


def evaluating(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy in eval mode that shares the tensors, with what its model does in eval mode.

    Where the model is not known, any recorded training flag is off. A tensor that is still to be
    computed is computed at each run, and held no longer than it is used.

    Raises:
        TraceError: the graph was traced in training mode, and eval mode takes another way.
    """
    graph = copy_graph(gm.graph)
    if source_of(gm) is None:
        for node in graph.nodes:
            _switch_off(node)
    copy = build_graph_module(gm, graph, training=False)
    copy.meta = dict(gm.meta)
    for target in targets(graph):
        value = get_unevaluated(copy, target)
        if isinstance(value, LazyTensor):
            assign(copy, target, value.uncached())
    return copy.eval()


def call_eager(gm: fx.GraphModule | WeightForm, case: Case) -> Any:
    """What a model returns; whatever it writes to, inputs and tensors of its own, is a copy."""
    if not isinstance(gm, fx.GraphModule):
        return gm(*case.args, **case.kwargs)
    with torch.no_grad():
        args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (case.args, case.kwargs))
        # Looking for tied weights would read, and so compute, every weight: `_state` names all.
        return torch.func.functional_call(gm, _state(gm), args, kwargs, tie_weights=False)


def run_eager(gm: fx.GraphModule | WeightForm, case: Case) -> Tensors:
    """The tensors that a model returns, in order."""
    outputs = pytree.tree_leaves(call_eager(gm, case))
    return [value for value in outputs if isinstance(value, torch.Tensor)]


@contextmanager
def told_of_eager(
    gm: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Says of an export that failed that eager fails too, if it does.

    Raises:
        ExportError: the graph itself does not run on these inputs.
    """
    try:
        yield
    except (LoraFxError, *_ANY_ERRORS) as error:
        try:
            call_eager(evaluating(gm), Case("example", args, dict(kwargs)))
        except _ANY_ERRORS as problem:
            reason = str(problem).strip().partition("\n")[0]
            raise ExportError(
                f"the graph does not run on its example inputs: {reason}: give args= of the types "
                "and sizes that it was traced for (dynamic_shapes= of trace leaves them open), and "
                "as it takes them now, where it was converted since (.half(), .double())"
            ) from error
        raise


def _state(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Copies of the tensors that a call may write to: large weights are not among them."""
    held = get_all_unevaluated(gm, targets(gm.graph))
    dirty = {id(held[str(n.target)]) for n in written(gm.graph) if n.op == "get_attr"}
    state = {target: value for target, value in held.items() if id(value) in dirty}
    for target in {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}:
        state |= gm.get_submodule(target).named_buffers(target, remove_duplicate=False)
    copies: dict[int, torch.Tensor] = {}  # one for all names of a tensor
    for value in state.values():
        if id(value) not in copies:
            copies[id(value)] = evaluate(value).clone()
    return {name: copies[id(value)] for name, value in state.items()}


def _switch_off(node: fx.Node) -> None:
    for name, (place, *_) in flags(node).items():
        if place < len(node.args):
            node.update_arg(place, EVAL_FLAGS[name])
        else:
            node.update_kwarg(name, EVAL_FLAGS[name])
