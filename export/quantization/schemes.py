"""How a weight is stored in a few bits: by onnxruntime's own quantisers, for its own operators."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from onnxruntime.capi import _pybind_state as kernels

from lora_fx.errors import ExportError
from lora_fx.graph.example import STORED

Array = np.ndarray[Any, Any]
KINDS = ("fp4", "nf4")  # in the order of MatMulBnb4's quant_type
_STORED = re.compile(r"(?P<kind>fp4|nf4):(?P<block>[0-9]{1,5})")
_BITS = (4, 8)
_LEVELS = (0, 4)
LEVEL = "accuracy_level"  # of MatMulNBits
_BLOCKS = (16, 32, 64, 128, 256)  # that onnxruntime's quantisers take


@dataclass(frozen=True)
class Packed:
    """A weight in a few bits.

    Attributes:
        operator: of com.microsoft, that multiplies with it.
        attributes: of its node.
        tensors: what the name of each input ends in -> its values, in the operator's order.
        lookup: attributes of the GatherBlockQuantized that gives rows of W' (out, in); None if
            onnxruntime has none for these tensors.
    """

    operator: str
    attributes: dict[str, int]
    tensors: dict[str, Array]
    lookup: dict[str, int] | None = None


class Scheme(Protocol):
    """A way to store a weight.

    Attributes:
        is_exact: whether only a weight is stored so that is of such numbers already.
    """

    @property
    def is_exact(self) -> bool:
        """Whether only a weight is stored so that is of such numbers already."""

    def pack(self, weight: Array) -> Packed:
        """Stores a weight (in, out)."""


@dataclass(frozen=True)
class Blocks:
    """Whole numbers with a scale, and a zero point, for each block of inputs: MatMulNBits.

    Attributes:
        bits: of a number, 4 or 8.
        block: inputs that share a scale.
        level: what onnxruntime may round x to as well: 4, to 8 bits; 0, to nothing.
        symmetric: whether zero is the middle of the numbers everywhere, and no block has its own.
    """

    bits: int = 4
    block: int = 32
    level: int = 0
    symmetric: bool = False
    is_exact: bool = field(default=False, init=False)

    def __str__(self) -> str:
        """In words."""
        more = ", symmetric" if self.symmetric else ""
        more += ", x in 8 bits" if self.level else ""
        return f"{self.bits} bits in blocks of {self.block}{more}"

    def pack(self, weight: Array) -> Packed:
        """Rounds to the nearest."""
        into, out = weight.shape
        count = -(-into // self.block)
        padded = np.pad(weight, ((0, count * self.block - into), (0, 0)))
        numbers = np.zeros((out, count, self.block * self.bits // 8), np.uint8)
        zeros = np.zeros((out, -(-count * self.bits // 8)), np.uint8)
        scales = np.zeros((out, count), weight.dtype)
        # Not through MatMulNBitsQuantizer, which takes a whole model in memory and logs for all.
        quantise = (
            kernels.quantize_matmul_4bits if self.bits == 4 else kernels.quantize_matmul_8bits
        )
        quantise(numbers, padded, scales, zeros, self.block, out, into, self.symmetric)
        tensors = {f"_Q{self.bits}": numbers, "_scales": scales}
        tensors |= {} if self.symmetric else {"_zero_points": zeros}
        sizes = {"bits": self.bits, **_sizes(weight, self.block)}
        sizes |= {LEVEL: self.level} if self.level else {}
        whole = into % self.block == 0
        rows = {"bits": self.bits, "block_size": self.block, "gather_axis": 0, "quantize_axis": 1}
        return Packed("MatMulNBits", sizes, tensors, rows if whole else None)


@dataclass(frozen=True)
class Table:
    """bitsandbytes' 16 numbers, times the largest of each block of a row of all: MatMulBnb4.

    Attributes:
        kind: ``"nf4"`` or ``"fp4"``.
        block: weights that share a factor.
        is_exact: whether a weight of other numbers stays as it is.
    """

    kind: str
    block: int = 64
    is_exact: bool = False

    def __str__(self) -> str:
        """In words."""
        return f"{self.kind} in blocks of {self.block}"

    def pack(self, weight: Array) -> Packed:
        """Rounds to the nearest: what is of such numbers already is stored without a change."""
        own = np.ascontiguousarray(weight.T)
        packed = np.zeros(-(-own.size // 2), np.uint8)
        largest = np.zeros(-(-own.size // self.block), own.dtype)
        kind = KINDS.index(self.kind)
        kernels.quantize_matmul_bnb4(packed, own, largest, self.block, kind, *own.shape)
        sizes = {"quant_type": kind, **_sizes(weight, self.block)}
        return Packed("MatMulBnb4", sizes, {"_Bnb4": packed, "_absmax": largest})


def scheme_of(
    quantize: int | str, block: int | None = None, level: int = 0, symmetric: bool = False
) -> Scheme:
    """The scheme that a word or a number of bits means.

    Args:
        quantize: 4 or 8 bits, or ``"nf4"`` or ``"fp4"``.
        block: weights that share a scale; the scheme's own by default.
        level: as `Blocks` has it.
        symmetric: as `Blocks` has it.

    Raises:
        ExportError: it is none of these, or no size of a block that it takes.
    """
    if block is not None and (type(block) is not int or block not in _BLOCKS):
        known = ", ".join(map(str, _BLOCKS))
        raise ExportError(f"blocks of {block!r}: expected one of {known}")
    if level not in _LEVELS or (level and isinstance(quantize, str)):
        raise ExportError(f"accuracy level {level!r}: expected 0, or 4 with 4 or 8 bits")
    if symmetric and isinstance(quantize, str):
        raise ExportError(
            f"symmetric {quantize}: expected 4 or 8 bits; a table's numbers are its own"
        )
    if type(quantize) is int and quantize in _BITS:
        return Blocks(quantize, block or Blocks.block, level, symmetric)
    if isinstance(quantize, str) and quantize in KINDS:
        return Table(quantize, block or Table.block)
    raise ExportError(f"quantize to {quantize!r:.80}: expected 4 or 8 bits, 'nf4' or 'fp4'")


def scheme_wanted(quantize: int | str | None, noted: Mapping[str, str]) -> Scheme | None:
    """The scheme that is asked for, or that a base was loaded in; None for plain weights.

    Args:
        quantize: as `scheme_of` takes it; ``"float"``; or None for what is noted.
        noted: what is known of a model, by `lora_fx.graph.example`.

    Raises:
        ExportError: it is none.
    """
    if quantize is None:
        return stored_scheme(noted[STORED]) if STORED in noted else None
    return None if quantize == "float" else scheme_of(quantize)


def stored_scheme(said: str) -> Scheme:
    """The scheme that a base was loaded in, ``"nf4:64"``, for weights that are still of it.

    Raises:
        ExportError: it is none that onnxruntime has.
    """
    found = _STORED.fullmatch(said)
    if found is None or int(found["block"]) not in _BLOCKS:
        raise ExportError(
            f"a base stored as {said!r:.80}: expected nf4 or fp4 in blocks of "
            f'{", ".join(map(str, _BLOCKS))}; quantize="float" keeps plain numbers'
        )
    return Table(found["kind"], int(found["block"]), is_exact=True)


def _sizes(weight: Array, block: int) -> dict[str, int]:
    into, out = weight.shape
    return {"K": into, "N": out, "block_size": block}
