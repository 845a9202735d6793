"""The tensors of a file by layer and role."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lora_fx.errors import AdapterError, shorten
from lora_fx.layers.axes import convert, sizes_of

# How every format has the two factors of a layer.
DOWN_AXES, UP_AXES = "r in *k", "out r 1*"
DOWN, UP, ALPHA, MAGNITUDE, BIAS = "down", "up", "alpha", "magnitude", "bias"
Roles = dict[str, tuple[str, torch.Tensor]]
Layers = dict[str, Roles]


def add(layers: Layers, path: str, role: str, key: str, tensor: torch.Tensor) -> None:
    """Files a tensor under its layer's path and its role in it.

    Raises:
        AdapterError: the layer has a tensor of this role already, under another spelling.
    """
    roles = layers.setdefault(path, {})
    if role in roles:
        raise AdapterError(
            f"tensors {roles[role][0]!r} and {key!r} are both the {role} of {path}; remove one"
        )
    roles[role] = key, tensor


def check_pairs(layers: Layers) -> None:
    """Refuses a file that adapts nothing, and a layer that has only half of a pair.

    Raises:
        AdapterError: names the tensors that stand alone.
    """
    check_no_half(layers.values())
    if not layers:
        raise AdapterError("no pair of down and up in it, so nothing is adapted")


def check_no_half(layers: Iterable[Roles]) -> None:
    """Refuses a layer that has only half of a pair.

    Raises:
        AdapterError: names the tensors that stand alone.
    """
    halves = [
        key for roles in layers if not {DOWN, UP} <= roles.keys() for key, _ in roles.values()
    ]
    if halves:
        raise AdapterError(f"half of a pair, down without up or up without: {shorten(halves)}")


def matrices_of(roles: Roles) -> tuple[torch.Tensor, torch.Tensor]:
    """The down- and the up-projection of a layer, both matrices.

    Raises:
        AdapterError: they are no matrices.
    """
    down, up = roles[DOWN][1], roles[UP][1]
    if down.ndim != 2 or up.ndim != 2:
        raise AdapterError(f"{_shapes(roles)}: expected matrices, (r, in) and (out, r)")
    return down, up


def factors_of(roles: Roles, grouped: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The down- and the up-projection of a layer: of a linear one, or of a convolution.

    Args:
        roles: of the layer: down (r, in, *kernel), and up (out, r), or (out, r, 1, ...) with as
            many axes as down.
        grouped: whether up may be (out, r / groups, 1, ...), beside a grouped convolution.

    Returns:
        down as it is, and up as a matrix.

    Raises:
        AdapterError: the shapes are others, or the ranks differ.
    """
    down, up = roles[DOWN][1], roles[UP][1]
    low, high = sizes_of(DOWN_AXES, down.shape), sizes_of(UP_AXES, up.shape)
    if low is None or high is None or up.ndim not in (2, down.ndim):
        raise AdapterError(
            f"{_shapes(roles)}: expected (r, in) and (out, r), or of a convolution "
            "(r, in, *kernel) and (out, r, 1, ...)"
        )
    rank, inner = low["r"], high["r"]
    if rank != inner and not (grouped and down.ndim > 2 and inner and rank % inner == 0):
        raise AdapterError(f"{_shapes(roles)}: the ranks differ, expected (r, in) and (out, r)")
    return down, up.flatten(1)


def _shapes(roles: Roles) -> str:
    (down_key, down), (up_key, up) = roles[DOWN], roles[UP]
    return f"{down_key!r} is {tuple(down.shape)} and {up_key!r} is {tuple(up.shape)}"


def up_beside(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """An up-projection (out, r) as files store it: with the axes of its down-projection."""
    return convert(up, "out r", UP_AXES, down.ndim - 2)


def magnitude_beside(down: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """A magnitude (out,) as PEFT and diffusers store it: (1, out, 1, ...) of a convolution."""
    further = down.ndim - 2
    return convert(magnitude, "n", magnitude_axes(further), further)


def magnitude_axes(further: int) -> str:
    """The axes of a magnitude as PEFT stores it, of a layer with so many kernel axes."""
    return "1 n 1*" if further else "n"


def scalar_of(roles: Roles) -> float | None:
    """The alpha that a layer's tensors hold, or None.

    Raises:
        AdapterError: it is not one number.
    """
    if ALPHA not in roles:
        return None
    key, tensor = roles[ALPHA]
    if tensor.numel() != 1:
        raise AdapterError(f"{key!r} is {tuple(tensor.shape)}, expected one number")
    return float(tensor.item())
