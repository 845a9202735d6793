"""Directories of transformers and diffusers in Python: what the command line exports of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lora_fx.choices import TaskName, takes
from lora_fx.errors import LoraFxError
from lora_fx.io.plain_file import check_path
from lora_fx.tasks.adapter_task import trained_for
from lora_fx.tasks.directory import refuse_lacking
from lora_fx.tasks.model_source import ModelSource, from_directory
from lora_fx.tasks.pipeline import is_pipeline
from lora_fx.tasks.pipeline_source import from_pipeline


@takes(LoraFxError)
def load(
    directory: str | Path,
    task: TaskName | None = None,
    *,
    adapters: Sequence[str | Path] = (),
    last_logits: bool = False,
    component: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[ModelSource, ...]:
    """Loads the model of a directory, a part for each file that it is exported to.

    ``part.traced()`` is its graph, for `inject`, `fold` and `to_onnx`; ``part.file`` what clients
    call its file; ``parts[0].write_beside(out)`` writes what they need beside it.

    Args:
        directory: of transformers or diffusers.
        task: of optimum's names; by default what the adapters were trained for, or what the
            directory's own class does. A decoder is taken with its cache.
        adapters: that will be injected: their task decides the class, the count of labels too.
        last_logits: of a decoder with a cache, logits of the last position alone.
        component: the only model of a pipeline.
        dtype: what it is loaded in; the directory's own by default.

    Raises:
        LoraFxError: it cannot be loaded, has no such task, or lacks a weight.
    """
    path, paths = check_path(Path(directory), LoraFxError), [Path(adapter) for adapter in adapters]
    if not path.is_dir():
        raise LoraFxError(f"{path}: no such directory: give one of transformers or diffusers")
    if is_pipeline(path):
        source = from_pipeline(path, component, dtype, bool(paths))
        refuse_lacking(source.lacks, ())
    else:
        trained = trained_for(paths)
        source = from_directory(path, trained, task, last_logits, dtype)
        refuse_lacking(source.lacks, trained.shapes)
    return source, *source.more
