"""A safetensors file written one tensor after the other, none of which is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Made(NamedTuple):
    """A tensor to be written.

    Attributes:
        shape: of it.
        dtype: of it.
        make: gives it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


def write_tensors(path: Path, tensors: Mapping[str, Made]) -> None:
    """Writes tensors in their order.

    Raises:
        ValueError: one is not what was said of it.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, made in tensors.items():
        start, end = end, end + math.prod(made.shape) * made.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[made.dtype],
            "shape": list(made.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, made in tensors.items():
            found = made.make()
            if (tuple(found.shape), found.dtype) != (made.shape, made.dtype):
                raise ValueError(f"{name}: shape {tuple(found.shape)}, expected {made.shape}")
            values: Any = found.contiguous().flatten().view(torch.uint8).numpy()
            file.write(values.data)
