"""The commands on a model and its adapters: export, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from lora_fx import choices
from lora_fx.cli.adapter_options import AdapterOptions, with_hints
from lora_fx.cli.console import show, stages
from lora_fx.cli.options import (
    Adapters,
    Against,
    AllowUnmerged,
    AsJson,
    Bits,
    DryRun,
    DType,
    Force,
    LastLogits,
    Measure,
    Mode,
    Model,
    NamedModel,
    Names,
    OutDirectory,
    OutputNames,
    TaskName,
)
from lora_fx.errors import LoraFxError
from lora_fx.io.output_place import keeping


@with_hints("base")
def export(
    given: AdapterOptions,
    out: OutDirectory,
    model: Model = None,
    named_model: NamedModel = None,
    adapter: Adapters = None,
    name: Names = None,
    mode: Mode = "merged",
    vectors: Annotated[
        bool, typer.Option(help="Swappable slots that take DoRA and (IA)3 as well.")
    ] = False,
    allow_unmerged: AllowUnmerged = False,
    task: TaskName = None,
    last_logits: LastLogits = False,
    dtype: DType = None,
    bits: Bits = None,
    opset: Annotated[
        int | None, typer.Option(help="Version of ONNX's operators, 18 to 25.")
    ] = None,
    slots: Annotated[
        list[str] | None,
        typer.Option(help="A layer that takes an adapter, in swappable mode; or all-linear."),
    ] = None,
    output_name: OutputNames = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="Leave the operators as torch.onnx gives them.")
    ] = False,
    shared_cache: Annotated[
        bool, typer.Option("--shared-cache", help="A decoder's cache can be written in place.")
    ] = False,
    measure: Measure = False,
    dry_run: DryRun = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write OUT/model.onnx and OUT/report.json, verified against the eager model.

    In swappable mode each adapter is also written as OUT/NAME.onnx_adapter. Mode required is the
    same without defaults, for JavaScript: OUT/NAME.safetensors, and OUT/no-adapter.safetensors.
    """
    from lora_fx.cli.commands import export_model

    spec = model or named_model
    if spec is None or (model and named_model):
        raise LoraFxError("give one model: MODEL, or -m MODEL")
    with stages() as progress, keeping(spec, spec.rpartition(":")[0], *(adapter or ()), given.base):
        report = export_model(
            spec, adapter or [], cast(choices.Mode, mode), out, force, progress, given, vectors,
            allow_unmerged, task, last_logits, opset, slots or (), name or (), dtype, dry_run, bits,
            measure, output_name or (), portable, shared_cache,
        )  # fmt: skip
    show(as_json, report.to_dict(), str(report))


@with_hints("base")
def verify(
    given: AdapterOptions,
    path: Annotated[Path, typer.Argument(help="An exported model.")],
    against: Against,
    adapter: Adapters = None,
    name: Names = None,
    task: TaskName = None,
    last_logits: LastLogits = False,
    as_json: AsJson = False,
) -> None:
    """Compare an exported model with the eager one, and with a control that must differ."""
    from lora_fx.cli.commands import verify_model

    with stages() as progress:
        report = verify_model(
            path, against, adapter or [], progress, given, task, last_logits, name or ()
        )
    show(as_json, report.to_dict(), str(report))
