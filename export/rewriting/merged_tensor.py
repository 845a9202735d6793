"""A weight with an adapter in it, made piece by piece while it is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from lora_fx.export.onnx_model.tensors import array_to_torch, to_numpy
from lora_fx.graph.one_thread import one_thread
from lora_fx.layers.axes import names_of

_PIECE = 1 << 19  # bytes in float32 that are made at a time: what larger ones leave is not reused


@dataclass(frozen=True)
class Part:
    """A tensor and the names of its axes, of those that `lora_fx.layers.axes` has.

    Attributes:
        axes: in order.
        values: the tensor.
    """

    axes: tuple[str, ...]
    values: torch.Tensor

    @classmethod
    def of(cls, axes: str, values: torch.Tensor, kernel: int = 0) -> Part:
        """A tensor by its axis string; axes of one place go."""
        names = names_of(axes, kernel)
        kept = [name for name in names if name != "1"]
        sizes = dict(zip(names, values.shape, strict=True))
        return cls(tuple(kept), values.reshape([sizes[name] for name in kept]))

    def rows(self, axis: str, start: int, stop: int) -> Part:
        """The same, some places of an axis alone if it has that."""
        if axis not in self.axes:
            return self
        return Part(self.axes, self.values.narrow(self.axes.index(axis), start, stop - start))

    def turned(self, axes: Sequence[str]) -> torch.Tensor:
        """Its values with its axes in another order."""
        return self.values.permute([self.axes.index(name) for name in axes])

    def along(self, axes: Sequence[str]) -> torch.Tensor:
        """A vector, broadcast over the other axes of a tensor."""
        return self.values.reshape([-1 if name in self.axes else 1 for name in axes])


@dataclass(frozen=True)
class Change:
    """``((1 + gain) W + up @ down) col + added``, each a tensor of a slot, or None.

    Attributes:
        down: the axes of W but out, and r.
        up: out and r.
        gain: along out.
        col: along in.
        added: of W, or of a bias, as a whole.
    """

    down: Part | None = None
    up: Part | None = None
    gain: Part | None = None
    col: Part | None = None
    added: Part | None = None

    def of_group(self, out: int, outs: int, into: int, ins: int) -> Change:
        """What is done to some outputs and inputs, each from a place on so many."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return Change(
            **{
                name: part.rows("out", out, out + outs).rows("in", into, into + ins)
                for name, part in parts.items()
                if part is not None
            }
        )

    def of(self, weight: Part, start: int, stop: int) -> torch.Tensor:
        """Some rows of W', in float32 or wider.

        Args:
            weight: these rows of W, a copy that is written to.
            start: of them.
            stop: behind the last.
        """
        first = weight.axes[0]
        wide = torch.promote_types(weight.values.dtype, torch.float32)

        def part(name: str) -> Part | None:
            whole: Part | None = getattr(self, name)
            own = None if whole is None else whole.rows(first, start, stop)
            return None if own is None else Part(own.axes, own.values.to(wide))

        made = weight.values.to(wide)
        up, down, gain, col, added = map(part, ("up", "down", "gain", "col", "added"))
        if gain is not None:
            made = made * gain.along(weight.axes).add(1)
        if up is not None and down is not None:
            if len(weight.axes) == 2:  # in half the time
                rows, others = (up, down) if first in up.axes else (down, up)
                made.addmm_(rows.turned((first, "r")), others.turned(("r", weight.axes[1])))
            else:
                product = f"{_spelled(up.axes)},{_spelled(down.axes)}->{_spelled(weight.axes)}"
                made.add_(torch.einsum(product, up.values, down.values))
        if col is not None:
            made = made * col.along(weight.axes)
        return made if added is None else made + added.values


class MergedTensor(ir.LazyTensor):
    """W' of a file's own W.

    Args:
        weight: W.
        axes: of it, in order.
        changes: what W' is of W, for each group of rows.
        name: of the result.
    """

    def __init__(
        self,
        weight: ir.TensorProtocol,
        axes: tuple[str, ...],
        changes: Sequence[Change],
        name: str | None,
    ) -> None:
        shape = ir.Shape(weight.shape.numpy())
        super().__init__(self._whole, dtype=weight.dtype, shape=shape, name=name)
        self._weight, self._axes, self._changes = weight, axes, changes

    def pieces(self) -> Iterator[torch.Tensor]:
        """W' from its first row on."""
        values, rows = self._weight.numpy(), self.shape.numpy()[0]
        each = rows // len(self._changes)
        step = max(1, _PIECE * rows // max(4 * self.size, 1))
        for group, change in enumerate(self._changes):
            for start in range(0, each, step):
                stop = min(start + step, each)
                held = values[group * each + start : group * each + stop]
                own = array_to_torch(held, self.dtype)
                made = change.of(Part(self._axes, own), start, stop)
                yield made.to(own.dtype).contiguous()

    def tofile(self, file: Any) -> None:
        """Writes W', one piece after the other, each too small to be worth several threads."""
        with one_thread():
            for piece in self.pieces():
                file.write(to_numpy(piece).data)

    def _whole(self) -> ir.TensorProtocol:
        return TorchTensor(torch.cat(list(self.pieces())), name=self.name)


def _spelled(axes: Sequence[str]) -> str:
    """Axes as letters, those of a kernel, ``k0`` and its kin, as x, y and z."""
    return "".join("xyz"[int(name[1:])] if name[1:].isdigit() else name[0] for name in axes)
