"""GGUF files as the converter of llama.cpp writes them, byte by byte, for tests."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch

ALIGNMENT = 32
_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}


def gguf(values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor | tuple[Any, ...]]) -> bytes:
    """The bytes of a file: texts, floats and lists of whole numbers, and tensors behind them.

    A tensor may be (shape, code of its type, its bytes) too.
    """
    stored = {name: _stored(tensor) for name, tensor in tensors.items()}
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(values))]
    head += [_text(name) + _value(value) for name, value in values.items()]
    offset, data = 0, b""
    for name, (shape, code, own) in stored.items():
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head.append(_text(name) + dims + struct.pack("<IQ", code, offset))
        data += own + bytes(-len(own) % ALIGNMENT)
        offset = len(data)
    whole = b"".join(head)
    return whole + bytes(-len(whole) % ALIGNMENT) + data


def _stored(tensor: torch.Tensor | tuple[Any, ...]) -> tuple[Sequence[int], int, bytes]:
    if isinstance(tensor, tuple):
        return tensor
    own = tensor.detach().contiguous()
    return tuple(own.shape), _CODES[own.dtype], bytes(own.view(torch.uint8).flatten().tolist())


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, list):
        return struct.pack(f"<IIQ{len(value)}I", 9, 4, len(value), *value)
    return struct.pack("<If", 6, value)
