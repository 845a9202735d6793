"""Layers of a graph with their weights in a few bits, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from lora_fx.errors import ExportError, VerificationError, shorten
from lora_fx.export.onnx_model.tensor_protos import MICROSOFT
from lora_fx.export.onnx_model.tensors import add_constant, array_to_torch, digest_of
from lora_fx.export.quantization.choose_layers import A_HEAD, Chosen
from lora_fx.export.quantization.schemes import Packed, Scheme
from lora_fx.export.rewriting.dequantize import LOOKUP, weight_and_step
from lora_fx.export.rewriting.file_layers import FileLayer
from lora_fx.export.rewriting.insert_slots import add_behind, as_called
from lora_fx.export.rewriting.weight_reads import input_at
from lora_fx.export.slots.manifest import KEY, read_manifest
from lora_fx.export.slots.slot import AnySlot

Array = np.ndarray[Any, Any]
_ROUNDING = 1.01  # of a step, which itself is rounded


@dataclass(frozen=True)
class _Stored:
    """A weight in a few bits, which a product and a lookup may share.

    Attributes:
        packed: how it is stored.
        turned: whether it was read (in, out).
        is_same: whether its numbers are what it was.
        off: how far it is off, relative.
        digests: of the weight -> of its numbers.
    """

    packed: Packed
    turned: bool
    is_same: bool
    off: float
    digests: Mapping[str, str]


def quantise(
    model: ir.Model, scheme: Scheme, chosen: Chosen
) -> tuple[dict[str, float], dict[str, str]]:
    """Stores the weights of some layers in a few bits; what a manifest says of them stays true.

    Before -> after: ``MatMul(x, W)  ->  MatMulNBits(x, W_Q4, W_scales, W_zero_points)``,
    ``Gemm(x, W, b)  ->  Add(MatMulNBits(x, ...), b)``, and ``Gather(W, ids)  ->
    GatherBlockQuantized(W_Q4, ids, W_scales, W_zero_points)``, of ``Reshape(W_Q4)`` where a product
    reads the same blocks. Weights are read one after the other, and held in their few bits.

    Returns:
        Path -> how far its weight is off, relative; path -> why it stays as it is.

    Raises:
        ExportError: a weight is not finite, or none is quantised by a scheme that takes any.
        VerificationError: a weight is off by more than what lies between two of its numbers.
    """
    manifest = read_manifest(model.metadata_props)
    stored: dict[ir.Value, _Stored] = {}
    held: dict[ir.Value, list[ir.Value]] = {}  # of what is stored
    digests: dict[bool, dict[str, str]] = {True: {}, False: {}}  # by whether it is a table's
    errors, left = {}, dict(chosen.left)
    multiplied = {c[0].weight for c in chosen.layers.values() if c[0].kind != "embedding"}
    for path, calls in chosen.layers.items():
        first, is_table = calls[0], calls[0].kind == "embedding"
        if first.weight not in stored:
            stored[first.weight] = _store(path, first, scheme, digested=manifest is not None)
        found = stored[first.weight]
        if why := _why_not(found, first, scheme):
            left[path] = why
            continue
        errors[path] = found.off
        digests[is_table] |= found.digests
        if first.weight not in held:
            held[first.weight] = [
                add_constant(model.graph, f"{first.weight.name}{end}", ir.tensor(array))
                for end, array in _tensors(found.packed, first.weight in multiplied)
            ]
        nodes, write = [call.node for call in calls], _look_up if is_table else _multiply
        write(nodes, found.packed, held[first.weight])
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


def _store(path: str, layer: FileLayer, scheme: Scheme, *, digested: bool) -> _Stored:
    own = _matrix(layer)
    if wrong := int((~np.isfinite(own)).sum()):
        raise ExportError(f"{path}: {wrong} of {own.size} weights are NaN or infinite")
    packed = scheme.pack(own)
    numbers, step = _read(packed)
    is_same = np.array_equal(numbers, own)
    off = 0.0 if is_same or scheme.is_exact else error_of(path, own, numbers, step)
    digests = _digests(own, numbers) if digested else {}
    return _Stored(packed, layer.turned, is_same, off, digests)


def _tensors(packed: Packed, is_multiplied: bool) -> list[tuple[str, Array]]:
    """What is stored: in blocks for a product, in rows where lookups alone read it."""
    every = packed.tensors.items()
    return [(end, a if is_multiplied else a.reshape(len(a), -1)) for end, a in every]


def _why_not(stored: _Stored, layer: FileLayer, scheme: Scheme) -> str:
    """Why a layer cannot read what is stored; nothing if it can."""
    if scheme.is_exact and not stored.is_same:
        return f"its numbers are not all of {scheme}: merged, trained or cast"
    if layer.turned != stored.turned:
        return "its weight is read turned round too"
    if layer.kind == "embedding" and stored.packed.lookup is None:
        return f"onnxruntime looks up no rows of {layer.shape[0]} in {scheme}"
    return ""


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


def _read(packed: Packed) -> tuple[Array, Array]:
    """What a node multiplies with, read as any file's is."""
    inputs = [ir.val(end, const_value=ir.tensor(array)) for end, array in packed.tensors.items()]
    node = ir.node(packed.operator, [None, *inputs], packed.attributes, domain=MICROSOFT)
    return weight_and_step(node)


