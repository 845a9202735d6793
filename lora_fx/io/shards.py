"""Tensors in several files: the index that says which tensor is in which of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from lora_fx.errors import LoraFxError, shorten
from lora_fx.io.strict_json import read_json

INDEX = ".index.json"
_INDEX = re.compile(r".+\.index(\.[^.]+)?\.json", re.DOTALL)  # of a variant: .index.fp16.json


def is_index(path: Path) -> bool:
    """Whether a file's name is one that an index of shards has."""
    return _INDEX.fullmatch(path.name) is not None


def shards_of(index: Path, error: type[LoraFxError] = LoraFxError) -> Mapping[str, Path]:
    """Which file beside an index holds each tensor.

    Raises:
        LoraFxError: of the type ``error``: it is no index, names what does not lie beside it, or
            what is not there.
    """
    found = read_json(index, error)
    names = found.get("weight_map") if isinstance(found, dict) else found
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise error(
            f"{index}: weight_map is {names!r:.80}, expected names of tensors to names of files: "
            "save the model again"
        )
    files = sorted(set(names.values()))
    if odd := [repr(name)[:80] for name in files if not _is_name(name)]:
        raise error(
            f"{index}: the weights lie at {shorten(odd)}, expected names of files beside it: put "
            "them there, or save the model again"
        )
    if lost := [name[:80] for name in files if not index.with_name(name).is_file()]:
        raise error(
            f"{index}: names {shorten(lost)}, which are not there, expected every file of weights: "
            "download or save the model again"
        )
    return {tensor: index.with_name(name) for tensor, name in names.items()}


def _is_name(name: str) -> bool:
    plain = name == Path(name).name and name not in ("", ".", "..") and len(name) < 256
    return plain and not set(name) & set("\\:\0")
