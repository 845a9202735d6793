"""From the file that onnxruntime loads back to an adapter."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import torch
from torch.utils.dlpack import from_dlpack

from lora_fx.adapter import Adapter, Update
from lora_fx.errors import AdapterError, shorten
from lora_fx.export.adapter_check import read_adapter
from lora_fx.formats.pairs import DOWN, UP, Layers, add, check_pairs, rank_of
from lora_fx.formats.tensor_rules import check_tensors

_ROLES = {".lora_A": DOWN, ".lora_B": UP}


def read_adapter_file(path: Path, name: str) -> Adapter:
    """Reads an ``.onnx_adapter`` that was made by `export_adapter`.

    A is stored as (in, r) and B as (r, out) with the scale folded in: they are turned around, and
    the scale is 1. A layer of rank 0 was left alone, and is left out.

    Args:
        path: the file.
        name: of the adapter.

    Returns:
        The adapter; its tensors are copies, in the dtype of the file.

    Raises:
        AdapterError: it is missing, damaged, or holds what is no pair of A and B.
    """
    stored = read_adapter(path)
    values = {key: _copy(value) for key, value in sorted(stored.get_parameters().items())}
    layers = _sorted(path, values)
    updates = {
        module: Update(roles[DOWN][1], roles[UP][1], 1.0)
        for module, roles in layers.items()
        if rank_of(path, roles)
    }
    return Adapter(name, updates)


def _copy(value: ort.OrtValue) -> torch.Tensor:
    # The file's memory is gone with the file; numpy() would refuse bfloat16.
    tensor: torch.Tensor = from_dlpack(value)
    return tensor.clone()


def _sorted(path: Path, values: dict[str, torch.Tensor]) -> Layers:
    check_tensors(path, values)
    layers: Layers = {}
    unused = []
    for key, value in values.items():
        ending = key[-len(".lora_A") :]
        if ending in _ROLES and value.ndim == 2:
            module = key.removesuffix(ending)
            add(path, layers, module, _ROLES[ending], key, value.T.contiguous())
        else:
            unused.append(f"{key} {tuple(value.shape)}")
    if unused:
        raise AdapterError(
            f"{path}: values that are no A (in, r) or B (r, out) of a layer: {shorten(unused)}; "
            "expected <path>.lora_A and <path>.lora_B, as export_adapter writes them"
        )
    check_pairs(path, layers)
    return layers
