"""Tensors as bits and digests, on their way into files and out of them."""

from __future__ import annotations

import hashlib
from itertools import chain, count
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from lora_fx.graph.lazy_tensor import LazyTensor, evaluate


def digest_of(weight: torch.Tensor | LazyTensor) -> str:
    """A digest of a tensor: dtype, shape and bytes."""
    value = evaluate(weight)
    digest = hashlib.blake2b(f"{value.dtype}:{tuple(value.shape)}:".encode(), digest_size=16)
    # The last axis of a turned row, (n, 1), has a stride that no other dtype can be seen through.
    values: Any = value.cpu().contiguous().unsqueeze(-1).view(torch.uint8).numpy()
    digest.update(values)
    return digest.hexdigest()


def add_constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Puts a tensor into a graph.

    Args:
        graph: of a model, or of a branch or loop in it.
        name: of the constant; where it is taken, with a number behind, which still tells the layer.
        tensor: its values.
    """
    names = chain([name], (f"{name}_{number}" for number in count(1)))
    free = next(name for name in names if name not in graph.initializers)
    return ir.tape.Tape(graph).initializer(tensor, free)


def to_torch(tensor: ir.TensorProtocol) -> torch.Tensor:
    """A tensor of an ONNX model, bit for bit."""
    return array_to_torch(tensor.numpy(), tensor.dtype)


def array_to_torch(array: np.ndarray[Any, Any], dtype: ir.DataType) -> torch.Tensor:
    """The values of a tensor of an ONNX model, or some of them, bit for bit: a copy.

    Those of less than a byte are wider ones, and texts are their bytes.
    """
    if dtype is ir.DataType.STRING:
        words = [word if isinstance(word, bytes) else str(word).encode() for word in array.flat]
        return torch.tensor([*b"\0".join(words)], dtype=torch.uint8)
    if dtype.bitwidth < 8:  # torch computes with no such numbers
        array = array.astype(np.float32 if dtype.is_floating_point() else np.int8)
    name = "bfloat16" if dtype is ir.DataType.BFLOAT16 else array.dtype.name
    if name.startswith(("bfloat", "float8")):  # numpy's are not torch's
        bits = torch.from_numpy(np.array(array).view(f"i{array.itemsize}"))
        return bits.view(getattr(torch, name))
    return torch.from_numpy(np.array(array))


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor's values; those of bfloat16, which numpy has not, as bits."""
    tensor = tensor.detach().cpu()
    return tensor.view(torch.uint16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()
