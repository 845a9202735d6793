"""What the file of an adapter holds for the slots of its model, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_fx.choices import SlotFormat
from lora_fx.errors import shorten
from lora_fx.export.slots.manifest import Manifest
from lora_fx.export.slots.slot import AnySlot
from lora_fx.tables import size, table


@dataclass(frozen=True)
class Filled:
    """A slot that the adapter acts through.

    Attributes:
        path: of the layer or the parameter.
        rank: of its factors; None of a whole tensor, and of the tokens of an invocation.
        dtype: what its values are stored in.
        size: bytes that they take.
    """

    path: str
    rank: int | None
    dtype: str
    size: int

    def __str__(self) -> str:
        """One line."""
        rank = "whole" if self.rank is None else f"rank {self.rank}"
        return f"{self.path}  {rank}  {self.dtype}  {size(self.size)}"


@dataclass(frozen=True)
class AdapterReport:
    """What `export_adapter` wrote.

    Attributes:
        path: of the file.
        adapter: its name, or None for no adapter.
        model: the file that it is for.
        format: ``"onnx_adapter"`` or ``"safetensors"``.
        size: bytes of the file.
        filled: the slots that the adapter acts through.
        left: the slots that it leaves alone, where the base stays as it is.
    """

    path: str
    adapter: str | None
    model: str
    format: SlotFormat
    size: int
    filled: Sequence[Filled]
    left: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def __str__(self) -> str:
        """What it is, then a line for each slot."""
        lines = [self._head(), *(f"  {one}" for one in self.filled)]
        lines += [f"  as the base: {shorten(list(self.left))}"] if self.left else []
        return "\n".join(lines)

    __repr__ = __str__

    def _head(self) -> str:
        whose = "no adapter" if self.adapter is None else f"adapter {self.adapter}"
        slots = len(self.filled) + len(self.left)
        return (
            f"{self.path}  {whose} for {self.model}  {size(self.size)}  "
            f"{len(self.filled)} of {slots} slots filled"
        )

    def _repr_html_(self) -> str:
        rows: list[list[object]] = [[f.path, f.rank, f.dtype, size(f.size)] for f in self.filled]
        rows += [[path, "as the base", None, None] for path in self.left]
        return table(["slot", "rank", "dtype", "size"], rows, self._head())


def report_of(
    path: Path, model: Path, format: SlotFormat, name: str | None, size: int,
    values: Mapping[str, torch.Tensor], manifest: Manifest,
) -> AdapterReport:  # fmt: skip
    """What was written of an adapter's values.

    Args:
        path: of the file.
        model: that it is for.
        format: of the file.
        name: of the adapter.
        size: bytes of the file.
        values: the adapter's, by the names of the inputs.
        manifest: of the model.
    """
    acting = [slot for slot in manifest.slots if _acts(slot, values)]
    filled = tuple(_filled(slot, values) for slot in acting)
    left = tuple(slot.path for slot in manifest.slots if slot not in acting)
    return AdapterReport(str(path), name, str(model), format, size, filled, left)


def _acts(slot: AnySlot, values: Mapping[str, torch.Tensor]) -> bool:
    """Whether what goes into a slot is other than what has no effect."""
    given = {name: values[name] for name in slot.names if name in values}
    neutral = slot.neutral()
    return any(
        name not in neutral or not torch.equal(value, neutral[name])
        for name, value in given.items()
    )


def _filled(slot: AnySlot, values: Mapping[str, torch.Tensor]) -> Filled:
    own = [values[name] for name in slot.names if name in values]
    bytes_ = sum(value.numel() * value.element_size() for value in own)
    down = slot.inputs.get("down")
    rank = None if down is None else slot.rank_of(values[down.name])
    return Filled(slot.path, rank, slot.dtype, bytes_)
