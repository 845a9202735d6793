"""What stands beside a pipeline's files so that clients load the directory as it is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from lora_fx.tasks.client_files import is_kept
from lora_fx.tasks.pipeline import Pipeline

Copies = dict[Path, Path]  # where to, relative -> where from


def copies_of(pipeline: Pipeline, alone: str | None, files: Mapping[str, str]) -> Copies:
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


def write_copies(copies: Copies, out: Path) -> None:
    """Copies files into a directory."""
    for place, source in copies.items():
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, out / place)
