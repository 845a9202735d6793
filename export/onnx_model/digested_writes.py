"""Tensors that are digested while they are written, so that each is computed once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from lora_fx.export.onnx_model.digests import short, start

_LARGE = 1 << 20  # bytes that are worth a thread: the digest is taken beside the writing


class Watched(ir.LazyTensor):
    """A tensor that knows its digest once it was written to a file.

    Args:
        tensor: what is written.
    """

    def __init__(self, tensor: ir.TensorProtocol, name: str | None) -> None:
        shape = ir.Shape(tensor.shape.numpy())
        super().__init__(lambda: tensor, dtype=tensor.dtype, shape=shape, name=name)
        self.digest = ""

    def tofile(self, file: BinaryIO) -> None:
        """Writes the bytes, and keeps their digest."""
        digest = start(int(self.dtype), self.shape.numpy())
        super().tofile(_Both(file, digest))
        self.digest = short(digest)


class _Both:
    """A file that a digest follows."""

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file = file
        self._digest = digest

    def write(self, data: Any) -> int:
        content: Any = np.frombuffer(data, np.uint8)  # flat, which ctypes' arrays are not
        if content.nbytes < _LARGE:
            self._digest.update(content)
            self._file.write(content)
            return len(content)
        with ThreadPoolExecutor(1) as beside:
            digested = beside.submit(self._digest.update, content)
            self._file.write(content)
            digested.result()
        return len(content)
