"""Slots that another exporter left open, known by what their graph does and by their names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx import ModelProto

from lora_fx.adapters.adapter import Adapter
from lora_fx.errors import AdapterError, ExportError
from lora_fx.export.onnx_model.parsed import parsed
from lora_fx.export.rewriting.weight_reads import turns
from lora_fx.export.slots.manifest import DTYPES, KEY, Manifest
from lora_fx.export.slots.slot import Input, Slot
from lora_fx.numerics import widened

# ``model.layers.0.attn.q_proj.lora_A.MatMul.weight`` of onnxruntime-genai's builder, and Olive's
# ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight``, or less of it.
_NAME = re.compile(
    r"(?P<path>.+?)[./]lora_(?P<side>[AB])(\.(?!MatMul|Gemm|weight)\w+)?(\.(MatMul|Gemm))?(\.weight)?"
)
_ATTENTION, _BUILDER = re.compile(r"\bself_attn\b"), "onnxruntime-genai"
_PARTS = {"A": "down", "B": "up"}
_PASSED = {"Cast", "Dropout", "Identity"}
Values = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ForeignSlot(Slot):
    """A linear layer's factors, as another exporter calls and stores them.

    Attributes:
        down_name: of the input that takes A.
        up_name: of the input that takes B.
        turned: the parts, ``down`` and ``up``, that are stored as PEFT has them, (r, in), (out, r).
        rank: that the graph is made for; 0 for any.
        rank_name: what an open one is called: slots that call it alike have one rank.
        scale: that the graph multiplies the branch by.
    """

    down_name: str = ""
    up_name: str = ""
    turned: tuple[str, ...] = ()
    rank: int = 0
    rank_name: str = ""
    scale: float = 1.0
    is_ours = False

    @property
    def inputs(self) -> dict[str, Input]:
        """A and B, by their names."""
        sizes = {
            "down": (self.in_features, self.rank or None),
            "up": (self.rank or None, self.out_features),
        }
        names = {"down": self.down_name, "up": self.up_name}
        return {
            part: Input(names[part], shape[::-1] if part in self.turned else shape)
            for part, shape in sizes.items()
        }

    def as_input(self, part: str, value: torch.Tensor) -> torch.Tensor:
        """A factor as the graph takes it: without its scale, and with zeros up to its rank."""
        axis = part == "down"
        rank = value.shape[axis]
        if self.rank and rank > self.rank:
            raise AdapterError(
                f"{self.path}: rank {rank}, and the file takes {self.rank} and no other: "
                f"adapter.to_rank({self.rank}), or merge it into the model itself"
            )
        if part == "up":
            value = (widened(value) / self.scale).to(value.dtype)
        if self.rank:
            value = _padded(value, axis, self.rank)
        return (value.T if part in self.turned else value).contiguous()

    def widened(self, values: Values, rank: int) -> dict[str, torch.Tensor]:
        """What goes into its inputs, with zeros up to a rank."""
        axes = {p: (p == "down") ^ (p in self.turned) for p in self.inputs}
        return {v.name: _padded(values[v.name], axes[p], rank) for p, v in self.inputs.items()}

    def from_input(self, part: str, value: torch.Tensor) -> torch.Tensor:
        """A factor as ours are: (in, r) and (r, out), which with its scale is all that is added."""
        own = value.T if part in self.turned else value
        return own * self.scale if part == "up" else own

    def rank_of(self, down: torch.Tensor) -> int:
        """The rank of what goes in, which a file of one rank alone takes with zeros behind it."""
        return self.from_input("down", down).shape[1]


def _padded(value: torch.Tensor, axis: int, rank: int) -> torch.Tensor:
    missing = rank - value.shape[axis]
    return torch.nn.functional.pad(value, [0, missing] if axis else [0, 0, 0, missing])


def of_one_rank(values: Values, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Values for slots whose ranks a file calls alike, which onnxruntime holds it to.

    Args:
        values: of all slots, by the names of their inputs; a slot that is left alone has no rank.
        manifest: of the file.
    """
    found, alike = dict(values), dict[str, list[ForeignSlot]]()
    for slot in manifest.slots:
        if isinstance(slot, ForeignSlot) and slot.rank_name:
            alike.setdefault(slot.rank_name, []).append(slot)
    for slots in alike.values():
        rank = max(slot.rank_of(values[slot.down_name]) for slot in slots)
        for slot in slots:
            found |= slot.widened(values, rank)
    return found


