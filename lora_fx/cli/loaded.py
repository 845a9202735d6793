"""The model that a command names, and the adapters for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import fx

from lora_fx.adapters.adapter import Adapter
from lora_fx.cli.adapter_options import AdapterOptions, base_of, named
from lora_fx.cli.model_source import dtype_named, find_model
from lora_fx.errors import AdapterError, shorten, within
from lora_fx.io.plain_file import check_path
from lora_fx.tasks.adapter_task import trained_for
from lora_fx.tasks.directory import refuse_lacking
from lora_fx.tasks.model_source import ModelSource

Progress = Callable[[str], None]


def load(
    spec: str,
    paths: Sequence[Path],
    given: AdapterOptions | None,
    task: str | None = None,
    last_logits: bool = False,
    names: Sequence[str] = (),
    dtype: str | None = None,
    component: str | None = None,
) -> tuple[ModelSource, list[Adapter]]:
    """The model and its adapters, whose names it resolves; of a pipeline, a component by itself."""
    called, wanted = named(paths, names), dtype_named(dtype)
    paths = [path for path, _ in called]
    missing = [str(p) for p in paths if not check_path(p, AdapterError).exists()]
    if missing:  # told before a model is loaded, which can take long
        raise AdapterError(f"{shorten(missing)}: no such file or directory: give an adapter")
    given = given or AdapterOptions()
    trained = trained_for(paths, given.allow_pickle) if paths else None
    source = find_model(spec, trained, task, last_logits, given.component or component, wanted)
    if given.component is None:  # an adapter may be of the others alone
        source = replace(source, chosen=None)
    base = base_of(source) if paths else None
    given = replace(given, component=None) if source.chosen is not None else given
    adapters = [given.load(path, base, name) for path, name in called]
    with within(spec):
        refuse_lacking(source.lacks, {n for adapter in adapters for n in adapter.replacements})
    found = [adapter.name for adapter in adapters]
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise AdapterError(f"--adapter: {shorten(twice)} is given twice: name them by --name")
    return source, adapters


def trace(source: ModelSource, progress: Progress) -> fx.GraphModule:
    """The graph of a model."""
    progress("trace")
    return source.traced()
