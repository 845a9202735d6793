"""An exported file, whoever made it and when, against the eager model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx

from lora_fx.adapter import Adapter

if TYPE_CHECKING:
    from lora_fx.export import ExportReport


def verify_existing(
    path: Path, base: fx.GraphModule, adapters: Sequence[Adapter], progress: Callable[[str], None]
) -> ExportReport:
    """Runs a file and eager models side by side, and a control that must differ.

    Args:
        path: the file; not changed.
        base: the traced model, without adapters.
        adapters: a swappable file runs alone and with each; any other must hold their sum.
        progress: told the name of each stage.

    Raises:
        LoraFxError: the file cannot be read or run, or an adapter does not fit.
        VerificationError: the file and eager disagree, or the control agreed.
    """
    from lora_fx.export import verify_onnx

    return verify_onnx(base, path, adapters=adapters, progress=progress)
