"""The tensors that a model file holds, by name, and what its graph calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from lora_fx.export.onnx_model.changed_file import check_digests
from lora_fx.export.onnx_model.external_data import check_external_data
from lora_fx.export.onnx_model.model_file import load_proto
from lora_fx.export.onnx_model.parsed import parsed_file
from lora_fx.export.onnx_model.tensors import to_torch


class Stored(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: name -> what reads it.
        calls: operator -> how many there are.
    """

    tensors: Mapping[str, Callable[[], torch.Tensor]]
    calls: Mapping[str, int]


def tensors_in(path: Path) -> Stored:
    """Opens a file; no tensor is read yet.

    Raises:
        LoraFxError: it is missing, damaged, or not what was exported.
    """
    proto = load_proto(path)
    check_external_data(proto, path)
    check_digests(proto, path)
    graph = parsed_file(path).graph
    held = {str(name): value.const_value for name, value in graph.initializers.items()}
    tensors = {name: partial(to_torch, value) for name, value in held.items() if value is not None}
    return Stored(tensors, Counter(node.op_type for node in graph))