def _look_up(nodes: Sequence[ir.Node], packed: Packed, inputs: Sequence[ir.Value]) -> None:
    """Makes nodes look up rows of a weight in a few bits, whose blocks a head may read."""
    numbers, *rest = inputs
    graph, stored = numbers.graph, numbers.const_value
    assert isinstance(graph, ir.Graph)
    assert packed.lookup is not None
    assert stored is not None
    if len(stored.shape) > 2:
        whole = ir.tensor(np.array([0, -1], np.int64), name="rows")
        shape = ir.node("Constant", [], {"value": whole}, name=as_called(nodes[0], "Constant"))
        rows = ir.node("Reshape", [numbers, shape.outputs[0]], name=as_called(nodes[0], "Reshape"))
        graph.insert_before(graph[0], [shape, rows])  # a call may be in a branch
        numbers = rows.outputs[0]
    for node in nodes:
        _call(node, LOOKUP, packed.lookup, [numbers, node.inputs[1], *rest])


def _multiply(nodes: Sequence[ir.Node], packed: Packed, inputs: Sequence[ir.Value]) -> None:
    """Makes nodes multiply with a weight in a few bits; a bias is added behind."""
    for node in nodes:
        bias = input_at(node, 2)
        _call(node, packed.operator, packed.attributes, [node.inputs[0], *inputs])
        if bias is not None:
            add_behind(node, bias)


def _call(
    node: ir.Node, kind: str, attributes: Mapping[str, int], inputs: Sequence[ir.Value | None]
) -> None:
    node.name = as_called(node, kind)
    node.domain, node.op_type = MICROSOFT, kind
    node.attributes.clear()
    for name, size in attributes.items():
        node.attributes[name] = ir.AttrInt64(name, size)
    node.resize_inputs(len(inputs))
    for place, value in enumerate(inputs):
        node.replace_input_with(place, value)


def _digests(own: Array, numbers: Array) -> dict[str, str]:
    """Digest of a weight -> of its numbers, both ways round that a model may store it."""
    pairs = ((own, numbers), (own.T, numbers.T))
    return {_digest(before): _digest(after) for before, after in pairs}


def _digest(array: Array) -> str:
    return digest_of(
        array_to_torch(np.ascontiguousarray(array), ir.DataType.from_numpy(array.dtype))
    )


def _of_base(slot: AnySlot, digests: Mapping[bool, Mapping[str, str]]) -> AnySlot:
    """A slot of the numbers: of the two that share a weight one may stay as it is."""
    own = digests[slot.kind == "embedding"]
    return replace(slot, digest=own.get(slot.digest, slot.digest))
