"""What ``adapter`` does: an adapter for an exported model, or in another format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from torch import nn

from lora_fx.adapters.adapter import Adapter
from lora_fx.choices import SavedFormat, SlotFormat
from lora_fx.cli.adapter_options import AdapterOptions
from lora_fx.errors import AdapterError
from lora_fx.formats import save_adapter

if TYPE_CHECKING:
    from lora_fx.export import AdapterReport


class Written(NamedTuple):
    """What was written.

    Attributes:
        adapter: that was read; None for no adapter.
        report: of a file for one model.
    """

    adapter: Adapter | None
    report: AdapterReport | None = None


def convert_adapter(
    source: Path | None,
    out: Path,
    model: Path | None,
    to: str | None,
    force: bool,
    given: AdapterOptions | None = None,
    change: Callable[[Adapter, nn.Module | None], Adapter] | None = None,
) -> Written:
    """Writes an adapter for an exported model, or in another format.

    Args:
        source: the adapter to read; None: no adapter, for a swappable file.
        out: the file or directory to write.
        model: a swappable file, or None.
        to: a format; PEFT's directory by default, and for a swappable file what ``out`` ends in.
        force: replace what exists.
        given: what the adapter's format does not store; a component is of what is written, where
            that format has components.
        change: what to make of the adapter first, with the base that is given.

    Returns:
        The adapter, and of a file for a model what is in it.

    Raises:
        LoraFxError: the adapter cannot be read, does not fit, or the output exists.
    """
    slot_format = cast(SlotFormat | None, to)  # which it checks
    if model is None and to in ("onnx_adapter", "safetensors"):
        raise AdapterError(
            f"{out}: a file of format {to} is made for one model: use --for MODEL.onnx, a file "
            "that was exported as swappable"
        )
    if source is None:
        from lora_fx.export import export_adapter

        if model is None:
            raise AdapterError(f"{out}: no adapter is of one model: use --for MODEL.onnx")
        return Written(None, export_adapter(None, model, out, format=slot_format, force=force))
    reading, hints = (given or AdapterOptions()).split(to)
    base = reading.model()
    adapter = reading.load(source, base)
    if change is not None:
        adapter = change(adapter, base)
    if model is not None:
        from lora_fx.export import export_adapter

        return Written(
            adapter, export_adapter(adapter, model, out, format=slot_format, force=force)
        )
    save_adapter(adapter, out, format=cast(SavedFormat, to or "peft"), force=force, **hints)
    return Written(adapter)
