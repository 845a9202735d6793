"""Runs the passes that say an ONNX graph in faster operators, in order, and counts their work."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from lora_fx.errors import ExportError
from lora_fx.export.onnx_model.convert import check_opset
from lora_fx.export.spelling.attention import OPSET, FuseAttention
from lora_fx.export.spelling.idle_calls import DropIdleCalls
from lora_fx.export.spelling.rewrite import Spelling
from lora_fx.export.spelling.rms_norm import FuseRmsNorm
from lora_fx.export.spelling.rotary import FuseRotary
from lora_fx.export.spelling.sums import SumResiduals
from lora_fx.export.spelling.transposes import TransposeOnce
from lora_fx.export.spelling.whole_masks import ReadWholeMasks

_SPELLINGS: tuple[type[Spelling], ...] = (
    DropIdleCalls,
    ReadWholeMasks,
    TransposeOnce,
    FuseRotary,
    FuseAttention,
    FuseRmsNorm,
    SumResiduals,
)


def check_operators(opset: int | None, portable: bool, shared_cache: bool) -> None:
    """Refuses operators that cannot be written together, before anything is done for them.

    Raises:
        ExportError: names what can.
    """
    check_opset(opset)
    if shared_cache and (portable or (opset or OPSET) < OPSET):
        raise ExportError(
            f"shared_cache: it needs attention as one operator, of opset {OPSET}: leave portable "
            "and opset out, or shared_cache"
        )


def spell(model: ir.Model, opset: int | None) -> dict[str, int]:
    """Says a graph in the operators that onnxruntime runs fastest, in place.

    Each was measured: ``benchmarks/run.py encoder decoder``. Numbers stay, up to the rounding of
    another order; names and weights do too.

    Args:
        model: what was exported.
        opset: that it has to stay with; by default a newer one may be chosen.

    Returns:
        What was chosen -> how often.
    """
    newest = opset or OPSET
    passes = [spelling() for spelling in _SPELLINGS if spelling.since <= newest]
    for each in passes:  # what is left over of one is no reader to the next
        each(model)
        common.RemoveUnusedNodesPass()(model)
    versions = model.opset_imports
    versions[""] = max(versions[""], *(each.since for each in passes if each.count), 0)
    return {each.what: each.count for each in passes if each.count}
