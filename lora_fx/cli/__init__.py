"""The command line.

Exit codes: 0 done and verified, 1 verification failed, 2 anything else, 130 interrupted.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import lora_fx
from lora_fx.cli.adapter_options import (
    Adapters,
    Against,
    AllowUnmerged,
    AsJson,
    DryRun,
    DType,
    Force,
    Given,
    LastLogits,
    Model,
    NamedModel,
    Names,
    TaskName,
    with_hints,
)
from lora_fx.cli.console import show, stages
from lora_fx.cli.error_exit import report as report_failure
from lora_fx.errors import LoraFxError
from lora_fx.io.output_place import keeping

# Usage errors, which typer shows itself; what they derive from has no public name in every typer.
_USAGE: type[Exception] = next(
    kind
    for kind in typer.BadParameter.__mro__
    if kind.__name__ == "ClickException" and issubclass(kind, Exception)
)


class Commands(TyperGroup):
    """The one place where whatever a command raises becomes a message and an exit code.

    It stands inside typer, which ends with 1 where a pipe was closed or an input had ended.
    """

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was named."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, _USAGE):
            raise
        except BaseException as error:
            sys.exit(report_failure(error))


app = typer.Typer(
    cls=Commands,
    name="lora-fx",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lora-fx {lora_fx.__version__}")
        raise typer.Exit


@app.callback()
def every_command(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """From a PyTorch model with LoRA adapters to verified ONNX, merged or swappable."""


class Mode(StrEnum):
    """How an exported model holds its adapters."""

    merged = "merged"
    unmerged = "unmerged"
    swappable = "swappable"


@app.command()
@with_hints("base")
def export(
    given: Given,
    out: Annotated[Path, typer.Option("-o", "--out", help="The directory to write.")],
    model: Model = None,
    named_model: NamedModel = None,
    adapter: Adapters = None,
    name: Names = None,
    mode: Annotated[Mode, typer.Option(help="Where the adapters go.")] = Mode.merged,
    vectors: Annotated[
        bool, typer.Option(help="Swappable slots that take DoRA and (IA)3 as well.")
    ] = False,
    allow_unmerged: AllowUnmerged = False,
    task: TaskName = None,
    last_logits: LastLogits = False,
    dtype: DType = None,
    opset: Annotated[
        int | None, typer.Option(help="Version of ONNX's operators, 18 to 25.")
    ] = None,
    slots: Annotated[
        list[str] | None,
        typer.Option(help="A layer that takes an adapter, in swappable mode; or all-linear."),
    ] = None,
    dry_run: DryRun = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write OUT/model.onnx and OUT/report.json, verified against the eager model.

    In swappable mode each adapter is also written as OUT/NAME.onnx_adapter.
    """
    from lora_fx.cli.commands import export_model

    spec = model or named_model
    if spec is None or (model and named_model):
        raise LoraFxError("give one model: MODEL, or -m MODEL")
    with stages() as progress, keeping(spec, spec.rpartition(":")[0], *(adapter or ()), given.base):
        report = export_model(
            spec, adapter or [], mode.value, out, force, progress, given, vectors, allow_unmerged,
            task, last_logits, opset, slots or (), name or (), dtype, dry_run,
        )  # fmt: skip
    show(as_json, report.to_dict(), str(report))


@app.command()
@with_hints()
def adapter(
    given: Given,
    adapter: Annotated[Path, typer.Argument(help="An adapter, such as a PEFT directory.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file or directory to write.")],
    model: Annotated[
        Path | None, typer.Option("--for", help="A model exported as swappable.")
    ] = None,
    to: Annotated[str | None, typer.Option("--to", help="A format, such as peft.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Convert an adapter, for one exported model or to another format."""
    from lora_fx.cli.commands import convert_adapter

    if (model is None) == (to is None):
        raise LoraFxError("give either --for MODEL.onnx or --to FORMAT")
    with stages(), keeping(adapter, model, given.base):
        converted = convert_adapter(adapter, out, model, to, force, given)
    report = {"path": str(out), "adapter": converted.name, "targets": list(converted.updates)}
    show(as_json, report, f"{converted}\nwritten to {out}")


@app.command()
@with_hints()
def inspect(
    given: Given,
    path: Annotated[Path, typer.Argument(help="An adapter, a .onnx or a .onnx_adapter file.")],
    as_json: AsJson = False,
) -> None:
    """Show targets, ranks, scales, norms, slots and digests."""
    from lora_fx.cli.inspect import as_text, describe

    with stages():
        report = describe(path, given)
    show(as_json, report, as_text(report))


@app.command()
@with_hints("base")
def verify(
    given: Given,
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


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="The directory to write.")] = Path("out"),
    as_json: AsJson = False,
) -> None:
    """Train two adapters of a sentence encoder, export, swap and score them."""
    from lora_fx.demo import run, table

    with stages(lines=True) as progress:
        result = run(out, progress)
    show(as_json, result.to_dict(), table(result))


def main(arguments: list[str] | None = None) -> None:
    """Runs a command, and ends the process with its exit code."""
    app(arguments)
