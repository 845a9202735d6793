"""What is in a file: adapters and exported models as plain values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.describe import describe_update
from lora_fx.cli.adapter_options import AdapterOptions
from lora_fx.cli.commands import REPORT
from lora_fx.errors import LoraFxError, within
from lora_fx.formats.peft import CONFIG
from lora_fx.io.adapter_files import is_slot_tensors
from lora_fx.io.gguf_file import is_gguf
from lora_fx.io.plain_file import check_path, check_plain, models_in
from lora_fx.io.state_dict import SAFETENSORS, is_pickle

_CHUNK = 1 << 20


def describe(path: Path, given: AdapterOptions | None = None) -> dict[str, Any]:
    """Describes an adapter, a ``.onnx`` file, that of an export, or a ``.onnx_adapter`` file.

    Args:
        path: of an adapter's directory, or of a file.
        given: what an adapter's format does not store.

    Returns:
        ``kind``, ``path``, and what that kind has: targets or slots, shapes, norms, digests.

    Raises:
        LoraFxError: it is missing, damaged, not what was exported, or none of these.
    """
    if not check_path(path, LoraFxError).exists():
        raise LoraFxError(f"{path}: no such file or directory: give an adapter or an .onnx")
    path = exported(path)
    if path.suffix == ".onnx":
        return _model(path)
    if path.suffix == ".onnx_adapter" or is_slot_tensors(path):
        return _adapter_file(path)
    if path.is_dir() or is_pickle(path) or path.suffix == SAFETENSORS or is_gguf(path):
        return _adapter(path, (given or AdapterOptions()).load(path))
    raise LoraFxError(
        f"{path}: expected an adapter (a directory, a {SAFETENSORS} or .gguf file or a pickle), a "
        ".onnx or a .onnx_adapter file"
    )


def exported(path: Path) -> Path:
    """The only model file of a directory that export wrote; any other path as it is.

    Raises:
        LoraFxError: there are several; names them.
    """
    if (path / CONFIG).is_file() or not ((path / REPORT).is_file() or any(path.glob("*.onnx"))):
        return path
    found = models_in(path)
    if len(found) != 1:
        check_plain(path, LoraFxError)
    return found[0]


def _adapter(path: Path, adapter: Adapter) -> dict[str, Any]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    replaced = [{"path": k, "shape": list(v.shape)} for k, v in adapter.replacements.items()]
    return {
        "kind": "adapter",
        "path": str(path),
        "name": adapter.name,
        "targets": [describe_update(name, update) for name, update in adapter.updates.items()],
        "replaced": replaced,
        "digests": _digests(file for file in files if file.is_file()),
    }


def _model(path: Path) -> dict[str, Any]:
    from lora_fx.export.onnx_model.changed_file import check_digests
    from lora_fx.export.onnx_model.model_file import load_proto, manifest_in
    from lora_fx.export.verification.verify_onnx import mode_of

    proto = load_proto(path)
    manifest = manifest_in(proto, path)
    check_digests(proto, path)
    slots = manifest.slots if manifest else ()
    fed = {name for slot in slots for name in slot.names}
    files = (path, path.with_name(f"{path.name}.data"))
    return {
        "kind": "model",
        "path": str(path),
        "mode": mode_of(proto, manifest),
        "opset": {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
        "nodes": len(proto.graph.node),
        "inputs": [value.name for value in proto.graph.input if value.name not in fed],
        "outputs": [value.name for value in proto.graph.output],
        "slots": [asdict(slot) for slot in slots],
        "required": manifest.required if manifest else False,
        "base": manifest.base if manifest else None,
        "model_version": manifest.model_version if manifest else None,
        "digests": _digests(file for file in files if file.is_file()),
    }


def _adapter_file(path: Path) -> dict[str, Any]:
    from lora_fx.export.slots.check_adapter import read_stored, values_of

    stored = read_stored(path)
    with within(path):
        values = values_of(stored)
    return {
        "kind": "adapter file",
        "path": str(path),
        "base": stored.base,
        "model_version": stored.model_version,
        "values": [
            {
                "name": name,
                "shape": list(value.shape),
                "dtype": str(value.dtype).removeprefix("torch."),
                "norm": float(value.double().norm()),
            }
            for name, value in values.items()
        ],
        "digests": _digests([path]),
    }


def _digests(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: f"sha256:{_sha256(file)}" for file in files}


def _sha256(path: Path) -> str:
    check_plain(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def as_text(report: Mapping[str, Any]) -> str:
    """One line a value; a list of records is one line a record."""
    lines = []
    for name, value in report.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += [f"{name} {len(value)}", *(f"  {_record(row)}" for row in value)]
        elif isinstance(value, Mapping):
            lines += [name, *(f"  {key}  {_short(item)}" for key, item in value.items())]
        else:
            lines.append(f"{name} {_short(value)}")
    return "\n".join(lines)


def _record(row: Mapping[str, Any]) -> str:
    first, *rest = row.items()
    told = (f"{key} {_short(value)}" for key, value in rest if value not in ((), [], ""))
    return "  ".join([str(first[1]), *told])


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join("?" if item is None else _short(item) for item in value)
    return str(value)
