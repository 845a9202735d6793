"""The manifest of a swappable model: its slots, kept in the file's metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from onnx import ModelProto
from torch import fx

from lora_fx.errors import ExportError, shorten, within
from lora_fx.export.onnx_model.tensors import digest_of
from lora_fx.graph.lazy_tensor import get_unevaluated
from lora_fx.layers.layer import Layer
from lora_fx.layers.layer_bias import bias_of
from lora_fx.layers.layer_types import TYPES
from lora_fx.layers.sites import Site, by_path

KEY = "lora_fx.slots"
VERSION = 2
DTYPES = ("float32", "float16", "bfloat16", "float64")
_FIELDS = {
    **dict.fromkeys(("path", "kind", "dtype", "digest", "bias_digest"), str),
    **dict.fromkeys(("in_features", "out_features"), int),
    "kernel": list,
    "vectors": bool,
}


@dataclass(frozen=True)
class Manifest:
    """What a swappable model says about itself.

    Attributes:
        slots: in the order of the graph.
    """

    slots: tuple[Slot, ...]

    @property
    def base(self) -> str:
        """Digest of the slotted weights, names and bytes."""
        parts = "".join(f"{slot.path}:{slot.digest};" for slot in self.slots)
        return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()

    def to_json(self) -> str:
        """The text that is stored in the model."""
        slots = [
            {**asdict(slot), "kernel": list(slot.kernel), "inputs": slot.names}
            for slot in self.slots
        ]
        manifest = {"version": VERSION, "base": self.base, "slots": slots}
        return json.dumps(manifest, sort_keys=True, separators=(",", ":"))

    @property
    def model_version(self) -> int:
        """31 bits of a digest of the manifest: what an adapter file remembers of its model."""
        digest = hashlib.blake2b(self.to_json().encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") & 0x7FFFFFFF or 1  # 0 is what other tools leave


def manifest_of(gm: fx.GraphModule, slots: Sequence[Slot]) -> Manifest:
    """Describes the slots of a graph, and digests the weights that they stand beside."""
    groups = by_path(gm)
    return Manifest(tuple(_digested(gm, slot, groups[slot.path]) for slot in slots))


def _digested(gm: fx.GraphModule, slot: Slot, calls: Sequence[Site]) -> Slot:
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
    with within(KEY):
        values = versioned(text, VERSION)
    slots = values.get("slots")
    if not isinstance(slots, list) or not isinstance(values.get("base"), str):
        raise ExportError(f"{KEY}: no list of slots or no base digest: export again")
    manifest = Manifest(tuple(_slots(slots)))
    if json.loads(manifest.to_json()) != values:
        raise ExportError(f"{KEY}: unknown or missing fields: export the model again")
    return manifest


def versioned(text: str, version: int) -> dict[str, Any]:
    """Reads what an export has noted in a file's metadata.

    Raises:
        ExportError: it is damaged, or of another version.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ExportError(f"not JSON ({error}): export the model again") from error
    found = values.get("version") if isinstance(values, dict) else None
    if found != version:
        raise ExportError(f"version {found!r}, expected {version}: export again")
    return dict(values)


def check_slots(model: ModelProto, manifest: Manifest) -> None:
    """Refuses a graph whose slots are not those of its manifest.

    Raises:
        ExportError: names the slots that are listed and gone, or there and not listed.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    found = {value.name for value in model.graph.input if value.name in constants}
    listed = [name for slot in manifest.slots for name in slot.names]
    lost = [name for name in listed if name not in found]
    unknown = sorted(found.difference(listed))
    if lost or unknown:
        raise ExportError(
            f"its graph has no input, or none with a default, for the slots "
            f"{shorten(lost) or '(none)'}, and has inputs {shorten(unknown) or '(none)'} that its "
            "manifest does not list: another tool rewrote the file; use it as it was exported, or "
            "export it again"
        )


def _slots(entries: Iterable[Any]) -> Iterator[Slot]:
    for place, entry in enumerate(entries):
        for name, kind in _FIELDS.items():
            value = entry.get(name) if isinstance(entry, dict) else None
            if type(value) is not kind:
                raise ExportError(f"{KEY}: slot {place}: {name} is {value!r}")
        sizes = [entry["in_features"], entry["out_features"], *entry["kernel"]]
        whole = all(type(size) is int and size > 0 for size in sizes)
        if entry["dtype"] not in DTYPES or entry["kind"] not in TYPES or not whole:
            raise ExportError(f"{KEY}: slot {place}: kind, dtype or size out of range: {entry}")
        fields = {name: entry[name] for name in _FIELDS}
        yield Slot(**{**fields, "kernel": tuple(entry["kernel"])})


class Input(NamedTuple):
    """A graph input of a slot.

    Attributes:
        name: ``<module path>.lora_A`` and its kin.
        shape: None where the rank goes.
    """

    name: str
    shape: tuple[int | None, ...]

    def sized(self, rank: int) -> tuple[int, ...]:
        """The shape at a rank."""
        return tuple(rank if size is None else size for size in self.shape)


@dataclass(frozen=True)
class Slot:
    """One layer that an adapter can act on.

    Attributes:
        path: module path of the layer.
        kind: of the layer, as `lora_fx.sites.Layer` says.
        in_features: that A sums over; of an embedding, how many rows it has.
        out_features: that B gives.
        dtype: of what goes in: ``"float32"``.
        kernel: of a convolution, else empty.
        vectors: whether it takes those of DoRA and (IA)3 as well.
        digest: of the weight that the slot stands beside, its dtype, shape and bytes.
        bias_digest: of the layer's bias, or ``""``.
    """

    path: str
    kind: str
    in_features: int
    out_features: int
    dtype: str
    kernel: tuple[int, ...] = ()
    vectors: bool = False
    digest: str = ""
    bias_digest: str = ""

    @property
    def layer(self) -> Layer:
        """What an update needs to know of it."""
        shape = (self.out_features, self.in_features, *self.kernel)
        return Layer(path=self.path, kind=self.kind, shape=shape, dtype=getattr(torch, self.dtype))

    @property
    def inputs(self) -> dict[str, Input]:
        """The graph inputs, by the names of `lora_fx.terms.Terms`: A, B, and vectors if any."""
        stored = TYPES[self.kind]
        sizes = {"out": self.out_features, "in": self.in_features, "r": None}
        found = {
            (role, stored.leaf(role)): stored.shape(role, sizes, self.kernel)
            for role in ("down", "up")
        }
        along = {"gain": "out", "bias": "out"} | ({} if stored.reads_ids else {"col": "in"})
        for name, axis in along.items() if self.vectors else ():
            shape = stored.shape("vector", {"n": sizes[axis]}, self.kernel)
            found[name, name] = shape
        return {part: Input(f"{self.path}.lora_{n}", shape) for (part, n), shape in found.items()}

    @property
    def names(self) -> list[str]:
        """The names of its graph inputs."""
        return [value.name for value in self.inputs.values()]

    def neutral(self) -> dict[str, torch.Tensor]:
        """What has no effect, by input name: no rank, gains and biases of zero, columns of one.

        A convolution gets zeros of rank 1: there are versions of onnxruntime (1.31) whose
        convolutions leave the result of no channels as the memory was.
        """
        dtype, rank = self.layer.dtype, 1 if self.kernel else 0
        make = {"col": torch.ones}
        return {
            value.name: make.get(part, torch.zeros)(value.sized(rank), dtype=dtype)
            for part, value in self.inputs.items()
        }
