"""GLoRA: a product of two factors beside the weight, and one that the weight is put through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_fx.adapters.other_updates import WeightUpdate
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.adapters.updates import AnyUpdate
from lora_fx.algebra.matrix_expr import Matrix, Sum, constant, product, reshaped, transposed
from lora_fx.errors import AdapterError
from lora_fx.kinds.validation import layer_shape, measure, number
from lora_fx.numerics import widened

_AXES: dict[str, tuple[str, ...]] = {
    "a1.weight": ("in", "r", "*ones"),
    "a2.weight": ("r", "in", "*ones"),
    "b1.weight": ("out", "r", "*ones"),
    "b2.weight": ("r", "in", "*kernel"),
}
LEAVES = frozenset({*_AXES, "alpha"})


def read(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> AnyUpdate:
    """Reads ``W + scale * (W a1 a2 + b1 b2)``.

    Source: Chavan et al., arXiv:2306.07967; ``glora`` of LyCORIS 4.1, which takes the products with
    W along the inputs of each place of a kernel.

    Args:
        tensors: a1 (in, r), a2 (r, in), b1 (out, r) and b2 (r, in, *kernel), the first three with
            axes of size 1 behind where the layer has a kernel. ``alpha`` is kept.
        settings: ``scale``; ``shape`` of the layer, if known.

    Returns:
        An update of kind ``"glora"``, of the base's own weight alone, as LyCORIS computes it.

    Raises:
        AdapterError: a tensor is missing, not used or of another shape; a setting is wrong; or the
            layer is of another shape, as one whose inputs are in groups is.
    """
    own = {leaf: tensor for leaf, tensor in tensors.items() if leaf != "alpha"}
    scale, layer = number(settings, "scale"), layer_shape(settings)
    sizes = measure(own, _AXES)
    shape = (sizes["out"], sizes["in"], *own["b2.weight"].shape[2:])
    if any(own[leaf].numel() != sizes["r"] * own[leaf].shape[at] for leaf, at in _ENDS.items()):
        raise AdapterError(f"{sorted(_ENDS)} have a kernel, expected matrices")
    if layer is not None and layer != shape:
        raise AdapterError(f"the GLoRA factors make {shape}, the layer is {layer}")
    into = sizes["in"]
    a1, a2, b1, b2 = (widened(own[leaf]).flatten(1) for leaf in _AXES)
    through = constant(a1.T.contiguous()), constant((scale * a2).T.contiguous())
    beside = product(constant(scale * b1), constant(b2))

    def function(weight: Matrix) -> Matrix:
        turned = reshaped(transposed(weight), into)
        moved = product(through[1], product(through[0], turned))
        return Sum(weight, Sum(transposed(reshaped(moved, weight.shape[1])), beside))

    return WeightUpdate("glora", function, shape, SourceRecord(tensors, settings), stacks="never")


_ENDS = {"a1.weight": 0, "a2.weight": 1, "b1.weight": 0}