def foreign_manifest(model: ModelProto, strict: bool = False) -> Manifest | None:
    """The slots of a file without a manifest, in the order of its inputs; None if it has none.

    Args:
        model: the model.
        strict: refuse what is called as a slot and is none; else it is passed over.

    Raises:
        ExportError: under ``strict``, names the input and what its graph does with it.
    """
    named = {
        value.name: match for value in model.graph.input if (match := _NAME.fullmatch(value.name))
    }
    if not named:
        return None
    inputs = {str(value.name): value for value in parsed(model).graph.inputs}
    pairs: dict[str, dict[str, ir.Value]] = {}
    for name, match in named.items():
        pairs.setdefault(match["path"], {})[_PARTS[match["side"]]] = inputs[name]
    found = []
    for path, parts in pairs.items():
        try:
            found.append(_slot(path, parts))
        except ExportError:
            if strict:
                raise
    return Manifest(tuple(found)) if found else None


def fitted_names(adapter: Adapter, manifest: Manifest) -> Adapter:
    """An adapter with its paths as a file calls them: ``self_attn`` is ``attn`` to some.

    Raises:
        AdapterError: two layers of the adapter would be one.
    """
    if manifest.is_ours:
        return adapter
    paths = [slot.path for slot in manifest.slots]
    known: dict[str, list[str]] = {}
    for path in paths:
        known.setdefault(_plain(path), []).append(path)
    updates = {}
    for path, update in adapter.updates.items():
        same = known.get(_plain(path), [])
        name = same[0] if path not in paths and len(same) == 1 else path
        if name in updates:
            raise AdapterError(f"{path}: {name} of the file is another layer's of the adapter too")
        updates[name] = update
    return replace(adapter, updates=updates)


def as_builder_calls(adapter: Adapter, manifest: Manifest, model: Path) -> Adapter:
    """An adapter for a file of onnxruntime-genai's builder, where ``self_attn`` is ``attn``.

    Slots that were put in later bear the names that its weights have.
    """
    paths = [slot.path for slot in manifest.slots]
    updates = {_ATTENTION.sub("attn", path): update for path, update in adapter.updates.items()}
    is_other = updates.keys() != adapter.updates.keys() and len(updates) == len(adapter.updates)
    if not is_other or any(map(_ATTENTION.search, paths)) or not any("attn" in p for p in paths):
        return adapter
    producer = onnx.load(str(model), load_external_data=False).producer_name
    return replace(adapter, updates=updates) if producer == _BUILDER else adapter


def _plain(path: str) -> str:
    """A module path without what exporters change in it."""
    bare = re.sub(r"^(base_model\.|model\.)+", "", path.replace("/", "."))
    return _ATTENTION.sub("attn", bare)


def _slot(path: str, parts: Mapping[str, ir.Value]) -> ForeignSlot:
    if parts.keys() != {"down", "up"}:
        found = ", ".join(str(value.name) for value in parts.values())
        raise ExportError(f"{path}: half of a pair of inputs: {found}; expected lora_A and lora_B")
    sizes, turned = {}, []
    for part, value in parts.items():
        is_turned = _product(path, value)[1]
        sizes[part] = _sizes(path, value)
        if is_turned:
            turned.append(part)
            sizes[part] = sizes[part][::-1]
    (into, low), (high, out) = sizes["down"], sizes["up"]
    if not into or not out or (low and high and low != high):
        raise ExportError(f"{path}: inputs of shapes {sizes}: expected (in, r) and (r, out)")
    dtype = str(parts["up"].dtype.name).lower() if parts["up"].dtype is not None else ""
    known = {"float": "float32", "double": "float64"}.get(dtype, dtype)
    if known not in DTYPES:
        raise ExportError(f"{path}: inputs of {dtype}, expected one of {', '.join(DTYPES)}")
    return ForeignSlot(
        path, "linear", into, out, known, turned=tuple(turned), rank=low or high or 0,
        rank_name=_rank_name(parts["up"], "up" in turned),
        scale=_scale(path, parts["down"], parts["up"]),
        down_name=str(parts["down"].name), up_name=str(parts["up"].name),
    )  # fmt: skip


