"""What the commands do, from paths to reports."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx

from lora_fx.adapter import Adapter
from lora_fx.api import fold, inject
from lora_fx.errors import AdapterError, ExportError, shorten
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.model_source import find_model
from lora_fx.trace import trace

if TYPE_CHECKING:
    from lora_fx.export import ExportReport

Progress = Callable[[str], None]

MODEL = "model.onnx"
REPORT = "report.json"


def export_model(
    spec: str, adapters: Sequence[Path], mode: str, out: Path, force: bool, progress: Progress
) -> ExportReport:
    """Exports a model with its adapters into a directory: all of it, or nothing.

    Args:
        spec: as `find_model` takes it.
        adapters: paths for `load_adapter`; summed, except in swappable mode.
        mode: ``"merged"``, ``"unmerged"`` or ``"swappable"``.
        out: gets ``model.onnx``, ``report.json`` and, in swappable mode, the adapter files.
        force: replace files that exist.
        progress: told the name of each stage.

    Raises:
        LoraFxError: names what cannot be read, exported or written.
        VerificationError: the file and eager disagree.
    """
    from lora_fx.export import export_adapter, to_onnx

    loaded = _load(adapters)
    names = [MODEL, REPORT, *(_file_of(a) for a in loaded if mode == "swappable")]
    _refuse_existing(out, names, force)
    progress("load")
    gm = _trace(spec, progress)
    if loaded:
        gm = inject(gm, loaded)
    if mode == "merged":
        gm = fold(gm)
    kind = "input" if mode == "swappable" else "constant"
    with _staged(out, names, force) as draft:
        report = to_onnx(gm, draft / MODEL, adapters=kind, progress=progress)
        for adapter in loaded if mode == "swappable" else []:
            progress(f"adapter {adapter.name}")
            export_adapter(adapter, draft / MODEL, draft / _file_of(adapter))
        report = replace(report, path=str(out / MODEL))
        report.save_json(draft / REPORT)
    return report


def convert_adapter(
    source: Path, out: Path, model: Path | None, to: str | None, force: bool
) -> Adapter:
    """Writes an adapter for an exported model, or in another format.

    Raises:
        LoraFxError: the adapter cannot be read, does not fit, or the output exists.
    """
    adapter = load_adapter(source)
    if model is not None:
        from lora_fx.export import export_adapter

        export_adapter(adapter, model, out, force=force)
    else:
        save_adapter(adapter, out, format=to or "peft", force=force)
    return adapter


def verify_model(
    path: Path, spec: str, adapters: Sequence[Path], progress: Progress
) -> ExportReport:
    """Compares an exported file with the eager model.

    A swappable file is run alone and with each adapter; any other must hold their sum.

    Raises:
        LoraFxError: something cannot be read, or an adapter does not fit.
        VerificationError: the file and eager disagree, or the control agreed.
    """
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    loaded = _load(adapters)
    progress("load")
    from lora_fx.export import verify_onnx

    return verify_onnx(_trace(spec, progress), path, adapters=loaded, progress=progress)


def _trace(spec: str, progress: Progress) -> fx.GraphModule:
    source = find_model(spec)
    progress("trace")
    return trace(source.model, source.args, source.kwargs, dynamic_shapes=source.dynamic_shapes)


def _load(paths: Sequence[Path]) -> list[Adapter]:
    adapters = [load_adapter(path) for path in paths]
    names = [adapter.name for adapter in adapters]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AdapterError(f"--adapter: {shorten(twice)} is given twice: rename a directory")
    return adapters


def _file_of(adapter: Adapter) -> str:
    return f"{adapter.name}.onnx_adapter"


def _refuse_existing(out: Path, names: Sequence[str], force: bool) -> None:
    if os.path.lexists(out) and not out.is_dir():
        raise ExportError(f"{out}: is a file: give a directory")
    found = [name for name in names if os.path.lexists(out / name)]
    if found and not force:
        raise ExportError(f"{out}: holds {shorten(found)} already: pass --force to replace it")


@contextmanager
def _staged(out: Path, names: Sequence[str], force: bool) -> Iterator[Path]:
    """A directory to write in, whose files move to ``out`` if the body did not raise."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise ExportError(f"{out}: cannot be created: {error.strerror}") from error
    try:
        yield draft
        _refuse_existing(out, names, force)  # they may have appeared meanwhile
        out.mkdir(exist_ok=True)
        for file in sorted(draft.iterdir(), key=lambda file: file.name == MODEL):
            os.replace(file, out / file.name)
    except OSError as error:
        raise ExportError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
