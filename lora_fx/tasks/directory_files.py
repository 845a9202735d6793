"""The files of a model's directory, looked at before transformers reads them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lora_fx.errors import LoraFxError
from lora_fx.formats.peft import CONFIG
from lora_fx.io.plain_file import check_plain
from lora_fx.io.state_dict import is_index, shards_of
from lora_fx.io.strict_json import MAX_JSON, read_json
from lora_fx.tasks.bounded_build import check_config

_WEIGHTS = {".safetensors", ".bin"}
# What weights are called, and an infix for a copy in another precision: model.fp16.safetensors.
_MODEL = re.compile(
    r"(diffusion_)?(pytorch_)?model(?:-\d+-of-\d+)?(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?"
)
_READ = {".json", ".safetensors", ".bin", ".txt", ".model", ".py", ".jinja"}


def check_alone(directory: Path, adapters: Sequence[Path]) -> None:
    """Refuses an adapter in the place of a model, and one beside it that nobody asked for.

    transformers would put the one that lies beside a model on it, unasked.

    Raises:
        LoraFxError: says what to name instead.
    """
    if not (directory / CONFIG).is_file():
        return
    names = (file.name for file in directory.iterdir() if file.suffix in _WEIGHTS)
    if all(name.startswith("adapter_model") for name in names):
        raise LoraFxError(
            f"{directory}: this is an adapter; name its base model, and it as --adapter"
        )
    if directory.resolve() not in [path.resolve() for path in adapters]:
        raise LoraFxError(
            f"{directory}: this is a model with an adapter beside it: name it as --adapter too, or "
            f"take {CONFIG} out of it"
        )


@contextmanager
def without_adapter(directory: Path) -> Iterator[Path]:
    """A directory as transformers may read it: it would load an adapter that lies there too."""
    if not (directory / CONFIG).is_file():
        yield directory
        return
    with TemporaryDirectory() as name:
        for file in directory.iterdir():
            if file.name != CONFIG:
                Path(name, file.name).symlink_to(file.resolve())
        yield Path(name)


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
        if is_index(file):
            shards_of(file)


def variant_of(directory: Path) -> str | None:
    """What transformers and diffusers call the weights of a directory, if it has no others: fp16.

    Raises:
        LoraFxError: there are several variants, and none that is read unasked.
    """
    stems = (file.stem for file in directory.iterdir() if file.suffix in _WEIGHTS)
    found = {match["variant"] for match in map(_MODEL.fullmatch, stems) if match}
    if None in found or not found:
        return None
    if len(found) > 1:
        raise LoraFxError(
            f"{directory}: holds the weights as {', '.join(sorted(filter(None, found)))}: take all "
            "but one out of it"
        )
    return found.pop()
