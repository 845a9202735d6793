"""LoKr: the Kronecker product of two small weights, either of them perhaps of low rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from lora_fx.adapters.other_updates import WeightUpdate, added
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.adapters.updates import AnyUpdate
from lora_fx.algebra.matrix_expr import Kron, Matrix, Sum, constant
from lora_fx.errors import AdapterError
from lora_fx.kinds import dora
from lora_fx.kinds.validation import layer_shape, measure, number
from lora_fx.numerics import widened

_FIRST: dict[str, tuple[str, ...]] = {"lokr_w1": ("a", "b")}
_FIRST_LOW: dict[str, tuple[str, ...]] = {"lokr_w1_a": ("a", "r"), "lokr_w1_b": ("r", "b")}
_SECOND: dict[str, tuple[str, ...]] = {"lokr_w2": ("c", "d", "*kernel")}
_SECOND_LOW: dict[str, tuple[str, ...]] = {
    "lokr_w2_a": ("c", "s"),
    "lokr_w2_b": ("s", "d", "*kernel"),
}
_SECOND_TUCKER: dict[str, tuple[str, ...]] = {
    "lokr_t2": ("s", "q", "*kernel"),
    "lokr_w2_a": ("s", "c"),
    "lokr_w2_b": ("q", "d"),
}
MARKS = frozenset({*_FIRST, *_FIRST_LOW, *_SECOND, *_SECOND_TUCKER})
LEAVES = MARKS | {"alpha", "dora_scale"}


def read(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> AnyUpdate:
    """Reads ``W + scale * kron(w1, w2)``.

    Source: Yeh et al., LyCORIS, arXiv:2309.14859; ``lokr`` of PEFT 0.21 and LyCORIS 4.1.

    Args:
        tensors: w1 (a, b) and w2 (c, d, *kernel) of a layer (a c, b d, *kernel). Instead of w1
            there may be w1_a (a, r) and w1_b (r, b); instead of w2 w2_a (c, r) and w2_b
            (r, d * kernel), or w2_a (r, c), w2_b (r, d) and t2 (r, r, *kernel). ``alpha`` is
            kept, ``dora_scale`` heeded.
        settings: ``scale``; ``shape`` of the layer, if known; ``writer``: ``"peft"`` or
            ``"lycoris"``, needed where they differ (see below).

    Returns:
        An update of kind ``"lokr"``. Its shape is the layer's, if known, else (out, columns) or
        (out, in, *kernel) as the tensors have it; it fits any layer of as many columns.

    Raises:
        AdapterError: a tensor is missing, not used or of another shape; a setting is wrong.
    """
    own, magnitude = dora.split(tensors)
    own.pop("alpha", None)
    scale, layer = number(settings, "scale"), layer_shape(settings)
    first, second = _factors(own)
    shape = _shape(first, second, layer)
    if second.ndim == 3 and _writer(settings) == "peft":
        # PEFT leaves w1 a matrix beside the w2 of a Conv1d, so torch.kron pairs the last axes: the
        # layer's numbers in another order, which such an adapter has learned to live with.
        whole = torch.einsum("ab,cdk->cadbk", first * scale, second)
        function = added(whole.reshape(layer or shape))
    else:
        # With the axes that a graph multiplies, so that it has no view to take.
        (high, wide), rows = first.shape, len(second)
        one = constant((first * scale).reshape(high, 1, wide, 1), (high, wide))
        flat = second.reshape(1, rows, 1, -1)
        other = constant(flat, (rows, flat.shape[3]))

        def function(weight: Matrix) -> Matrix:
            return Sum(weight, Kron(one, other))

    update = WeightUpdate("lokr", function, layer or shape, SourceRecord(tensors, settings))
    return dora.with_magnitude(update, magnitude)


def _factors(own: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """w1 (a, b) and w2 (c, d, *kernel), in float32 or wider."""
    is_low = "lokr_w1_a" in own or "lokr_w1_b" in own
    expected = dict(_FIRST_LOW if is_low else _FIRST)
    is_tucker, is_low_second = "lokr_t2" in own, "lokr_w2_a" in own or "lokr_w2_b" in own
    expected |= _SECOND_TUCKER if is_tucker else _SECOND_LOW if is_low_second else _SECOND
    measure(own, expected)
    parts = {leaf: widened(tensor) for leaf, tensor in own.items()}
    first = parts["lokr_w1_a"] @ parts["lokr_w1_b"] if is_low else parts["lokr_w1"]
    if is_tucker:
        names = ("lokr_t2", "lokr_w2_a", "lokr_w2_b")
        return first, torch.einsum("sq...,sc,qd->cd...", *(parts[name] for name in names))
    if is_low_second:
        return first, torch.tensordot(parts["lokr_w2_a"], parts["lokr_w2_b"], 1)
    return first, parts["lokr_w2"]


def _shape(
    first: torch.Tensor, second: torch.Tensor, layer: tuple[int, ...] | None
) -> tuple[int, ...]:
    """(out, in, *kernel), or (out, in * kernel), of the layer that the factors make."""
    out, into = (one * two for one, two in zip(first.shape, second.shape[:2], strict=True))
    shape = (out, into, *second.shape[2:])
    if layer is None:
        return shape
    known = 1 if second.ndim == 2 else 2
    if layer[:known] != shape[:known] or math.prod(layer) != math.prod(shape):
        raise AdapterError(f"the LoKr factors make {shape}, the layer is {layer}")
    return shape


def _writer(settings: Mapping[str, Any]) -> str:
    writer = settings.get("writer")
    if writer not in ("peft", "lycoris"):
        raise AdapterError(
            f"setting writer is {writer!r:.80}: lokr_w2 of a one-dimensional convolution "
            "means different things to 'peft' and to 'lycoris', expected one of them"
        )
    return str(writer)


def shapes(
    layer: tuple[int, ...],
    r: int,
    decompose_both: bool,
    decompose_factor: int,
    use_effective_conv2d: bool,
) -> dict[str, tuple[int, ...]]:
    """The tensors that PEFT makes for a layer: ``LoKrLayer.update_layer`` of PEFT 0.21.

    Args:
        layer: (out, in, *kernel).
        r: the rank.
        decompose_both: whether the first factor may be of low rank too.
        decompose_factor: how sizes are split.
        use_effective_conv2d: whether a kernel is in a core between the factors of the second.
    """
    (a, c), (b, d) = (split(size, decompose_factor) for size in layer[:2])
    kernel, points = layer[2:], math.prod(layer[2:])
    is_low = decompose_both and r < max(a, b) / 2
    first = {"lokr_w1_a": (a, r), "lokr_w1_b": (r, b)} if is_low else {"lokr_w1": (a, b)}
    if r >= max(c, d) / 2:
        return {**first, "lokr_w2": (c, d, *kernel)}
    if use_effective_conv2d and points > 1:
        return {**first, "lokr_t2": (r, r, *kernel), "lokr_w2_a": (r, c), "lokr_w2_b": (r, d)}
    return {**first, "lokr_w2_a": (c, r), "lokr_w2_b": (r, d * points)}


def split(size: int, factor: int) -> tuple[int, int]:
    """The two factors of a size: ``factorization`` of PEFT 0.21.

    Args:
        size: of a side of a layer.
        factor: the first of the two if it divides the size (LyCORIS puts the smaller first even
            then), else a bound of the first, which is the smaller; -1 is none.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    bound = min(math.isqrt(size), factor if factor > 0 else size)
    smaller = max(n for n in range(1, bound + 1) if size % n == 0)
    return smaller, size // smaller
