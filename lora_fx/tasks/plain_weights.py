"""A directory whose weights bitsandbytes quantised, as one of plain weights: its own is not needed.

A QLoRA's base is saved so. transformers would want bitsandbytes to read it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lora_fx.errors import LoraFxError, shorten, within
from lora_fx.io.safetensors_file import TensorToWrite, write_tensors
from lora_fx.io.state_dict import INDEX, shards_of
from lora_fx.io.strict_json import read_json
from lora_fx.tasks.bitsandbytes import PARTS, SCALES, STATE, Table, of_rows

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_BESIDE = (SCALES, ".weight_format")
OURS = "bitsandbytes"
_BYTES = ("I8", "U8", "I32", "F8_")  # what the types of safetensors begin with that pack weights
_PLAIN = (
    "load the model with what quantised it, save it in plain numbers (model.dequantize(), then "
    "save_pretrained), and give that directory: quantize= and --bits store these in few bits"
)


def quantised_by(directory: Path) -> str | None:
    """What quantised a directory's weights, by its config: ``"bitsandbytes"``, or another."""
    said = read_json(directory / _CONFIG)
    given = said.get("quantization_config") if isinstance(said, dict) else None
    if not isinstance(given, dict):
        return None
    flags, method = ("load_in_4bit", "load_in_8bit"), given.get("quant_method")
    if any(given.get(flag) for flag in flags):
        return OURS
    return method[:80] if isinstance(method, str) else "what its config does not name"


@contextmanager
def told_of(method: str | None) -> Iterator[None]:
    """Says of a directory that cannot be loaded what quantised its weights, if anything did."""
    try:
        yield
    except LoraFxError as error:
        if method is None:
            raise
        raise LoraFxError(f"{error}\nIts weights are quantised by {method}; {_PLAIN}") from error


def refuse_packed(model: nn.Module, plain: nn.Module) -> None:
    """Refuses a model whose weights are still as they were quantised.

    Args:
        model: that was loaded.
        plain: one of its class and config, on the meta device.

    Raises:
        LoraFxError: names the weights.
    """
    wanted = {name: tensor.shape for name, tensor in plain.named_parameters()}
    numbers = {name: t.shape for name, t in model.state_dict().items() if t.is_floating_point()}
    packed = [name for name, shape in wanted.items() if numbers.get(name) != shape]
    if packed:
        raise LoraFxError(
            f"{shorten(packed, 3)}: packed for kernels of their own, expected matrices of "
            "numbers, which an adapter could change"
        )


def refuse_bytes(directory: Path, model: nn.Module, left: Iterable[str]) -> None:
    """Refuses weights that were loaded without what says which numbers their bytes stand for.

    A library that does not know how they were quantised takes the bytes for numbers.

    Args:
        directory: of safetensors files; of others nothing is known.
        model: what was made of them.
        left: names in the files that it has no place for, such as ``fc.weight_scale``.

    Raises:
        LoraFxError: one of these is of a layer that is stored in bytes.
    """
    owners = {name: name.rpartition(".")[0] for name in left}
    layers = {name.removesuffix(".weight") for name, _ in model.named_parameters()}
    asked = {name: owner for name, owner in owners.items() if owner in layers}
    files = sorted(directory.glob("*.safetensors")) if asked else ()
    stored = {name.rpartition(".")[0] for file in files for name in _in_bytes(file)}
    lost = sorted(name for name, owner in asked.items() if _is_of(owner, tuple(stored)))
    if lost:
        raise LoraFxError(
            f"{directory}: its weights are stored in bytes, and {type(model).__name__} has no "
            f"place for what says which numbers these are: {shorten(lost)}; {_PLAIN}"
        )