def _sizes(path: str, value: ir.Value) -> tuple[int, int]:
    """Of a factor; 0 where a size is open."""
    shape = [] if value.shape is None else list(value.shape)
    if len(shape) != 2:
        raise ExportError(f"{path}: input {value.name} is of shape {shape}, expected two axes")
    one, other = (size if isinstance(size, int) else 0 for size in shape)
    return one, other


def _rank_name(up: ir.Value, is_turned: bool) -> str:
    """What B's rank is called, where it is open; nothing if it is not."""
    size = up.shape[int(is_turned)] if up.shape is not None else None
    return str(size.value or "") if isinstance(size, ir.SymbolicDim) else ""


def _product(path: str, value: ir.Value) -> tuple[ir.Node, bool]:
    """The node that multiplies with a factor, and whether it does with its transpose."""
    turned = False
    while True:
        uses = list(value.uses())
        node = uses[0].node if len(uses) == 1 else None
        if node is None or node.op_type not in (*_PASSED, "Transpose", "MatMul", "Gemm"):
            found = ", ".join(use.node.op_type for use in uses) or "nothing"
            raise ExportError(
                f"{path}: input {value.name} goes into {found}, expected a MatMul: slots of other "
                f"layers than linear ones are told by a file's metadata {KEY}, which some tools "
                "drop: put back what it was before"
            )
        if node.op_type in ("MatMul", "Gemm") and uses[0].idx == 1:
            return node, turned ^ bool(node.attributes.get_int("transB", 0))
        if node.op_type in ("MatMul", "Gemm"):
            raise ExportError(f"{path}: input {value.name} is multiplied from the left")
        turned ^= turns(node)
        value = node.outputs[0]


def _scale(path: str, down: ir.Value, up: ir.Value) -> float:
    """What a graph multiplies a branch by, from A to the sum with its layer."""
    first, last = _product(path, down)[0], _product(path, up)[0]
    total = _factor(first, "alpha")
    for node, place in _chain(first.outputs[0]):
        if node.op_type == "Gemm" and place == 2:
            return total * _factor(node, "beta")
        if node is last:
            total *= _factor(node, "alpha")
            if _adds(node):
                return total
        elif node.op_type in ("Mul", "Div"):
            factor = next((c for v in node.inputs if (c := _number(v)) is not None), None)
            if factor is None:
                break
            total = total * factor if node.op_type == "Mul" else total / factor
        elif node.op_type in ("Add", "Sum"):
            return total
        elif node.op_type not in _PASSED:
            break
    raise ExportError(f"{path}: what lies between {down.name} and the layer's sum is not told")


def _factor(node: ir.Node, name: str) -> float:
    """What a Gemm multiplies its product, or what it adds, by."""
    found = node.attributes.get_float(name, 1.0) if node.op_type == "Gemm" else None
    return 1.0 if found is None else found


def _adds(node: ir.Node) -> bool:
    """Whether it adds what is computed: onnxruntime's optimiser makes a Gemm of ``y + h @ B``."""
    added = node.inputs[2] if len(node.inputs) > 2 else None
    return added is not None and added.producer() is not None


def _chain(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The only reader of a value and the place that it has there, that of what it gives, ..."""
    while len(uses := list(value.uses())) == 1:
        yield uses[0].node, uses[0].idx
        value = uses[0].node.outputs[0]


def _number(value: ir.Value | None) -> float | None:
    tensor = (
        None if value is None or value.is_graph_input() else ir.convenience.get_const_tensor(value)
    )
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None
