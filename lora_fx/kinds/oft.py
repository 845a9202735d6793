"""OFT: blocks of rotations, on the inputs as PEFT has them, on the outputs as LyCORIS does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lora_fx.adapters.other_updates import Function, WeightUpdate
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.adapters.updates import AnyUpdate, Shape, Stacks
from lora_fx.algebra.index_expr import reordered
from lora_fx.algebra.matrix_expr import (
    Matrix,
    constant,
    diagonal,
    product,
    reshaped,
    rows,
    scaled,
    transposed,
)
from lora_fx.errors import AdapterError
from lora_fx.kinds.validation import flag, layer_shape, measure, number
from lora_fx.numerics import widened

MARKS = frozenset({"oft_R.weight", "oft_embedding_R.weight", "oft_blocks"})
SCALED = "oft_R.scaled_oft"  # a flag of OneTrainer's
LEAVES = MARKS | {"rescale", "alpha", SCALED}
# What stands below a layer's name in files of LyCORIS, sd-scripts and OneTrainer.
OF_TRAINERS = LEAVES - {"oft_embedding_R.weight"}
_MOST_TERMS = 1000  # PEFT's default is 5; a number in a file must not keep a reader busy for hours


def read(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> AnyUpdate:
    """Reads ``W diag(R)^T`` (PEFT), or ``rescale * diag(R)^T W`` (LyCORIS, and PEFT's tables).

    OneTrainer's is PEFT's, but of a convolution it is ``W diag(R)``, of the inputs of all points.
    Source: Qiu et al., arXiv:2306.07280; ``oft`` of PEFT 0.21, ``diag-oft`` of LyCORIS 4.1,
    ``OFTModule`` of OneTrainer.

    Args:
        tensors: oft_R.weight, or oft_embedding_R.weight of a table, (blocks, b (b - 1) / 2), one
            row if all blocks share it; or oft_blocks (blocks, b, b), of BOFT with an axis of
            stages in front, and perhaps rescale (out, 1, ...). ``alpha`` is kept.
            oft_R.scaled_oft, of any value, makes values smaller.
        settings: ``shape`` of the layer, if known. PEFT's: ``block_share``,
            ``use_cayley_neumann``, ``num_cayley_neumann_terms``, ``coft``, ``eps``, by default as
            in its config. LyCORIS': ``constraint``, the file's alpha, by default 0. ``writer``:
            ``"onetrainer"``, whose ``shape`` has to be known.

    Returns:
        An update of kind ``"oft"``. Of its shape it knows the axis that is rotated, and that only
        if the blocks are not shared.

    Raises:
        AdapterError: a tensor is missing, not used or of another shape; a setting is wrong; or
            the layer is a convolution with a kernel under PEFT, whose own forward is no
            convolution then: it adds up the patches that overlap, taken at stride 1 whatever the
            stride of the layer is.
    """
    layer, own = layer_shape(settings), dict(tensors)
    own.pop("alpha", None)
    leaf = next(iter(sorted(own.keys() & MARKS)), "oft_R.weight")
    on_inputs, is_shared, flat = leaf == "oft_R.weight", False, layer
    if leaf == "oft_blocks" and own[leaf].ndim == 4:
        return _butterfly(own, layer, SourceRecord(tensors, settings))
    if leaf == "oft_blocks":
        blocks = _of_lycoris(own, settings)
    else:
        is_scaled = own.pop(SCALED, None) is not None
        measure(own, {leaf: ("blocks", "values")})
        blocks = from_peft(leaf, own[leaf], settings, is_scaled).mT
        is_shared = flag(settings, "block_share", False)
    if settings.get("writer") == "onetrainer" and layer is not None and len(layer) > 2:
        blocks, flat = blocks.mT, (layer[0], math.prod(layer[1:]))
    side = _On(on_inputs, is_shared, *blocks.shape[:2])
    side.check(leaf, flat)
    stored = SourceRecord(tensors, settings)
    # PEFT's layers rotate what they read, one adapter behind the other; its tables what they give.
    stacks: Stacks = "inputs first" if on_inputs else "on any"
    return WeightUpdate("oft", side.turned(blocks), layer or side.shape, stored, stacks=stacks)


def _of_lycoris(own: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> torch.Tensor:
    """What multiplies each block of rows: the rotation, turned, and the factors of the rows."""
    expected = {"oft_blocks": ("blocks", "b", "b"), "rescale": ("out", "*ones")}
    sizes = measure(own, {leaf: axes for leaf, axes in expected.items() if leaf in own})
    count, size = sizes["blocks"], sizes["b"]
    limit = number(settings, "constraint", 0.0) * count * size
    turned = from_lycoris(own["oft_blocks"], limit).mT
    factors = _factors(own, count * size)
    return turned if factors is None else turned * factors.reshape(count, size, 1)


def _factors(own: Mapping[str, torch.Tensor], out: int) -> torch.Tensor | None:
    """What each row of the weight is multiplied with, if anything."""
    rescale = own.get("rescale")
    if rescale is None:
        return None
    if len(rescale) != rescale.numel() or len(rescale) != out:
        raise AdapterError(f"rescale is {tuple(rescale.shape)}, expected ({out}, 1, ...)")
    return widened(rescale).reshape(out, 1)


def _butterfly(
    own: Mapping[str, torch.Tensor], layer: tuple[int, ...] | None, stored: SourceRecord
) -> WeightUpdate:
    """LyCORIS' BOFT: one rotation of blocks after the other, of rows that lie further apart.

    Stage i takes the rows two halves of ``2**i * b`` at a time, one of each in turn. Source:
    ``functional/boft.py`` of LyCORIS 4.1.
    """
    axes = {"oft_blocks": ("stages", "blocks", "b", "b"), "rescale": ("out", "*ones")}
    sizes = measure(own, {leaf: axes[leaf] for leaf in axes if leaf in own})
    stages, count, size = (sizes[name] for name in ("stages", "blocks", "b"))
    out, found = count * size, tuple(own["oft_blocks"].shape)
    if size % 2 or out % (size << min(stages - 1, 40)) or (layer and layer[0] != out):
        raise AdapterError(f"oft_blocks is {found}, which is no BOFT of a layer {layer or (out,)}")
    limit = number(stored.settings, "constraint", 0.0) * out
    turns = from_lycoris(own["oft_blocks"].flatten(0, 1), limit).reshape(found)
    every, rescale = [diagonal(blocks) for blocks in turns], _factors(own, out)
    factors = None if rescale is None else constant(rescale)

    def function(weight: Matrix) -> Matrix:
        for stage, turn in enumerate(every):
            half = (size << stage) // 2
            apart = reordered((out // (2 * half), 2, half), (0, 2, 1))
            back = reordered((out // (2 * half), half, 2), (0, 2, 1))
            weight = rows(product(turn, rows(weight, apart)), back)
        return weight if factors is None else scaled(factors, weight)

    return WeightUpdate("oft", function, layer or (out, None), stored, stacks="on any")


@dataclass(frozen=True)
class _On:
    """Where the blocks act: on the inputs or the outputs, each its own or one for all."""

    inputs: bool
    is_shared: bool
    count: int
    size: int

    @property
    def shape(self) -> Shape:
        """Of the layer, as far as the blocks tell."""
        known = None if self.is_shared else self.count * self.size
        return (None, known) if self.inputs else (known, None)

    def check(self, leaf: str, layer: tuple[int, ...] | None) -> None:
        """Raises AdapterError where the blocks do not fit the layer, or PEFT's kernels do not."""
        if self.is_shared and self.count != 1:
            raise AdapterError(f"{leaf} has {self.count} blocks, expected 1 that is shared")
        if layer is None:
            return
        if leaf == "oft_R.weight" and any(size > 1 for size in layer[2:]):
            raise AdapterError(
                f"OFT of PEFT on a convolution {layer}: its forward adds up the patches "
                "that overlap, which no weight does; if the merged form is meant, merge it in PEFT"
            )
        found, whole = layer[self.inputs], self.count * self.size
        if found % self.size if self.is_shared else found != whole:
            blocks = f"{self.count} blocks of {self.size}"
            raise AdapterError(f"{leaf} rotates {blocks}, the layer is {layer}")

    def turned(self, blocks: torch.Tensor) -> Function:
        """W' of W: by blocks of its own, or by one as often as the layer has room for it."""
        blocks = (blocks if self.inputs else blocks.mT).contiguous()
        many, one = diagonal(blocks), constant(blocks, (len(blocks) * self.size, self.size))

        def turn(weight: Matrix) -> Matrix:
            if not self.is_shared:
                return product(weight, many)
            rows, columns = weight.shape
            return reshaped(product(reshaped(weight, rows * columns // self.size), one), rows)

        return turn if self.inputs else lambda weight: transposed(turn(transposed(weight)))


def settings_for(
    tensors: Mapping[str, torch.Tensor], layer: tuple[int, ...], alpha: float | None
) -> dict[str, Any]:
    """What a trainer's file says of a layer: LyCORIS' constraint, or OneTrainer's blocks."""
    values = tensors.get("oft_R.weight")
    if values is None or values.ndim != 2:
        return {"constraint": alpha or 0.0}
    size = _size(values.shape[1])
    is_shared = len(values) == 1 and size != math.prod(layer[1:])
    return {"writer": "onetrainer", "oft_block_size": size, "block_share": is_shared}


def _size(length: int) -> int:
    """The b of which b (b - 1) / 2 values stand above a diagonal, if there is one."""
    return (1 + math.isqrt(1 + 8 * length)) // 2


def from_peft(
    leaf: str, values: torch.Tensor, settings: Mapping[str, Any], is_scaled: bool = False
) -> torch.Tensor:
    """The rotations of PEFT's OFT: an exact or a cut off Cayley transform.

    With S skew-symmetric, ``(I - S)(I + S)^-1``, or the series of ``(I + S)(I - S)^-1``, which is
    its inverse, as far as ``num_cayley_neumann_terms`` says. Under ``coft`` each S is shortened
    first. Source: ``OFTRotationModule`` of PEFT 0.21.

    Args:
        leaf: that the values are.
        values: (blocks, b (b - 1) / 2), what stands above the diagonals.
        settings: as in PEFT's config, and with its defaults.
        is_scaled: whether the values are as many times too large as OneTrainer has them.

    Returns:
        (blocks, b, b), in float32 or wider.

    Raises:
        AdapterError: no b fits the values; a setting is wrong.
    """
    count, length = values.shape
    size = _size(length)
    if size * (size - 1) // 2 != length or not count:
        raise AdapterError(f"{leaf} is {tuple(values.shape)}, expected (blocks, b (b - 1) / 2)")
    numbers = widened(values) / (2 * math.sqrt(size - 1)) if is_scaled else widened(values)
    skew = numbers.new_zeros(count, size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    skew[:, rows, columns] = numbers
    skew = skew - skew.mT
    if flag(settings, "coft", False):
        skew = _shortened(skew, number(settings, "eps", 6e-5) / math.sqrt(count))
    eye = torch.eye(size, dtype=skew.dtype)
    if flag(settings, "use_cayley_neumann", True):
        terms = settings.get("num_cayley_neumann_terms", 5)
        if type(terms) is not int or terms > _MOST_TERMS:
            said = f"setting num_cayley_neumann_terms is {terms!r:.80}"
            raise AdapterError(f"{said}, expected an integer of at most {_MOST_TERMS}")
        return _series(skew, eye, terms)
    return _cayley(-skew, eye)


def from_lycoris(blocks: torch.Tensor, limit: float) -> torch.Tensor:
    """The rotations of LyCORIS' Diag-OFT: ``(I + Q)(I - Q)^-1`` with ``Q = blocks - blocks^T``.

    Args:
        blocks: (blocks, b, b).
        limit: of the norm of all Q together, or 0 for none.

    Returns:
        (blocks, b, b), in float32 or wider.
    """
    whole = widened(blocks)
    skew = whole - whole.mT
    norm = float(skew.norm()) + 1e-8
    if 0 < limit < norm:
        skew = skew * (limit / norm)
    eye = torch.eye(blocks.shape[1], dtype=skew.dtype)
    return _cayley(skew, eye)


def _cayley(skew: torch.Tensor, eye: torch.Tensor) -> torch.Tensor:
    """``(I + S)(I - S)^-1``."""
    result: torch.Tensor = torch.linalg.solve(eye - skew, eye + skew, left=False)
    return result


def _shortened(skew: torch.Tensor, limit: float) -> torch.Tensor:
    """Each block no longer than a limit."""
    norm = skew.flatten(1).norm(dim=1)[:, None, None]
    return torch.where(norm <= limit, skew, limit * (skew / norm))


def _series(skew: torch.Tensor, eye: torch.Tensor, terms: int) -> torch.Tensor:
    """``I + 2 S + 2 S² + ...``; from three terms on the last power is counted once."""
    total, power = eye.expand_as(skew), skew
    if terms <= 1:
        return total.clone()
    total = total + 2 * skew
    last = 1 if terms == 2 else max(terms, 4) - 1
    for exponent in range(2, last + 1):
        power = power @ skew
        total = total + (power if exponent == last else 2 * power)
    return total
