"""The commands on adapters: adapter, inspect, diff."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_fx.cli.adapter_options import AdapterOptions, with_hints
from lora_fx.cli.console import show, stages
from lora_fx.cli.options import AsJson, Force, To
from lora_fx.errors import LoraFxError
from lora_fx.io.output_place import keeping

if TYPE_CHECKING:
    from torch import nn

    from lora_fx.adapters.adapter import Adapter
    from lora_fx.adapters.converted import Converted


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
    to: To = None,
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
    from lora_fx.cli.convert import convert_adapter

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
        written, file = convert_adapter(
            adapter, out, model, to, force, given, change if to_lora else None
        )
    name, targets = (written.name, list(written.updates)) if written else (None, [])
    report: dict[str, Any] = {"path": str(out), "adapter": name, "targets": targets}
    report |= told[0].to_dict() if told else {}
    report |= {"file": file.to_dict()} if file else {}
    texts = [*map(str, told), str(file)] if file else [str(told[0] if told else written)]
    show(as_json, report, "\n".join([*texts, f"written to {out}"]))


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
