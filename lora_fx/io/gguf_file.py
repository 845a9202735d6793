"""llama.cpp's GGUF files: named tensors, and values beside them, after a check of the header.

Source: ``docs/gguf.md`` of ggml; versions 2 and 3, which are alike, least bytes first.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy
import torch

from lora_fx.errors import AdapterError, within
from lora_fx.io.plain_file import check_plain
from lora_fx.io.safetensors_file import MAX_TENSORS, check_gathered, check_tensors, start_of

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_DIMS = 4
_STEPS = tuple(str(1 << power) for power in range(17))
# How the types of a value are packed, by code; a text and a list have their length before them.
_PACKED = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
# Q8_0: rows of blocks, each a float16 and so many signed bytes that it is multiplied with.
_Q8_0, _BLOCK = 8, 32


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do.

    Raises:
        AdapterError: it cannot be read.
    """
    with within(path):
        return path.is_file() and start_of(path, len(MAGIC)) == MAGIC


def read_gguf_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file, memory-mapped in its own dtype; Q8_0 as float32.

    Raises:
        AdapterError: names the file, the tensor and what is wrong with it.
    """
    check_plain(path)
    with within(path):
        tensors = _Header(path).tensors()
        check_tensors(tensors)
    return tensors


def read_gguf_values(path: Path) -> dict[str, str]:
    """The values beside the tensors: texts as they are, numbers and lists of such as JSON.

    Raises:
        AdapterError: names the file and what is wrong with its header.
    """
    check_plain(path)
    with within(path):
        return _Header(path).values


def read_gguf_names(path: Path) -> list[str]:
    """The names of the tensors, from the header alone.

    Raises:
        AdapterError: names the file and what is wrong with its header.
    """
    check_plain(path)
    with within(path):
        return [name for name, *_ in _Header(path).entries]


class _Header:
    """A header, read from its first byte to its last."""

    def __init__(self, path: Path) -> None:
        self.data = numpy.memmap(path, numpy.uint8, "c")
        self.at = len(MAGIC)
        (version,) = self._take("I")
        if version not in VERSIONS:
            raise AdapterError(f"GGUF of version {version}, expected 2 or 3: convert it again")
        tensors, values = self._take("QQ")
        if max(tensors, values) > MAX_TENSORS:
            raise AdapterError(f"{tensors} tensors and {values} values, expected {MAX_TENSORS}")
        self.values: dict[str, str] = {}
        for _ in range(values):
            name = self._text()
            self._once(name, self.values)
            (kind,) = self._take("I")
            value = self._value(kind)
            self.values[name] = value if isinstance(value, str) else json.dumps(value)
        self.entries = [self._entry() for _ in range(tensors)]
        step = self.values.get("general.alignment", "32")
        if step not in _STEPS:
            raise AdapterError(f"general.alignment is {step:.80}, expected a power of two")
        self.step = int(step)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors, which follow each other without holes."""
        found: dict[str, torch.Tensor] = {}
        expected = self._aligned(self.at)
        start = expected
        for name, shape, kind, offset in self.entries:
            self._once(name, found)
            with within(f"tensor {name!r:.80}"):
                if start + offset != expected:
                    raise AdapterError(f"begins at {offset}, expected {expected - start}")
                size = _size(shape, kind)
                if expected + size > len(self.data):
                    raise AdapterError(f"ends at {expected + size}, the file at {len(self.data)}")
                found[name] = _tensor(self.data[expected : expected + size], shape, kind)
                expected = self._aligned(expected + size)
        return found

    def _aligned(self, place: int) -> int:
        return -(-place // self.step) * self.step

    def _take(self, letters: str) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{letters}")
        return struct.unpack(f"<{letters}", self._bytes(size))

    def _bytes(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise AdapterError(f"{len(self.data)} bytes, which end within its header")
        self.at += size
        return self.data[self.at - size : self.at].tobytes()

    def _text(self) -> str:
        (size,) = self._take("Q")
        try:
            return self._bytes(size).decode()
        except UnicodeDecodeError as error:
            raise AdapterError(f"a text of its header is not UTF-8: {error}") from error

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind in _PACKED:
            return self._take(_PACKED[kind])[0]
        if kind != _LIST:
            raise AdapterError(f"a value of type {kind} in its header, expected 0 to 12")
        inner, count = self._take("IQ")
        if inner == _TEXT:  # a tokenizer's
            return [self._text() for _ in range(min(count, len(self.data)))]
        if inner not in _PACKED:
            raise AdapterError(f"a list of type {inner} in its header, expected numbers or texts")
        packed = numpy.dtype(f"<{_PACKED[inner]}")
        return numpy.frombuffer(self._bytes(count * packed.itemsize), packed).tolist()

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """The name, the shape, the code of the type, and where the bytes begin."""
        name, (axes,) = self._text(), self._take("I")
        if axes > MAX_DIMS:
            raise AdapterError(f"tensor {name!r:.80}: {axes} axes, expected at most {MAX_DIMS}")
        shape = self._take("Q" * axes)[::-1]
        check_gathered(name, shape)
        kind, offset = self._take("IQ")
        return name, shape, kind, offset

    @staticmethod
    def _once(name: str, found: dict[str, Any]) -> None:
        if name in found:
            raise AdapterError(f"{name!r:.80} is there twice")


def _size(shape: tuple[int, ...], kind: int) -> int:
    """How many bytes a tensor has."""
    if kind in _PLAIN:
        return math.prod(shape) * _PLAIN[kind].itemsize
    if kind != _Q8_0 or not shape or shape[-1] % _BLOCK:
        raise AdapterError(
            f"{shape} of type {kind}, expected F32, F16, BF16, or Q8_0 with rows of whole blocks: "
            "convert it again, to F32"
        )
    return math.prod(shape) // _BLOCK * (_BLOCK + 2)


def _tensor(data: numpy.ndarray[Any, Any], shape: tuple[int, ...], kind: int) -> torch.Tensor:
    whole = torch.from_numpy(data)
    if kind in _PLAIN:
        return whole.view(_PLAIN[kind]).reshape(shape)
    blocks = whole.reshape(-1, _BLOCK + 2)
    scale = blocks[:, :2].contiguous().view(torch.float16)
    return (scale.float() * blocks[:, 2:].view(torch.int8)).reshape(shape)
