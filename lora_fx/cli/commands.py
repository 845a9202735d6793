"""What the commands do, from paths to reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx, nn

from lora_fx.adapters.adapter import Adapter
from lora_fx.api import fold, inject
from lora_fx.cli.adapter_options import AdapterOptions, base_of, named
from lora_fx.cli.components import of_components
from lora_fx.cli.dry_run import Plan, not_merged, planned, wanted_slots
from lora_fx.cli.model_source import dtype_named, find_model
from lora_fx.cli.parts import (
    SWAPPING,
    Parts,
    Report,
    Work,
    adapter_file,
    beside,
    part_work,
    share_of,
    shared_out,
)
from lora_fx.errors import AdapterError, ExportError, shorten, within
from lora_fx.formats import save_adapter
from lora_fx.graph.example import DTYPE, LAST_LOGITS, TASK
from lora_fx.io.atomic import refuse_files, staged_files
from lora_fx.io.output_place import check_path
from lora_fx.report.layer_facts import layer_facts
from lora_fx.report.look import Look
from lora_fx.report.stages import Stages
from lora_fx.tasks.adapter_task import trained_for
from lora_fx.tasks.directory import refuse_lacking
from lora_fx.tasks.model_source import ModelSource
from lora_fx.tasks.pipeline import is_pipeline

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
    given: AdapterOptions | None = None,
    vectors: bool = False,
    allow_unmerged: bool = False,
    task: str | None = None,
    last_logits: bool = False,
    opset: int | None = None,
    slots: Sequence[str] = (),
    names: Sequence[str] = (),
    dtype: str | None = None,
    dry_run: bool = False,
    bits: str | None = None,
    measure: bool = False,
    portable: bool = False,
) -> Report:
    """Exports a model with its adapters into a directory: all of it, or nothing.

    Args:
        spec: as `find_model` takes it.
        adapters: paths for `load_adapter`; summed, except in swappable mode.
        mode: ``"merged"``, ``"unmerged"``, ``"swappable"`` or ``"required"``, which is swappable
            without defaults.
        out: gets ``model.onnx``, or a file for each part of a model, ``report.json``, what clients
            need and, in the swappable modes, the adapter files.
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
            PATH=FORM, as `to_onnx` takes them, or ``"all-linear"``; in a
            pipeline they begin with the component's name.
        names: of the adapters, as `named` takes them.
        dtype: what the model is loaded in, or cast to: ``"float32"`` or ``"float16"``.
        dry_run: write nothing, and say what would be written.
        bits: what linear layers are stored in; by default as the base is.
        measure: measure what adapters do to each layer, for the page of the report.
        portable: leave the operators as torch.onnx gives them, as `to_onnx` does.

    Raises:
        LoraFxError: names what cannot be read, exported or written, or merged.
        VerificationError: the file and eager disagree.
    """
    refuse_files(out, [REPORT], force)
    if (slots or vectors) and mode not in SWAPPING:
        raise ExportError("--slots and --vectors are of --mode swappable: add it")
    stored = bits_named(bits)
    progress("load")
    source, loaded = _load(spec, adapters, given, task, last_logits, names, dtype)
    parts = source, *source.more
    files = [part.file for part in parts] + [REPORT, *source.beside]
    files += [adapter_file(one, part, mode) for part in parts for one in beside(mode, loaded)]
    places = [*dict.fromkeys(Path(file).parts[0] for file in files)]
    refuse_files(out, places, force)
    by_component = [of_components(adapter, source) for adapter in loaded]
    graphs = [_trace(part, progress) for part in parts]
    shares = shared_out(by_component, parts, graphs)
    options = {"opset": opset, "quantize": stored, "measure": measure, "portable": portable}
    works = [
        part_work(part, gm, share, mode, slots, vectors, options)
        for part, gm, share in zip(parts, graphs, shares, strict=True)
    ]
    if dry_run:
        return Plan(str(out), tuple(planned(w, allow_unmerged) for w in works), tuple(places))
    with staged_files(out, places, Path(parts[-1].file).parts[0], force) as draft:
        reports = []
        for work in works:
            (draft / work.part.file).parent.mkdir(exist_ok=True)
            reports.append(_export_part(work, draft, progress, allow_unmerged))
        reports = [replace(r, path=str(out / Path(r.path).relative_to(draft))) for r in reports]
        report = reports[0] if len(reports) == 1 else Parts(tuple(reports))
        report.save_json(draft / REPORT)
        if source.write_beside is not None:
            source.write_beside(draft)
    return report


def _export_part(work: Work, draft: Path, progress: Progress, allow_unmerged: bool) -> ExportReport:
    """Writes one file, and its adapters' if they swap."""
    from lora_fx.export import to_onnx

    if work.mode in SWAPPING:
        return replace(_swappable(work, draft, progress), mode=work.mode)
    path, notes = draft / work.part.file, []
    gm = inject(work.graph, work.adapters) if work.adapters else work.graph
    if work.mode == "merged":
        gm = fold(gm)
        notes = not_merged(gm, allow_unmerged)
    report = to_onnx(gm, path, progress=progress, **work.options)
    shown = work.mode if work.mode != "merged" else report.mode
    return replace(report, mode=shown, notes=[*report.notes, *notes])


