"""The manifest of a swappable model: its slots, kept in the file's metadata."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cache, cached_property
from itertools import chain
from typing import Any, get_type_hints

import onnx_ir as ir
from onnx import ModelProto, ValueInfoProto
from torch import fx

from lora_fx.errors import AdapterError, ExportError, shorten, within
from lora_fx.export.onnx_model.tensor_protos import ASIDE
from lora_fx.export.onnx_model.tensors import digest_of
from lora_fx.export.slots.slot import AnySlot, InvocationSlot, Slot, class_of
from lora_fx.graph.lazy_tensor import get_unevaluated
from lora_fx.io.strict_json import parse_object
from lora_fx.layers.parameter_readers import readers
from lora_fx.layers.sites import Groups, bias_of, by_path

KEY = "lora_fx.slots"
NO_SLOTS = (
    "takes no adapter: its weights are constants; give it slots with lora-fx add-lora, or export "
    'it with adapters="input"'
)
VERSION = 2
UNKNOWN = "unknown"  # the base of a file of another exporter
_MAX_TEXT = 16 << 20
_MOST_AXES = 8
_MOST = (1 << 31) - 1  # of one axis
_MOST_VALUES = 1 << 48  # of a weight: more than any disk holds
DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "float64": ir.DataType.DOUBLE,
}
_SINCE = {"groups": 1}  # fields that older manifests lack; one of this value is not written


@dataclass(frozen=True)
class Manifest:
    """What a swappable model says about itself.

    Attributes:
        slots: in the order of the graph.
        required: whether the inputs of the slots have no default, so that each run feeds them.
    """

    slots: tuple[AnySlot, ...]
    required: bool = False

    @cached_property
    def names(self) -> list[str]:
        """The graph inputs of all slots."""
        return [name for slot in self.slots for name in slot.names]

    @property
    def is_ours(self) -> bool:
        """Whether the file says itself which slots it has, and of which base."""
        return all(slot.is_ours for slot in self.slots)

    @property
    def base(self) -> str:
        """Digest of the slotted weights, names and bytes."""
        if not self.is_ours:
            return UNKNOWN
        parts = "".join(f"{slot.path}:{slot.digest};" for slot in self.slots)
        return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()

    def to_json(self) -> str:
        """The text that is stored in the model."""
        slots = [{**_written(slot), "inputs": slot.names} for slot in self.slots]
        manifest = {"version": VERSION, "base": self.base, "slots": slots}
        if self.required:
            manifest["required"] = True
        return json.dumps(manifest, sort_keys=True, separators=(",", ":"))

    @property
    def model_version(self) -> int:
        """31 bits of a digest of the manifest: what an adapter file remembers of its model.

        With defaults or without, what an adapter puts in is the same.
        """
        text = replace(self, required=False).to_json()
        digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") & 0x7FFFFFFF or 1  # 0 is what other tools leave


def _written(slot: AnySlot) -> dict[str, Any]:
    record = {name: value for name, value in asdict(slot).items() if _SINCE.get(name) != value}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in record.items()}


def manifest_of(gm: fx.GraphModule, slots: Sequence[AnySlot], required: bool = False) -> Manifest:
    """Describes the slots of a graph, and digests the tensors that they are of."""
    groups = by_path(gm)
    return Manifest(tuple(_digested(gm, slot, groups) for slot in slots), required)


def _digested(gm: fx.GraphModule, slot: AnySlot, groups: Groups) -> AnySlot:
    if isinstance(slot, InvocationSlot):
        return slot
    if not isinstance(slot, Slot):
        source = next(readers(gm, slot.path))[1]
        return replace(slot, digest=digest_of(get_unevaluated(gm, str(source.target))))
    calls = groups[slot.path]
    bias = bias_of(gm, calls)
    return replace(
        slot,
        digest=digest_of(get_unevaluated(gm, str(calls[0].weight.target))),
        bias_digest="" if bias is None else digest_of(bias),
    )


def read_manifest(metadata: Mapping[str, str]) -> Manifest | None:
    """Reads the manifest of a model, or None if it has none.

    Raises:
        ExportError: the manifest is damaged or of another version.
    """
    text = metadata.get(KEY)
    if text is None:
        return None
    if len(text) > _MAX_TEXT:
        raise ExportError(f"{KEY}: {len(text)} characters, expected at most {_MAX_TEXT}")
    with within(KEY):
        values = versioned(text, VERSION)
    slots = values.get("slots")
    if not isinstance(slots, list) or not isinstance(values.get("base"), str):
        raise ExportError(f"{KEY}: no list of slots or no base digest: export again")
    manifest = Manifest(tuple(_slots(slots)), values.get("required") is True)
    if len(set(manifest.names)) < len(manifest.names):
        raise ExportError(f"{KEY}: two slots of one name: export the model again")
    if json.loads(manifest.to_json()) != values:
        raise ExportError(f"{KEY}: unknown or missing fields: export the model again")
    return manifest


def versioned(text: str, version: int) -> dict[str, Any]:
    """Reads what an export has noted in a file's metadata.

    Raises:
        ExportError: it is damaged, or of another version.
    """
    try:
        values: dict[str, Any] = parse_object(text.encode())
    except AdapterError as error:
        raise ExportError(f"not JSON ({error}): export the model again") from error
    found = values.get("version")
    if found != version:
        raise ExportError(f"version {found!r:.80}, expected {version}: export again")
    return values


def check_slots(model: ModelProto, manifest: Manifest) -> None:
    """Refuses a graph whose slots are not those of its manifest.

    Raises:
        ExportError: names the slots that are listed and gone, or there and not listed.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name for value in model.graph.input}
    listed = manifest.names
    # Before, a weight was an input because there was no other way to have one.
    defaults = inputs & constants if model.ir_version >= ASIDE else set()
    found = inputs - constants if manifest.required else defaults
    lost = [name for name in listed if name not in found]
    unknown = sorted(defaults.difference(listed))
    if lost or unknown:
        default = "without" if manifest.required else "with"
        gone = f"no input, or none {default} a default, for the slots {shorten(lost)}"
        more = f"inputs {shorten(unknown)} that its manifest does not list"
        raise ExportError(
            f"its graph has {' and '.join([gone] * bool(lost) + [more] * bool(unknown))}: another "
            "tool rewrote the file; use it as it was exported, or export it with "
            'adapters="required", whose inputs no tool takes for constants'
        )
    _check_types(model, manifest)
    _check_sizes(model, manifest)


