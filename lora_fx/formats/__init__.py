"""Adapters on disk: one file a format, and here which is which.

What is wrong with a file, or cannot be written, is an ``AdapterError`` everywhere in this room; it
names the file, the tensor or field, and what was found and expected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import filterfalse
from os import PathLike
from pathlib import Path
from typing import Any

from lora_fx.adapters.adapter import Adapter, check_name
from lora_fx.adapters.settle import inside, settled, told_of_tables
from lora_fx.choices import Format as FormatName
from lora_fx.choices import FormatOrAuto, SavedFormat, check_choice, takes
from lora_fx.errors import AdapterError, advised, doubt, memory_told, shorten, within
from lora_fx.formats import diffusers, gguf, kohya, loralib, mlx, peft, torchtune
from lora_fx.formats.dialects import Contents
from lora_fx.formats.hints import Hints
from lora_fx.formats.peft.keys import is_named
from lora_fx.io.adapter_files import is_ort_adapter, is_slot_tensors
from lora_fx.io.gguf_file import is_gguf
from lora_fx.io.plain_file import check_path
from lora_fx.io.state_dict import is_pickle, names_in, write_file
from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.meanings import Meanings
from lora_fx.layers.trainer_names import names_in_decoder, names_of

Tell = Callable[[Path, Collection[str]], bool]
Write = Callable[[Adapter, Path, Hints, bool], None]


@dataclass(frozen=True)
class Format:
    """One format; to support another, add a line to the table.

    Attributes:
        read: makes an adapter of a path, under a name.
        write: writes it to a path, and replaces what is there if the last is true; None if it is
            read alone.
        is_it: whether a file is of the format, by its tensors' names and, if need be, by itself.
        hints: those that it takes to be read, but ``base`` and ``strict``.
        write_hints: those that it takes to be written.
        names: what its files may call the layers of a base, beside their own names.
    """

    read: Callable[[Path, str, Hints], Adapter]
    write: Write | None = None
    is_it: Tell = lambda path, names: False
    hints: tuple[str, ...] = ("allow_pickle",)
    write_hints: tuple[str, ...] = ()
    names: Callable[[BaseLayers], Meanings] = names_of


def _names(end: Collection[str]) -> Tell:
    """Whether the name of a tensor ends with one of these."""
    return lambda path, names: any(name.endswith(tuple(end)) for name in names)


def _as_file(
    make: Callable[[Adapter, Path, Hints], Contents], pickles: tuple[str, ...] = ()
) -> Write:
    """Writes one file of tensors, ``.safetensors`` or with one of these endings."""

    def write(adapter: Adapter, path: Path, hints: Hints, force: bool) -> None:
        with within(path):
            tensors, texts = make(adapter, path, hints)
        write_file(path, tensors, texts, force, pickles)

    return write


def _is_onnx_adapter(path: Path, names: Collection[str] = ()) -> bool:
    """Whether a file says that it is of an exported model, onnxruntime's own kind or another."""
    return is_ort_adapter(path) or is_slot_tensors(path)


def _read_onnx_adapter(path: Path, name: str, hints: Hints) -> Adapter:
    """Reads what `lora_fx.export_adapter` wrote; each scale is in its B, so it reads as 1."""
    from lora_fx.export.slots.adapter_file import read_adapter_file

    return read_adapter_file(path, name)


def _write_onnx_adapter(adapter: Adapter, path: Path, hints: Hints, force: bool) -> None:
    """Writes an adapter for one swappable model, as `lora_fx.export_adapter` does."""
    if hints.model is None:
        raise AdapterError(
            f"{path}: an .onnx_adapter is made for one model; pass model=, the .onnx file that was "
            'exported with adapters="input"'
        )
    from lora_fx.export import export_adapter

    export_adapter(adapter, hints.model, path, format="onnx_adapter", force=force)


