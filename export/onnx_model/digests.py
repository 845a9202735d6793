"""Digests of what a model file holds: they tell it from a file that was changed since.

They are of contents, not of places: a file whose weights moved from one place to another, or that
got a name for its author, is still the file that was exported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from onnx import GraphProto, ModelProto, TensorProto, external_data_helper, numpy_helper

from lora_fx.errors import ExportError
from lora_fx.export.onnx_model.external_data import external_tensors
from lora_fx.export.slots.manifest import KEY as SLOTS
from lora_fx.graph.example import NEW_CACHE

KEY = "lora_fx.digests"
VERSION = 1
_BITS = 32  # hexadecimal digits: 128 bits, enough to tell contents apart


@dataclass(frozen=True)
class Digests:
    """What a file held when it was exported.

    Attributes:
        graph: of everything but the values of its initializers.
        tensors: initializer -> of its type, shape and bytes.
        whole: of these, of the manifest of its slots, and of when a cache is begun anew.
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
    digests = digests_of(model, lambda tensor: external[tensor.name])
    model.metadata_props.add(key=KEY, value=digests.to_json())


def digests_of(model: ModelProto, external: Callable[[TensorProto], str]) -> Digests:
    """Digests of what a model holds.

    Args:
        model: loaded without its external data.
        external: gives the digest of a tensor whose data lies beside the model.
    """
    tensors = {
        tensor.name: external(tensor)
        if external_data_helper.uses_external_data(tensor)
        else _digest_inline(tensor)
        for tensor in (*model.graph.initializer, *external_tensors(model))
    }
    graph = _graph_digest(model)
    return Digests(graph, tensors, whole_of(graph, tensors, model))


def whole_of(graph: str, tensors: Mapping[str, str], model: ModelProto) -> str:
    """A digest of digests, of the manifest of a model's slots, and of what else a run follows."""
    noted = metadata(model)
    followed = [noted[NEW_CACHE]] if NEW_CACHE in noted else []
    held = [graph, sorted(tensors.items()), noted.get(SLOTS, ""), *followed]
    return short(hashlib.sha256(json.dumps(held).encode()))


def _digest_inline(tensor: TensorProto) -> str:
    digest = start(tensor.data_type, tensor.dims)
    if tensor.HasField("raw_data"):
        digest.update(tensor.raw_data)
    elif tensor.data_type == TensorProto.STRING:
        digest.update(repr(list(tensor.string_data)).encode())
    else:
        digest.update(_values(tensor))
    return short(digest)


def _values(tensor: TensorProto) -> bytes:
    try:
        return numpy_helper.to_array(tensor).tobytes()
    except (ValueError, TypeError, OverflowError) as error:
        raise ExportError(
            f"tensor {tensor.name!r:.80}: its values do not fill its shape {list(tensor.dims)}: "
            f"{error}: export it again"
        ) from error


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


def metadata(model: ModelProto) -> dict[str, str]:
    """The metadata of a model; of two entries of one key the last."""
    return {entry.key: entry.value for entry in model.metadata_props}
