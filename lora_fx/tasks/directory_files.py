"""The files of a model's directory, looked at before transformers reads them."""

from __future__ import annotations

from pathlib import Path

from lora_fx.errors import LoraFxError, shorten
from lora_fx.io.plain_file import check_plain
from lora_fx.io.strict_json import MAX_JSON, read_json
from lora_fx.tasks.bounded_build import check_config

_READ = {".json", ".safetensors", ".bin", ".txt", ".model", ".py", ".jinja"}
_INDEX = ".index.json"


def check_files(directory: Path) -> None:
    """Refuses what transformers would wait for, or follow to another directory.

    A link is followed: a cache of models is made of them. A name in an index is not, beyond the
    directory: it comes with the model.

    Raises:
        LoraFxError: names the file, what was found and what was expected.
    """
    for file in sorted(directory.iterdir()):
        if file.suffix not in _READ or file.is_dir():
            continue
        check_plain(file, LoraFxError, MAX_JSON if file.suffix == ".json" else None)
        if file.name == "config.json":
            check_config(file, read_json(file, LoraFxError))
        if file.name.endswith(_INDEX):
            _check_index(file)


def _check_index(file: Path) -> None:
    """Refuses an index of weights that is not names of tensors to names of files beside it."""
    found = read_json(file)
    names = found.get("weight_map") if isinstance(found, dict) else found
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise LoraFxError(
            f"{file}: weight_map is {names!r:.80}, expected names of tensors to names of files: "
            "save the model again"
        )
    files = sorted(set(names.values()))
    if odd := [repr(name)[:80] for name in files if not _is_name(name)]:
        raise LoraFxError(
            f"{file}: the weights lie at {shorten(odd)}, expected names of files beside it: put "
            "them there, or save the model again"
        )
    if lost := [name[:80] for name in files if not file.with_name(name).is_file()]:
        raise LoraFxError(
            f"{file}: names {shorten(lost)}, which are not there, expected every file of weights: "
            "download or save the model again"
        )


def _is_name(name: str) -> bool:
    plain = name == Path(name).name and name not in ("", ".", "..") and len(name) < 256
    return plain and not set(name) & set("\\:\0")
