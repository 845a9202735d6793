from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_ir.tensor_adapters import TorchTensor

from lora_fx.export.onnx_model.digested_writes import Watched


@pytest.mark.parametrize(
    "tensor",
    [
        TorchTensor(torch.randn(5, 3)),
        TorchTensor(torch.randn(600, 500)),  # digested beside the writing
        TorchTensor(torch.randn(7, 3).bfloat16()),
        TorchTensor(torch.randn(5, 3).t()),
        ir.tensor(np.arange(6).reshape(2, 3)),
        ir.tensor(np.ones((2, 3), ml_dtypes.bfloat16)),
    ],
)
def test_the_digest_is_of_what_lies_in_the_file(tensor: ir.TensorProtocol, tmp_path: Path) -> None:
    watched = Watched(tensor, "x")
    assert (watched.name, watched.shape, watched.nbytes) == ("x", tensor.shape, tensor.nbytes)
    with (tmp_path / "data").open("wb") as file:
        watched.tofile(file)
    content = (tmp_path / "data").read_bytes()
    assert content == tensor.tobytes()
    start = f"{int(tensor.dtype)}:{tuple(tensor.shape.numpy())}:".encode()
    assert watched.digest == hashlib.sha256(start + content).hexdigest()[:32]


class Reused(TorchTensor):
    """A tensor whose memory goes to the next, as that of a lazy one does."""

    def tofile(self, file: Any) -> None:
        super().tofile(file)
        self.raw.zero_()


def test_what_was_written_may_be_gone_at_once() -> None:
    nowhere: Any = SimpleNamespace(write=len)
    held = Watched(Reused(torch.ones(3000, 2000)), "x")
    held.tofile(nowhere)
    alone = Watched(TorchTensor(torch.ones(3000, 2000)), "x")
    alone.tofile(nowhere)
    assert held.digest == alone.digest