_SCALE, _PART = ("allow_pickle", "alpha", "r"), ("component",)
_AGAIN = "save the adapter again where it was made, or use the base that it was trained on"
FORMATS: dict[str, Format] = {
    "onnx_adapter": Format(
        _read_onnx_adapter, _write_onnx_adapter, _is_onnx_adapter, (), ("model",)
    ),
    "diffusers": Format(
        diffusers.read_diffusers, _as_file(diffusers.contents), diffusers.is_diffusers,
        ("allow_pickle", *_PART), _PART,
    ),
    "gguf": Format(gguf.read_gguf, None, lambda path, _: is_gguf(path), (), (), names_in_decoder),
    "mlx": Format(mlx.read_mlx, is_it=_names(mlx.DIALECT.endings)),
    "torchtune": Format(
        torchtune.read_torchtune, is_it=_names([".lora_a.weight"]), names=names_in_decoder
    ),
    "peft": Format(peft.read_peft, peft.write_peft),
    "peft_file": Format(
        peft.read_peft_file, _as_file(peft.file_contents),
        lambda path, names: any(map(is_named, names)),
        (*_SCALE, "use_rslora"),
    ),
    "kohya": Format(
        kohya.read_kohya, _as_file(kohya.contents), kohya.is_kohya, ("allow_pickle", *_PART), _PART,
    ),
    "loralib": Format(
        loralib.read_loralib, _as_file(loralib.contents, loralib.PICKLES),
        _names(loralib.DIALECT.endings), (*_SCALE, "enable_lora"),
    ),
}  # fmt: skip


@takes(AdapterError)
def load_adapter(
    path: str | PathLike[str],
    *,
    name: str | None = None,
    format: FormatOrAuto = "auto",
    base: object = None,
    prefix: str | None = None,
    strict: bool = True,
    **hints: Any,
) -> Adapter:
    """Reads an adapter from disk.

    Args:
        path: a directory or a file.
        name: tells adapters apart in one graph; an identifier. Default: made from the path.
        format: ``"peft"`` (a directory), ``"peft_file"``, ``"loralib"``, ``"kohya"``,
            ``"diffusers"``, ``"onnx_adapter"``, ``"mlx"``, ``"torchtune"``, ``"gguf"``, or
            ``"auto"`` to tell it by what is there.
        base: the model or graph that names are resolved against: needed for kohya's, which are
            lossy, and where parts of the model were moved, packed or called otherwise since.
        prefix: the path of the module that the adapter was made for, where the model holds it in
            another: ``"m"`` of ``self.m = model``. With ``base`` it is found.
        strict: refuse what is suspicious; False turns it into an ``AdapterWarning``.
        **hints: what a format does not store, see `lora_fx.formats.hints.Hints`: ``alpha``,
            ``r``, ``use_rslora``, ``enable_lora``, ``component``. ``allow_pickle=True`` reads a
            ``.bin`` or ``.pt``, with ``weights_only=True``.

    Returns:
        The adapter; its tensors are in the dtype of the file, memory-mapped where they can be.

    Raises:
        AdapterError: names the file, the tensor or field, what was found and expected.
    """
    check_choice("format ", format, FormatOrAuto, AdapterError)
    source = check_path(Path(path), AdapterError)
    if not source.exists():
        raise AdapterError(f"{source}: no such file or directory: give an adapter's")
    own, told = name or _name_from(source), str(format)
    if not (source / peft.CONFIG).exists():
        source = diffusers.weights_in(source) or source
    if told == "auto":
        told = _detect(source, bool(hints.get("allow_pickle")))
    chosen = FORMATS[told]
    _check_hints(source, hints, told, chosen.hints)
    if name is not None:
        check_name(name)
    options = Hints(strict=strict, base=base, **hints)
    with memory_told(source, AdapterError), advised(_AGAIN):
        adapter = chosen.read(source, own, options)
        with within(source):
            adapter = adapter if prefix is None else inside(adapter, prefix)
            adapter = _settled(adapter, options, chosen.names)
    _check_products(source, adapter)
    if not adapter.replacements and not any(u.has_effect() for u in adapter.updates.values()):
        doubt(source, "the adapter has no effect: every update is zero; was it trained?", "", False)
    return adapter


