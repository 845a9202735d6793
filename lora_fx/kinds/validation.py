"""What every kind checks of its tensors and settings before it reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from lora_fx.errors import AdapterError


def measure(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[str, ...]]
) -> dict[str, int]:
    """Holds tensors against shapes in which a name is of one size everywhere.

    Args:
        tensors: by leaf.
        expected: leaf -> names of sizes, such as ``("out", "r")``; ``"1"`` is 1. A last name with a
            star stands for any further axes, none too.

    Returns:
        The size of each name.

    Raises:
        AdapterError: a tensor is missing, is not expected, is no float or is of another shape.
    """
    missing, extra = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
    if missing:
        raise AdapterError(f"{missing[0]} is missing beside {sorted(tensors)}")
    if extra:
        raise AdapterError(f"{extra[0]} is not used beside {sorted(expected)}")
    sizes = {"1": 1}
    for leaf, axes in expected.items():
        _one(leaf, tensors[leaf], axes, sizes)
    return sizes


def _one(leaf: str, tensor: torch.Tensor, axes: tuple[str, ...], sizes: dict[str, int]) -> None:
    if not tensor.is_floating_point():
        raise AdapterError(f"{leaf} is {tensor.dtype}, expected floating point")
    is_open = str(axes[-1]).startswith("*")
    names, found = axes[:-1] if is_open else axes, tuple(tensor.shape)
    fits = len(found) >= len(names) if is_open else len(found) == len(names)
    pairs = list(zip(names, found, strict=False))
    together = dict(sizes)
    if not fits or any(together.setdefault(name, size) != size for name, size in pairs):
        known = [f"{name} = {sizes[name]}" for name in names if name in sizes and name != "1"]
        shape = f"({', '.join(axes)}{',' if len(axes) == 1 else ''})"
        raise AdapterError(
            f"{leaf} is {found}, expected {shape}{' with ' if known else ''}" + " and ".join(known)
        )
    sizes.update(together)


def check_rank(leaf: str, tensor: torch.Tensor, rank: tuple[int, str], axis: int = 0) -> None:
    """Refuses a tensor that is not of a rank, which a config says, and where.

    Raises:
        AdapterError: it is of another rank along the axis.
    """
    if tensor.shape[axis : axis + 1] != (rank[0],):
        found = tuple(tensor.shape)
        raise AdapterError(f"{leaf} {found} should be of rank {rank[0]} by {rank[1]}")


def number(settings: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A setting that is a finite number.

    Raises:
        AdapterError: it is missing and has no default, or it is something else.
    """
    value = settings.get(name, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise AdapterError(f"setting {name} is {value!r:.80}, expected a finite number")
    return float(value)


def flag(settings: Mapping[str, Any], name: str, default: bool | None = None) -> bool:
    """A setting that is true or false.

    Raises:
        AdapterError: it is missing and has no default, or it is something else.
    """
    value = settings.get(name, default)
    if not isinstance(value, bool):
        raise AdapterError(f"setting {name} is {value!r:.80}, expected true or false")
    return value


def layer_shape(settings: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The setting ``shape``: (out, in, *kernel) of the layer, or None if nobody said.

    Raises:
        AdapterError: it is no such shape.
    """
    shape = settings.get("shape")
    if shape is None:
        return None
    is_list = isinstance(shape, tuple | list) and len(shape) >= 2
    if not is_list or any(type(size) is not int or size < 1 for size in shape):
        raise AdapterError(
            f"setting shape is {shape!r:.80}, expected (out, in, *kernel) of the layer"
        )
    return tuple(shape)


def unflatten(leaf: str, down: torch.Tensor, shape: tuple[int, ...] | None) -> torch.Tensor:
    """Gives a down-projection the axes of its layer, of which the file holds the product alone.

    Args:
        leaf: that the columns come from.
        down: (r, in * kernel), or (r, in, *kernel).
        shape: (out, in, *kernel) of the layer; None leaves ``down`` as it is.

    Raises:
        AdapterError: the layer has another number of columns.
    """
    if shape is None:
        return down
    found = tuple(down.shape[1:])
    if math.prod(found) != math.prod(shape[1:]):
        raise AdapterError(f"{leaf} gives columns {found}, the layer is {shape}")
    return down.reshape(len(down), *shape[1:])
