"""Folds affine regions into the layer they contain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from lora_fx.editor import Editor
from lora_fx.errors import PassError
from lora_fx.maps import Analysis
from lora_fx.ops import aten, module_path
from lora_fx.pass_base import Pass
from lora_fx.regions import Region, maximal_regions
from lora_fx.transfer import analyse
from lora_fx.weights import Matrix


@dataclass(frozen=True)
class FoldLora(Pass):
    """``add(linear(x, W, b), matmul(matmul(x, A), B))  ->  linear(x, W + (A @ B).T, b)``.

    Any region that is provably affine in one source and holds a layer of its own shape becomes
    that layer with a new constant, however it was spelled. Weights are composed in float32 or
    wider and rounded once; a shared weight is left to its other readers.

    Refuses a folded weight that is not finite. Leaves alone, and says why, a region whose layer
    is also read from outside.
    """

    @torch.no_grad()
    def rewrite(self, editor: Editor) -> None:
        """Replaces each maximal region, last first."""
        analysis = analyse(editor.gm)
        for region in maximal_regions(editor.gm, analysis):
            if region.blocked:
                editor.record("skip", module_path(region.layer), region.blocked)
            else:
                _fold(editor, analysis, region)


def _fold(editor: Editor, analysis: Analysis, region: Region) -> None:
    value, layer, end = region.value, region.layer, region.value.node
    path = module_path(layer)
    weight_node = layer.args[2 if layer.target is aten.addmm.default else 1]
    names = _names(path, weight_node)
    dtype = analysis.constants.dtype(weight_node)  # type: ignore[arg-type]  # a constant's node
    # The layer's own input keeps what passes it on, such as a dropout in eval; addmm takes two
    # axes and a bias, so elsewhere a linear stands for it.
    is_first = region.starts_with_layer(analysis)
    transposed = layer.target is aten.addmm.default and is_first and value.bias is not None
    x = layer.args[1 if layer.target is aten.addmm.default else 0] if is_first else region.source
    weight = _rounded(value.weight, dtype, names[0], transposed)
    arguments = [x, editor.constant(names[0], weight, before=end)]
    if value.bias is not None:
        bias = _rounded(value.bias, dtype, names[1]).reshape(-1)
        bias = nn.Parameter(bias, requires_grad=False)
        arguments.append(editor.constant(names[1], bias, before=end))
    target = aten.addmm.default if transposed else aten.linear.default
    if transposed:
        arguments = [arguments[2], arguments[0], arguments[1]]
    folded = editor.call(target, tuple(arguments), before=end, like=layer)
    editor.remember(folded, end)
    editor.replace(end, folded)
    editor.record("fold", path, f"{len(region.nodes)} calls into one layer")


def _names(path: str, weight: object) -> tuple[str, str]:
    """The layer's own names, even where a tied weight bears another's."""
    own = str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else ""
    if path and not own.startswith(f"{path}."):
        return f"{path}.weight", f"{path}.bias"
    holder, _, name = (own or "weight").rpartition(".")
    prefix = f"{holder}." if holder else ""
    return f"{prefix}{name}", f"{prefix}{name.replace('weight', 'bias')}"


def _rounded(
    matrix: Matrix, dtype: torch.dtype, name: str, transposed: bool = False
) -> nn.Parameter:
    wide = matrix.dense(torch.promote_types(dtype, torch.float32))
    rounded = (wide.T if transposed else wide).to(dtype).contiguous()
    if not rounded.isfinite().all():
        raise PassError(
            f"{name}: the folded value is not finite in {dtype} (largest magnitude "
            f"{wide.abs().max().item():g}); fold the model in a wider dtype"
        )
    return nn.Parameter(rounded, requires_grad=False)
