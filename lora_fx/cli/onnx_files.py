"""What ``merge`` and ``add-lora`` do, from an ONNX file to another, and what ``--bits`` says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lora_fx.choices import BitsOrFloat, SlotMode
from lora_fx.cli.adapter_options import AdapterOptions
from lora_fx.errors import ExportError, shorten

if TYPE_CHECKING:
    from lora_fx.export import ExportReport

Progress = Callable[[str], None]


def merge_file(
    model: Path,
    adapter: Path,
    out: Path,
    allow_unmerged: bool,
    force: bool,
    progress: Progress,
    given: AdapterOptions | None = None,
) -> ExportReport:
    """Merges an adapter into a swappable file.

    Args:
        model: the swappable file.
        adapter: an adapter, or the file that was made of one for this model.
        out: the file to write.
        allow_unmerged: what no weight can hold stays beside its layer, as constants.
        force: replace what exists.
        progress: told the name of each stage.
        given: what the adapter's format does not store.

    Raises:
        LoraFxError: the adapter cannot be read or does not fit, or the output exists.
        VerificationError: the two files disagree.
    """
    from lora_fx.export import merge_onnx

    # Without hints it is read by path, there where its memory is given back.
    own = adapter if given is None or given == AdapterOptions() else given.load(adapter)
    return merge_onnx(
        model,
        own,
        out,
        allow_unmerged=allow_unmerged,
        force=force,
        progress=progress,
    )


def open_file(
    model: Path,
    out: Path,
    slots: Sequence[str],
    names: Sequence[str],
    force: bool,
    progress: Progress,
    required: bool = False,
) -> ExportReport:
    """Gives an ONNX file slots for adapters.

    Args:
        model: the file.
        out: the file to write.
        slots: layers; all linear ones by default.
        names: ``NAME=PATH``: the module path of the layer of a weight or a node.
        force: replace what exists.
        progress: told the name of each stage.
        required: the slots get no default.

    Raises:
        LoraFxError: a layer is not there, or the output exists.
        VerificationError: the two files disagree.
    """
    from lora_fx.export import add_lora

    pairs = [name.rpartition("=")[::2] for name in names]
    if wrong := [name for name, (old, new) in zip(names, pairs, strict=True) if not (old and new)]:
        raise ExportError(f"--name {shorten(wrong)}: expected NAME=PATH")
    wanted = list(slots) or "all-linear"
    adapters: SlotMode = "required" if required else "input"
    return add_lora(
        model, out, slots=wanted, names=dict(pairs), adapters=adapters, force=force,
        progress=progress,
    )  # fmt: skip


def bits_named(word: str | None) -> BitsOrFloat | None:
    """What ``--bits`` says, as `to_onnx` takes it.

    Raises:
        LoraFxError: it is none that weights are stored in.
    """
    if word is None:
        return None
    from lora_fx.export.quantization.schemes import scheme_wanted

    bits = int(word) if word.isascii() and word.isdigit() else word
    scheme_wanted(bits, {})
    return cast(BitsOrFloat, bits)
