"""The way from a graph to a published, verified ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from lora_fx.choices import AdapterMode, BitsOrFloat, Mode, check_choice, takes
from lora_fx.errors import ExportError, shorten
from lora_fx.explanation import is_unmerged
from lora_fx.export.modes import Constant, Swappable
from lora_fx.export.onnx_model.convert import convert
from lora_fx.export.onnx_model.model_file import (
    INLINE_LIMIT,
    load_proto,
    manifest_in,
    write_model,
)
from lora_fx.export.onnx_model.node_names import name_nodes, tensors_of_constants
from lora_fx.export.onnx_model.optimize import anonymise, clean
from lora_fx.export.program.decompose import LoweredProgram
from lora_fx.export.program.example_inputs import Inputs, example_inputs
from lora_fx.export.program.export_unit import ExportUnit, export_unit
from lora_fx.export.program.io_signature import rename, rename_axes
from lora_fx.export.program.lazy_weights import replace_stand_ins
from lora_fx.export.program.planted import planted
from lora_fx.export.quantization.pack_file import outputs_off, pack_file, plain_place
from lora_fx.export.quantization.schemes import scheme_wanted
from lora_fx.export.report import Clock, ExportReport, Verification, file_sizes
from lora_fx.export.slots.choose import Wanted
from lora_fx.export.spelling.nan_guards import guard_empty_rows
from lora_fx.export.spelling.shared_cache import share_caches
from lora_fx.export.spelling.spell import check_operators, spell
from lora_fx.export.verification.eager import told_of_eager
from lora_fx.export.verification.file_run import Run
from lora_fx.export.verification.stateful_calls import refuse_unsteady
from lora_fx.graph.example import DTYPE, TASK, task_of
from lora_fx.graph.graph_module import targets
from lora_fx.graph.lazy_tensor import get_all_unevaluated
from lora_fx.graph.one_thread import one_at_a_time
from lora_fx.injection.branch_tensors import check_branches
from lora_fx.injection.injected_adapters import injected
from lora_fx.injection.invocation_mask import invocations_in
from lora_fx.io.atomic import refuse_existing, staged
from lora_fx.layers.sites import by_path
from lora_fx.report.page import page_beside, write_page


@takes(ExportError)
@one_at_a_time
def to_onnx(
    gm: fx.GraphModule,
    path: str | Path,
    *,
    adapters: AdapterMode = "constant",
    verify: bool = True,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | Mapping[str, str] | None = None,
    output_names: Sequence[str] | Mapping[str, str] | None = None,
    slots: Wanted = None,
    vectors: bool | None = None,
    opset: int | None = None,
    quantize: BitsOrFloat | None = None,
    portable: bool = False,
    shared_cache: bool = False,
    external_data_above: int = INLINE_LIMIT,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
    report: str | Path | None = None,
    measure: bool = False,
) -> ExportReport:
    """Writes a graph as ONNX, checks the file against eager, and only then publishes it.

    Args:
        gm: a graph from `lora_fx.trace` and passes. It is exported in eval mode, not changed.
        path: the ``.onnx`` file.
        adapters: ``"constant"``: low-rank weights are initializers. ``"input"``: they are
            overridable graph inputs ``<module path>.lora_A`` (in, r) and ``.lora_B`` (r, out);
            without an adapter the file is the base. ``"required"``: the same inputs without a
            default, for runtimes that feed no other ones, as JavaScript's: each run is fed what
            `export_adapter` writes as safetensors, of an adapter or of none.
        verify: run eager and onnxruntime side by side, and a control that must fail.
        args: example inputs by position; those that ``gm`` was traced with by default.
        kwargs: example inputs by name.
        dynamic_shapes: as `lora_fx.trace` takes it.
        input_names: what the file calls its inputs, all in order, or some by the name that they
            would have; as the model does by default.
        output_names: what the file calls its outputs, likewise.
        slots: of these two, what an adapter can change: paths of layers and of
            parameters (``*`` stands for any part of one), or path -> form; ``"all-linear"``; or
            None: what the adapters in ``gm`` change, else all linear layers but the output
            embedding. A layer's form is ``"factors"``, ``"vectors"`` (below), or ``"weight"``: an
            input of the weight's own name that takes W' whole, for LoKr, OFT and their like, each
            adapter as large as the layer. A parameter is whole: a head, a norm, a bias.
            ``"input_ids"`` -> ``"invocation"`` lets aLoRA say from which tokens on it acts.
            `lora_fx.export.slots_for` says what some adapters need.
        vectors: of these two, each slot also takes a bias and the vectors of DoRA
            and (IA)3: ``.lora_gain`` and ``.lora_bias`` (out,), ``.lora_col`` (in,). By default
            if an adapter in ``gm`` has one.
        opset: version of the ONNX operator set, 18 to 25; the exporter's own choice by default.
        quantize: store the weights of linear layers in 4 or 8 bits, or as ``"nf4"`` or ``"fp4"``;
            adapters, slots and heads stay as they are, as with `lora_fx.export.quantize_onnx`. The
            file is verified with plain weights first, then with the numbers of its bits. By default
            what a base was loaded in: a bitsandbytes base stays one, unless it is ``"float"``.
        portable: leave the operators as torch.onnx gives them. By default what onnxruntime runs
            slowly is said otherwise; the report says what, and how often.
        shared_cache: of a decoder with a cache: let it be written in place, where a runtime gives a
            buffer with room for more as ``past_key_values`` and takes the same as ``present``, as
            onnxruntime-genai and `Session.generate` do: nothing is copied at a token. Behind a
            cache the file takes one row, or one new token of each; what a query of padding gives,
            which nobody reads, is another number than eager's.
        external_data_above: bytes of weights from which they go to ``<path>.data``.
        force: replace files that exist.
        progress: told the name of each stage as it starts.
        report: an ``.html`` file to write besides: one page with all that the report says.
        measure: also measure what adapters do to each layer and draw one of each kind, for the
            report's ``layers``, ``pictures`` and ``left``; a page has them anyway.

    Returns:
        What was written, measured and checked.

    Raises:
        ExportError: no example inputs, an operator without ONNX form, an opset that cannot be
            written, a model whose next call gives something else, a cache that cannot be shared,
            or the output exists.
        AdapterError: a branch of the graph holds NaN or infinity, or its products overflow.
        VerificationError: the file and eager disagree, or a control agreed.
    """
    if not isinstance(gm, fx.GraphModule):
        raise ExportError(
            f"to_onnx writes a GraphModule, not a {type(gm).__name__}: trace the model first, "
            "gm = lora_fx.trace(model, args)"
        )
    check_choice("adapters=", adapters, AdapterMode, ExportError)
    if adapters == "constant" and (slots is not None or vectors):
        raise ExportError('slots or vectors is given: that needs adapters="input" or "required"')
    check_operators(opset, portable, shared_cache)
    scheme = scheme_wanted(quantize, task_of(gm))
    target, clock = Path(path), Clock(progress)
    refuse_existing(target, force=force)
    page = None if report is None else page_beside(report, target, force=force)
    _refuse_meta(gm)
    check_branches(gm)
    inputs = example_inputs(gm, args, kwargs, dynamic_shapes, input_names, output_names)
    told = partial(told_of_eager, gm, inputs.args, inputs.kwargs)
    with told(), clock.stage("trace"):
        plan = _planned(gm, adapters, slots, vectors, apart=scheme is not None)
        refuse_unsteady(plan.traced)
        inputs = planted(inputs, gm, [*invocations_in(gm), *invocations_in(plan.traced)])
        trial = export_unit(plan.traced, inputs)
    with clock.stage("convert"):
        trial, model = _translated(trial, plan, inputs, opset)
    with clock.stage("optimise"):
        spellings = _finish(
            model, plan, trial, opset=opset, portable=portable, shared_cache=shared_cache
        )
        model.metadata_props.update(task_of(gm))
    evidence, quantised = Verification.left_out(), None
    with told(), staged(target, force=force) as draft:
        with plain_place(draft, scheme) as plain:
            with clock.stage("write"):
                write_model(model, plain, external_data_above=external_data_above)
            if verify:
                with clock.stage("verify"):
                    evidence = plan.verify(plain, trial)
                    evidence.judge(str(target))
            if scheme is not None:
                with clock.stage("quantise"):
                    own = by_path(plan.traced).keys() | targets(plan.traced.graph).keys()
                    quantised = pack_file(plain, draft, scheme, own=own, above=external_data_above)
                if verify:
                    with clock.stage("verify"):
                        more, off = _verified(plan, trial, plain, draft)
                        more.judge(str(target))
                    evidence, quantised = evidence.and_then(more), replace(quantised, outputs=off)
        evidence.notes += _moves(gm)
        done = ExportReport.of(
            target,
            evidence,
            clock,
            mode=_mode(gm, adapters),
            files=file_sizes(draft.parent),
            opset=model.opset_imports[""],
            notes=[*trial.notes, *plan.notes],
            inputs=trial.inputs,
            outputs=trial.outputs,
            slots=[slot.path for slot in plan.slots],
            task=task_of(gm).get(TASK),
            dtype=task_of(gm).get(DTYPE),
            quantised=quantised,
            spellings=spellings,
        )
        if measure or page is not None:
            with clock.stage("measure"):
                done = done.with_look(plan.look())
        if page is not None:
            write_page(done, page, force=force)
    return done


def _refuse_meta(gm: fx.GraphModule) -> None:
    """Refuses tensors that have no values: a model may be traced on the meta device."""
    if torch.get_default_device().type == "meta":
        raise ExportError('under torch.device("meta") nothing has values: call to_onnx outside it')
    held = get_all_unevaluated(gm, targets(gm.graph)).items()
    empty = [name for name, value in held if getattr(value, "is_meta", False)]
    if empty:
        raise ExportError(
            f"{shorten(empty)}: on the meta device, so without values: load the weights into the "
            "model before it is traced"
        )


def _moves(gm: fx.GraphModule) -> list[str]:
    """What was exchanged in the paths of the adapters to find their layers in the model."""
    every = (record.adapter for record in injected(gm))
    return [f"adapter {adapter.name}: {move}" for adapter in every for move in adapter.moves]


def _verified(
    plan: Constant | Swappable, trial: ExportUnit, plain: Path, draft: Path
) -> tuple[Verification, dict[str, float]]:
    """A file of few bits against eager with its numbers, and how far it is off plain weights."""
    evidence = plan.verify_numbers(draft, trial)
    proto = load_proto(draft)
    manifest, first = manifest_in(proto, draft), trial.taken_by(proto).cases[0]
    found, wanted = (Run(file, None, manifest) for file in (draft, plain))
    return evidence, outputs_off(found, wanted, {first.label: trial.feeds(first)})


def _planned(
    gm: fx.GraphModule, adapters: AdapterMode, slots: Wanted, vectors: bool | None, *, apart: bool
) -> Constant | Swappable:
    if adapters == "constant":
        return Constant.of(gm, apart=apart)
    return Swappable.of(gm, slots, vectors, required=adapters == "required", apart=apart)


def _mode(gm: fx.GraphModule, adapters: AdapterMode) -> Mode:
    if adapters != "constant":
        return "required" if adapters == "required" else "swappable"
    return "unmerged" if is_unmerged(gm) else "merged"


def _translated(
    trial: ExportUnit, plan: Constant | Swappable, inputs: Inputs, opset: int | None
) -> tuple[ExportUnit, ir.Model]:
    """The ONNX form of a program; one that has none gets another chance, traced again."""
    try:
        model = convert(trial.program, opset)
    except ExportError:
        if not isinstance(trial.program, LoweredProgram):
            raise
        trial = export_unit(plan.traced, inputs, retrace=True)
        model = convert(trial.program, opset)
    replace_stand_ins(model, trial.stand_ins)
    return trial, model


def _finish(
    model: ir.Model,
    plan: Constant | Swappable,
    trial: ExportUnit,
    *,
    opset: int | None,
    portable: bool,
    shared_cache: bool,
) -> dict[str, int]:
    plan.open(model)
    clean(model)
    rename_axes(model, trial.leaves)
    spellings = {} if portable else spell(model, opset)
    guard_empty_rows(model)
    rename(model, trial.leaves, trial.outputs)
    spellings |= share_caches(model) if shared_cache else {}
    name_nodes(model)
    tensors_of_constants(model)
    anonymise(model)
    plan.close(model)
    return spellings
