"""What commands are told of adapters beside their files; torch is loaded when one is read."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from lora_fx import choices
from lora_fx.choices import check_choice
from lora_fx.cli.options import (
    AllowPickle,
    Alpha,
    Base,
    Component,
    EnableLora,
    Format,
    Prefix,
    UseRslora,
)
from lora_fx.errors import AdapterError, within

if TYPE_CHECKING:
    from torch import nn

    from lora_fx.adapters.adapter import Adapter
    from lora_fx.tasks.model_source import ModelSource

T = TypeVar("T")

_FLAGS = {"1": True, "true": True, "0": False, "false": False}


@dataclass(frozen=True)
class AdapterOptions:
    """The hints of `load_adapter`, as the command line spells them, each an option of its name.

    Attributes:
        alpha: ``16``, or ``q_proj=16`` for the layers whose path ends so, which may be repeated.
        enable_lora: ``1,0,1``, or ``attn=1,0,1`` likewise.
        use_rslora: the scale is alpha / sqrt(r).
        component: the part of a pipeline that is meant.
        allow_pickle: read a ``.bin`` or ``.pt``.
        format: of the adapter's file or directory, by `load_adapter`'s names.
        prefix: the path of the module that the adapter is for.
        base: the model that names are resolved against, as `find_model` takes it.
    """

    alpha: Alpha = None
    enable_lora: EnableLora = None
    use_rslora: UseRslora = False
    component: Component = None
    allow_pickle: AllowPickle = False
    format: Format = None
    prefix: Prefix = None
    base: Base = None

    def hints(self) -> dict[str, Any]:
        """What is given, by the names and in the types of `load_adapter`.

        Raises:
            AdapterError: a value that is no number, no list of flags or no format; says which
                option.
        """
        if self.format is not None:
            check_choice("--format ", self.format, choices.Format, AdapterError)
        every: dict[str, Any] = {
            "alpha": _by_end("--alpha", self.alpha or (), _number),
            "enable_lora": _by_end("--enable-lora", self.enable_lora or (), _flags),
            "use_rslora": self.use_rslora or None,
            "component": self.component,
            "allow_pickle": self.allow_pickle or None,
            "format": self.format,
            "prefix": self.prefix,
        }
        return {name: value for name, value in every.items() if value is not None}

    def load(self, path: Path, base: nn.Module | None = None, name: str | None = None) -> Adapter:
        """Reads an adapter.

        Args:
            path: of a file or a directory.
            base: the model that the adapter is for; by default the one that was named.
            name: of the adapter; by default made of the path.

        Raises:
            LoraFxError: the adapter, or the model that was named, cannot be read.
        """
        from lora_fx.formats import load_adapter

        hints = self.hints()
        return load_adapter(path, base=self.model() if base is None else base, name=name, **hints)

    def model(self) -> nn.Module | None:
        """The model that was named, if any.

        Raises:
            LoraFxError: it cannot be read.
        """
        if self.base is None:
            return None
        from lora_fx.cli.model_source import find_model

        return base_of(find_model(self.base))

    def split(self, to: str | None) -> tuple[AdapterOptions, dict[str, Any]]:
        """What to read with, and the hints to write with: the component is of one of the two.

        Args:
            to: the format to write; if it has components, the one given is of what is written.
        """
        from lora_fx.formats import FORMATS

        takes = to in FORMATS and "component" in FORMATS[to].write_hints
        if self.component is None or not takes:
            return self, {}
        return replace(self, component=None), {"component": self.component}


def with_hints(
    *names: str,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of `AdapterOptions`, and hands it what they say as ``given``.

    Args:
        *names: of those that it has not.
    """
    fields = [field for field in dataclasses.fields(AdapterOptions) if field.name not in names]
    hints = get_type_hints(AdapterOptions, include_extras=True)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**options: Any) -> None:
            said = {field.name: options.pop(field.name) for field in fields}
            command(**options, given=AdapterOptions(**said))

        own, types = inspect.signature(command), get_type_hints(command, include_extras=True)
        kept = [p.replace(annotation=types[n]) for n, p in own.parameters.items() if n != "given"]
        kind = inspect.Parameter.KEYWORD_ONLY
        more = [
            inspect.Parameter(f.name, kind, default=f.default, annotation=hints[f.name])
            for f in fields
        ]
        run.__signature__ = own.replace(parameters=[*kept, *more])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*kept, *more)}  # typer reads both
        return run

    return decorate


def named(paths: Sequence[Path], names: Sequence[str]) -> list[tuple[Path, str | None]]:
    """The adapters of a command, each with its name if it was given one.

    Args:
        paths: of ``--adapter``.
        names: of ``--name``: ``NAME=PATH``, which is an adapter whether ``--adapter`` has it too or
            not; or ``NAME`` for each adapter of ``--adapter``, in their order.

    Raises:
        AdapterError: there are other than as many names as adapters, or one is no identifier.
    """
    from lora_fx.adapters.adapter import check_name

    pairs = [
        (name, Path(path)) for name, equals, path in (n.partition("=") for n in names) if equals
    ]
    alone = [name for name in names if "=" not in name]
    for name in (*alone, *(name for name, _ in pairs)):
        with within("--name"):
            check_name(name)
    rest = [path for path in paths if path not in {path for _, path in pairs}]
    if alone and len(alone) != len(rest):
        raise AdapterError(
            f"--name: {len(alone)} names ({', '.join(alone)}) for {len(rest)} adapters of "
            "--adapter: give one for each, or NAME=PATH"
        )
    words: Sequence[str | None] = alone or [None] * len(rest)
    return [*zip(rest, words, strict=True), *((path, name) for name, path in pairs)]


def base_of(source: ModelSource) -> nn.Module:
    """The model whose layers names are resolved against; of an exported program, its graph."""
    from torch import nn

    from lora_fx.frontend.trace import trace

    model = source.base or source.model
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