def _check_products(source: Path, adapter: Adapter) -> None:
    """Refuses products that a format asks for of its values, which are finite, and that are not."""
    loud = [path for path, update in adapter.updates.items() if not update.is_finite()]
    if loud:
        raise AdapterError(
            f"{source}: {shorten(loud)}: the values are finite, but products of them overflow: the "
            "adapter diverged or is damaged; take an earlier checkpoint"
        )


def _settled(adapter: Adapter, options: Hints, more: Callable[[BaseLayers], Meanings]) -> Adapter:
    """An adapter by the paths of the base, if that is given."""
    if options.base is None:
        return adapter
    base = options.layers

    def is_there(name: str) -> bool:
        return name in base or name in base.aliases or base.unevaluated(name) is not None

    names = (*adapter.updates, *adapter.replacements)
    found = settled(adapter, base, list(filter(is_there, names)), more)
    if more is names_in_decoder and (lost := [*filterfalse(is_there, found.updates)]):
        raise AdapterError(f"no layer of the base is called {shorten(lost)}: give the model itself")
    return told_of_tables(found, base)


@takes(AdapterError)
def save_adapter(
    adapter: Adapter,
    path: str | PathLike[str],
    *,
    format: SavedFormat = "peft",
    force: bool = False,
    **hints: Any,
) -> None:
    """Writes an adapter to disk, completely or not at all.

    Args:
        adapter: what to write; each tensor keeps its dtype.
        path: what to create; it must not exist, except with ``force``.
        format: as `load_adapter` takes it.
        force: replace an adapter that is already there.
        **hints: ``component`` for kohya and diffusers: the part of a pipeline that the paths are
            of; ``model`` for an ``.onnx_adapter``: the swappable model.

    Raises:
        AdapterError: the target exists, or the format cannot express the adapter.
    """
    check_choice("format ", format, FormatName, AdapterError)
    chosen = FORMATS[format]
    _check_hints(Path(path), hints, format, chosen.write_hints)
    if chosen.write is None:
        written = ", ".join(name for name, entry in FORMATS.items() if entry.write is not None)
        raise AdapterError(
            f"{path}: format {format} is read and not written; choose one of {written}"
        )
    if not adapter.updates:
        raise AdapterError(f"{path}: the adapter {adapter.name} has no update to write: train one")
    advice = "write another format, or convert it to plain LoRA first (to_lora, --to-lora)"
    with memory_told(path, AdapterError), advised(advice):
        chosen.write(adapter, Path(path), Hints(**hints), force)


def _check_hints(path: Path, given: dict[str, Any], form: str, known: tuple[str, ...]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        takes = ", ".join(known) or "none"
        raise AdapterError(
            f"{path}: unknown hint {unknown[0]!r}; format {form} takes {takes}: leave it out"
        )


def _detect(source: Path, allow_pickle: bool) -> str:
    """The format of an existing file or directory: the first that knows it."""
    if source.is_dir():
        return _of_directory(source)
    names = () if _is_onnx_adapter(source) else names_in(source, allow_pickle)
    found = next((form for form, entry in FORMATS.items() if entry.is_it(source, names)), None)
    if found is None:
        raise AdapterError(
            f"{source}: not told by its tensors' names ({shorten(sorted(names), 3) or 'none'}); "
            f"pass format=, one of {', '.join(FORMATS)}"
        )
    return found


def _of_directory(path: Path) -> str:
    """What a directory is of, by its files; PEFT's reader says what is missing in another."""
    if (path / mlx.WEIGHTS).is_file():
        return "mlx"
    weights = peft.weights_in(path)
    if weights is None:
        return "torchtune" if torchtune.is_torchtune(path) else "peft"
    names = () if is_pickle(weights) else names_in(weights, allow_pickle=False)
    return "torchtune" if FORMATS["torchtune"].is_it(weights, names) else "peft"


def _name_from(source: Path) -> str:
    """A valid adapter name out of a file's name: ``my.adapter-v2`` becomes ``my_adapter_v2``."""
    resolved = source.resolve()
    stem = resolved.stem if resolved.is_file() else resolved.name
    word = re.sub(r"\W+", "_", stem, flags=re.ASCII).strip("_")
    return word if word[:1].isalpha() else f"adapter_{word}".rstrip("_")