def _swappable(work: Work, draft: Path, progress: Progress) -> ExportReport:
    """The base with slots for what its adapters change and for what was asked for; their files."""
    from lora_fx.export import export_adapter, to_onnx
    from lora_fx.export.verification.verify_onnx import check_adapter_files

    gm, path = work.graph, draft / work.part.file
    # What does not fit is told before a file is written.
    adapted = [inject(gm, adapter) for adapter in work.adapters]
    options = {**work.options, "slots": wanted_slots(work)}
    report = to_onnx(gm, path, adapters=SWAPPING[work.mode][0], progress=progress, **options)
    pairs = []
    for one in beside(work.mode, work.adapters):
        progress("no adapter" if one is None else f"adapter {one.name}")
        file = draft / adapter_file(one, work.part, work.mode)
        export_adapter(one, path, file, check=False)
        pairs.append((one, file))
    report = report.with_evidence(check_adapter_files(gm, path, pairs))
    if not options["measure"]:
        return report
    layers = [fact for graph in adapted for fact in layer_facts(Stages.of(graph), "input")]
    return report.with_look(Look(layers))


def convert_adapter(
    source: Path | None,
    out: Path,
    model: Path | None,
    to: str | None,
    force: bool,
    given: AdapterOptions | None = None,
    change: Callable[[Adapter, nn.Module | None], Adapter] | None = None,
) -> Adapter | None:
    """Writes an adapter for an exported model, or in another format.

    Args:
        source: the adapter to read; None: no adapter, for a swappable file.
        out: the file or directory to write.
        model: a swappable file, or None.
        to: a format; PEFT's directory by default, and for a swappable file what ``out`` ends in.
        force: replace what exists.
        given: what the adapter's format does not store; a component is of what is written, where
            that format has components.
        change: what to make of the adapter first, with the base that is given.

    Raises:
        LoraFxError: the adapter cannot be read, does not fit, or the output exists.
    """
    if model is None and to in ("onnx_adapter", "safetensors"):
        raise AdapterError(
            f"{out}: a file of format {to} is made for one model: use --for MODEL.onnx, a file "
            "that was exported as swappable"
        )
    if source is None:
        from lora_fx.export import export_adapter

        if model is None:
            raise AdapterError(f"{out}: no adapter is of one model: use --for MODEL.onnx")
        export_adapter(None, model, out, format=to, force=force)
        return None
    reading, hints = (given or AdapterOptions()).split(to)
    base = reading.model()
    adapter = reading.load(source, base)
    if change is not None:
        adapter = change(adapter, base)
    if model is not None:
        from lora_fx.export import export_adapter

        export_adapter(adapter, model, out, format=to, force=force)
    else:
        save_adapter(adapter, out, format=to or "peft", force=force, **hints)
    return adapter


def merge_file(
    model: Path,
    adapter: Path,
    out: Path,
    allow_unmerged: bool,
    force: bool,
    progress: Progress,
    given: AdapterOptions | None = None,
) -> ExportReport:
    """Merges an adapter into a swappable file.

    Args:
        model: the swappable file.
        adapter: an adapter, or the file that was made of one for this model.
        out: the file to write.
        allow_unmerged: what no weight can hold stays beside its layer, as constants.
        force: replace what exists.
        progress: told the name of each stage.
        given: what the adapter's format does not store.

    Raises:
        LoraFxError: the adapter cannot be read or does not fit, or the output exists.
        VerificationError: the two files disagree.
    """
    from lora_fx.export import merge_onnx

    # Without hints it is read by path, there where its memory is given back.
    own = adapter if given is None or given == AdapterOptions() else given.load(adapter)
    return merge_onnx(
        model,
        own,
        out,
        allow_unmerged=allow_unmerged,
        force=force,
        progress=progress,
    )


def open_file(
    model: Path,
    out: Path,
    slots: Sequence[str],
    names: Sequence[str],
    force: bool,
    progress: Progress,
    required: bool = False,
) -> ExportReport:
    """Gives an ONNX file slots for adapters.

    Args:
        model: the file.
        out: the file to write.
        slots: layers; all linear ones by default.
        names: ``NAME=PATH``: the module path of the layer of a weight or a node.
        force: replace what exists.
        progress: told the name of each stage.
        required: the slots get no default.

    Raises:
        LoraFxError: a layer is not there, or the output exists.
        VerificationError: the two files disagree.
    """
    from lora_fx.export import add_lora

    pairs = [name.rpartition("=")[::2] for name in names]
    if wrong := [name for name, (old, new) in zip(names, pairs, strict=True) if not (old and new)]:
        raise ExportError(f"--name {shorten(wrong)}: expected NAME=PATH")
    wanted = list(slots) or "all-linear"
    adapters = "required" if required else "input"
    return add_lora(
        model, out, slots=wanted, names=dict(pairs), adapters=adapters, force=force,
        progress=progress,
    )  # fmt: skip


