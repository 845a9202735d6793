"""What is in a file: adapters and exported models as plain values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_fx.adapter import Adapter, Update
from lora_fx.errors import LoraFxError
from lora_fx.formats import load_adapter

_CHUNK = 1 << 20


def describe(path: Path) -> dict[str, Any]:
    """Describes an adapter directory, a ``.onnx`` file or a ``.onnx_adapter`` file.

    Returns:
        ``kind``, ``path``, and what that kind has: targets or slots, shapes, norms, digests.

    Raises:
        LoraFxError: it is missing, damaged, or none of these.
    """
    if not path.exists():
        raise LoraFxError(f"{path}: no such file or directory")
    if path.suffix == ".onnx":
        return _model(path)
    if path.suffix == ".onnx_adapter":
        return _adapter_file(path)
    if path.is_dir():
        return _adapter(path, load_adapter(path))
    raise LoraFxError(f"{path}: expected an adapter directory, a .onnx or a .onnx_adapter file")


def _adapter(path: Path, adapter: Adapter) -> dict[str, Any]:
    replaced = [{"path": k, "shape": list(v.shape)} for k, v in adapter.replacements.items()]
    return {
        "kind": "adapter",
        "path": str(path),
        "name": adapter.name,
        "targets": [_target(name, update) for name, update in adapter.updates.items()],
        "replaced": replaced,
        "digests": _digests(file for file in sorted(path.iterdir()) if file.is_file()),
    }


def _target(path: str, update: Update) -> dict[str, Any]:
    return {
        "path": path,
        "kind": update.kind,
        "shape": list(update.shape),
        "rank": update.rank,
        "scale": update.scale,
        "norm": update.delta().norm().item(),
    }


def _model(path: Path) -> dict[str, Any]:
    from lora_fx.export.model_file import load_proto, manifest_in

    proto = load_proto(path)
    manifest = manifest_in(proto, path)
    slots = manifest.slots if manifest else ()
    fed = {name for slot in slots for name in (slot.down, slot.up)}
    files = (path, path.with_name(f"{path.name}.data"))
    return {
        "kind": "model",
        "path": str(path),
        "opset": {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
        "nodes": len(proto.graph.node),
        "inputs": [value.name for value in proto.graph.input if value.name not in fed],
        "outputs": [value.name for value in proto.graph.output],
        "slots": [asdict(slot) for slot in slots],
        "base": manifest.base if manifest else None,
        "model_version": manifest.model_version if manifest else None,
        "digests": _digests(file for file in files if file.is_file()),
    }


def _adapter_file(path: Path) -> dict[str, Any]:
    from lora_fx.export.adapter_check import read_adapter

    stored = read_adapter(path)
    values = {name: value.numpy() for name, value in sorted(stored.get_parameters().items())}
    return {
        "kind": "adapter file",
        "path": str(path),
        "model_version": stored.get_model_version(),
        "values": [
            {
                "name": name,
                "shape": list(value.shape),
                "dtype": str(value.dtype),
                "norm": float((value.astype("float64") ** 2).sum() ** 0.5),
            }
            for name, value in values.items()
        ],
        "digests": _digests([path]),
    }


def _digests(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: f"sha256:{_sha256(file)}" for file in files}


def _sha256(path: Path) -> str:
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
    return "  ".join([str(first[1]), *(f"{key} {_short(value)}" for key, value in rest)])


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
