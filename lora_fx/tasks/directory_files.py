"""The files of a model's directory, looked at before transformers reads them."""

from __future__ import annotations

from pathlib import Path

from lora_fx.errors import LoraFxError
from lora_fx.io.plain_file import check_plain
from lora_fx.io.shards import is_index, shards_of
from lora_fx.io.strict_json import MAX_JSON

_READ = {".json", ".safetensors", ".bin", ".txt", ".model", ".py", ".jinja"}


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
        if is_index(file):
            shards_of(file)