def bits_named(word: str | None) -> int | str | None:
    """What ``--bits`` says, as `to_onnx` takes it.

    Raises:
        LoraFxError: it is none that weights are stored in.
    """
    if word is None:
        return None
    from lora_fx.export.quantization.schemes import scheme_wanted

    bits = int(word) if word.isascii() and word.isdigit() else word
    scheme_wanted(bits, {})
    return bits


def quantize_file(
    model: Path,
    out: Path,
    bits: str | None,
    block_size: int | None,
    accuracy_level: int,
    layers: Sequence[str] | None,
    keep: Sequence[str],
    force: bool,
    progress: Progress,
) -> ExportReport:
    """Stores the base of an ONNX file in a few bits.

    Args:
        model: the file, or a directory that holds one.
        out: the file to write.
        bits: ``"4"``, ``"8"``, ``"nf4"`` or ``"fp4"``.
        block_size: weights that share a scale.
        accuracy_level: what onnxruntime may round inputs of layers to.
        layers: linear layers; all but heads by default.
        keep: those that stay as they are.
        force: replace what exists.
        progress: told the name of each stage.

    Raises:
        LoraFxError: a layer is not there, or the output exists.
        VerificationError: the file is not what its numbers say.
    """
    from lora_fx.export import quantize_onnx

    return quantize_onnx(
        model,
        out,
        bits=bits_named(bits) or 4,
        block_size=block_size,
        accuracy_level=accuracy_level,
        layers=layers or None,
        keep=keep,
        force=force,
        progress=progress,
    )


def verify_model(
    path: Path,
    spec: str,
    adapters: Sequence[Path],
    progress: Progress,
    given: AdapterOptions | None = None,
    task: str | None = None,
    last_logits: bool = False,
    names: Sequence[str] = (),
) -> ExportReport:
    """Compares an exported file with the eager model.

    A swappable file is run alone and with each adapter; any other must hold their sum.

    Raises:
        LoraFxError: something cannot be read, or an adapter does not fit.
        VerificationError: the file and eager disagree, or the control agreed.
    """
    if not check_path(path, ExportError).is_file():
        raise ExportError(f"{path}: no such file")
    from lora_fx.export import verify_onnx
    from lora_fx.export.onnx_model.model_file import load_proto

    progress("load")
    noted = {entry.key: entry.value for entry in load_proto(path).metadata_props}
    if Path(spec).is_dir() and not is_pipeline(Path(spec)):
        is_own = task in (None, noted.get(TASK))
        last_logits = last_logits or (is_own and LAST_LOGITS in noted)
        task = task or noted.get(TASK)
    source, loaded = _load(spec, adapters, given, task, last_logits, names, noted.get(DTYPE))
    part = _part_of(path, source, noted)
    gm, share = share_of(part, loaded, source, lambda part: _trace(part, progress))
    return verify_onnx(gm, path, adapters=share, progress=progress)


def _part_of(path: Path, source: ModelSource, noted: Mapping[str, str]) -> ModelSource:
    """The part of a model that a file is of: by what it notes, or by its name."""
    parts = source, *source.more
    own = [p for p in parts if p.component and p.task.get(TASK) == noted.get(TASK)]
    own += [p for p in parts if p.file == path.name]
    return next(iter(own), source)


def _trace(source: ModelSource, progress: Progress) -> fx.GraphModule:
    progress("trace")
    return source.traced()


def _load(
    spec: str,
    paths: Sequence[Path],
    given: AdapterOptions | None,
    task: str | None = None,
    last_logits: bool = False,
    names: Sequence[str] = (),
    dtype: str | None = None,
) -> tuple[ModelSource, list[Adapter]]:
    """The model and its adapters, whose names it resolves."""
    called, wanted = named(paths, names), dtype_named(dtype)
    paths = [path for path, _ in called]
    missing = [str(p) for p in paths if not check_path(p, AdapterError).exists()]
    if missing:  # told before a model is loaded, which can take long
        raise AdapterError(f"{shorten(missing)}: no such file or directory")
    given = given or AdapterOptions()
    trained = trained_for(paths, given.allow_pickle) if paths else None
    source = find_model(spec, trained, task, last_logits, given.component, wanted)
    base = base_of(source) if paths else None
    given = replace(given, component=None) if source.chosen is not None else given
    adapters = [given.load(path, base, name) for path, name in called]
    with within(spec):
        refuse_lacking(source.lacks, {n for adapter in adapters for n in adapter.replacements})
    found = [adapter.name for adapter in adapters]
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise AdapterError(f"--adapter: {shorten(twice)} is given twice: name them by --name")
    return source, adapters
