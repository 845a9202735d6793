"""The options of commands: what each is called, what it says, and which words complete it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_fx import choices

_MANY = 9  # words that nobody reads in a row


def _complete(of: Any) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [word for word in choices.words(of) if word.startswith(incomplete)]

    return complete


def _said(help: str, of: Any) -> str:
    """What an option is, and its words, where they are few enough to be read."""
    *most, last = choices.words(of)
    return f"{help}: {', '.join(most)} or {last}." if len(most) < _MANY else f"{help}."


def offering(of: Any, *names: str, help: str, metavar: str) -> Any:
    """An option whose words are those of a type of `lora_fx.choices`, told and completed.

    Args:
        of: the type.
        names: of the option.
        help: what it says, before the words.
        metavar: stands for one of them.
    """
    return typer.Option(*names, help=_said(help, of), metavar=metavar, autocompletion=_complete(of))


def offered(of: Any, *, help: str, metavar: str) -> Any:
    """An argument likewise."""
    return typer.Argument(
        help=_said(help, of), metavar=metavar, autocompletion=_complete(of), show_default=False
    )


# The hints of `load_adapter`.
Alpha = Annotated[
    list[str] | None,
    typer.Option(
        "--alpha", metavar="ALPHA", help="The lora_alpha, where a file stores none; or LAYER=ALPHA."
    ),
]
EnableLora = Annotated[
    list[str] | None,
    typer.Option(
        "--enable-lora", metavar="FLAGS", help="loralib's enable_lora, as 1,0,1; or LAYER=1,0,1."
    ),
]
UseRslora = Annotated[
    bool, typer.Option("--use-rslora", help="The scale is alpha / sqrt(r), where none is stored.")
]
Component = Annotated[
    str | None,
    typer.Option(
        "--component", metavar="NAME", help="The only part of a pipeline that is meant, as unet."
    ),
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read a .bin or .pt, of tensors alone.")
]
Format = Annotated[
    str | None,
    offering(
        choices.Format,
        "--format",
        help="The adapter's format, where nothing tells it",
        metavar="FORMAT",
    ),
]
Prefix = Annotated[
    str | None,
    typer.Option(
        "--prefix",
        metavar="PATH",
        help="Where in the model the module is that the adapter was made for.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="MODEL", help="The model that names mean layers of, as in export."
    ),
]

# Models, and the adapters that go into them.
Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A directory of Hugging Face's or diffusers', module:function, file.py:function, or "
        "a .pt2 file.",
        show_default=False,
    ),
]
NamedModel = Annotated[
    str | None,
    typer.Option(
        "-m", "--model", metavar="MODEL", help="The same, as an option.", show_default=False
    ),
]
Against = Annotated[
    str,
    typer.Option(
        "--against",
        "-m",
        "--model",
        metavar="MODEL",
        help="The model to compare with, as in export.",
    ),
]
Adapters = Annotated[
    list[Path] | None,
    typer.Option("--adapter", metavar="PATH", help="An adapter; repeated, they are summed."),
]
Names = Annotated[
    list[str] | None,
    typer.Option(
        "--name",
        metavar="NAME",
        help="NAME=PATH, an adapter and what it is called, or NAME for each --adapter in turn; "
        "by default it is called as its directory is.",
    ),
]
TaskName = Annotated[
    str | None,
    offering(
        choices.TaskName,
        "--task",
        help="What a directory's model is for, such as text-generation-with-past",
        metavar="TASK",
    ),
]
LastLogits = Annotated[
    bool,
    typer.Option("--last-logits", help="Of a decoder with a cache, the last position's alone."),
]
DType = Annotated[
    str | None,
    offering(choices.FloatType, "--dtype", help="What the model is cast to", metavar="DTYPE"),
]

# What is written.
Mode = Annotated[
    str, offering(choices.Mode, "--mode", help="Where the adapters go", metavar="MODE")
]
Bits = Annotated[
    str | None,
    offering(
        choices.BitsOrFloat,
        "--bits",
        help="What linear layers of the base are stored in",
        metavar="BITS",
    ),
]
FewBits = Annotated[
    str, offering(choices.Bits, "--bits", help="What they are stored in", metavar="BITS")
]
To = Annotated[
    str | None,
    offering(
        choices.WrittenFormat,
        "--to",
        help="A format; with --for, onnx_adapter or safetensors; else",
        metavar="FORMAT",
    ),
]
OutputNames = Annotated[
    list[str] | None,
    typer.Option(
        "--output-name",
        metavar="NAME",
        help="OLD=NEW, what the file calls an output, or NAME for each output in turn.",
    ),
]
Measure = Annotated[
    bool,
    typer.Option("--measure", help="Measure each layer's update, for the page of `report`."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Trace and bind, say what would be written, write nothing."),
]
AllowUnmerged = Annotated[
    bool,
    typer.Option(
        "--allow-unmerged", help="In merged mode, keep beside its layer what cannot be folded."
    ),
]
OutDirectory = Annotated[
    Path, typer.Option("-o", "--out", metavar="OUT", help="The directory to write.")
]
OutFile = Annotated[
    Path, typer.Option("-o", "--out", metavar="FILE", help="The .onnx file to write.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report alone, as JSON.")]
