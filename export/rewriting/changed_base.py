"""The base file with W' in its weights, made without slots: what the slots are verified against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from lora_fx.export.onnx_model.tensors import add_constant, to_torch
from lora_fx.export.rewriting.dequantize import dequantise
from lora_fx.export.rewriting.file_layers import DTYPES, FileLayer, layers_in
from lora_fx.export.rewriting.merged_tensor import MergedTensor
from lora_fx.export.rewriting.slot_change import changes_of
from lora_fx.export.rewriting.weight_reads import Read, read_another, source_of
from lora_fx.export.slots.slot import AnySlot

# Path -> the calls of its layer, each by its number among the layers of the file.
Opened = Mapping[str, Mapping[int, FileLayer]]


def put_in_weights(
    model: ir.Model, slots: Sequence[AnySlot], opened: Opened, values: Mapping[str, torch.Tensor]
) -> None:
    """Gives each call of some layers W' in place of W, in place; a quantised one as numbers.

    Args:
        model: the base.
        slots: of the layers.
        opened: their calls in the file.
        values: of the slots, by the names of their inputs.
    """
    calls = [number for slot in slots for number in opened[slot.path]]
    every = list(layers_in(model))
    dequantise(model, [every[number].node for number in calls if every[number].quantised])
    every = list(layers_in(model))
    for slot in slots:
        changes = changes_of(slot, values)
        assert changes is not None
        for number in opened[slot.path]:
            layer = every[number]
            name = f"{slot.path}_{number}_changed"
            made = MergedTensor(_as_read(layer), _axes(layer), changes, name)
            value = add_constant(model.graph, name, made)
            read_another(Read(layer.node, _place(layer), layer.weight, None), value)


def _as_read(layer: FileLayer) -> ir.TensorProtocol:
    """A weight in the type that its layer computes with, whatever the file stores it in."""
    stored = layer.weight.const_value
    assert stored is not None
    dtype: torch.dtype = getattr(torch, layer.dtype)
    own = DTYPES.get(stored.dtype)
    return stored if own == layer.dtype else TorchTensor(to_torch(stored).to(dtype))


def _axes(layer: FileLayer) -> tuple[str, ...]:
    names = ["out", "in", *(f"k{place}" for place in range(len(layer.shape) - 2))]
    if layer.turned ^ (layer.kind == "embedding"):
        names[:2] = names[1::-1]
    return tuple(names)


def _place(layer: FileLayer) -> int:
    sources = [None if value is None else source_of(value)[0] for value in layer.node.inputs]
    return sources.index(layer.weight)
