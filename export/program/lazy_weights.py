"""Weights that are computed while the file is written, one after the other.

Tracing and translation see stand-ins: tensors of the right shape in memory that nobody touches,
which the system therefore never provides.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import fx, nn

from lora_fx.errors import ExportError, shorten
from lora_fx.graph.aliasing import Written
from lora_fx.graph.graph_module import assign, build_graph_module, copy_graph, remove, targets
from lora_fx.graph.lazy_tensor import LazyTensor, evaluate, get_unevaluated
from lora_fx.graph.ops import written_arguments


@dataclass(frozen=True)
class StandIn:
    """A weight to be, and what stands for it until the file is written.

    Attributes:
        name: in the graph.
        weight: computes it.
        tensor: of its shape; what it holds means nothing.
        is_read: whether an output depends on it; if a buffer alone does, a file has nothing of it.
    """

    name: str
    weight: LazyTensor
    tensor: nn.Parameter
    is_read: bool = True


def with_stand_ins(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[StandIn]]:
    """A copy that computes nothing: each tensor that is still to be computed has a stand-in."""
    graph = copy_graph(gm.graph)
    for node in reversed(list(graph.nodes)):
        if _is_idle(node):
            graph.erase_node(node)
    hollow = build_graph_module(gm, graph, gm.training)
    hollow.meta = dict(gm.meta)
    read = {str(node.target) for node in Written(hollow.graph).needed() if node.op == "get_attr"}
    known: dict[int, nn.Parameter] = {}
    stand_ins = []
    for target in targets(hollow.graph):
        weight = get_unevaluated(gm, target)
        if isinstance(weight, LazyTensor):
            if id(weight) not in known:
                memory = torch.empty(weight.shape, dtype=weight.dtype)
                known[id(weight)] = nn.Parameter(memory, requires_grad=False)
            remove(hollow, target)  # assigning alone would compute it: torch looks whether it is
            assign(hollow, target, known[id(weight)])
            stand_ins.append(StandIn(target, weight, known[id(weight)], target in read))
    return hollow, stand_ins


def _is_idle(node: fx.Node) -> bool:
    """Whether a file has nothing of a node: a dropout that nobody reads draws no numbers there."""
    if node.users or written_arguments(node):
        return False
    operator = isinstance(node.target, torch._ops.OpOverload) and bool(node.target._schema.returns)
    return operator or node.op == "get_attr"


def replace_stand_ins(model: ir.Model, stand_ins: list[StandIn]) -> None:
    """Puts tensors that compute themselves when written in the place of stand-ins.

    Raises:
        ExportError: a stand-in is not among the initializers as it was given: whatever was made
            of it would be written in the place of the weight.
    """
    waiting = {s.tensor.data_ptr(): s for s in stand_ins if s.tensor.numel()}
    values = list(model.graph.initializers.values())
    kept = set()
    for value in values:
        found = waiting.get(_address(value.const_value))
        if found is not None and value.shape == found.weight.shape:
            value.const_value = _lazy(found.weight, value)
            kept.add(found.name)
    lost = [s.name for s in waiting.values() if s.is_read and s.name not in kept]
    lost += [str(value.name) for value in values if _address(value.const_value) in waiting]
    if lost:
        raise ExportError(f"lost in translation: {shorten(lost)}; please report the model")


def _address(tensor: ir.TensorProtocol | None) -> int:
    held = getattr(tensor, "raw", None)
    return held.data_ptr() if isinstance(held, torch.Tensor) else 0


def _lazy(weight: LazyTensor, value: ir.Value) -> ir.LazyTensor:
    def computed() -> ir.TensorProtocol:
        return TorchTensor(evaluate(weight), name=value.name)

    assert value.dtype is not None
    shape = ir.Shape(weight.shape)
    return ir.LazyTensor(computed, dtype=value.dtype, shape=shape, name=value.name)
