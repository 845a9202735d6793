"""The tensors of a file by layer and role."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_fx.errors import AdapterError, shorten

DOWN, UP, ALPHA = "down", "up", "alpha"
Roles = dict[str, tuple[str, torch.Tensor]]
Layers = dict[str, Roles]


def add(file: Path, layers: Layers, path: str, role: str, key: str, tensor: torch.Tensor) -> None:
    """Files a tensor under its layer's path and its role in it.

    Raises:
        AdapterError: the layer has a tensor of this role already, under another spelling.
    """
    roles = layers.setdefault(path, {})
    if role in roles:
        raise AdapterError(
            f"{file}: tensors {roles[role][0]!r} and {key!r} are both the {role} of {path}; "
            "remove one"
        )
    roles[role] = key, tensor


def check_pairs(file: Path, layers: Layers) -> None:
    """Refuses a file that adapts nothing, and a layer that has only half of a pair.

    Raises:
        AdapterError: names the tensors that stand alone.
    """
    halves = [
        key
        for roles in layers.values()
        if not {DOWN, UP} <= roles.keys()
        for key, _ in roles.values()
    ]
    if halves:
        raise AdapterError(
            f"{file}: half of a pair, down without up or up without: {shorten(halves)}"
        )
    if not layers:
        raise AdapterError(f"{file}: no pair of down and up in it, so nothing is adapted")


def matrices_of(file: Path, roles: Roles) -> tuple[torch.Tensor, torch.Tensor]:
    """The down- and the up-projection of a layer.

    Raises:
        AdapterError: they are no matrices.
    """
    down, up = roles[DOWN][1], roles[UP][1]
    if down.ndim != 2 or up.ndim != 2:
        raise AdapterError(
            f"{_shapes(file, roles)}: only linear layers are supported, (r, in) and (out, r)"
        )
    return down, up


def rank_of(file: Path, roles: Roles) -> int:
    """The rank of a layer's pair.

    Raises:
        AdapterError: they are no matrices, or their ranks differ.
    """
    down, up = matrices_of(file, roles)
    if down.shape[0] != up.shape[1]:
        raise AdapterError(
            f"{_shapes(file, roles)}: the ranks differ, expected (r, in) and (out, r)"
        )
    return down.shape[0]


def _shapes(file: Path, roles: Roles) -> str:
    (down_key, down), (up_key, up) = roles[DOWN], roles[UP]
    return f"{file}: {down_key!r} is {tuple(down.shape)} and {up_key!r} is {tuple(up.shape)}"


def scalar_of(file: Path, roles: Roles) -> float | None:
    """The alpha that a layer's tensors hold, or None.

    Raises:
        AdapterError: it is not one number.
    """
    if ALPHA not in roles:
        return None
    key, tensor = roles[ALPHA]
    if tensor.numel() != 1:
        raise AdapterError(f"{file}: {key!r} is {tuple(tensor.shape)}, expected one number")
    return float(tensor.item())
