"""Tensors that are digested while they are written, so that each is computed once."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from lora_fx.export.onnx_model.digests import short, start

_LARGE = 1 << 16  # bytes that are worth a thread


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
        """Writes the bytes, and keeps their digest, which is taken beside the writing."""
        digest = start(int(self.dtype), self.shape.numpy())
        with ThreadPoolExecutor(1) as beside:
            followed = _Followed(file, digest, beside)
            super().tofile(followed)
            followed.wait()
        self.digest = short(digest)


class _Followed:
    """A file that a digest follows, one piece behind: no piece may change once it is written."""

    def __init__(self, file: BinaryIO, digest: Any, beside: ThreadPoolExecutor) -> None:
        self._file, self._digest, self._beside = file, digest, beside
        self._last: Future[None] | None = None

    def write(self, data: Any) -> int:
        content: Any = np.frombuffer(data, np.uint8)  # flat, which ctypes' arrays are not
        self.wait()
        if content.nbytes < _LARGE:
            self._digest.update(content)
        else:
            self._last = self._beside.submit(self._digest.update, content)
        self._file.write(content)
        return len(content)

    def wait(self) -> None:
        """Until all that was written is in the digest."""
        if self._last is not None:
            self._last.result()
            self._last = None
