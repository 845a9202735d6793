"""The tensors of a model about to be read: every one there is, of a type and size that exist."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from google.protobuf.message import Message
from onnx import ModelProto, NodeProto, TensorProto, external_data_helper, helper

from lora_fx.errors import ExportError, shorten

MICROSOFT = "com.microsoft"  # the domain of onnxruntime's own operators
_TYPES = {number for name, number in TensorProto.DataType.items() if name != "UNDEFINED"}
_BITS = {
    bits: {getattr(TensorProto, name) for name in names if hasattr(TensorProto, name)}
    for bits, names in {
        2: ("UINT2", "INT2"),
        4: ("UINT4", "INT4", "FLOAT4E2M1"),
        6: ("FLOAT6E2M3", "FLOAT6E3M2"),
    }.items()
}
_TYPED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
_MOST, _MOST_NODES = 1 << 63, 1_000_000
_OLDEST_IR = 3  # before it a model said nothing of its operator sets
ASIDE = 4  # version of the format from which on an initializer need not be an input


def every_tensor(model: ModelProto) -> Iterator[TensorProto]:
    """All tensors of a model: of graphs and branches, attributes, functions, sparse ones."""
    return (message for message, _ in _messages(model) if isinstance(message, TensorProto))


def every_node(model: Message) -> Iterator[NodeProto]:
    """All nodes of a model, a graph or a function: of branches and functions too."""
    return (message for message, _ in _messages(model) if isinstance(message, NodeProto))


def _messages(model: Message) -> Iterator[tuple[Message, Sequence[Any]]]:
    """All that a model is made of, itself included, each with its fields; a tensor without."""
    waiting: list[Message] = [model]
    while waiting:
        message = waiting.pop()
        fields = [] if isinstance(message, TensorProto) else message.ListFields()
        yield message, fields
        for field, value in fields:
            if field.message_type is not None:
                waiting += [value] if isinstance(value, Message) else value


def _check_functions(model: ModelProto) -> None:
    """Refuses what calls itself, or so much that nobody can write it where it is called."""
    if not model.functions:
        return
    parts = {(f.domain, f.name): [(n.domain, n.op_type) for n in every_node(f)]
             for f in model.functions}  # fmt: skip
    parts["", ""] = [(n.domain, n.op_type) for n in every_node(model.graph)]
    sizes: dict[tuple[str, str], int] = {}
    try:
        for name in TopologicalSorter(parts).static_order():
            whole = sum(sizes[part] for part in parts[name]) if name in parts else 1
            sizes[name] = min(whole, _MOST_NODES + 1)
    except CycleError as error:
        called = ", ".join(f"{domain}.{name}" for domain, name in error.args[1])
        raise ExportError(
            f"functions that call themselves: {called:.80}: export it again"
        ) from error
    if sizes["", ""] > _MOST_NODES:
        raise ExportError(
            f"functions that stand for more than {_MOST_NODES} nodes: export it again without them"
        )


def check_model(model: ModelProto) -> None:
    """Refuses versions, types, sizes, names and calls that no model has.

    Raises:
        ExportError: names the tensor or field, what was found and what was expected.
    """
    if model.ir_version < _OLDEST_IR:
        raise ExportError(
            f"IR version {model.ir_version}, expected {_OLDEST_IR} or more: export it again"
        )
    for entry in (*model.opset_import, *(e for f in model.functions for e in f.opset_import)):
        if entry.version < 1:
            raise ExportError(
                f"opset version {entry.version} of {entry.domain!r:.80}, expected 1 or more: "
                "export it again"
            )
    if all(entry.domain for entry in model.opset_import):
        raise ExportError(
            "says no version of ONNX's own operators, for which each tool takes another: export it "
            "again"
        )
    _check_functions(model)
    names = Counter(value.name for value in model.graph.input)
    if twice := sorted(name for name, times in names.items() if times > 1):
        raise ExportError(f"two inputs of one name: {shorten(twice)}: export it again")
    for message, fields in _messages(model):
        if isinstance(message, TensorProto):
            _check_text([message.name])
            _check_tensor(message)
        for field, value in fields:
            if field.type == field.TYPE_STRING:
                _check_text([value] if isinstance(value, str | bytes) else value)


def _check_text(texts: Iterable[str | bytes]) -> None:
    for text in texts:
        if isinstance(text, bytes):  # protobuf's word for what it could not decode
            raise ExportError(
                f"the name {text!r:.80} is not UTF-8, as every name of a model is: the file is "
                "damaged; export it again"
            )


def byte_size(tensor: TensorProto) -> int:
    """How many bytes a tensor's shape and type take."""
    small = next((bits for bits, types in _BITS.items() if tensor.data_type in types), 0)
    bits = small or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(-(-math.prod(tensor.dims) * bits // 8))


def _check_tensor(tensor: TensorProto) -> None:
    where = f"tensor {tensor.name!r:.80}"
    if tensor.data_type not in _TYPES:
        raise ExportError(
            f"{where}: data type {tensor.data_type}, expected one of ONNX's, 1 to {max(_TYPES)}: "
            "the file is damaged; export it again"
        )
    if any(size < 0 for size in tensor.dims) or math.prod(tensor.dims) >= _MOST:
        raise ExportError(
            f"{where}: shape {list(tensor.dims)!s:.80}, expected sizes of 0 or more whose "
            "product is below 2 ** 63: export it again"
        )
    if external_data_helper.uses_external_data(tensor):
        return
    if tensor.HasField("raw_data") and len(tensor.raw_data) != byte_size(tensor):
        raise ExportError(
            f"{where}: {len(tensor.raw_data)} bytes, expected the {byte_size(tensor)} of its shape "
            f"{list(tensor.dims)!s:.80}: export it again"
        )
    # Where values are packed, up to four are in one.
    held = 4 * sum(len(getattr(tensor, name)) for name in _TYPED)
    if not tensor.HasField("raw_data") and math.prod(tensor.dims) > held:
        raise ExportError(
            f"{where}: at most {held} values, expected the {math.prod(tensor.dims)} of its shape: "
            "export it again"
        )
