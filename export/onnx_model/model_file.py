"""Writing a model file, and reading what it says about itself."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx import serialization

from lora_fx.errors import ExportError, LoraFxError, advised, within
from lora_fx.export.onnx_model.digested_writes import Watched
from lora_fx.export.onnx_model.digests import seal
from lora_fx.export.onnx_model.tensor_protos import MICROSOFT, check_model, every_node
from lora_fx.export.onnx_model.wire import check_outline
from lora_fx.export.slots.foreign import foreign_manifest
from lora_fx.export.slots.manifest import Manifest, check_slots, read_manifest
from lora_fx.io.atomic import data_path
from lora_fx.io.plain_file import check_plain

INLINE_LIMIT = 128_000_000  # a protobuf is held whole in memory, several times, to be written
_ALIGNMENT = 4096  # a memory page: onnxruntime maps weights that start on one
_INLINE = 256  # bytes of a tensor that stays in the model file though others lie beside it
# From which opset on onnx has what onnxruntime's fusions write in ONNX's domain in any.
_SINCE = {"LayerNormalization": 17, "SimplifiedLayerNormalization": math.inf}
_MAX_MODEL = (1 << 31) - 1  # protobuf's own limit


def write_model(
    model: ir.Model,
    path: Path,
    *,
    external_data_above: int,
    known: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes a model, with its weights in a file beside it if they are large.

    Its metadata gets a digest of each weight, taken as that is written.

    Args:
        model: what is written.
        path: the ``.onnx`` file.
        external_data_above: bytes of weights from which they go to a file of their own.
        known: digests of weights that are copied from another file as they are.

    Raises:
        ExportError: the result is not valid ONNX.
    """
    weights = {value: value.const_value for value in _initializers(model)}
    size = sum(tensor.nbytes for tensor in weights.values() if tensor is not None)
    is_large = size > external_data_above
    model.graph.name = model.graph.name or "graph"  # which some leave empty, and onnx refuses
    if not is_large:
        ir.external_data.load_to_model(model)  # of another file, which the new one is not beside
    try:
        _save(model, path, data_path(path).name if is_large else None, known)
    finally:
        for value, tensor in weights.items():
            value.const_value = tensor
    try:
        _check_valid(model, path)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        said = " ".join(str(error).split())
        raise ExportError(
            f"{path.name}: the result is not valid ONNX: {said:.300}; if a file that it was made "
            "of is not either, as onnxruntime says, export that again"
        ) from error


def _check_valid(model: ir.Model, path: Path) -> None:
    """Asks onnx of a file, with onnxruntime's own operators in a domain of theirs."""
    opset = model.opset_imports.get("", 0)
    given = [*model.graph.inputs, *model.graph.outputs]
    if any(isinstance(v.type, ir.TensorType) and v.shape is None for v in given):
        return  # of an unknown number of axes, which onnx takes for an error and runtimes do not
    if not any(opset < _SINCE.get(node.op_type, 0) for node in model.graph.all_nodes()):
        onnx.checker.check_model(str(path), full_check=True)
        return
    proto = onnx.load(str(path), load_external_data=False)
    for node in every_node(proto):
        if not node.domain and opset < _SINCE.get(node.op_type, 0):
            node.domain = MICROSOFT
    if all(entry.domain != MICROSOFT for entry in proto.opset_import):
        proto.opset_import.add(domain=MICROSOFT, version=1)
    # Beside the file: what holds its weights is there.
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=path.suffix) as apart:
        onnx.save(proto, apart.name)
        onnx.checker.check_model(apart.name, full_check=True)


def _save(model: ir.Model, path: Path, external: str | None, known: Mapping[str, str]) -> None:
    try:
        digests = {} if external is None else _save_beside(model, path, external, known)
        proto = ir.to_proto(model)
        _say_once(proto.graph)
        seal(proto, digests)
        onnx.save(proto, str(path))
    except ir.serde.SerdeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, LoraFxError):
            cause = cause.__cause__
        raise cause or ExportError(f"{path.name}: not written: {error}") from error


def _say_once(graph: onnx.GraphProto) -> None:
    """Leaves types and shapes of weights and constants to these.

    Tools that put another tensor in the place of one, as onnxruntime 1.31 transposes what it
    quantises, leave what was said of it elsewhere as it was, and then trip over it.
    onnxruntime-genai's builder says of a constant of one number that it has no axis.
    """
    constants = [node.output[0] for node in graph.node if node.op_type == "Constant"]
    weights = {*constants, *(tensor.name for tensor in graph.initializer)}
    others = [info for info in graph.value_info if info.name not in weights]
    del graph.value_info[:]
    graph.value_info.extend(others)


def _save_beside(
    model: ir.Model, path: Path, external: str, known: Mapping[str, str]
) -> dict[str, str]:
    """Writes the large tensors to a file of their own, and gives the digest of each."""
    tensors, digests = [], {}
    for value in _initializers(model):
        tensor, name = value.const_value, str(value.name)
        if tensor is None or tensor.nbytes <= _INLINE:
            continue
        if isinstance(tensor, ir.ExternalTensor) and name in known:
            digests[name] = known[name]
        else:
            value.const_value = Watched(tensor, name)
            tensors.append(value.const_value)
    ir.external_data.unload_from_model(
        model,
        path.parent,
        external,
        size_threshold_bytes=_INLINE,
        alignment=_ALIGNMENT,
        align_threshold=_ALIGNMENT - 1,
    )
    return digests | {str(tensor.name): tensor.digest for tensor in tensors}


def _initializers(model: ir.Model) -> list[ir.Value]:
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    return [value for value in values if value.const_value is not None]


@advised("give the file as it was exported, or export it again")
def load_proto(path: Path) -> onnx.ModelProto:
    """Reads a model without its external data.

    Raises:
        ExportError: the file is missing or no ONNX model.
    """
    size = check_plain(path, ExportError, _MAX_MODEL)
    try:
        with within(path):
            _check_form(path)
            check_outline(path, size)
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror}") from error
    except (DecodeError, ValueError) as error:
        raise ExportError(f"{path}: not an ONNX file: {error}") from error
    for entry in model.opset_import:
        entry.domain = "" if entry.domain == "ai.onnx" else entry.domain  # its other name
    if not model.graph.node and not model.graph.output:
        raise ExportError(f"{path}: not an ONNX file: it holds no graph")
    with within(path):
        check_model(model)
    return model


def _check_form(path: Path) -> None:
    """Refuses what holds a model in another form, by the end of its name, as onnx.load knows it."""
    if path.suffix == ".ort":
        raise ExportError(
            "onnxruntime's own format, read by it alone: give the .onnx file that it was made of"
        )
    if serialization.registry.get_format_from_file_extension(path.suffix) not in (None, "protobuf"):
        raise ExportError(
            'a model as text: write it as ONNX, onnx.save(onnx.load(file), "model.onnx"), and give '
            "that file"
        )


def manifest_in(model: onnx.ModelProto, path: Path, *, strict: bool = False) -> Manifest | None:
    """The manifest of a swappable model, whose graph has its slots; None for any other.

    Of a file of another exporter's, the slots that its graph has, of an unknown base; under
    ``strict`` what is called as one and is none is refused.

    Raises:
        ExportError: the manifest is damaged, or the graph has other slots than it lists.
    """
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    with within(path):
        manifest = read_manifest(metadata)
        if manifest is None:
            return foreign_manifest(model, strict)
        check_slots(model, manifest)
    return manifest