@contextmanager
def plain_weights(directory: Path, turned: Iterable[str]) -> Iterator[tuple[Path, str | None]]:
    """A directory with the numbers of another one's weights, for as long as it is read.

    They are written where the system has its temporary files, one after the other.

    Args:
        directory: `quantised_by` bitsandbytes.
        turned: paths of layers that store their weight as (in, out), transformers' Conv1D:
            bitsandbytes has it as (out, in).

    Yields:
        The directory, and what its weights were stored in, ``"nf4:64"``, if a table of 4 bits.

    Raises:
        LoraFxError: a weight is damaged, or stored in another way.
    """
    with TemporaryDirectory() as name:
        place = Path(name)
        for file in directory.iterdir():
            if file.name != _CONFIG and ".safetensors" not in file.name:
                (place / file.name).symlink_to(file.resolve())
        config = read_json(directory / _CONFIG)
        config.pop("quantization_config")
        (place / _CONFIG).write_text(json.dumps(config))
        weights = _Weights(directory, tuple(turned))
        write_tensors(place / _WEIGHTS, dict(weights.made()))
        yield place, weights.stored


class _Weights:
    """The weights of a directory, by name.

    Args:
        directory: that holds them.
        turned: paths of layers whose weight is turned round.

    Raises:
        LoraFxError: it has none in safetensors.
    """

    def __init__(self, directory: Path, turned: tuple[str, ...]) -> None:
        index = directory / f"{_WEIGHTS}{INDEX}"
        paths = (
            sorted(set(shards_of(index).values())) if index.is_file() else [directory / _WEIGHTS]
        )
        self._files = {name: path for path in paths for name in _names(path)}
        self._turned = turned
        self._tables = {
            name.partition(STATE)[0]: self._table(name) for name in self._files if STATE in name
        }

    @property
    def stored(self) -> str | None:
        """What most of the weights of 4 bits are stored in."""
        words = Counter(table.said for table in self._tables.values())
        return words.most_common(1)[0][0] if words else None

    def made(self) -> Iterator[tuple[str, TensorToWrite]]:
        """Each weight, read when it is written."""
        beside = tuple(f"{weight}." for weight in self._tables)
        for name in self._files:
            if name.endswith(_BESIDE) or name.startswith(beside):
                continue
            if name in self._tables:
                yield name, self._of_layer(name, self._tables[name].shape)
                continue
            own = self._tensor(name)
            if self._scales(name) in self._files:
                yield name, self._of_layer(name, tuple(own.shape))
            elif own.dtype is torch.int8:
                raise LoraFxError(
                    f"{self._files[name]}: {name}: int8 without the scales {self._scales(name)}: "
                    "download or save the model again"
                )
            else:
                yield name, TensorToWrite(tuple(own.shape), own.dtype, partial(self._tensor, name))

    def _of_layer(self, name: str, shape: tuple[int, ...]) -> TensorToWrite:
        is_turned = _is_of(name.removesuffix(".weight"), self._turned)
        make = partial(self._numbers, name, is_turned)
        return TensorToWrite(shape[::-1] if is_turned else shape, torch.float32, make)

    def _numbers(self, name: str, is_turned: bool) -> torch.Tensor:
        """A weight as its layer stores it."""
        with within(f"{self._files[name]}: {name}"):
            if name in self._tables:
                parts = {p: self._tensor(n) for p in PARTS if (n := f"{name}.{p}") in self._files}
                found = self._tables[name].numbers(self._tensor(name), parts)
            else:
                found = of_rows(self._tensor(name), self._tensor(self._scales(name)))
            return found.T if is_turned else found

    def _table(self, state: str) -> Table:
        with within(f"{self._files[state]}: {state}"):
            return Table.of(self._tensor(state))

    def _tensor(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
            return found

    def _scales(self, name: str) -> str:
        return f"{name.removesuffix('.weight')}{SCALES}"


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise LoraFxError(
            f"{path}: no safetensors file that can be read ({error}): save the quantised model "
            "again, with save_pretrained"
        ) from error


def _in_bytes(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        names: list[str] = list(file.keys())
        return [n for n in names if file.get_slice(n).get_dtype().startswith(_BYTES)]


def _is_of(path: str, turned: tuple[str, ...]) -> bool:
    """Whether a layer is among some, where one of the two may be called by less of its path."""
    return any(f".{a}".endswith(f".{b}") for own in turned for a, b in ((own, path), (path, own)))
