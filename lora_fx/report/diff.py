"""Two adapters or two files, held against each other: what differs, and by how much."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lora_fx.adapters.adapter import Adapter, line_of
from lora_fx.choices import takes
from lora_fx.errors import AdapterError, LoraFxError
from lora_fx.report.distance import UpdateDistance, tensors_apart
from lora_fx.tables import table

T = TypeVar("T")
_UNKNOWN = "relative unknown (other sizes, or no base)"


@dataclass(frozen=True)
class Difference:
    """One layer or tensor that the two do not share.

    Attributes:
        path: of the layer, or name of the tensor.
        first: what the first has there, in words, or None.
        second: what the second has, or None.
        relative: the norm of the difference, of W' - W and of the bias, over that of the first's;
            None where it is not known, or only one has it.
    """

    path: str
    first: str | None
    second: str | None
    relative: float | None = None

    def __str__(self) -> str:
        """One line."""
        if self.first is None or self.second is None:
            place = "second" if self.first is None else "first"
            return f"{self.path}  only in the {place}: {self.first or self.second}"
        words = self.first if self.first == self.second else f"{self.first} -> {self.second}"
        far = _UNKNOWN if self.relative is None else f"relative {self.relative:.2g}"
        return f"{self.path}  {words}  {far}"


@dataclass(frozen=True)
class Differences:
    """What `diff` found.

    Attributes:
        first: name of the first.
        second: name of the second.
        rows: what differs.
        equal: how many layers or tensors do not.
    """

    first: str
    second: str
    rows: tuple[Difference, ...]
    equal: int

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.rows

    def to_dict(self) -> dict[str, Any]:
        """As plain values; what is infinitely far, of what is nothing, is None."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            far = row["relative"]
            row["relative"] = far if far is None or math.isfinite(far) else None
        return {
            "first": self.first, "second": self.second, "same": self.same, "equal": self.equal,
            "rows": rows,
        }  # fmt: skip

    def __str__(self) -> str:
        """How many differ, then one line for each."""
        return "\n".join([self._head(), *(f"  {row}" for row in self.rows)])

    def _head(self) -> str:
        counts = f"{len(self.rows)} differ, {self.equal} are equal"
        return f"{self.first} and {self.second}: {counts}"

    def _repr_html_(self) -> str:
        rows = [[row.path, row.first, row.second, row.relative] for row in self.rows]
        return table(["layer", self.first, self.second, "relative"], rows, self._head())


@takes(AdapterError)
def diff(
    first: Adapter | str | Path, second: Adapter | str | Path, *, base: nn.Module | None = None
) -> Differences:
    """Finds where two adapters, or two files, differ, and by how much.

    Adapters are compared by what they make of each weight, whatever their kind, rank, scale or
    format; where that depends on the weight (DoRA, OFT, ...) and there is no base, by the tensors
    that they hold. ``.onnx`` files are compared tensor by tensor, and by how many calls of each
    operator they have.

    Args:
        first: an adapter, or a path of one, or of an ``.onnx`` file.
        second: another of the same sort.
        base: the model that adapters are for.

    Raises:
        LoraFxError: one cannot be read, or they are not of the same sort.
    """
    models = [p for p in (first, second) if not isinstance(p, Adapter) and is_model(Path(p))]
    if len(models) == 1:
        raise LoraFxError(
            f"{models[0]} is a model, the other an adapter: expected two of the same sort"
        )
    if models:
        return _of_files(*map(Path, models))
    one, two = (_adapter(given, base) for given in (first, second))
    far = UpdateDistance(base)
    layers = _compared(one.updates, two.updates, line_of, lambda path, a, b: far.of(path, a, b))
    whole = _compared(
        one.replacements, two.replacements, _sizes, lambda _, a, b: tensors_apart(a, b)
    )
    return _told(_name(first, one), _name(second, two), [*layers, *whole])


def is_model(path: Path) -> bool:
    """Whether a path is that of an ONNX model."""
    return path.suffix == ".onnx"


def _adapter(given: Adapter | str | Path, base: nn.Module | None) -> Adapter:
    from lora_fx.formats import load_adapter

    return given if isinstance(given, Adapter) else load_adapter(given, base=base)


def _name(given: Adapter | str | Path, adapter: Adapter) -> str:
    return adapter.name if isinstance(given, Adapter) else str(given)


def _of_files(first: Path, second: Path) -> Differences:
    from lora_fx.export.onnx_model.stored_tensors import tensors_in

    one, two = tensors_in(first), tensors_in(second)
    tensors = _compared(
        one.tensors, two.tensors, lambda t: _sizes(t()), lambda _, a, b: tensors_apart(a(), b())
    )
    calls = _compared(one.calls, two.calls, lambda n: f"{n} calls", lambda _, a, b: abs(b - a) / a)
    return _told(str(first), str(second), [*tensors, *calls])


def _compared(
    one: Mapping[str, T],
    two: Mapping[str, T],
    words: Callable[[T], str],
    distance: Callable[[str, T, T], float | None],
) -> Iterator[Difference]:
    """Each path of either: what stands there, and how far the two are apart."""
    for path in dict.fromkeys([*one, *two]):
        first, second = (words(held[path]) if path in held else None for held in (one, two))
        both = first is not None and second is not None
        yield Difference(
            path, first, second, distance(path, one[path], two[path]) if both else None
        )


def _told(first: str, second: str, rows: Iterable[Difference]) -> Differences:
    every = list(rows)
    apart = tuple(row for row in every if row.first != row.second or row.relative != 0)
    return Differences(first, second, apart, len(every) - len(apart))


def _sizes(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
