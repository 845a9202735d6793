"""The commands on ONNX files alone: merge, add-lora, quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from lora_fx.choices import Bits
from lora_fx.cli.adapter_options import AdapterOptions, with_hints
from lora_fx.cli.console import show, stages
from lora_fx.cli.options import AllowUnmerged, AsJson, FewBits, Force, OutFile


@with_hints()
def merge(
    given: AdapterOptions,
    model: Annotated[Path, typer.Argument(help="A model exported as swappable.")],
    adapter: Annotated[
        Path, typer.Argument(help="An adapter, or a file that was made of one for the model.")
    ],
    out: OutFile,
    allow_unmerged: AllowUnmerged = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Put an adapter into the weights of an exported model, without tracing it again.

    Verified in onnxruntime against the model with that adapter.
    """
    from lora_fx.cli.onnx_files import merge_file

    with stages() as progress:
        report = merge_file(model, adapter, out, allow_unmerged, force, progress, given)
    show(as_json, report.to_dict(), str(report))


def add_lora(
    model: Annotated[Path, typer.Argument(help="An ONNX file without slots, whoever made it.")],
    out: OutFile,
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
    from lora_fx.cli.onnx_files import open_file

    with stages() as progress:
        report = open_file(model, out, slots or (), name or (), force, progress, required)
    show(as_json, report.to_dict(), str(report))


def quantize(
    model: Annotated[Path, typer.Argument(help="An ONNX file, or a directory that holds one.")],
    out: OutFile,
    bits: FewBits = "4",
    block_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale: 16, 32, 64, 128 or 256.")
    ] = None,
    accuracy_level: Annotated[
        int, typer.Option(help="4 rounds what layers read to 8 bits too, which is faster.")
    ] = 0,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="No zero points: faster, and further off.")
    ] = False,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="A linear layer, * for any part; all but heads by default."),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="A layer that stays as it is, * for any part.")
    ] = None,
    table: Annotated[
        list[str] | None,
        typer.Option(help="An embedding that is quantised too, * for any part; none by default."),
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Store the base of an ONNX file in a few bits; adapters, heads and tables stay as they are.

    Verified against the file with the numbers of these bits as plain weights; the report says how
    far they are off, of each weight and of the outputs.
    """
    from lora_fx.cli.onnx_files import bits_named
    from lora_fx.export import quantize_onnx

    with stages() as progress:
        report = quantize_onnx(
            model,
            out,
            bits=cast(Bits, bits_named(bits) or 4),  # "float" it refuses
            block_size=block_size,
            accuracy_level=accuracy_level,
            symmetric=symmetric,
            layers=layer or None,
            keep=keep or (),
            tables=table or (),
            force=force,
            progress=progress,
        )
    show(as_json, report.to_dict(), str(report))
