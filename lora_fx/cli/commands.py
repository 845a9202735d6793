"""What the commands do, from paths to reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx

from lora_fx.adapters.adapter import Adapter
from lora_fx.api import fold, inject
from lora_fx.cli.adapter_options import Given, base_of
from lora_fx.cli.model_source import ModelSource, find_model
from lora_fx.cli.parts import Parts, adapter_file, shared_out
from lora_fx.errors import AdapterError, ExportError, shorten, within
from lora_fx.explanation import unmerged
from lora_fx.formats import save_adapter
from lora_fx.graph.example import LAST_LOGITS, TASK
from lora_fx.io.atomic import refuse_files, staged_files
from lora_fx.tasks.adapter_task import trained_for
from lora_fx.tasks.directory import refuse_lacking

if TYPE_CHECKING:
    from lora_fx.export import ExportReport

Progress = Callable[[str], None]

REPORT = "report.json"


def export_model(
    spec: str,
    adapters: Sequence[Path],
    mode: str,
    out: Path,
    force: bool,
    progress: Progress,
    given: Given | None = None,
    vectors: bool = False,
    allow_unmerged: bool = False,
    task: str | None = None,
    last_logits: bool = False,
    opset: int | None = None,
    slots: Sequence[str] = (),
) -> ExportReport | Parts:
    """Exports a model with its adapters into a directory: all of it, or nothing.

    Args:
        spec: as `find_model` takes it.
        adapters: paths for `load_adapter`; summed, except in swappable mode.
        mode: ``"merged"``, ``"unmerged"`` or ``"swappable"``.
        out: gets ``model.onnx``, or a file for each part of a model, ``report.json``, what clients
            need and, in swappable mode, the adapter files.
        force: replace files that exist.
        progress: told the name of each stage.
        given: what the adapters' formats do not store; the model is their base.
        vectors: swappable slots take those of DoRA and (IA)3 even if no adapter here has any.
        allow_unmerged: in merged mode, what cannot be folded stays beside its layer; the report's
            mode is then ``"unmerged"``, and a note names the layers.
        task: what a directory's model is exported for, as `lora_fx.tasks` names it.
        last_logits: of a decoder with a cache, logits of the last position alone.
        opset: version of the ONNX operator set; the exporter's own choice by default.
        slots: in swappable mode, what adapters can change beside what these change: paths, or
            PATH=FORM, as `to_onnx` takes them, or ``"all-linear"``.

    Raises:
        LoraFxError: names what cannot be read, exported or written, or merged.
        VerificationError: the file and eager disagree.
    """
    refuse_files(out, [REPORT], force)
    if (slots or vectors) and mode != "swappable":
        raise ExportError("--slots and --vectors are of --mode swappable: add it")
    progress("load")
    source, loaded = _load(spec, adapters, given, task, last_logits)
    parts = source, *source.more
    swaps = loaded if mode == "swappable" else []
    names = [part.file for part in parts] + [REPORT, *source.beside]
    names += [adapter_file(adapter, part) for part in parts for adapter in swaps]
    refuse_files(out, names, force)
    graphs = [_trace(part, progress) for part in parts]
    shares = shared_out(loaded, graphs)
    options: dict[str, Any] = {"opset": opset}
    if mode == "swappable":
        options |= {"vectors": vectors or None, "slots": _slots(slots)}
    with staged_files(out, names, parts[-1].file, force) as draft:
        reports = [
            _export_part(part, gm, own, mode, draft, progress, options, allow_unmerged)
            for part, gm, own in zip(parts, graphs, shares, strict=True)
        ]
        reports = [replace(r, path=str(out / Path(r.path).name)) for r in reports]
        report = reports[0] if len(reports) == 1 else Parts(tuple(reports))
        report.save_json(draft / REPORT)
        if source.write_beside is not None:
            source.write_beside(draft)
    return report


def _export_part(
    part: ModelSource,
    gm: fx.GraphModule,
    adapters: Sequence[Adapter],
    mode: str,
    draft: Path,
    progress: Progress,
    options: Mapping[str, Any],
    allow_unmerged: bool,
) -> ExportReport:
    """Writes one file, and its adapters' if they swap."""
    from lora_fx.export import to_onnx

    path = draft / part.file
    if mode == "swappable":
        report = _swappable(part, gm, adapters, draft, progress, options)
        return replace(report, mode=mode)
    if adapters:
        gm = inject(gm, adapters)
    if mode == "merged":
        gm = fold(gm)
        notes = _not_merged(gm, allow_unmerged)
        report = to_onnx(gm, path, progress=progress, **options)
        return replace(report, notes=[*report.notes, *notes])
    return replace(to_onnx(gm, path, progress=progress, **options), mode=mode)


