"""Translations of torch.onnx that lose numbers which eager has, said so that they stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from lora_fx.graph.ops import aten, call_argument

MASKED = "masked by"  # of a node's notes, until a file is written


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator -> what to write instead of torch.onnx's own translation."""
    from onnxscript import opset18 as op  # loaded where a model is exported

    def log_sigmoid(x: Any) -> Any:
        """The sigmoid itself is off at -16, and 0 in onnxruntime below -18 or so."""
        return op.Neg(op.Softplus(op.Neg(x)))

    return {aten.log_sigmoid.default: log_sigmoid}


def mark_masked(model: ir.Model, program: torch.export.ExportedProgram) -> None:
    """Notes which products are the last of an attention with a mask of numbers."""
    masked = {node.name for node in program.graph.nodes if _has_mask(node)}
    for node in model.graph:
        if node.op_type == "MatMul" and node.outputs[0].name in masked:
            node.metadata_props[MASKED] = "numbers"


def _has_mask(node: fx.Node) -> bool:
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    mask = call_argument(node, 3, "attn_mask")
    return isinstance(mask, fx.Node) and mask.meta["val"].dtype is not torch.bool
