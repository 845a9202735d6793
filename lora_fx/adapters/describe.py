"""One layer's update as plain values: what it is, and how large."""

from __future__ import annotations

from typing import Any

import torch

from lora_fx.adapters.adapter import AnyUpdate, Scaling, Update

_VECTORS = ("bias", "magnitude", "row", "col")


def describe_update(path: str, update: AnyUpdate) -> dict[str, Any]:
    """Describes the update of one layer.

    Returns:
        ``path``, ``kind`` and ``shape``, None where any size fits; ``rank``, ``scale`` and
        ``norm``, of ``scale * up @ down``, where there are such factors; ``<vector>_norm`` for each
        vector beside them; ``norms`` of the values of what is a function of the weight.
    """
    report: dict[str, Any] = {"path": path, "kind": update.kind, "shape": list(update.shape)}
    if isinstance(update, Update):
        report |= {"rank": update.rank, "scale": update.scale, "norm": _norm(update)}
    if isinstance(update, (Update, Scaling)):
        vectors = {name: getattr(update, name, None) for name in _VECTORS}
        return report | {f"{n}_norm": _size(v) for n, v in vectors.items() if v is not None}
    return report | {"norms": [_size(v) for v in update.values if v.is_floating_point()]}


def _size(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach().double()))


def _norm(update: Update) -> float:
    """The Frobenius norm of ``scale * up @ down``, without the product, which may be large.

    It is the root of the sum of ``(up.T @ up) * (down @ down.T)``; a grouped up-projection has one
    such product a group.
    """
    groups, rank = update.groups, update.up.shape[1]
    up = update.up.detach().double().reshape(groups, -1, rank)
    down = update.down.detach().double().reshape(groups, rank, -1)
    square = ((up.mT @ up) * (down @ down.mT)).sum().clamp_min(0)
    return abs(update.scale) * float(square.sqrt())