def _check_types(model: ModelProto, manifest: Manifest) -> None:
    """Refuses slots that a tool cast, whose adapters would be of another type."""
    found = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
    wanted = {n: DTYPES[s.dtype] for s in manifest.slots if isinstance(s, Slot) for n in s.names}
    if other := [name for name, kind in wanted.items() if found[name] not in (0, kind)]:
        kinds = {kind.value: kind.name.lower() for kind in ir.DataType}
        kind = kinds.get(found[other[0]], f"type {found[other[0]]}")
        raise ExportError(
            f"{KEY}: {shorten(other)}: {kind} in the graph, and not in the manifest: another tool "
            f"cast the file: without its metadata {KEY} its slots are read from the graph; or "
            "export the model in that dtype"
        )


def _check_sizes(model: ModelProto, manifest: Manifest) -> None:
    """Refuses sizes that the graph has not: memory is taken by what the manifest says."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    if manifest.required:
        most = max(map(math.prod, shapes.values()), default=0)  # of the weights that slots are of
        shapes = {value.name: _declared(value) for value in model.graph.input}
        large = [n for n in manifest.names if math.prod(s for s in shapes[n] if s) > most]
        if large:
            raise ExportError(
                f"{KEY}: {shorten(large)}: larger than any weight of the file: use the file as it "
                "was exported, or export it again"
            )
    for slot in manifest.slots:
        for name, sizes in slot.inputs.values():
            pairs = zip(sizes, shapes[name], strict=False)
            if len(sizes) != len(shapes[name]) or any(s not in (None, n) for s, n in pairs):
                raise ExportError(
                    f"{KEY}: {name} is of {sizes}, but {shapes[name]} in the graph: use the file "
                    "as it was exported, or export it again"
                )


def _declared(value: ValueInfoProto) -> tuple[int, ...]:
    """The sizes of an input; 0 where one is open."""
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)


def _slots(entries: Sequence[Any]) -> Iterator[AnySlot]:
    for place, entry in enumerate(entries):
        kind = entry.get("kind") if isinstance(entry, dict) else None
        slot = _slot(class_of(kind), entry if isinstance(entry, dict) else {}, place)
        is_float = slot.dtype in DTYPES or isinstance(slot, InvocationSlot)
        if not is_float or not _is_of_weights(entry) or not slot.is_sound():
            raise ExportError(
                f"{KEY}: slot {place}: kind, dtype or size out of range: {entry!r:.300}: export "
                "the model again"
            )
        yield slot


def _is_of_weights(entry: Mapping[str, Any]) -> bool:
    """Whether a file could have a weight of the sizes that an entry speaks of."""
    lists = [value for value in entry.values() if isinstance(value, list)]
    if any(len(value) > _MOST_AXES for value in lists):
        return False
    sizes = [n for n in (*entry.values(), *chain(*lists)) if type(n) is int]
    return max(sizes, default=0) <= _MOST and math.prod(max(n, 1) for n in sizes) < _MOST_VALUES


@cache
def _types(cls: type[AnySlot]) -> Mapping[str, Any]:
    return get_type_hints(cls)


def _slot(cls: type[AnySlot], entry: Mapping[str, Any], place: int) -> AnySlot:
    types, values = _types(cls), {}
    for field in fields(cls):
        value = entry.get(field.name, _SINCE.get(field.name, MISSING))
        kind = list if types[field.name] not in (str, int, bool) else types[field.name]
        if type(value) is not kind:
            shown = None if value is MISSING else value
            raise ExportError(f"{KEY}: slot {place}: {field.name} is {shown!r:.80}")
        values[field.name] = tuple(value) if kind is list else value
    return cls(**values)
