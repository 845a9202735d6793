"""What the command line takes as a model: a directory, a function, or an exported program."""

from __future__ import annotations

import copy
import logging
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.cli.user_code import load_module, users_code
from lora_fx.errors import LoraFxError
from lora_fx.graph.example import DTYPE
from lora_fx.io.plain_file import check_path
from lora_fx.tasks.adapter_task import AdapterTask
from lora_fx.tasks.model_source import ModelSource, from_directory
from lora_fx.tasks.pipeline import is_pipeline
from lora_fx.tasks.pipeline_source import from_pipeline

DTYPES = {"float32": torch.float32, "float16": torch.float16}
_FORMS = "expected a Hugging Face directory, module:function, file.py:function, or a .pt2 file"


def dtype_named(word: str | None) -> torch.dtype | None:
    """The dtype that ``--dtype`` names.

    Raises:
        LoraFxError: it is none that onnxruntime's CPU provider runs models in.
    """
    if word is None or word in DTYPES:
        return DTYPES[word] if word else None
    if isinstance(getattr(torch, word, None), torch.dtype):
        raise LoraFxError(
            f"--dtype {word}: onnxruntime's CPU provider runs no {word} models, so the file could "
            f"not be verified: expected {' or '.join(DTYPES)}"
        )
    raise LoraFxError(f"--dtype {word!r:.80}: is no dtype: expected {' or '.join(DTYPES)}")


def find_model(
    spec: str,
    adapters: AdapterTask | None = None,
    task: str | None = None,
    last_logits: bool = False,
    component: str | None = None,
    dtype: torch.dtype | None = None,
) -> ModelSource:
    """Loads the model that a command line names.

    Args:
        spec: a Hugging Face directory, ``module:function`` or ``file.py:function`` whose function
            returns ``(model, args, kwargs, dynamic_shapes)`` (later ones optional), or a ``.pt2``
            file.
        adapters: what they were trained for; it decides the class of a directory's model.
        task: what a directory's model is exported for; by default what its adapters were trained
            for, or what its own class does.
        last_logits: of a decoder with a cache, logits of the last position alone.
        component: of a pipeline of diffusers, the only model that is exported.
        dtype: what the model is loaded in, or cast to.

    Raises:
        LoraFxError: it is none of these, or it cannot be loaded.
    """
    found = _found(spec, adapters, task, last_logits, component, dtype)
    return found if dtype is None else _noting(found, {DTYPE: str(dtype).removeprefix("torch.")})


def _noting(source: ModelSource, more: Mapping[str, str]) -> ModelSource:
    parts = tuple(replace(part, task={**part.task, **more}) for part in source.more)
    return replace(source, task={**source.task, **more}, more=parts)


def _found(
    spec: str,
    adapters: AdapterTask | None,
    task: str | None,
    last_logits: bool,
    component: str | None,
    dtype: torch.dtype | None,
) -> ModelSource:
    path = check_path(Path(spec), LoraFxError)
    if path.is_dir() and is_pipeline(path):
        return _from_diffusers(path, component, dtype, adapters is not None, task, last_logits)
    if path.is_dir():
        return from_directory(path, adapters or AdapterTask(), task, last_logits, dtype)
    if task is not None or last_logits:
        raise LoraFxError(
            f"{spec}: --task and --last-logits are for a Hugging Face directory: leave them out"
        )
    if path.suffix == ".pt2":
        return _from_program(path, dtype)
    if spec.rpartition(":")[0]:
        return _cast(_from_function(spec), dtype)
    found = "is a file of another kind" if path.exists() else "no such directory or file"
    raise LoraFxError(f"{spec}: {found}; {_FORMS}")


def _from_diffusers(
    path: Path,
    component: str | None,
    dtype: torch.dtype | None,
    every: bool,
    task: str | None,
    last_logits: bool,
) -> ModelSource:
    if task is not None or last_logits:
        raise LoraFxError(
            f"{path}: --task and --last-logits are for models of transformers; each model of a "
            "pipeline has one call: leave them out, or choose one by --component"
        )
    return from_pipeline(path, component, dtype, every)


def _cast(source: ModelSource, dtype: torch.dtype | None) -> ModelSource:
    """A model of a function in another dtype, with its example inputs."""
    if dtype is None:
        return source
    if not isinstance(source.model, nn.Module):
        raise LoraFxError("--dtype: an exported program keeps its own; export its model again")

    def cast(value: Any) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if is_float else value

    args, kwargs = pytree.tree_map(cast, (source.args, dict(source.kwargs)))
    return replace(source, model=copy.deepcopy(source.model).to(dtype), args=args, kwargs=kwargs)


def _from_program(path: Path, dtype: torch.dtype | None) -> ModelSource:
    if not path.is_file():
        raise LoraFxError(f"{path}: no such file: give what torch.export.save wrote")
    if dtype is not None:
        raise LoraFxError(f"{path}: --dtype: a program keeps its own; export its model again")
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
    try:
        with users_code(f"{spec}: {place} cannot be imported"):
            module = load_module(place)
    except LoraFxError as error:
        cause = error.__cause__
        if not isinstance(cause, ModuleNotFoundError):
            raise
        if cause.name != place.partition(".")[0]:
            raise LoraFxError(f"{error}: install {cause.name} for this Python") from cause
        raise LoraFxError(
            f"{error}: give the path of its file, {place}.py:{name}, start where that is, or "
            "install it"
        ) from cause
    with users_code(spec):
        function = getattr(module, name, None)
    if function is None:
        raise LoraFxError(f"{spec}: {place} has no function {name!r}; {_FORMS}")
    if isinstance(function, nn.Module) or not callable(function):
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
        raise LoraFxError(
            f"{spec}: args must be a tuple and kwargs a mapping of example inputs: return such"
        )
    return ModelSource(model, args or (), kwargs or {}, shapes)
