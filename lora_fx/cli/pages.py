"""Looking at what there is: a page on what an export wrote, two adapters or files compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fx.cli.adapter_options import AdapterOptions
from lora_fx.cli.commands import REPORT
from lora_fx.cli.inspect import exported
from lora_fx.cli.parts import Parts
from lora_fx.errors import ExportError, LoraFxError, within
from lora_fx.io.plain_file import check_path
from lora_fx.io.strict_json import read_json
from lora_fx.report.diff import Differences, diff, is_model
from lora_fx.report.page import write_page

if TYPE_CHECKING:
    from lora_fx.export import ExportReport

PAGE = "report.html"


def read_report(path: Path) -> ExportReport | Parts:
    """Reads the report of an export.

    Args:
        path: the directory that was written, or its ``report.json``.

    Raises:
        ExportError: there is none, or it is none of an export.
    """
    from lora_fx.export import ExportReport

    file = path / REPORT if check_path(path, ExportError).is_dir() else path
    if not file.is_file():
        raise ExportError(f"{file}: no such file: give a directory that lora-fx export wrote")
    if file.suffix != Path(REPORT).suffix:
        raise ExportError(f"{file}: is no {REPORT}: give a directory that lora-fx export wrote")
    values = read_json(file, ExportError)
    with within(file):
        if not isinstance(values, dict) or not {"parts", "checks"} & values.keys():
            raise ExportError("is no report of an export: give what lora-fx export wrote")
        if "parts" not in values:
            return ExportReport.from_dict(values)
        if not isinstance(values["parts"], list) or not values["parts"]:
            raise ExportError("has no parts: export again")
        return Parts(tuple(ExportReport.from_dict(part) for part in values["parts"]))


def make_page(path: Path, out: Path | None, force: bool) -> tuple[Path, ExportReport | Parts]:
    """Writes a report as one page.

    Args:
        path: the directory that was written, or its ``report.json``.
        out: the ``.html`` file; ``report.html`` beside the report by default.
        force: replace a file that exists.

    Raises:
        ExportError: there is no report, or the page cannot be written.
    """
    report = read_report(path)
    place = out or (path if path.is_dir() else path.parent) / PAGE
    if place.suffix not in (".html", ".htm"):
        raise ExportError(f"{place}: expected the name of an .html file")
    write_page(report.reports if isinstance(report, Parts) else report, place, force=force)
    return place, report


def compared(first: Path, second: Path, given: AdapterOptions) -> Differences:
    """Holds two adapters, or two files, against each other.

    Args:
        first: an adapter, or a ``.onnx`` file.
        second: another of the same sort.
        given: what the adapters' formats do not store; the base that they are for.

    Raises:
        LoraFxError: one cannot be read, or they are not of the same sort.
    """
    for path in (first, second):
        if not check_path(path, LoraFxError).exists():
            raise LoraFxError(f"{path}: no such file or directory: give an adapter or an .onnx")
    first, second = exported(first), exported(second)
    if is_model(first) or is_model(second):
        return diff(first, second)
    base = given.model()
    found = diff(given.load(first, base), given.load(second, base), base=base)
    return replace(found, first=str(first), second=str(second))  # two may have one name
