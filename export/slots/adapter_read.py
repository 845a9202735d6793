"""From the file that onnxruntime loads back to an adapter."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.errors import AdapterError, shorten, within
from lora_fx.export.slots.check_adapter import read_adapter, values_of
from lora_fx.injection.branch_tensors import Terms, update_of
from lora_fx.layers.layer import Layer

_PARTS = {".lora_A": "down", ".lora_B": "up"} | {
    f".lora_{vector}": vector for vector in ("gain", "bias", "col")
}


def read_adapter_file(path: Path, name: str) -> Adapter:
    """Reads an ``.onnx_adapter`` that was made by `export_adapter`.

    A is stored as (in, r) and B as (r, out) with the scale folded in: they are turned around, and
    the scale is 1. A gain is read as the row that it was made of. A layer whose factors are empty,
    or zeros of rank 1, and whose vectors do nothing was left alone, and is left out.

    Args:
        path: the file.
        name: of the adapter.

    Returns:
        The adapter; its tensors are copies, in the dtype of the file.

    Raises:
        AdapterError: it is missing, damaged, or holds what is no pair of A and B.
    """
    stored = read_adapter(path)
    with within(path):
        # The file's memory is gone with the file.
        values = {key: value.clone() for key, value in values_of(stored).items()}
        updates = {module: _update(module, terms) for module, terms in _sorted(values).items()}
    return Adapter(name, {module: update for module, update in updates.items() if update})


def _sorted(values: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors by layer and part."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    unused = []
    for key, value in values.items():
        module, dot, leaf = key.rpartition(".lora_")
        part = _PARTS.get(dot + leaf)
        if part is None or not module or value.ndim < (2 if part in ("down", "up") else 1):
            unused.append(f"{key} {tuple(value.shape)}")
        else:
            layers.setdefault(module, {})[part] = value
    if unused:
        raise AdapterError(
            f"values that are no A (in, r) or B (r, out) of a layer: {shorten(unused)}; "
            "expected <path>.lora_A and <path>.lora_B, as export_adapter writes them"
        )
    halves = [module for module, terms in layers.items() if not {"down", "up"} <= terms.keys()]
    if halves or not layers:
        raise AdapterError(f"half of a pair, or none: {shorten(halves) or 'no values'}")
    return layers


def _update(module: str, terms: dict[str, torch.Tensor]) -> Update | None:
    """The update of one layer, or None if nothing is done to it."""
    down, up = terms["down"], terms["up"]
    is_conv = down.ndim > 2
    rank, other = (down.shape[0], up.shape[1]) if is_conv else (down.shape[1], up.shape[0])
    if rank != other or down.ndim != up.ndim:
        raise AdapterError(
            f"{module}: A {tuple(down.shape)} and B {tuple(up.shape)} are of two ranks"
        )
    if rank == 1 and is_conv and not (down.any() or up.any()):  # what stands for no rank there
        rank, down, up = 0, down[:0], up[:, :0]
    neutral = {"gain": 0.0, "bias": 0.0, "col": 1.0}
    acting = {k: v for k, v in terms.items() if k in neutral and bool((v != neutral[k]).any())}
    if not rank and not acting:
        return None
    sizes = (up.shape[0], *down.shape[1:]) if is_conv else (up.shape[1], down.shape[0])
    kind = f"conv{down.ndim - 2}d" if is_conv else "linear"
    layer = Layer(path=module, kind=kind, shape=tuple(sizes), dtype=down.dtype)
    return update_of(Terms(down=down, up=up, **acting), layer)
