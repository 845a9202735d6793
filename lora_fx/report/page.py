"""One page on an export, in one file: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fx.choices import takes
from lora_fx.errors import ExportError
from lora_fx.io.atomic import data_path, refuse_existing, staged
from lora_fx.io.plain_file import check_path
from lora_fx.report.summary import sections, verdict

if TYPE_CHECKING:
    from lora_fx.export import ExportReport


def page(reports: Sequence[ExportReport]) -> str:
    """Reports of the files of one model as HTML."""
    from jinja2 import Environment  # a moment, which only who wants a page waits for

    shown = [(report, verdict(report), list(sections(report))) for report in reports]
    source = files("lora_fx.report").joinpath("page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        source
    )
    first = Path(reports[0].path)
    title = first.name if len(reports) == 1 else first.parent.name
    return template.render(title=title, reports=shown, version=version("lora-fx"))


@takes(ExportError)
def write_page(
    report: ExportReport | Sequence[ExportReport], path: str | Path, *, force: bool = False
) -> None:
    """Writes a report as one page: one HTML file, which loads nothing and runs nothing.

    Args:
        report: of an export, or those of the files of one model.
        path: the ``.html`` file.
        force: replace a file that exists.

    Raises:
        ExportError: the file exists, or cannot be written.
    """
    reports = report if isinstance(report, Sequence) else [report]
    with staged(Path(path), force=force) as draft:
        draft.write_text(page(reports), encoding="utf-8", errors="xmlcharrefreplace")


def page_beside(path: str | Path, model: Path, *, force: bool) -> Path:
    """Where a page goes that is written with a model.

    Raises:
        ExportError: it would take the place of the model, or cannot be written there.
    """
    place = check_path(Path(path), ExportError)
    if os.path.realpath(place) in map(os.path.realpath, (model, data_path(model))):
        raise ExportError(f"{place}: is the model's file: give the report another, such as .html")
    refuse_existing(place, force=force)
    return place
