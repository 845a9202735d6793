"""The few rewrites that make an exported graph small, and leave its weights as they are."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript.optimizer import fold_constants

from lora_fx.export.onnx_model.tied import read_transposed


def clean(model: ir.Model) -> None:
    """Rewrites a model in place: the same function of the same named weights, in fewer nodes.

    Before -> after: ``MatMul(x, Transpose(fc.weight))`` -> ``MatMul(x, fc.weight)`` with the
    weight stored as it is read, or multiplied where it lies if others read it too; arithmetic on
    shapes and scalars is evaluated; repeated and unused nodes go. No weight is copied: constants
    are folded only where no weight takes part.
    """
    weights = set(model.graph.initializers.values())
    outputs = [(value.type, value.shape) for value in model.graph.outputs]
    common.CommonSubexpressionEliminationPass()(model)
    fold_transposes(model)
    read_transposed(model)
    fold_constants(model, should_fold=partial(_foldable, weights))
    for tidy in (
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.OutputFixPass(),
        common.RemoveUnusedOpsetsPass(),
    ):
        tidy(model)
    # Of two equal nodes the first stays, whose result may lack what the other's is known to be.
    for value, (kind, shape) in zip(model.graph.outputs, outputs, strict=True):
        value.type, value.shape = kind, shape


def anonymise(model: ir.Model) -> None:
    """Drops what tells of the machine: stack traces, absolute paths, the tracer's own notes."""
    common.ClearMetadataAndDocStringPass()(model)
    values = [value for node in model.graph.all_nodes() for value in node.outputs]
    values += [*model.graph.inputs, *model.graph.initializers.values()]
    things: list[ir.Model | ir.Graph | ir.Value] = [model, model.graph, *values]
    for thing in things:
        thing.metadata_props.clear()
        thing.doc_string = None


def fold_transposes(model: ir.Model) -> None:
    """Stores each weight the way its only reader, a Transpose, would hand it on."""
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" and node.inputs else None
        if weight is None or not weight.is_initializer() or len(weight.uses()) != 1:
            continue
        result = node.outputs[0]
        if weight.is_graph_input() or weight.const_value is None or result.is_graph_output():
            continue
        permutation = node.attributes["perm"].as_ints()
        weight.const_value = _transposed(weight.const_value, permutation, weight.name)
        weight.shape = ir.Shape(weight.const_value.shape.numpy())
        result.replace_all_uses_with(weight)
        model.graph.remove(node, safe=True)


def _transposed(
    tensor: ir.TensorProtocol, permutation: tuple[int, ...], name: str | None
) -> ir.TensorProtocol:
    def compute() -> ir.TensorProtocol:
        held = tensor.raw() if isinstance(tensor, ir.LazyTensor) else tensor
        values = held.raw if isinstance(held.raw, torch.Tensor) else torch.tensor(held.numpy())
        # torch's, not numpy's: it transposes faster, and its bytes are written in one go.
        return TorchTensor(values.detach().permute(permutation).contiguous(), name=name)

    sizes = tensor.shape.numpy()
    shape = ir.Shape([sizes[axis] for axis in permutation])
    return ir.LazyTensor(compute, dtype=tensor.dtype, shape=shape, name=name)


def _foldable(weights: set[ir.Value], node: ir.Node) -> bool | None:
    return False if weights.intersection(v for v in node.inputs if v is not None) else None
