"""A diffusers directory as a model in several files, one a component, and what stands beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lora_fx.errors import advised, within
from lora_fx.graph.example import TASK
from lora_fx.tasks.calls import Call
from lora_fx.tasks.client_files import Copies, is_kept, write_copies
from lora_fx.tasks.model_source import MODEL, ModelSource
from lora_fx.tasks.pipeline import Pipeline, load_pipeline
from lora_fx.tasks.pipeline_calls import calls_of

_HALVES = {"vae_encoder": "vae", "vae_decoder": "vae"}


@advised("download or save the pipeline again, or give module:function")
def from_pipeline(
    path: Path, component: str | None, dtype: torch.dtype | None, every: bool
) -> ModelSource:
    """The models of a diffusers directory.

    Args:
        path: of a pipeline, or of one of its models.
        component: the only one of a pipeline that is exported, as ``model.onnx``. A VAE is two
            files, and ``vae_decoder`` one of them.
        dtype: what they are loaded in.
        every: have the others of a pipeline too: an adapter's names mean layers of all.

    Raises:
        LoraFxError: there is no such component, or it cannot be loaded or called.
    """
    chosen = _HALVES.get(component or "", component)
    pipeline = load_pipeline(path, chosen, dtype, every)
    if not pipeline.fields:  # of one model alone, a component is what its adapters call it
        chosen = next(iter(pipeline.models))
    names = [chosen] if chosen else [*pipeline.models]
    with within(path):
        parts = [(name, call) for name in names for call in calls_of(pipeline, name)]
    parts = [p for p in parts if component not in _HALVES or component == _place(p[1])]
    calls = [call for _, call in parts]
    if chosen and len(parts) == 1:
        calls = [replace(calls[0], file=MODEL)]
    sources = [
        _part(name, _place(own), call) for (name, own), call in zip(parts, calls, strict=True)
    ]
    copies = _copies(pipeline, chosen, {part.file: part.component for part in sources})
    return replace(
        sources[0],
        more=tuple(sources[1:]),
        lacks=tuple(f"{n}.{key}" for n in names for key in pipeline.models[n].lacks),
        beside=list(dict.fromkeys(place.parts[0] for place in copies)),
        write_beside=partial(write_copies, copies),
        base=_base(pipeline),
        chosen=chosen if pipeline.fields else None,
    )


def _place(call: Call) -> str:
    return Path(call.file).parent.name


def _part(component: str, task: str, call: Call) -> ModelSource:
    return ModelSource(
        call.model, (), call.kwargs, call.dynamic_shapes, task={TASK: task}, file=call.file,
        component=component,
    )  # fmt: skip


def _base(pipeline: Pipeline) -> nn.Module:
    """A module of the components by name, of whose layers an adapter's names are."""
    base = nn.Module()
    for name, loaded in pipeline.models.items():
        base.add_module(name, loaded.model)
    return base


def _copies(pipeline: Pipeline, alone: str | None, files: Mapping[str, str]) -> Copies:
    """The files that are copied as they are: the configs of the models, and all that is none.

    Scheduler, tokenizers and whatever else a pipeline has come with all that they hold.

    Args:
        pipeline: the models.
        alone: the only component that is exported, or None.
        files: of the models that are written, relative -> the component that each is of.
    """
    found: Copies = {}
    for file, component in files.items():
        own = sorted(pipeline.home(component).iterdir())
        kept = [path for path in own if path.is_file() and is_kept(path)]
        found |= {Path(file).parent / path.name: path for path in kept}
    return found if alone is not None else found | dict(_others(pipeline))


def _others(pipeline: Pipeline) -> Iterator[tuple[Path, Path]]:
    for path in sorted(pipeline.path.iterdir()):
        if path.is_file() and is_kept(path):
            yield Path(path.name), path
        elif path.name in pipeline.fields and path.name not in pipeline.models:
            inner = (file for file in sorted(path.rglob("*")) if file.is_file())
            yield from ((file.relative_to(pipeline.path), file) for file in inner)
