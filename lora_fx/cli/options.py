"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        help="A Hugging Face directory, module:function, file.py:function, or a .pt2 file."
    ),
]
Against = Annotated[str, typer.Option("--against", help="The model to compare with, as in export.")]
Adapters = Annotated[
    list[Path] | None, typer.Option("--adapter", help="An adapter; repeated, they are summed.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
AllowUnmerged = Annotated[
    bool,
    typer.Option(
        "--allow-unmerged", help="In merged mode, keep beside its layer what cannot be folded."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report alone, as JSON.")]


Alpha = Annotated[
    list[str] | None,
    typer.Option("--alpha", help="The lora_alpha, where a file stores none; or LAYER=ALPHA."),
]
EnableLora = Annotated[
    list[str] | None,
    typer.Option("--enable-lora", help="loralib's enable_lora, as 1,0,1; or LAYER=1,0,1."),
]
UseRslora = Annotated[
    bool, typer.Option("--use-rslora", help="The scale is alpha / sqrt(r), where none is stored.")
]
Component = Annotated[
    str | None, typer.Option("--component", help="A part of a pipeline, such as unet.")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read a .bin or .pt, of tensors alone.")
]
Base = Annotated[
    str | None, typer.Option("--base", help="The model that names mean layers of, as in export.")
]
