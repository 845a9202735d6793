"""Digests of what a model file holds: they tell it from a file that was changed since.

They are of contents, not of places: a file whose weights moved from one place to another, or that
got a name for its author, is still the file that was exported.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onnx import GraphProto, ModelProto, TensorProto, external_data_helper, numpy_helper

from lora_fx.errors import ExportError, shorten
from lora_fx.export.external import check_external_data, external_tensors, range_of
from lora_fx.export.manifest import KEY as SLOTS

KEY = "lora_fx.digests"
VERSION = 1
_BITS = 32  # hexadecimal digits: 128 bits, enough to tell contents apart
_CHUNK = 1 << 20
_ADVICE = (
    "use the file as it was exported, or export again. Was it meant to be changed, by a quantiser "
    f"or another tool: Session(path, check=False) runs it as it is, and without its metadata {KEY} "
    "nothing is held against it"
)
_PRODUCER = "pytorch"  # what torch.onnx signs with


@dataclass(frozen=True)
class Digests:
    """What a file held when it was exported.

    Attributes:
        graph: of everything but the values of its initializers.
        tensors: initializer -> of its type, shape and bytes.
        whole: of these, and of the manifest of its slots.
    """

    graph: str
    tensors: dict[str, str]
    whole: str

    def to_json(self) -> str:
        """The text that is stored in the model."""
        return json.dumps({"version": VERSION, **asdict(self)}, separators=(",", ":"))


def start(data_type: int, sizes: Sequence[int]) -> Any:
    """A digest that still lacks the tensor's bytes."""
    return hashlib.sha256(f"{data_type}:{tuple(sizes)}:".encode())


def short(digest: Any) -> str:
    """What is stored of a digest."""
    return str(digest.hexdigest())[:_BITS]


def seal(model: ModelProto, external: Mapping[str, str]) -> None:
    """Writes the digests of a model into its metadata.

    Args:
        model: as it will be stored.
        external: digest of each tensor whose data lies beside the model.
    """
    kept = [entry for entry in model.metadata_props if entry.key != KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    digests = _digests(model, lambda tensor: external[tensor.name])
    model.metadata_props.add(key=KEY, value=digests.to_json())


def check_digests(model: ModelProto, path: Path) -> None:
    """Reads every weight of a file, and refuses one that is not what was exported.

    A file of another tool, or of an earlier version, has no digests and passes.

    Args:
        model: the model, loaded without its external data.
        path: where it lies.

    Raises:
        ExportError: names what was changed, and what to do.
    """
    text = _metadata(model).get(KEY)
    if text is None:
        return
    stored = _read(text, path)
    check_external_data(model, path)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        waiting = {t.name: pool.submit(_digest_on_disk, t, path) for t in external_tensors(model)}
        found = _digests(model, lambda tensor: waiting[tensor.name].result())
    if found != stored:
        raise ExportError(f"{path}: not what was exported: {_difference(found, stored, model)}")


def _digests(model: ModelProto, external: Callable[[TensorProto], str]) -> Digests:
    tensors = {
        tensor.name: external(tensor)
        if external_data_helper.uses_external_data(tensor)
        else _digest_inline(tensor)
        for tensor in (*model.graph.initializer, *external_tensors(model))
    }
    graph = _graph_digest(model)
    return Digests(graph, tensors, _whole(graph, tensors, model))


def _whole(graph: str, tensors: Mapping[str, str], model: ModelProto) -> str:
    manifest = _metadata(model).get(SLOTS, "")
    return short(hashlib.sha256(json.dumps([graph, sorted(tensors.items()), manifest]).encode()))


def _digest_inline(tensor: TensorProto) -> str:
    digest = start(tensor.data_type, tensor.dims)
    if tensor.HasField("raw_data"):
        digest.update(tensor.raw_data)
    elif tensor.data_type == TensorProto.STRING:
        digest.update(repr(list(tensor.string_data)).encode())
    else:
        digest.update(numpy_helper.to_array(tensor).tobytes())
    return short(digest)


def _digest_on_disk(tensor: TensorProto, path: Path) -> str:
    digest, place = start(tensor.data_type, tensor.dims), range_of(tensor, path)
    with path.with_name(place.location).open("rb") as file:
        file.seek(place.offset)
        left = place.length
        while left and (chunk := file.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
    return short(digest)


def _graph_digest(model: ModelProto) -> str:
    """Nodes, inputs, outputs and operator sets: not what others note beside them, as shapes."""
    digest = hashlib.sha256()
    graph: GraphProto = model.graph
    parts = (graph.node, graph.input, graph.output, graph.sparse_initializer)
    for part in (*parts, model.opset_import, model.functions):
        digest.update(f"{len(part)};".encode())
        for message in part:
            content = message.SerializeToString(deterministic=True)
            digest.update(f"{len(content)}:".encode() + content)
    return short(digest)


def _metadata(model: ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def _read(text: str, path: Path) -> Digests:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ExportError(f"{path}: {KEY}: not JSON ({error}): export the model again") from error
    version = values.get("version") if isinstance(values, dict) else None
    if version != VERSION:
        raise ExportError(f"{path}: {KEY}: version {version!r}, expected {VERSION}: export again")
    graph, tensors, whole = (values.get(name) for name in ("graph", "tensors", "whole"))
    texts = [graph, whole, *(tensors.values() if isinstance(tensors, dict) else [None])]
    if len(values) != 4 or not all(isinstance(value, str) for value in texts):
        raise ExportError(f"{path}: {KEY}: unknown or missing fields: export the model again")
    return Digests(graph, tensors, whole)


def _difference(found: Digests, stored: Digests, model: ModelProto) -> str:
    """What differs, in words, and what to do."""
    both = found.tensors.keys() & stored.tensors.keys()
    other = [name for name in both if found.tensors[name] != stored.tensors[name]]
    reasons = {
        "other values in": sorted(other),
        "lacks": [name for name in stored.tensors if name not in both],
        "has besides": [name for name in found.tensors if name not in both],
    }
    words = [f"{what} {shorten(names)}" for what, names in reasons.items() if names]
    if found.graph != stored.graph:
        words.append("its graph was rewritten")
    if _whole(stored.graph, stored.tensors, model) != stored.whole:
        words.append("its manifest was changed")
    if model.producer_name != _PRODUCER:
        words.append(f"last written by {model.producer_name!r}")
    return f"{'; '.join(words)}: {_ADVICE}"