def _swappable(
    part: ModelSource,
    gm: fx.GraphModule,
    adapters: Sequence[Adapter],
    draft: Path,
    progress: Progress,
    options: Mapping[str, Any],
) -> ExportReport:
    """The base with slots for what its adapters change and for what was asked for; their files."""
    from lora_fx.export import export_adapter, slots_for, to_onnx
    from lora_fx.export.verification.verify_onnx import check_adapter_files

    for adapter in adapters:
        inject(gm, adapter)  # what does not fit is told before a file is written
    path, asked = draft / part.file, {**slots_for(gm, adapters), **options["slots"]} or None
    report = to_onnx(gm, path, adapters="input", progress=progress, **{**options, "slots": asked})
    pairs = [(adapter, draft / adapter_file(adapter, part)) for adapter in adapters]
    for adapter, file in pairs:
        progress(f"adapter {adapter.name}")
        export_adapter(adapter, path, file, check=False)
    return report.with_evidence(check_adapter_files(gm, path, pairs))


def _slots(given: Sequence[str]) -> dict[str, str]:
    """``PATH`` or ``PATH=FORM``, as often as it was given."""
    pairs = (text.partition("=") for text in given)
    return {path: form or "factors" for path, _, form in pairs}


def convert_adapter(
    source: Path,
    out: Path,
    model: Path | None,
    to: str | None,
    force: bool,
    given: Given | None = None,
) -> Adapter:
    """Writes an adapter for an exported model, or in another format.

    Args:
        source: the adapter to read.
        out: the file or directory to write.
        model: a swappable file, or None.
        to: a format; PEFT's directory by default.
        force: replace what exists.
        given: what the adapter's format does not store; a component is of what is written, where
            that format has components.

    Raises:
        LoraFxError: the adapter cannot be read, does not fit, or the output exists.
    """
    if to == "onnx_adapter":
        raise AdapterError(
            f"{out}: an .onnx_adapter is made for one model: use --for MODEL.onnx, a file that was "
            "exported as swappable, and no --to"
        )
    reading, hints = (given or Given()).split(to)
    adapter = reading.load(source)
    if model is not None:
        from lora_fx.export import export_adapter

        export_adapter(adapter, model, out, force=force)
    else:
        save_adapter(adapter, out, format=to or "peft", force=force, **hints)
    return adapter


def verify_model(
    path: Path,
    spec: str,
    adapters: Sequence[Path],
    progress: Progress,
    given: Given | None = None,
    task: str | None = None,
    last_logits: bool = False,
) -> ExportReport:
    """Compares an exported file with the eager model.

    A swappable file is run alone and with each adapter; any other must hold their sum.

    Raises:
        LoraFxError: something cannot be read, or an adapter does not fit.
        VerificationError: the file and eager disagree, or the control agreed.
    """
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    from lora_fx.export import verify_onnx
    from lora_fx.export.onnx_model.model_file import load_proto

    progress("load")
    if Path(spec).is_dir():
        noted = {entry.key: entry.value for entry in load_proto(path).metadata_props}
        is_own = task in (None, noted.get(TASK))
        last_logits = last_logits or (is_own and LAST_LOGITS in noted)
        task = task or noted.get(TASK)
    source, loaded = _load(spec, adapters, given, task, last_logits)

    parts = source, *source.more
    part = next((part for part in parts if part.file == path.name), source)
    place, graphs = parts.index(part), [_trace(each, progress) for each in parts]
    adapters_here = shared_out(loaded, graphs)[place]
    return verify_onnx(graphs[place], path, adapters=adapters_here, progress=progress)


def _not_merged(gm: fx.GraphModule, allowed: bool) -> list[str]:
    """What to note of layers that fold left with an adapter beside them; refused by default."""
    left = unmerged(gm)
    if not left:
        return []
    lines = shorten([f"{path} ({reason})" for path, reason in left.items()])
    if allowed:
        return [f"not merged, computed beside the layer: {lines}"]
    raise ExportError(
        f"mode merged: fold left an adapter beside {len(left)} layers: {lines}; export with --mode "
        "unmerged, or with --allow-unmerged to merge the others alone"
    )


def _trace(source: ModelSource, progress: Progress) -> fx.GraphModule:
    progress("trace")
    return source.traced()


def _load(
    spec: str,
    paths: Sequence[Path],
    given: Given | None,
    task: str | None = None,
    last_logits: bool = False,
) -> tuple[ModelSource, list[Adapter]]:
    """The model and its adapters, whose names it resolves."""
    missing = [str(path) for path in paths if not path.exists()]
    if missing:  # told before a model is loaded, which can take long
        raise AdapterError(f"{shorten(missing)}: no such file or directory")
    given = given or Given()
    source = find_model(spec, trained_for(paths, given.allow_pickle), task, last_logits)
    base = base_of(source) if paths else None
    adapters = [given.load(path, base) for path in paths]
    with within(spec):
        refuse_lacking(source.lacks, {n for adapter in adapters for n in adapter.replacements})
    names = [adapter.name for adapter in adapters]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AdapterError(f"--adapter: {shorten(twice)} is given twice: rename a directory")
    return source, adapters
