"""A model of a directory with the inputs to trace it with, and what stands beside its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from lora_fx.errors import LoraFxError, TraceError, advised, within
from lora_fx.frontend.trace import trace
from lora_fx.graph.example import LAST_LOGITS, STORED, TASK, example_of, remember_example
from lora_fx.tasks.adapter_task import AdapterTask
from lora_fx.tasks.calls import Call, as_it_is, check_runs
from lora_fx.tasks.client_files import write_companions, written_beside
from lora_fx.tasks.directory import load_directory, prepared_by
from lora_fx.tasks.table import task_named

MODEL = "model.onnx"


@dataclass(frozen=True)
class ModelSource:
    """A model with the inputs to trace it with.

    Attributes:
        model: a module in eval mode, or a program that remembers its inputs.
        args: example inputs by position.
        kwargs: example inputs by name.
        dynamic_shapes: as `lora_fx.trace` takes it.
        lacks: parameters without a value, which an adapter must bring.
        task: what it is exported for, as a file's metadata has it.
        input_names: what the file calls some of the inputs, by the names that they would have.
        generates: whether it is a decoder with a cache.
        file: the name of the file that it is exported to.
        joined: that of one that holds the file before it too, which clients without adapters load.
        more: what else is exported of the same model, a file each.
        beside: the names of what clients need beside the file.
        write_beside: writes these into a directory; told ``shared_cache=True``, of a decoder whose
            cache can be written in place.
        component: of a diffusers directory, which of a pipeline's models this is.
        base: what an adapter's names are of, where it is more than this model.
        chosen: the component that alone is exported of a pipeline.
    """

    model: nn.Module | torch.export.ExportedProgram
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    lacks: tuple[str, ...] = ()
    task: Mapping[str, str] = field(default_factory=dict)
    input_names: Mapping[str, str] | None = None
    generates: bool = False
    file: str = MODEL
    joined: str | None = None
    more: tuple[ModelSource, ...] = ()
    beside: Sequence[str] = ()
    write_beside: Callable[..., None] | None = None
    component: str = ""
    base: nn.Module | None = None
    chosen: str | None = None

    @property
    def label(self) -> str:
        """What tells it from the other files of its model; nothing where there is one alone."""
        path = Path(self.file)
        return "" if self.file == MODEL else path.parent.name or path.stem

    def traced(self) -> fx.GraphModule:
        """Its graph, which remembers what its file is for, and what that calls the inputs."""
        try:
            gm = trace(self.model, self.args, self.kwargs, dynamic_shapes=self.dynamic_shapes)
        except TraceError:
            if isinstance(self.model, nn.Module):
                check_runs(self.model, self.args, self.kwargs)
            raise
        example = example_of(gm)
        assert example is not None, "trace remembers what it is given"
        named = replace(example, input_names=self.input_names, task=self.task)
        remember_example(gm, replace(named, generates=self.generates))
        return gm


@advised("download or save the model again, or give module:function")
def from_directory(
    path: Path,
    adapters: AdapterTask,
    task: str | None,
    last_logits: bool,
    dtype: torch.dtype | None,
) -> ModelSource:
    """The model of a Hugging Face directory, with the call that its task means.

    Args:
        path: of the directory.
        adapters: what they were trained for.
        task: what it is exported for; by default what they were trained for, or its own class does.
        last_logits: of a decoder with a cache, logits of the last position alone.
        dtype: what it is loaded in.

    Raises:
        LoraFxError: it cannot be loaded, or not be called so.
    """
    loaded = load_directory(path, adapters, task_named(task) if task else None, dtype)
    prepared = replace(prepared_by(path, loaded.model.config), last_logits=last_logits)
    with within(path):
        calls = (loaded.task.call if loaded.task else as_it_is)(loaded.model, prepared)
        if last_logits and not calls[0].generates:
            raise LoraFxError("--last-logits is for a decoder with a cache: leave it out")
    noted = {TASK: loaded.task.name} if loaded.task else {}
    noted |= {LAST_LOGITS: "true"} if last_logits else {}
    noted |= {STORED: loaded.stored} if loaded.stored else {}
    first, *more = (_of_call(call, noted) for call in calls)
    return replace(
        first,
        lacks=loaded.lacks,
        more=tuple(more),
        beside=written_beside(path, calls[0]),
        write_beside=partial(write_companions, path, model=loaded.model, call=calls[0]),
    )


def _of_call(call: Call, noted: Mapping[str, str]) -> ModelSource:
    inputs = call.kwargs, call.dynamic_shapes
    return ModelSource(
        call.model, (), *inputs, task={**noted, **call.noted}, input_names=call.input_names,
        generates=call.generates, file=call.file, joined=call.joined,
    )  # fmt: skip
