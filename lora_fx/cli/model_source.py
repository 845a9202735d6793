"""What the command line takes as a model: a directory, a function, or an exported program."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.cli.adapter_task import Task
from lora_fx.cli.hf_directory import load_directory, prepared_by
from lora_fx.cli.hf_inputs import example_inputs
from lora_fx.cli.user_code import load_module, users_code
from lora_fx.errors import LoraFxError, within

_FORMS = "expected a Hugging Face directory, module:function, file.py:function, or a .pt2 file"


@dataclass(frozen=True)
class ModelSource:
    """A model with the inputs to trace it with.

    Attributes:
        model: a module in eval mode, or a program that remembers its inputs.
        args: example inputs by position.
        kwargs: example inputs by name.
        dynamic_shapes: as `lora_fx.trace` takes it.
        lacks: parameters without a value, which an adapter must bring.
    """

    model: nn.Module | torch.export.ExportedProgram
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    lacks: tuple[str, ...] = ()


def find_model(spec: str, task: Task | None = None) -> ModelSource:
    """Loads the model that a command line names.

    Args:
        spec: a Hugging Face directory, ``module:function`` or ``file.py:function`` whose function
            returns ``(model, args, kwargs, dynamic_shapes)`` (later ones optional), or a ``.pt2``
            file.
        task: of the adapters that the model is for; it decides the class of a directory's model.

    Raises:
        LoraFxError: it is none of these, or it cannot be loaded.
    """
    path = Path(spec)
    if path.is_dir():
        return _from_directory(path, task or Task())
    if path.suffix == ".pt2":
        return _from_program(path)
    if ":" in spec:
        return _from_function(spec)
    raise LoraFxError(f"{spec}: no such directory or file; {_FORMS}")


def _from_program(path: Path) -> ModelSource:
    if not path.is_file():
        raise LoraFxError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):  # torch would print a traceback before it raises
        raise LoraFxError(f"{path}: is damaged or no program: write it with torch.export.save")
    try:
        with _unlogged():
            return ModelSource(torch.export.load(path))
    except Exception as error:  # what is damaged in it decides what torch raises
        raise LoraFxError(
            f"{path}: torch.export.load cannot read it ({error}): write it with torch.export.save"
        ) from error


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keeps torch quiet: it logs the traceback of what it meets in a damaged file, then raises."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _from_function(spec: str) -> ModelSource:
    place, _, name = spec.rpartition(":")
    if place.endswith(".py") and not Path(place).is_file():
        raise LoraFxError(f"{place}: no such file; {_FORMS}")
    with users_code(f"{spec}: {place} cannot be imported"):
        module = load_module(place)
    with users_code(spec):
        function = getattr(module, name, None)
    if function is None:
        raise LoraFxError(f"{spec}: {place} has no function {name!r}; {_FORMS}")
    if not callable(function):
        raise LoraFxError(f"{spec}: found a {type(function).__name__}, expected a function")
    with users_code(spec):
        returned = function()
    return _checked(spec, returned)


def _checked(spec: str, returned: Any) -> ModelSource:
    parts = returned if isinstance(returned, tuple) else (returned,)
    model, args, kwargs, shapes = (*parts, *(None,) * 4)[:4]
    if len(parts) > 4 or not isinstance(model, nn.Module | torch.export.ExportedProgram):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise LoraFxError(
            f"{spec}: returned ({kinds}), expected (model, args, kwargs, dynamic_shapes), "
            "the later ones optional"
        )
    if not isinstance(args, tuple | None) or not isinstance(kwargs, Mapping | None):
        raise LoraFxError(f"{spec}: args must be a tuple and kwargs a mapping of example inputs")
    return ModelSource(model, args or (), kwargs or {}, shapes)


def _from_directory(path: Path, task: Task) -> ModelSource:
    loaded = load_directory(path, task)
    names, prepared = prepared_by(path, loaded.model.config)
    with within(path):
        kwargs, shapes = example_inputs(loaded.model, names, prepared)
    return ModelSource(loaded.model, (), kwargs, shapes, loaded.lacks)
