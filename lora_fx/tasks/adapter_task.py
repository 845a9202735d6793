"""What adapters say of the model that they were trained on, before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.peft import CONFIG, fields_in, weights_in
from lora_fx.formats.peft.keys import PREFIX
from lora_fx.graph.wrappers import PEFT_LAYER
from lora_fx.io.plain_file import check_path
from lora_fx.io.state_dict import is_pickle, read_file
from lora_fx.io.strict_json import read_object


@dataclass(frozen=True)
class AdapterTask:
    """The task of some adapters.

    Attributes:
        name: PEFT's ``task_type``, such as ``SEQ_CLS``; None if no adapter has one.
        shapes: of the tensors that the adapters hold whole, by parameter path: heads among them.
        paths: where the adapters are.
    """

    name: str | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    paths: Sequence[Path] = field(default=(), compare=False)


def trained_for(paths: Sequence[Path], allow_pickle: bool = False) -> AdapterTask:
    """The one task of all adapters, whatever their format.

    Raises:
        AdapterError: they were trained for different tasks, or a file cannot be read.
    """
    names: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        config = _config(check_path(path, AdapterError))
        name = config.get("task_type")
        if isinstance(name, str):
            names.setdefault(name, path)
        shapes |= _shapes(path, allow_pickle) if config else {}
    if len(names) > 1:
        told = shorten([f"{path} for {name}" for name, path in names.items()])
        raise AdapterError(
            f"--adapter: the adapters were trained for different tasks, {told}: one model has one "
            "head; export them one by one"
        )
    return AdapterTask(next(iter(names), None), shapes, paths)


def _config(path: Path) -> Mapping[str, object]:
    beside = path / CONFIG if path.is_dir() else path.with_name(CONFIG)
    if path.is_dir() or path.name.partition(".")[0] == "adapter_model":
        return read_object(beside) if beside.is_file() else {}
    return (fields_in(path) if path.suffix == ".safetensors" else None) or {}


def _shapes(path: Path, allow_pickle: bool) -> dict[str, tuple[int, ...]]:
    file = weights_in(path) if path.is_dir() else path
    if file is None or (is_pickle(file) and not allow_pickle):
        return {}  # the adapter's reader says so, in its own words
    tensors = read_file(file, allow_pickle)
    named = ((key.removeprefix(PREFIX), tensor) for key, tensor in tensors.items())
    return {name.replace(f"{PEFT_LAYER}.", "."): tuple(tensor.shape) for name, tensor in named}
