"""Operators that torch.onnx does not translate, or so that numbers are lost which eager has."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from lora_fx.export.spelling.rewrite import producer
from lora_fx.graph.ops import aten, call_argument

_WHOLE = ir.DataType.INT32
WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
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
        return nn.aten_scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )

    def grouped(rows: Any, matrices: Any, ends: Any) -> Any:
        """Each row times the matrix of its expert, the first to end behind it; or 0."""
        shapes = (op.Cast(op.Shape(value), to=_WHOLE) for value in (rows, ends))
        zero, one = (op.Constant(value=ir.tensor(n, dtype=_WHOLE)) for n in (0, 1))
        count, experts = (op.Gather(shape, zero) for shape in shapes)
        places = op.Unsqueeze(op.Range(zero, count, one), [1])
        before = op.LessOrEqual(op.Unsqueeze(op.Cast(ends, to=_WHOLE), [0]), places)
        expert = op.ReduceSum(op.Cast(before, to=_WHOLE), [1], keepdims=0)
        has_one = op.Less(expert, experts)
        matrix = op.Gather(matrices, op.Where(has_one, expert, zero))
        products = op.Squeeze(op.MatMul(op.Unsqueeze(rows, [1]), matrix), [1])
        return op.Where(op.Unsqueeze(has_one, [1]), products, op.CastLike(zero, rows))

    table: dict[Callable[..., Any], Callable[..., Any]] = {
        aten.log_sigmoid.default: log_sigmoid,
        aten.log.default: log,
        aten.scaled_dot_product_attention.default: attention,
    }
    if "transformers.integrations.moe" in sys.modules:  # which registers the operator
        table[torch.ops.transformers.grouped_mm_fallback.default] = grouped
    return table


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
