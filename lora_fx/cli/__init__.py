"""The command line.

Exit codes: 0 done and verified, 1 verification failed, 2 anything else, 130 interrupted.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import lora_fx
from lora_fx.cli.adapter_options import (
    AdapterOptions,
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

if TYPE_CHECKING:
    from torch import nn

    from lora_fx.adapters.adapter import Adapter
    from lora_fx.adapters.converted import Converted

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
            options = {name: _options(command) for name, command in self.commands.items()}
            own = options.get(ctx.invoked_subcommand or "", frozenset())
            sys.exit(report_failure(error, own, frozenset().union(*options.values())))


def _options(command: Any) -> frozenset[str]:
    """What a command takes beside its arguments."""
    names = (name for parameter in command.params for name in parameter.opts)
    return frozenset(name for name in names if name.startswith("-"))


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
    required = "required"


@app.command()
@with_hints("base")
def export(
    given: AdapterOptions,
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
    bits: Bits = None,
    opset: Annotated[
        int | None, typer.Option(help="Version of ONNX's operators, 18 to 25.")
    ] = None,
    slots: Annotated[
        list[str] | None,
        typer.Option(help="A layer that takes an adapter, in swappable mode; or all-linear."),
    ] = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="Leave the operators as torch.onnx gives them.")
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
            spec, adapter or [], mode.value, out, force, progress, given, vectors, allow_unmerged,
            task, last_logits, opset, slots or (), name or (), dtype, dry_run, bits,
            measure, portable,
        )  # fmt: skip
    show(as_json, report.to_dict(), str(report))


@app.command()
@with_hints()
def adapter(
    given: AdapterOptions,
    out: Annotated[Path, typer.Option("-o", "--out", help="The file or directory to write.")],
    adapter: Annotated[
        Path | None,
        typer.Argument(help="An adapter, such as a PEFT directory.", show_default=False),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--for", help="A model exported as swappable.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to", help="A format, such as peft; with --for, onnx_adapter or safetensors."
        ),
    ] = None,
    none: Annotated[
        bool, typer.Option("--none", help="With --for: no adapter, what leaves the base as it is.")
    ] = False,
    to_lora: Annotated[
        bool, typer.Option("--to-lora", help="As plain LoRA first, of any kind; tells the error.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option(help="With --to-lora: of each layer, at most.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="With --to-lora: of W' - W, the fraction to hold.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Convert an adapter, for one exported model, to another format or to plain LoRA."""
    from lora_fx.cli.commands import convert_adapter

    if none == (adapter is not None):
        raise LoraFxError("give one adapter, or --none, which is what a model is fed without one")
    if to_lora and model is None and to is None:
        to = "peft"
    if model is None and to is None:
        raise LoraFxError("give --for MODEL.onnx or --to FORMAT")
    if not to_lora and (rank, energy) != (None, None):
        raise LoraFxError("--rank and --energy are of --to-lora: add it")
    told: list[Converted] = []

    def change(read: Adapter, base: nn.Module | None) -> Adapter:
        told.append(read.to_lora(rank, energy, base=base))
        return told[0].adapter

    with stages(), keeping(adapter, model, given.base):
        converted = convert_adapter(
            adapter, out, model, to, force, given, change if to_lora else None
        )
    name, targets = (converted.name, list(converted.updates)) if converted else (None, [])
    report: dict[str, Any] = {"path": str(out), "adapter": name, "targets": targets}
    report |= told[0].to_dict() if told else {}
    show(as_json, report, f"{told[0] if told else converted or 'no adapter'}\nwritten to {out}")


@app.command()
@with_hints()
def merge(
    given: AdapterOptions,
    model: Annotated[Path, typer.Argument(help="A model exported as swappable.")],
    adapter: Annotated[
        Path, typer.Argument(help="An adapter, or a file that was made of one for the model.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The .onnx file to write.")],
    allow_unmerged: AllowUnmerged = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Put an adapter into the weights of an exported model, without tracing it again.

    Verified in onnxruntime against the model with that adapter.
    """
    from lora_fx.cli.commands import merge_file

    with stages() as progress:
        report = merge_file(model, adapter, out, allow_unmerged, force, progress, given)
    show(as_json, report.to_dict(), str(report))


@app.command("add-lora")
def add_lora(
    model: Annotated[Path, typer.Argument(help="An ONNX file without slots, whoever made it.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The .onnx file to write.")],
    slots: Annotated[
        list[str] | None,
        typer.Option(help="A layer that takes an adapter, * for any part; all linear by default."),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH: what the layer of a weight or a node is called."),
    ] = None,
    required: Annotated[
        bool, typer.Option("--required", help="Without defaults, as export's --mode required.")
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Give an ONNX file slots for adapters, verified against the file without them."""
    from lora_fx.cli.commands import open_file

    with stages() as progress:
        report = open_file(model, out, slots or (), name or (), force, progress, required)
    show(as_json, report.to_dict(), str(report))


@app.command()
def quantize(
    model: Annotated[Path, typer.Argument(help="An ONNX file, or a directory that holds one.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The .onnx file to write.")],
    bits: Bits = "4",
    block_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale: 16, 32, 64, 128 or 256.")
    ] = None,
    accuracy_level: Annotated[
        int, typer.Option(help="4 rounds what layers read to 8 bits too, which is faster.")
    ] = 0,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="A linear layer, * for any part; all but heads by default."),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="A linear layer that stays as it is, * for any part.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Store the base of an ONNX file in a few bits; adapters, slots and heads stay as they are.

    Verified against the file with the numbers of these bits as plain weights; the report says how
    far they are off, of each weight and of the outputs.
    """
    from lora_fx.cli.commands import quantize_file

    with stages() as progress:
        report = quantize_file(
            model, out, bits, block_size, accuracy_level, layer, keep or (), force, progress
        )
    show(as_json, report.to_dict(), str(report))


@app.command()
@with_hints()
def inspect(
    given: AdapterOptions,
    path: Annotated[
        Path, typer.Argument(help="An adapter, an .onnx or an adapter's file for one.")
    ],
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


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="A directory that export wrote.")],
    to: Annotated[
        Path | None, typer.Option("-o", "--out", help="The page; OUT/report.html by default.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a page on an export: each layer's update, drawings, verification, in one HTML file."""
    from lora_fx.cli.pages import make_page

    with stages():
        page, told = make_page(out, to, force)
    show(as_json, {"path": str(page), "verified": told.verified}, f"written to {page}")


@app.command()
@with_hints()
def diff(
    given: AdapterOptions,
    first: Annotated[Path, typer.Argument(help="An adapter of any format, or a .onnx file.")],
    second: Annotated[Path, typer.Argument(help="Another of the same sort.")],
    as_json: AsJson = False,
) -> None:
    """Show which layers of two adapters, or tensors of two files, differ, and by how much.

    The exit code is 0 whether they differ or not; --json says "same".
    """
    from lora_fx.cli.pages import compared

    with stages():
        found = compared(first, second, given)
    show(as_json, found.to_dict(), str(found))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show versions and providers, hold them to what is promised, and try a tiny export.

    Exit codes: 0 all is as promised, 1 the self-test is wrong, 2 a version is not as promised.
    """
    from lora_fx.cli.doctor import examined

    with stages() as progress:
        progress("self-test")
        health = examined()
    show(as_json, health.to_dict(), str(health))
    health.judge()


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
