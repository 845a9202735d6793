"""An adapter of a pipeline of diffusers, shared out among its components."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from torch import nn

from lora_fx.adapters.adapter import Adapter
from lora_fx.errors import AdapterError, shorten
from lora_fx.graph.wrappers import named_modules
from lora_fx.tasks.model_source import ModelSource

T = TypeVar("T")


def of_components(adapter: Adapter, source: ModelSource) -> dict[str, Adapter]:
    """What each component of a model gets, its paths those of its own modules.

    A file of diffusers' or kohya's says of each layer which component it is of. One of PEFT's does
    not: it is of the component that was chosen, or of the only one that has its layers.

    Args:
        adapter: of the whole model.
        source: the model; of any other than a pipeline, all is of the component ``""``.

    Raises:
        AdapterError: a layer is of no component, an adapter may be of several, or it has nothing
            for the one that alone is exported.
    """
    if source.base is None:
        return {"": adapter}
    models = dict(source.base.named_children())
    paths = [*adapter.updates, *adapter.replacements]
    foreign = [path for path in paths if path.partition(".")[0] not in models]
    if len(foreign) == len(paths):
        only = source.chosen or _only(adapter, models)
        return {only: replace(_part(adapter, ""), expects=adapter.expects)}
    if foreign:
        raise AdapterError(
            f"adapter {adapter.name}: {shorten(foreign)} begin with no component of the pipeline, "
            f"expected one of {', '.join(models)}: use the pipeline that it was trained on"
        )
    names = dict.fromkeys(path.partition(".")[0] for path in paths)
    found = {name: _part(adapter, f"{name}.") for name in names}
    if source.chosen is not None and source.chosen not in found:
        raise AdapterError(
            f"adapter {adapter.name}: has nothing for {source.chosen}, which alone is exported, "
            f"but for {', '.join(found)}: name one of these by --component, or leave that out"
        )
    return found


def _only(adapter: Adapter, models: Mapping[str, nn.Module]) -> str:
    paths = {*adapter.updates, *(name.rpartition(".")[0] for name in adapter.replacements)}
    every = {n: dict(named_modules(m)) for n, m in models.items()}
    fits = [name for name, modules in every.items() if paths & modules.keys()]
    if len(fits) == 1 or len(models) == 1:
        return next(iter(fits or models))
    raise AdapterError(
        f"adapter {adapter.name}: its layers ({shorten(sorted(paths), 2)}) are of "
        f"{' and of '.join(fits) or 'no component of the pipeline'}: say which by --component, "
        f"one of {', '.join(models)}"
    )


def _part(adapter: Adapter, start: str) -> Adapter:
    """What of an adapter begins so, by the paths behind that."""

    def own(values: Mapping[str, T]) -> dict[str, T]:
        return {p.removeprefix(start): v for p, v in values.items() if p.startswith(start)}

    updates, replaced = own(adapter.updates), own(adapter.replacements)
    return replace(adapter, updates=updates, replacements=replaced, expects=None)
