"""Tells a model file that was changed since it was exported, and how."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from onnx import ModelProto, TensorProto

from lora_fx.errors import ExportError, advised, shorten, within
from lora_fx.export.onnx_model.digests import (
    KEY,
    VERSION,
    Digests,
    digests_of,
    metadata,
    short,
    start,
    whole_of,
)
from lora_fx.export.onnx_model.external_data import check_external_data, external_tensors, range_of
from lora_fx.export.slots.manifest import versioned
from lora_fx.graph.example import NEW_CACHE

_CHUNK = 1 << 20
_ADVICE = (
    "use the file as it was exported, or export again. Was it meant to be changed, by a quantiser "
    f"or another tool: without its metadata {KEY} nothing is held against it; in Python "
    "Session(path, check=False) runs it as it is"
)
_PRODUCER = "pytorch"  # what torch.onnx signs with


@advised("give the file as it was exported, or export it again")
def check_digests(model: ModelProto, path: Path) -> None:
    """Reads every weight of a file, and refuses one that is not what was exported.

    A file of another tool, or of an earlier version, has no digests and passes.

    Args:
        model: the model, loaded without its external data.
        path: where it lies.

    Raises:
        ExportError: names what was changed, and what to do.
    """
    stored = _stored(model, path)
    if stored is None:
        return
    check_external_data(model, path)
    _refuse_twice(model, path)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        waiting = {t.name: pool.submit(_digest_on_disk, t, path) for t in external_tensors(model)}
        found = digests_of(model, lambda tensor: waiting[tensor.name].result())
    if found != stored:
        raise ExportError(f"{path}: not what was exported: {_difference(found, stored, model)}")


def tensor_digests(model: ModelProto, path: Path) -> Mapping[str, str]:
    """Of each tensor that a file says something of, what it says.

    Raises:
        ExportError: it says so in a way that cannot be read.
    """
    stored = _stored(model, path)
    return {} if stored is None else stored.tensors


def _stored(model: ModelProto, path: Path) -> Digests | None:
    """What a file says that it held when it was exported; None if it says nothing.

    Raises:
        ExportError: it says so in a way that cannot be read.
    """
    text = metadata(model).get(KEY)
    if text is None:
        return None
    with within(f"{path}: {KEY}"):
        return _read(text)


def _refuse_twice(model: ModelProto, path: Path) -> None:
    """Of two tensors of one name, only one would be held against its digest."""
    beside = Counter(tensor.name for tensor in external_tensors(model))
    held = Counter(tensor.name for tensor in model.graph.initializer)
    if twice := sorted(name for name in beside | held if max(beside[name], held[name]) > 1):
        raise ExportError(f"{path}: two tensors of one name: {shorten(twice)}: {_ADVICE}")


def _digest_on_disk(tensor: TensorProto, path: Path) -> str:
    digest, place = start(tensor.data_type, tensor.dims), range_of(tensor, path)
    with (path.parent / place.location).open("rb") as file:
        file.seek(place.offset)
        left = place.length
        while left and (chunk := file.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
    return short(digest)


def _read(text: str) -> Digests:
    values: Any = versioned(text, VERSION)
    graph, tensors, whole = (values.get(name) for name in ("graph", "tensors", "whole"))
    texts = [graph, whole, *(tensors.values() if isinstance(tensors, dict) else [None])]
    if len(values) != 4 or not all(isinstance(value, str) for value in texts):
        raise ExportError("unknown or missing fields: export the model again")
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
    if whole_of(stored.graph, stored.tensors, model) != stored.whole:
        words.append(f"its manifest or {NEW_CACHE} was changed")
    if model.producer_name != _PRODUCER:
        words.append(f"last written by {model.producer_name!r}")
    return f"{'; '.join(words)}: {_ADVICE}"
