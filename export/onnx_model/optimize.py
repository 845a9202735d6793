"""The few rewrites that make an exported graph small, and leave its weights as they are."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnx_ir.tensor_adapters import TorchTensor

from lora_fx.export.onnx_model.identities import DropIdentities
from lora_fx.export.onnx_model.tied import MultiplyTied


def clean(model: ir.Model) -> None:
    """Rewrites a model in place: the same function of the same named weights, in fewer nodes.

    Arithmetic on shapes and scalars is evaluated; repeated and unused nodes go. No weight is
    copied, read or dropped: constants are folded only where no weight takes part.
    """
    weights = frozenset(model.graph.initializers.values())
    outputs = [(value.type, value.shape) for value in model.graph.outputs]
    ir.passes.Sequential(
        DropMadeBiases(),
        common.CommonSubexpressionEliminationPass(),
        StoreTransposed(),
        MultiplyTied(),
        FoldConstants(weights),
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        DropIdentities(),
        common.RemoveUnusedNodesPass(),
        common.OutputFixPass(),
        common.RemoveUnusedOpsetsPass(),
    )(model)
    # Of two equal nodes the first stays, whose result may lack what the other's is known to be.
    for value, (kind, shape) in zip(model.graph.outputs, outputs, strict=True):
        value.type, value.shape = kind, shape


def anonymise(model: ir.Model) -> None:
    """Drops what tells of the machine: stack traces, absolute paths, the tracer's own notes."""
    own = {key: note for key, note in model.metadata_props.items() if key.startswith("lora_fx.")}
    common.ClearMetadataAndDocStringPass()(model)
    values = [value for node in model.graph.all_nodes() for value in node.outputs]
    values += [*model.graph.inputs, *model.graph.initializers.values()]
    things: list[ir.Model | ir.Graph | ir.Value] = [model, model.graph, *values]
    for thing in things:
        thing.metadata_props.clear()
        thing.doc_string = None
    model.metadata_props.update(own)


class StoreTransposed(ir.passes.InPlacePass):
    """Stores each weight the way its only reader, a Transpose, would hand it on.

    Before -> after: ``MatMul(x, Transpose(fc.weight))`` -> ``MatMul(x, fc.weight)``.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the model."""
        modified = False
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
            modified = True
        return ir.passes.PassResult(model, modified)


class FoldConstants(ir.passes.InPlacePass):
    """Evaluates what is computed from constants alone, and from no weight."""

    def __init__(self, weights: Collection[ir.Value]) -> None:
        self.weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the model."""
        from onnxscript.optimizer import fold_constants  # loaded where a model is exported

        modified: bool = fold_constants(model, should_fold=self._allowed).modified
        return ir.passes.PassResult(model, modified)

    def _allowed(self, node: ir.Node) -> bool | None:
        return False if any(value in self.weights for value in node.inputs) else None


class DropMadeBiases(ir.passes.InPlacePass):
    """Takes away the zeros that torch.onnx gives a convolution without a bias.

    They cost a pass over the result, and those of a conv3d are of a shape that no runtime takes:
    (out, 2), with onnxscript 0.7. Its own rule for optional biases wants a constant, which the
    zeros of a slot of any rank are not, and drops a bias of the model that happens to be zero.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the model."""
        made = [node for node in model.graph if node.op_type == "Conv" and _is_made(node)]
        for node in made:
            node.resize_inputs(2)
        return ir.passes.PassResult(model, bool(made))


def _is_made(convolution: ir.Node) -> bool:
    """Whether its bias is a number 0, cast and expanded."""
    value = convolution.inputs[2] if len(convolution.inputs) > 2 else None
    for step in ("Expand", "CastLike"):
        node = value.producer() if value is not None else None
        if node is None or node.op_type != step:
            return False
        value = node.inputs[0]
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    return constant is not None and constant.size == 1 and not constant.numpy().any()


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
