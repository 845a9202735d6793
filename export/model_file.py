"""Writing a model file, and reading what it says about itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from lora_fx.errors import ExportError, LoraFxError
from lora_fx.export.manifest import Manifest, read_manifest
from lora_fx.export.publish import data_path

_ALIGNMENT = 4096  # a memory page: onnxruntime maps weights that start on one


def write_model(model: ir.Model, path: Path, *, external_data_above: int) -> None:
    """Writes a model, with its weights in a file beside it if they are large.

    Raises:
        ExportError: the result is not valid ONNX.
    """
    weights = [v.const_value for v in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in weights if tensor is not None)
    external = data_path(path).name if size > external_data_above else None
    _save(model, path, external)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name}: the result is not valid ONNX: {error}") from error


def _save(model: ir.Model, path: Path, external: str | None) -> None:
    align: dict[str, Any] = {"alignment": _ALIGNMENT, "align_threshold": _ALIGNMENT - 1}
    try:
        ir.save(model, path, external_data=external, **align if external else {})
    except ir.serde.SerdeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, LoraFxError):
            cause = cause.__cause__
        raise cause or ExportError(f"{path.name}: not written: {error}") from error


def load_proto(path: Path) -> onnx.ModelProto:
    """Reads a model without its external data.

    Raises:
        ExportError: the file is missing or no ONNX model.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror}") from error
    except (DecodeError, ValueError) as error:
        raise ExportError(f"{path}: not an ONNX file: {error}") from error
    if not model.graph.node and not model.graph.output:
        raise ExportError(f"{path}: not an ONNX file: it holds no graph")
    return model


def manifest_in(model: onnx.ModelProto, path: Path) -> Manifest | None:
    """The manifest of a swappable model; None for any other."""
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return read_manifest(metadata, str(path))
