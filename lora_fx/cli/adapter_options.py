"""Options that commands share: adapters, and what their files do not say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from torch import nn

from lora_fx.adapters.adapter import Adapter
from lora_fx.cli.model_source import ModelSource, find_model
from lora_fx.errors import AdapterError
from lora_fx.formats import FORMATS, load_adapter
from lora_fx.frontend.trace import trace

T = TypeVar("T")

_FLAGS = {"1": True, "true": True, "0": False, "false": False}


@dataclass(frozen=True)
class Given:
    """The hints of `load_adapter`, as the command line spells them.

    Attributes:
        alpha: ``16``, or ``q_proj=16`` for the layers whose path ends so, which may be repeated.
        enable_lora: ``1,0,1``, or ``attn=1,0,1`` likewise.
        use_rslora: the scale is alpha / sqrt(r).
        component: the part of a pipeline that is meant.
        allow_pickle: read a ``.bin`` or ``.pt``.
        base: the model that names are resolved against, as `find_model` takes it.
    """

    alpha: Sequence[str] = ()
    enable_lora: Sequence[str] = ()
    use_rslora: bool = False
    component: str | None = None
    allow_pickle: bool = False
    base: str | None = None

    def hints(self) -> dict[str, Any]:
        """What is given, by the names and in the types of `load_adapter`.

        Raises:
            AdapterError: a value that is no number or no list of flags; says which option.
        """
        every: dict[str, Any] = {
            "alpha": _by_end("--alpha", self.alpha, _number),
            "enable_lora": _by_end("--enable-lora", self.enable_lora, _flags),
            "use_rslora": self.use_rslora or None,
            "component": self.component,
            "allow_pickle": self.allow_pickle or None,
        }
        return {name: value for name, value in every.items() if value is not None}

    def load(self, path: Path, base: nn.Module | None = None) -> Adapter:
        """Reads an adapter.

        Args:
            path: of a file or a directory.
            base: the model that the adapter is for; by default the one that was named.

        Raises:
            LoraFxError: the adapter, or the model that was named, cannot be read.
        """
        hints = self.hints()
        if base is None and self.base is not None:
            base = base_of(find_model(self.base))
        return load_adapter(path, base=base, **hints)

    def split(self, to: str | None) -> tuple[Given, dict[str, Any]]:
        """What to read with, and the hints to write with: the component is of one of the two.

        Args:
            to: the format to write; if it has components, the one given is of what is written.
        """
        takes = to in FORMATS and "component" in FORMATS[to].write_hints
        if self.component is None or not takes:
            return self, {}
        return replace(self, component=None), {"component": self.component}


def base_of(source: ModelSource) -> nn.Module:
    """The model whose layers names are resolved against; of an exported program, its graph."""
    model = source.model
    return model if isinstance(model, nn.Module) else trace(model)


def _by_end(
    option: str, given: Sequence[str], read: Callable[[str, str], T]
) -> T | dict[str, T] | None:
    """One value for all layers, or values by the ends of paths."""
    if not given:
        return None
    if len(given) == 1 and "=" not in given[0]:
        return read(option, given[0])
    values: dict[str, T] = {}
    for item in given:
        end, equals, value = item.rpartition("=")
        if not equals or not end or end in values:
            raise AdapterError(
                f"{option} {item}: expected one value for all layers, or LAYER=VALUE, each layer "
                "once"
            )
        values[end] = read(option, value)
    return values


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise AdapterError(f"{option} {text}: expected a number, or LAYER=NUMBER") from error


def _flags(option: str, text: str) -> list[bool]:
    words = [word.strip().lower() for word in text.split(",")]
    if any(word not in _FLAGS for word in words):
        raise AdapterError(f"{option} {text}: expected flags, such as 1,0,1, or LAYER=FLAGS")
    return [_FLAGS[word] for word in words]


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
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task", help="What a directory's model is for, such as text-generation-with-past."
    ),
]
LastLogits = Annotated[
    bool,
    typer.Option("--last-logits", help="Of a decoder with a cache, the last position's alone."),
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
