"""Weights as bitsandbytes stores them, in 4 bits by a table or in 8 with a scale a row, as numbers.

Source of the format: bitsandbytes' ``functional.QuantState`` (``as_dict(packed=True)``) and
``nn.Linear8bitLt``; of the numbers, its ``dequantize_4bit``, ``dequantize_blockwise`` and
``int8_vectorwise_dequant``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lora_fx.errors import LoraFxError
from lora_fx.io.strict_json import parse_object

STATE = ".quant_state.bitsandbytes__"
SCALES = ".SCB"  # of 8 bits, beside the weight
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_KINDS = ("nf4", "fp4")
_BYTE = 1 / 127  # of a scale
_MOST = 1 << 48  # values of a weight: more than any disk holds


@dataclass(frozen=True)
class Table:
    """How a weight of 4 bits is stored.

    Attributes:
        kind: ``"nf4"`` or ``"fp4"``.
        block: values that share a factor.
        shape: of the weight, (out, in).
        nested_block: factors that share one, where they are stored in 8 bits; else 0.
        offset: of these factors.
    """

    kind: str
    block: int
    shape: tuple[int, ...]
    nested_block: int
    offset: float

    @classmethod
    def of(cls, state: torch.Tensor) -> Table:
        """Reads what stands in the bytes of a ``quant_state``.

        Raises:
            LoraFxError: it is none that is known.
        """
        found: Any = parse_object(bytes(state.view(torch.uint8).flatten().tolist()))
        shape, kind, block = (found.get(name) for name in ("shape", "quant_type", "blocksize"))
        inner, offset = found.get("nested_blocksize", 0), found.get("nested_offset", 0.0)
        sizes = shape if isinstance(shape, list) else [0]
        is_whole = all(type(size) is int and size > 0 for size in (*sizes, block))
        is_known = kind in _KINDS and len(sizes) == 2 and is_whole and math.prod(sizes) < _MOST
        if not is_known or type(inner) is not int or inner < 0 or type(offset) is not float:
            raise LoraFxError(
                f"{found!s:.300}: expected nf4 or fp4, a blocksize and a shape of two sizes: save "
                "the model again"
            )
        return cls(kind, block, tuple(sizes), inner, offset)

    @property
    def said(self) -> str:
        """In a word: ``"nf4:64"``."""
        return f"{self.kind}:{self.block}"

    def numbers(self, packed: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight (out, in) in float32.

        Args:
            packed: two values a byte, the first in the high bits, whatever type holds the bytes.
            parts: the tensors of its name, by what that ends in.

        Raises:
            LoraFxError: one is missing, or they do not fill its shape.
        """
        missing = [name for name in PARTS[: 4 if self.nested_block else 2] if name not in parts]
        if missing:
            raise LoraFxError(f"lacks {', '.join(missing)}: download or save the model again")
        count, held = math.prod(self.shape), packed.contiguous().view(torch.uint8).flatten()
        blocks, table = -(-count // self.block), parts["quant_map"]
        _check("values", held, -(-count // 2))
        _check("quant_map", table, 16)
        _check("absmax", parts["absmax"], blocks)
        places = torch.stack([held >> 4, held & 15], -1).flatten()[:count]
        factors = self._factors(parts, blocks).repeat_interleave(self.block)[:count]
        return (table.float()[places.int()] * factors).reshape(self.shape)

    def _factors(self, parts: Mapping[str, torch.Tensor], blocks: int) -> torch.Tensor:
        stored = parts["absmax"].flatten()
        if not self.nested_block:
            return stored.float()
        table, largest = parts["nested_quant_map"], parts["nested_absmax"].flatten()
        _check("nested_quant_map", table, 256)
        _check("nested_absmax", largest, -(-blocks // self.nested_block))
        spread = largest.float().repeat_interleave(self.nested_block)[:blocks]
        return table.float()[stored.int()] * spread + torch.tensor(self.offset)


def of_rows(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """A weight of 8 bits as numbers: whole ones times the scale of their row, over 127.

    Raises:
        LoraFxError: they do not fit each other.
    """
    if packed.dtype is not torch.int8 or packed.ndim != 2 or scales.numel() != len(packed):
        raise LoraFxError(
            f"{packed.dtype} {tuple(packed.shape)} with {scales.numel()} scales, expected int8 "
            "(out, in) and a scale for each row: save the model again"
        )
    return packed * scales.float().reshape(-1, 1) * _BYTE


def _check(name: str, tensor: torch.Tensor, count: int) -> None:
    if tensor.numel() != count:
        raise LoraFxError(f"{tensor.numel()} {name}, expected {count}: save the model again")
