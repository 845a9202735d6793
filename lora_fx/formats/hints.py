"""What a caller knows of an adapter and its format does not store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from lora_fx.errors import AdapterError, shorten
from lora_fx.layers.base_layers import BaseLayers, layers_of

T = TypeVar("T")


@dataclass(frozen=True)
class Hints:
    """Options of ``load_adapter`` and ``save_adapter`` that only some formats take.

    Attributes:
        strict: refuse what is suspicious; False turns it into an ``AdapterWarning``.
        base: the model or graph that lossy names are resolved against.
        allow_pickle: read a ``.bin`` or ``.pt``, with ``torch.load(weights_only=True)`` alone.
        alpha: of every layer, or end of a path -> alpha.
        r: the rank; checked, or what alpha is divided by where ranks differ.
        use_rslora: the scale is alpha / sqrt(r).
        enable_lora: loralib's, of every fused layer, or end of a path -> which outputs.
        component: the part of a pipeline that the paths are of, such as ``"unet"``.
        model: the swappable ``.onnx`` file that an ``.onnx_adapter`` is written for.
    """

    strict: bool = True
    base: object = None
    allow_pickle: bool = False
    alpha: float | Mapping[str, float] | None = None
    r: int | None = None
    use_rslora: bool = False
    enable_lora: Sequence[bool] | Mapping[str, Sequence[bool]] | None = None
    component: str | None = None
    model: str | Path | None = None

    @cached_property
    def layers(self) -> BaseLayers:
        """Those of the base: looked for once, for every step of a reader."""
        return layers_of(self.base)


def _ends(path: str) -> list[str]:
    """A path and its ends after a dot, the longest first."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def value_for(values: Mapping[str, T], path: str) -> T | None:
    """The value of the longest name that is a path, or its end after a dot; None without one."""
    return next((values[end] for end in _ends(path) if end in values), None)


def check_all_used(hint: str, values: Mapping[str, object], paths: Iterable[str]) -> None:
    """Refuses a name that no path is or ends in: a misspelt one would change the result."""
    ends = {end for path in paths for end in _ends(path)}
    unused = [name for name in values if name not in ends]
    if unused:
        raise AdapterError(f"{hint} names what is no layer of the file: {shorten(unused)}")
