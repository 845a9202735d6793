"""What a caller knows of an adapter and its format does not store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


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
