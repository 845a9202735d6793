"""Axis strings: ``"r in *k"`` names the axes of a tensor, in order.

``*k`` stands for any further axes, none too, and ``1*`` for as many of size 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

Size = TypeVar("Size", int, int | None)


def names_of(axes: str, further: int) -> list[str]:
    """``"r in *k"`` with two further axes is r, in, k0, k1."""
    names = []
    for name in axes.split():
        is_open = name.startswith("*") or name == "1*"
        more = ["1"] * further if name == "1*" else [f"{name[1:]}{n}" for n in range(further)]
        names += more if is_open else [name]
    return names


def shape_of(axes: str, sizes: Mapping[str, Size], kernel: Sequence[int] = ()) -> tuple[Size, ...]:
    """The shape of a tensor, from the size of each name and those of the further axes."""
    further = {f"k{place}": size for place, size in enumerate(kernel)}
    known = {"1": 1, **further, **sizes}
    return tuple(known[name] for name in names_of(axes, len(kernel)))


def sizes_of(axes: str, shape: Sequence[int]) -> dict[str, int] | None:
    """The size of each name, or None if a tensor of this shape has other axes."""
    names = names_of(axes, further_in(axes, len(shape)))
    sizes = {"1": 1}
    if len(names) != len(shape):
        return None
    fits = [sizes.setdefault(name, size) == size for name, size in zip(names, shape, strict=True)]
    return sizes if all(fits) else None


def further_in(axes: str, count: int) -> int:
    """How many of ``count`` axes are further ones."""
    return max(0, count - sum("*" not in name for name in axes.split()))


def convert(tensor: torch.Tensor, have: str, want: str, further: int | None = None) -> torch.Tensor:
    """A view with the axes in another order, those of size 1 taken out and put in.

    Args:
        tensor: with the axes that it has.
        have: these.
        want: the same names.
        further: how many further axes ``want`` has, where ``have`` does not tell.
    """
    more = further_in(have, tensor.ndim) if further is None else further
    names, wanted = names_of(have, more), names_of(want, more)
    sizes = dict(zip(names, tensor.shape, strict=True)) | {"1": 1}
    real = [name for name in names if name != "1"]
    order = [real.index(name) for name in wanted if name != "1"]
    bare = tensor.reshape([sizes[name] for name in real])
    return bare.permute(order).reshape([sizes[name] for name in wanted])
