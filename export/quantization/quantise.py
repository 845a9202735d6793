"""Linear layers of a graph with their weights in a few bits, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from lora_fx.errors import ExportError, VerificationError, shorten
from lora_fx.export.onnx_model.tensor_protos import MICROSOFT
from lora_fx.export.onnx_model.tensors import add_constant, array_to_torch, digest_of
from lora_fx.export.quantization.choose_layers import A_HEAD, Chosen
from lora_fx.export.quantization.schemes import Packed, Scheme
from lora_fx.export.rewriting.dequantize import weight_and_step
from lora_fx.export.rewriting.file_layers import FileLayer
from lora_fx.export.rewriting.insert_slots import add_behind
from lora_fx.export.rewriting.weight_reads import input_at
from lora_fx.export.slots.manifest import KEY, read_manifest
from lora_fx.export.slots.slot import AnySlot

Array = np.ndarray[Any, Any]
_ROUNDING = 1.01  # of a step, which itself is rounded


def quantise(
    model: ir.Model, scheme: Scheme, chosen: Chosen
) -> tuple[dict[str, float], dict[str, str]]:
    """Stores the weights of some layers in a few bits; what a manifest says of them stays true.

    Before -> after: ``MatMul(x, W)  ->  MatMulNBits(x, W_Q4, W_scales, W_zero_points)``, and
    ``Gemm(x, W, b)  ->  Add(MatMulNBits(x, ...), b)``. Weights are read one after the other, and
    held in their few bits.

    Returns:
        Path -> how far its weight is off, relative; path -> why it stays as it is.

    Raises:
        ExportError: a weight is not finite, or none is quantised by a scheme that takes any.
        VerificationError: a weight is off by more than what lies between two of its numbers.
    """
    manifest = read_manifest(model.metadata_props)
    digests: dict[str, str] = {}
    errors, left = {}, dict(chosen.left)
    for path, calls in chosen.layers.items():
        own = _matrix(calls[0])
        if wrong := int((~np.isfinite(own)).sum()):
            raise ExportError(f"{path}: {wrong} of {own.size} weights are NaN or infinite")
        packed = scheme.pack(own)
        inputs = _inputs(packed, str(calls[0].weight.name))
        numbers, step = _read(packed, inputs)
        if scheme.is_exact and not np.array_equal(numbers, own):
            left[path] = f"its numbers are not all of {scheme}: merged, trained or cast"
            continue
        errors[path] = error_of(path, own, numbers, step)
        digests |= _digests(own, numbers) if manifest is not None else {}
        held = [
            add_constant(model, str(value.name), value.const_value)
            for value in inputs
            if value.const_value is not None
        ]
        for call in calls:
            _store(call.node, packed, held)
    if not errors and not scheme.is_exact:
        reasons = [f"{path}: {why}" for path, why in left.items()]
        asks = "; layers= asks for heads too" if A_HEAD in left.values() else ""
        raise ExportError(f"no layer is quantised: {shorten(reasons) or 'none is linear'}{asks}")
    if manifest is not None:
        slots = tuple(_of_base(slot, digests) for slot in manifest.slots)
        model.metadata_props[KEY] = replace(manifest, slots=slots).to_json()
    if errors:
        model.opset_imports[MICROSOFT] = 1
    ir.passes.Sequential(common.RemoveUnusedNodesPass(), common.NameFixPass())(model)
    return errors, left


def error_of(path: str, own: Array, numbers: Array, step: Array) -> float:
    """How far a weight is off the one that it stands for: the norm of that over its own.

    Raises:
        VerificationError: by more than what lies between two numbers somewhere, or by no number.
    """
    wide = own.astype(np.float32)
    gap = np.abs(wide - numbers.astype(np.float32))
    rounding = np.abs(wide) * np.finfo(own.dtype).eps
    wrong = int((~(gap <= step * _ROUNDING + rounding)).sum())
    if wrong:
        raise VerificationError(
            f"{path}: {wrong} of {own.size} weights are off by more than what lies between two "
            "numbers of their block: are these the weights of another layer, or of another model?"
        )
    return float(np.linalg.norm(gap) / (np.linalg.norm(wide) or 1.0))


def _matrix(layer: FileLayer) -> Array:
    """W (in, out), as the file has it."""
    tensor = layer.weight.const_value
    assert tensor is not None
    stored = tensor.numpy()
    return np.ascontiguousarray(stored if layer.turned else stored.T)


def _inputs(packed: Packed, name: str) -> list[ir.Value]:
    """The constants of a node, called after the weight as onnxruntime calls them."""
    made = []
    for end, array in packed.tensors.items():
        tensor = ir.tensor(array, name=f"{name}{end}")
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
        made.append(ir.Value(name=tensor.name, const_value=tensor, shape=shape, type=kind))
    return made


def _read(packed: Packed, inputs: Sequence[ir.Value]) -> tuple[Array, Array]:
    """What a node multiplies with, read as any file's is."""
    node = ir.node(packed.operator, [None, *inputs], packed.attributes, domain=MICROSOFT)
    found = weight_and_step(node)
    node.resize_inputs(0)
    return found


def _store(node: ir.Node, packed: Packed, inputs: Sequence[ir.Value]) -> None:
    """Makes a node multiply with a weight in a few bits; a bias is added behind."""
    bias = input_at(node, 2)
    node.name = f"{str(node.name).removesuffix(node.op_type)}{packed.operator}"
    node.domain, node.op_type = MICROSOFT, packed.operator
    node.attributes.clear()
    for name, size in packed.attributes.items():
        node.attributes[name] = ir.AttrInt64(name, size)
    node.resize_inputs(1 + len(inputs))
    for place, value in enumerate(inputs):
        node.replace_input_with(1 + place, value)
    if bias is not None:
        add_behind(node, bias)


def _digests(own: Array, numbers: Array) -> dict[str, str]:
    """Digest of a weight -> of its numbers, both ways round that a model may store it."""
    pairs = ((own, numbers), (own.T, numbers.T))
    return {_digest(before): _digest(after) for before, after in pairs}


def _digest(array: Array) -> str:
    return digest_of(
        array_to_torch(np.ascontiguousarray(array), ir.DataType.from_numpy(array.dtype))
    )


def _of_base(slot: AnySlot, digests: Mapping[str, str]) -> AnySlot:
    if slot.kind == "embedding":  # its table stays as it is, though a head may share it
        return slot
    return replace(slot, digest=digests.get(slot.digest, slot.digest))
