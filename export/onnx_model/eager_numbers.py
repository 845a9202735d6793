"""Operators that torch.onnx does not translate, or so that numbers are lost which eager has."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from lora_fx.export.spelling.bounds import dtype_of
from lora_fx.export.spelling.rewrite import producer, put
from lora_fx.graph.ops import aten, call_argument

_WHOLE = ir.DataType.INT64
WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
_SAME_NUMBERS = (
    *("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand"),
    *("Slice", "Gather"),
)
_NARROW = ir.DataType.BFLOAT16
_OF_ANY_TYPE = ("Cast", "Constant", "ConstantOfShape", "Identity", "If", "Loop", "Scan")
_MANY = 25  # rows from which torch.cdist multiplies
MASKED = "masked by"  # of a node's notes, until a file is written


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator -> what to write instead of torch.onnx's own translation."""
    from onnxscript import opset18  # loaded where a model is exported
    from onnxscript.function_libs.torch_lib.ops import core, nn

    op: Any = opset18

    def log_sigmoid(x: Any) -> Any:
        """The sigmoid itself is off at -16, and 0 in onnxruntime below -18 or so."""
        return op.Neg(op.Softplus(op.Neg(x)))

    def log(x: Any) -> Any:
        """The same where a model spells it; half precision rounds such a sigmoid in eager too."""
        gate = producer(x, "Sigmoid") if x.dtype in WIDE else None
        return core.aten_log(x) if gate is None else log_sigmoid(gate.inputs[0])

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """What booleans hide is -inf: of a row that is the least number whole, there is a mean."""
        if attn_mask is not None and attn_mask.dtype is ir.DataType.BOOL:
            numbers: list[Any] = [ir.tensor(n, dtype=query.dtype) for n in (0.0, -math.inf)]
            parts: list[Any] = [op.Constant(value=number) for number in numbers]
            attn_mask = op.Where(attn_mask, *parts)
        if len(query.shape) != 4 and not (dropout_p or enable_gqa):
            return products(query, key, value, attn_mask, is_causal, scale)
        return nn.aten_scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )

    def products(q: Any, k: Any, v: Any, mask: Any, is_causal: bool, scale: float | None) -> Any:
        """Attention of any number of axes in front, as of windows; torch.onnx takes two."""
        axes = len(k.shape)
        turned = op.Transpose(k, perm=[*range(axes - 2), axes - 1, axes - 2])
        by = nn._attention_scale(q) if scale is None else scale
        scores = op.MatMul(op.Mul(q, op.CastLike(by, q)), turned)
        mask = nn._causal_attention_mask(q, k) if is_causal else mask
        shown = scores if mask is None else op.Add(scores, op.CastLike(mask, scores))
        return op.MatMul(op.Softmax(shown, axis=-1), v)

    def grouped(rows: Any, matrices: Any, ends: Any) -> Any:
        """The rows of each expert, which follow each other, times its matrix; 0 behind the last."""
        stops, start = op.Cast(ends, to=_WHOLE), whole([0])
        products = []
        for expert in range(matrices.shape[0]):
            stop = op.Gather(stops, whole([expert]))
            own = op.Slice(rows, start, stop, whole([0]))
            products.append(op.MatMul(own, op.Gather(matrices, whole(expert))))
            start = stop
        behind = op.Max(op.Sub(op.Shape(rows, start=0, end=1), start), whole([0]))
        pads = op.Concat(whole([0, 0]), behind, whole([0]), axis=0)
        return op.Pad(op.Concat(*products, axis=0), pads)

    def averaged(torchs: Callable[..., Any], axes: int) -> Callable[..., Any]:
        def pool(
            x: Any,
            kernel_size: list[int],
            stride: Sequence[int] = (),
            padding: Sequence[int] = (0,),
            ceil_mode: bool = False,
            count_include_pad: bool = True,
            divisor_override: int | None = None,
        ) -> Any:
            """A sum that is divided otherwise; torch.onnx loses by what."""
            padding = [*padding] * (axes // len(padding))
            if divisor_override is None or ceil_mode:
                return torchs(x, kernel_size, stride, padding, ceil_mode, count_include_pad)
            mean = torchs(x, kernel_size, stride, padding, ceil_mode, True)
            places = math.prod([*kernel_size] * (axes // len(kernel_size)))
            factor = ir.tensor(places / divisor_override, dtype=x.dtype)
            return op.Mul(mean, op.Constant(value=factor))

        return pool

    def distances(x: Any, y: Any, p: float = 2.0, mode: int | None = None) -> Any:
        """From each row of x to each of y; of many rows by their products, as torch does it."""
        many = any(isinstance(value.shape[-2], int) and value.shape[-2] > _MANY for value in (x, y))
        if p == 2.0 and (mode == 1 or (many and not mode)):
            axes = len(y.shape)
            turned = op.Transpose(y, perm=[*range(axes - 2), axes - 1, axes - 2])
            lengths = op.ReduceSumSquare(x, whole([-1])), op.ReduceSumSquare(turned, whole([-2]))
            twice = op.MatMul(op.Add(x, x), turned)
            squares = op.Sub(op.Add(*lengths), twice)
            return op.Sqrt(op.Max(squares, op.CastLike(0.0, squares)))
        steps = op.Abs(op.Sub(op.Unsqueeze(x, whole([-2])), op.Unsqueeze(y, whole([-3]))))
        if p in (1.0, 2.0, math.inf):
            reduced = {1.0: op.ReduceSum, 2.0: op.ReduceL2, math.inf: op.ReduceMax}[p]
            return reduced(steps, whole([-1]), keepdims=0)
        if p == 0.0:
            return op.ReduceSum(op.Sign(steps), whole([-1]), keepdims=0)
        sums = op.ReduceSum(op.Pow(steps, op.CastLike(p, steps)), whole([-1]), keepdims=0)
        return op.Pow(sums, op.CastLike(1 / p, sums))

    def all_true(x: Any) -> Any:
        """What transformers checks of the tokens that stand for images."""
        return op.Equal(op.ReduceSum(op.Cast(op.Not(x), to=_WHOLE), keepdims=0), whole(0))

    def whole(value: Any) -> Any:
        return op.Constant(value=ir.tensor(value, dtype=_WHOLE))

    table: dict[Callable[..., Any], Callable[..., Any]] = {
        aten.log_sigmoid.default: log_sigmoid,
        aten.log.default: log,
        aten._is_all_true.default: all_true,
        aten.avg_pool2d.default: averaged(nn.aten_avg_pool2d, 2),
        aten.avg_pool3d.default: averaged(nn.aten_avg_pool3d, 3),
        aten._cdist_forward.default: distances,
        aten.scaled_dot_product_attention.default: attention,
    }
    if "transformers.integrations.moe" in sys.modules:  # which registers the operator
        table[torch.ops.transformers.grouped_mm_fallback.default] = grouped
    return table


def give_probabilities(model: ir.Model) -> None:
    """Writes each sigmoid that is an output as 1 / (1 + exp(-x)).

    onnxruntime's own is off by 1e-8 to 1e-7 whatever it is, by 1 % at -12, and 0 below -18 or so.
    Where others read it, as a gate, that is rounding; of a rare event nothing may be left.
    """
    for output in model.graph.outputs:
        value: ir.Value | None = output
        while (node := producer(value, _SAME_NUMBERS)) is not None:
            value = node.inputs[0]
        gate = producer(value, "Sigmoid")
        if gate is None or gate.outputs[0].dtype not in WIDE:
            continue
        one = ir.tensor(1.0, dtype=gate.outputs[0].dtype)
        nodes = [ir.node("Constant", [], {"value": one}), ir.node("Neg", [gate.inputs[0]])]
        nodes.append(ir.node("Exp", [nodes[1].outputs[0]]))
        nodes.append(ir.node("Add", [nodes[2].outputs[0], nodes[0].outputs[0]]))
        nodes.append(ir.node("Reciprocal", [nodes[3].outputs[0]]))
        put(gate, nodes, nodes[-1].outputs[0])


def widen_narrow_sums(model: ir.Model) -> None:
    """Computes in float32 what a model computes in bfloat16 in between, and rounds each result.

    onnxruntime's CPU has no kernels for bfloat16, and torch's do just that. A model that takes,
    gives or holds bfloat16 stays: it is for devices that have kernels.
    """
    graph = model.graph
    held = [value for value in graph.initializers.values() if value.shape]  # a number is no weight
    if any(value.dtype is _NARROW for value in (*graph.inputs, *graph.outputs, *held)):
        return
    if all(value.dtype is not _NARROW for node in graph for value in node.outputs):
        return
    for node in list(graph):
        if node.op_type in _OF_ANY_TYPE:
            continue
        for place, value in enumerate(node.inputs):
            if dtype_of(value) is _NARROW:
                wide = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
                graph.insert_before(node, wide)
                node.replace_input_with(place, wide.outputs[0])
        for value in node.outputs:
            if dtype_of(value) is _NARROW:
                rounded = ir.node("Cast", [value], {"to": _NARROW})
                graph.insert_after(node, rounded)
                value.replace_all_uses_with(rounded.outputs[0])
                rounded.replace_input_with(0, value)
                rounded.outputs[0].dtype, value.dtype = _NARROW, ir.DataType.FLOAT
                rounded.outputs[0].shape = value.shape


def give_wide_places(model: ir.Model) -> None:
    """Casts places in int32 for an operator that takes int64 alone, as an istft writes."""
    for node in list(model.graph):
        if node.op_type == "ScatterND" and _is_narrow(node.inputs[1]):
            cast = ir.node("Cast", [node.inputs[1]], {"to": _WHOLE})
            model.graph.insert_before(node, cast)
            node.replace_input_with(1, cast.outputs[0])


def _is_narrow(value: ir.Value | None) -> bool:
    """Whether places are joined and moved of some in int32."""
    if value is None or value.dtype is not None:
        return value is not None and value.dtype is ir.DataType.INT32
    node = producer(value, (*_SAME_NUMBERS, "Concat"))
    return node is not None and any(map(_is_narrow, node.inputs))


def mark_masked(model: ir.Model, program: torch.export.ExportedProgram) -> None:
    """Notes which products are the last of an attention with a mask."""
    masked = {node.name for node in program.graph.nodes if _has_mask(node)}
    for node in model.graph:
        if node.op_type == "MatMul" and node.outputs[0].name in masked:
            node.metadata_props[MASKED] = "a tensor"


def _has_mask(node: fx.Node) -> bool:
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    return isinstance(call_argument(node, 3, "attn_mask"), fx.Node)
