"""What ``export`` and ``verify`` do, from paths to reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fx.api import fold, inject
from lora_fx.choices import Mode, check_choice
from lora_fx.cli.adapter_options import AdapterOptions
from lora_fx.cli.components import of_components
from lora_fx.cli.dry_run import Plan, not_merged, planned, wanted_slots
from lora_fx.cli.loaded import Progress, load, trace
from lora_fx.cli.onnx_files import bits_named
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
from lora_fx.errors import ExportError
from lora_fx.graph.example import DTYPE, LAST_LOGITS, TASK
from lora_fx.io.atomic import refuse_files, staged_files
from lora_fx.io.plain_file import check_path
from lora_fx.io.strict_json import to_json
from lora_fx.report.layer_facts import layer_facts
from lora_fx.report.look import Look
from lora_fx.report.stages import Stages
from lora_fx.tasks.model_source import ModelSource
from lora_fx.tasks.pipeline import is_pipeline

if TYPE_CHECKING:
    from lora_fx.export import ExportReport

REPORT = "report.json"


def export_model(
    spec: str,
    adapters: Sequence[Path],
    mode: Mode,
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
    output_names: Sequence[str] = (),
    portable: bool = False,
    shared_cache: bool = False,
) -> Report:
    """Exports a model with its adapters into a directory: all of it, or nothing.

    Args:
        spec: as `find_model` takes it.
        adapters: paths for `load_adapter`; summed, except in swappable mode.
        mode: ``"merged"``, ``"unmerged"``, ``"swappable"`` or ``"required"``, which is swappable
            without defaults.
        out: gets ``model.onnx``, or a file for each part of a model, ``report.json``, what clients
            need and, in the swappable modes, the adapter files; in the others both steps of an
            encoder-decoder's decoder in one file too.
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
        output_names: what the file calls its outputs, as `outputs_named` takes them.
        portable: leave the operators as torch.onnx gives them, as `to_onnx` does.
        shared_cache: let a decoder's cache be written in place, as `to_onnx` does.

    Raises:
        LoraFxError: names what cannot be read, exported or written, or merged.
        VerificationError: the file and eager disagree.
    """
    check_choice("--mode ", mode, Mode, ExportError)
    refuse_files(out, [REPORT], force)
    if (slots or vectors) and mode not in SWAPPING:
        raise ExportError("--slots and --vectors are of --mode swappable: add it")
    stored, outputs = bits_named(bits), outputs_named(output_names)
    progress("load")
    source, loaded = load(spec, adapters, given, task, last_logits, names, dtype)
    parts = source, *source.more
    if outputs and len(parts) > 1:
        raise ExportError(
            f"--output-name: the model is written as {len(parts)} files, whose clients know their "
            "outputs by name: leave it out"
        )
    joined = [] if mode in SWAPPING else [part.joined for part in parts if part.joined]
    files = [part.file for part in parts] + [REPORT, *source.beside, *joined]
    files += [adapter_file(one, part, mode) for part in parts for one in beside(mode, loaded)]
    places = [*dict.fromkeys(Path(file).parts[0] for file in files)]
    refuse_files(out, places, force)
    from lora_fx.export.spelling.spell import check_operators

    check_operators(opset, portable, shared_cache)
    by_component = [of_components(adapter, source) for adapter in loaded]
    graphs = [trace(part, progress) for part in parts]
    shares = shared_out(by_component, parts, graphs)
    options: dict[str, Any] = {"opset": opset, "quantize": stored, "measure": measure}
    options |= {"portable": portable, "shared_cache": shared_cache}
    options |= {"output_names": outputs} if outputs else {}
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
        reports += [
            _joined(draft, first.file, later.file, later.joined, reports[-1].mode, progress)
            for first, later in pairwise(parts)
            if later.joined in joined
        ]
        reports = [replace(r, path=str(out / Path(r.path).relative_to(draft))) for r in reports]
        report = reports[0] if len(reports) == 1 else Parts(tuple(reports))
        (draft / REPORT).write_text(to_json(report.to_dict()) + "\n")
        if source.write_beside is not None:
            source.write_beside(draft, **({"shared_cache": True} if shared_cache else {}))
    return report


def outputs_named(given: Sequence[str]) -> dict[str, str] | list[str]:
    """What ``--output-name`` says, as `to_onnx` takes it.

    Args:
        given: ``OLD=NEW`` each, or ``NAME`` for each output in turn.

    Raises:
        ExportError: they are some of both.
    """
    pairs = [name.partition("=") for name in given]
    if all(not equals for _, equals, _ in pairs):
        return [*given]
    if not all(old and new for old, _, new in pairs) or len({o for o, _, _ in pairs}) < len(pairs):
        raise ExportError(
            f"--output-name {', '.join(given)}: expected OLD=NEW each, an output once, or NAME for "
            "each output in turn"
        )
    return {old: new for old, _, new in pairs}


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


def _joined(
    draft: Path, first: str, later: str, out: str, mode: Mode, progress: Progress
) -> ExportReport:
    """Writes two files as one."""
    from lora_fx.export import join_decoders

    report = join_decoders(
        draft / first, draft / later, draft / out, check=False, progress=progress
    )
    return replace(report, mode=mode)


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
    if not check_path(path, ExportError).exists():
        raise ExportError(f"{path}: no such file: give the .onnx file that was exported")
    from lora_fx.export import verify_onnx
    from lora_fx.export.onnx_model.model_file import load_proto

    progress("load")
    noted = {entry.key: entry.value for entry in load_proto(path).metadata_props}
    component = None
    if Path(spec).is_dir() and is_pipeline(Path(spec)):
        component = noted.get(TASK)
    elif Path(spec).is_dir():
        is_own = task in (None, noted.get(TASK))
        last_logits = last_logits or (is_own and LAST_LOGITS in noted)
        task = task or noted.get(TASK)
    source, loaded = load(
        spec, adapters, given, task, last_logits, names, noted.get(DTYPE), component
    )
    part = _part_of(path, source, noted)
    gm, share = share_of(part, loaded, source, lambda part: trace(part, progress))
    return verify_onnx(gm, path, adapters=share, progress=progress)


def _part_of(path: Path, source: ModelSource, noted: Mapping[str, str]) -> ModelSource:
    """The part of a model that a file is of: by what it notes, or by its name.

    Raises:
        ExportError: it is several.
    """
    parts = source, *source.more
    for first, later in pairwise(parts):
        if later.joined == path.name:
            raise ExportError(
                f"{path}: is {first.file} and {later.file} in one, and was held against both when "
                "it was written: give these"
            )
    own = [p for p in parts if p.component and p.task.get(TASK) == noted.get(TASK)]
    own += [p for p in parts if p.file == path.name]
    return next(iter(own), source)
