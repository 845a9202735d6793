"""One page on an export, in one file: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from lora_fx.errors import ExportError
from lora_fx.io.atomic import data_path, refuse_existing, staged
from lora_fx.report.summary import Values, sections, verdict


def page(report: Values) -> str:
    """A report as HTML.

    Args:
        report: what `ExportReport.to_dict` gives, or of several files, ``parts``, each of these.
    """
    from jinja2 import Environment  # a moment, which only who wants a page waits for

    parts: Sequence[Values] = report.get("parts", [report])
    shown = [
        {
            "path": part["path"],
            "verified": part["verified"],
            "verdict": verdict(part),
            "sections": list(sections(part)),
        }
        for part in parts
    ]
    source = files("lora_fx.report").joinpath("page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        source
    )
    title = Path(parts[0]["path"]).name if len(parts) == 1 else Path(parts[0]["path"]).parent.name
    return template.render(title=title, reports=shown, version=version("lora-fx"))


def write_page(report: Values, path: Path, *, force: bool = False) -> None:
    """Writes a report as one page.

    Args:
        report: as `page` takes it.
        path: the ``.html`` file.
        force: replace a file that exists.

    Raises:
        ExportError: the file exists, or cannot be written.
    """
    with staged(path, force=force) as draft:
        draft.write_text(page(report), encoding="utf-8")


def page_beside(path: str | Path, model: Path, *, force: bool) -> Path:
    """Where a page goes that is written with a model.

    Raises:
        ExportError: it would take the place of the model, or cannot be written there.
    """
    place = Path(path)
    if os.path.realpath(place) in map(os.path.realpath, (model, data_path(model))):
        raise ExportError(f"{place}: is the model's file: give the report another, such as .html")
    refuse_existing(place, force=force)
    return place
