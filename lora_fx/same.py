"""Whether two results are the same, bit for bit: structure, types, shapes and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have one dtype, shape and layout, and equal numbers; NaN equals NaN."""
    kinds = [(t.dtype, t.shape, t.layout, t.device) for t in (one, other)]
    if kinds[0] != kinds[1]:
        return False
    one, other = (t.detach() for t in (one, other))
    if one.layout is not torch.strided:
        one, other = one.to_dense(), other.to_dense()
    if torch.equal(one, other):
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def difference(found: Any, expected: Any, at: str = "") -> str | None:
    """Says where and how two results differ first, or None.

    Tensors are compared by `same_values`, containers and dataclasses by their parts, whatever
    else pytree knows by its leaves, and the rest by ``==``.
    """
    if isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor):
        return None if same_values(found, expected) else _gap(found, expected, at)
    if type(found) is not type(expected):
        return f"{at} is a {type(found).__name__}, expected a {type(expected).__name__}"
    parts = [_parts(value) for value in (found, expected)]
    if parts[1] is None or parts[0] is None:
        return None if _equal(found, expected) else f"{at} is {found!r}, expected {expected!r}"
    if list(parts[0]) != list(parts[1]):
        return f"{at} has the parts {list(parts[0])}, expected {list(parts[1])}"
    pairs = ((key, parts[0][key], parts[1][key]) for key in parts[1])
    found_one = (difference(a, b, f"{at}[{key!r}]" if at else str(key)) for key, a, b in pairs)
    return next((said for said in found_one if said), None)


def _parts(value: Any) -> Mapping[Any, Any] | None:
    """The parts of a value by key; None if it has none."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if is_dataclass(value):
        return {item.name: getattr(value, item.name) for item in fields(value)}
    leaves, spec = pytree.tree_flatten(value)
    if not spec.is_leaf():
        return dict(enumerate(leaves))
    own = getattr(value, "__dict__", None)
    return own if getattr(type(value), "__eq__", None) is object.__eq__ and own else None


def _equal(found: Any, expected: Any) -> bool:
    return found is expected or bool(found == expected) or (found != found and expected != expected)


def _gap(found: torch.Tensor, expected: torch.Tensor, at: str) -> str:
    said = [f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in (found, expected)]
    if said[0] != said[1]:
        return f"{at} is {said[0]}, expected {said[1]}"
    if found.layout is not expected.layout:
        return f"{at} is {found.layout}, expected {expected.layout}"
    if found.is_complex():
        found, expected = torch.view_as_real(found), torch.view_as_real(expected)
    one, other = (t.detach().to_dense().double() for t in (found, expected))
    same = (one == other) | (one.isnan() & other.isnan())
    gap = (one - other).abs().masked_fill(same, 0.0).nan_to_num(nan=float("inf"))
    largest = gap.max().item()
    return f"{at} is off by {largest:.2g}"
