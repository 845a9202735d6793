"""How far two results are apart, and whether two adapters are one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lora_fx.adapters.adapter import Adapter
from lora_fx.numerics import compare


def tensors(outputs: Any) -> list[torch.Tensor]:
    """The tensors of any structure of outputs, in its own order."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def relative(actual: Any, expected: Any) -> float:
    """The largest relative error over all outputs, by `lora_fx.compare`.

    Args:
        actual: any structure of tensors.
        expected: as many tensors, of the same shapes; another shape is infinitely far.

    Raises:
        ValueError: there are more tensors on one side.
    """
    pairs = zip(tensors(actual), tensors(expected), strict=True)
    return max(compare(one, other).relative for one, other in pairs)


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of what is expected, in float64.

    Raises:
        AssertionError: the shapes differ.
    """
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts that two tensors are one, bit for bit; a NaN is itself.

    Raises:
        AssertionError: they differ in dtype, shape or bits.
    """
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(
        *(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found, expected))
    )


def same_tensors(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Asserts that tensors by key, as of a file, are the same, bit for bit.

    Raises:
        AssertionError: they differ in a key, or a tensor in its dtype, shape or bits.
    """
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        same_bits(found[key], tensor)


def same_adapter(found: Adapter, expected: Adapter) -> None:
    """Asserts that two adapters of factors are one, bit for bit; their kinds may differ.

    Raises:
        AssertionError: they differ in a layer, a scale, a factor or a tensor that is replaced.
    """
    assert dict(found.updates).keys() == dict(expected.updates).keys()
    for path in found.updates:
        update: Any = found.updates[path]
        other: Any = expected.updates[path]
        assert update.scale == other.scale, path
        same_bits(update.down, other.down)
        same_bits(update.up, other.up)
    same_tensors(dict(found.replacements), dict(expected.replacements))
