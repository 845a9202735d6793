"""The manifest of a swappable model: its slots, kept in the file's metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from lora_fx.deferred import Deferred, raw
from lora_fx.errors import ExportError
from lora_fx.sites import by_path

KEY = "lora_fx.slots"
VERSION = 1
DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class Slot:
    """One layer that an adapter can act on.

    Attributes:
        path: module path of the layer.
        kind: ``"linear"``, or ``"linear_transposed"`` if the weight is stored as (in, out).
        in_features: rows of A, the input named ``down``: (in, r).
        out_features: columns of B, the input named ``up``: (r, out).
        dtype: of A and B: ``"float32"``.
        digest: of the weight that the slot stands beside, its dtype, shape and bytes.
    """

    path: str
    kind: str
    in_features: int
    out_features: int
    dtype: str
    digest: str = ""

    @property
    def down(self) -> str:
        """Name of the graph input A, (in, r)."""
        return f"{self.path}.lora_A"

    @property
    def up(self) -> str:
        """Name of the graph input B, (r, out), with every scale folded in."""
        return f"{self.path}.lora_B"


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
            {
                "path": slot.path,
                "kind": slot.kind,
                "in_features": slot.in_features,
                "out_features": slot.out_features,
                "dtype": slot.dtype,
                "digest": slot.digest,
                "inputs": [slot.down, slot.up],
            }
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
    weights = [raw(gm, str(groups[slot.path][0].weight.target)) for slot in slots]
    pairs = zip(slots, weights, strict=True)
    return Manifest(tuple(replace(slot, digest=digest_of(weight)) for slot, weight in pairs))


def digest_of(weight: torch.Tensor | Deferred) -> str:
    """A digest of a tensor: dtype, shape and bytes."""
    weight = weight.compute() if isinstance(weight, Deferred) else weight
    digest = hashlib.blake2b(f"{weight.dtype}:{tuple(weight.shape)}:".encode(), digest_size=16)
    values: Any = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    digest.update(values)
    return digest.hexdigest()


def read_manifest(metadata: Mapping[str, str], where: str) -> Manifest | None:
    """Reads the manifest of a model, or None if it has none.

    Raises:
        ExportError: the manifest is damaged or of another version.
    """
    text = metadata.get(KEY)
    if text is None:
        return None
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ExportError(f"{where}: {KEY}: not JSON ({error}): export the model again") from error
    found = values.get("version") if isinstance(values, dict) else None
    if found != VERSION:
        raise ExportError(f"{where}: {KEY}: version {found!r}, expected {VERSION}: export again")
    slots = values.get("slots")
    if not isinstance(slots, list) or not isinstance(values.get("base"), str):
        raise ExportError(f"{where}: {KEY}: no list of slots or no base digest: export again")
    manifest = Manifest(tuple(_slots(slots, where)))
    if json.loads(manifest.to_json()) != values:
        raise ExportError(f"{where}: {KEY}: unknown or missing fields: export the model again")
    return manifest


def _slots(entries: Iterable[Any], where: str) -> Iterable[Slot]:
    words = dict.fromkeys(("path", "kind", "dtype", "digest"), str)
    fields = words | dict.fromkeys(("in_features", "out_features"), int)
    for place, entry in enumerate(entries):
        for name, kind in fields.items():
            value = entry.get(name) if isinstance(entry, dict) else None
            if type(value) is not kind:
                raise ExportError(f"{where}: {KEY}: slot {place}: {name} is {value!r}")
        if entry["dtype"] not in DTYPES or min(entry["in_features"], entry["out_features"]) < 1:
            raise ExportError(f"{where}: {KEY}: slot {place}: dtype or size out of range: {entry}")
        yield Slot(**{name: entry[name] for name in fields})
