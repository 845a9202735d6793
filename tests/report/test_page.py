"""The page: everything is on it, nothing on it comes from elsewhere, and names are only names."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import ExportError, LoraFxError
from lora_fx.export import ExportReport, to_onnx
from lora_fx.report.page import page as render
from lora_fx.report.page import write_page
from lora_fx.tables import number

HOSTILE = "<script>alert(1)</script>&amp;"
VOID = {"meta"}


class Reader(HTMLParser):
    """Tags, attributes and text; tags have to close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def read(source: str) -> Reader:
    reader = Reader()
    reader.feed(source)
    reader.close()
    assert reader.open == []
    return reader


def test_every_number_of_the_report_is_on_the_page(page: Any) -> None:
    text = read(page.html).text
    assert len(page.report.layers) == 3
    for fact in page.report.layers:
        for value in (fact.change, fact.effective_rank, fact.error, fact.scale):
            assert number(value) in text
        assert all(word in text for word in (fact.path, fact.kind, fact.form, fact.adapter))
    for row in page.report.checks:
        assert f"{row.relative:.1e}" in text
    assert f"it does, by {page.report.controls[0].relative:.1e}" in text
    assert all(name in text for name in page.report.files)
    assert all(f"{reason}" in text for reason in page.report.left.values())
    assert "verified" in read(page.html).words


def test_every_section_is_there_and_linked(page: Any) -> None:
    reader = read(page.html)
    anchors = {value for _, name, value in reader.attributes if name == "id"}
    links = {value[1:] for tag, name, value in reader.attributes if (tag, name) == ("a", "href")}
    assert anchors == links
    titles = ("What was done", "Layers", "How much each layer changes", "Around a layer")
    assert all(title in reader.words for title in (*titles, "Verification", "Sizes"))
    assert reader.tags.count("svg") >= len(page.report.layers) + 2 * len(page.report.pictures)


def test_the_page_needs_nothing_else(page: Any) -> None:
    reader = read(page.html)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {*reader.tags}
    loads = [(n, v) for _, n, v in reader.attributes if n in ("src", "href", "srcset", "action")]
    assert all(value.startswith("#") for _, value in loads)
    assert not any(name.startswith("on") for _, name, _ in reader.attributes)
    assert not re.search(r"https?:|//|url\(|@import", page.html.replace(str(page.file.parent), ""))
    policy = next(v for _, n, v in reader.attributes if n == "content" and "default-src" in v)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_a_hostile_name_is_text(page: Any) -> None:
    reader = read(page.html)
    assert HOSTILE in reader.text, "the names are there"
    assert page.html.count("<script") == 0
    assert html.escape(HOSTILE) in page.html


def test_a_report_that_was_saved_gives_the_same_page(page: Any, tmp_path: Path) -> None:
    page.report.save_json(tmp_path / "report.json")
    again = ExportReport.from_dict(json.loads((tmp_path / "report.json").read_text()))
    assert again == page.report
    assert render([again]) == page.html
    off = dataclasses.replace(again.layers[0], change=2 * (again.layers[0].change or 0))
    changed = dataclasses.replace(again, layers=[off, *again.layers[1:]])
    assert render([changed]) != page.html, "the control: another number, another page"


def test_a_page_of_several_files_has_a_part_for_each(page: Any) -> None:
    reader = read(render([page.report, dataclasses.replace(page.report, path="out/decoder.onnx")]))
    ids = [value for _, name, value in reader.attributes if name == "id"]
    assert len(ids) == len({*ids})
    assert reader.tags.count("article") == 2
    assert "2 files, written by" in reader.text


def test_what_is_not_verified_is_not_called_so(page: Any) -> None:
    plain = dataclasses.replace(page.report, checks=[], controls=[])
    assert "not verified" in read(render([plain])).words
    wrong = [dataclasses.replace(row, ok=False) for row in page.report.checks]
    shown = read(render([dataclasses.replace(page.report, checks=wrong)]))
    assert "verified" not in shown.words
    assert "WRONG" in shown.words


def test_many_checks_are_behind_a_fold_the_worst_first(page: Any) -> None:
    one = page.report.checks[0]
    rows = [dataclasses.replace(one, relative=n * 1e-8) for n in range(50)]
    shown = read(render([dataclasses.replace(page.report, checks=rows)]))
    assert "30 more" in shown.words
    assert (
        shown.words.index("4.9e-07") < shown.words.index("30 more") < shown.words.index("1.0e-08")
    )


def small(tmp_path: Path, **options: Any) -> ExportReport:
    gm = lora_fx.trace(nn.Linear(3, 5).eval(), (torch.randn(2, 3),))
    return to_onnx(gm, tmp_path / "model.onnx", verify=False, **options)


def test_a_page_that_is_there_is_not_replaced_unless_forced(tmp_path: Path) -> None:
    place = tmp_path / "page.html"
    place.write_text("somebody's")
    with pytest.raises(ExportError, match=r"page\.html: exists"):
        small(tmp_path, report=place)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"], "and no model is written"
    report = small(tmp_path, report=place, force=True)
    assert "Nothing was held against eager" in place.read_text()
    with pytest.raises(ExportError, match="exists"):
        write_page(report, place)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_page_cannot_take_the_place_of_the_model(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is the model's file"):
        small(tmp_path, report=tmp_path / name)
    with pytest.raises(ExportError, match="is the model's file"):
        small(tmp_path, report=tmp_path / "x" / ".." / name)


def test_a_page_needs_a_path_that_a_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be the path of a file"):
        small(tmp_path, report=tmp_path / "a\0b")
    assert list(tmp_path.iterdir()) == []


def test_a_page_where_none_can_be_leaves_no_model(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="directory does not exist"):
        small(tmp_path, report=tmp_path / "nowhere" / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_shows_the_sections_of_the_page(page: Any) -> None:
    shown = page.report._repr_html_()
    assert "<script" not in shown
    assert "Verification" in shown
    assert all(html.escape(fact.path) in shown for fact in page.report.layers)


@pytest.mark.parametrize("odd", ["inf", "nan", "-inf"])
def test_a_number_that_is_none_breaks_no_page(odd: str, page: Any) -> None:
    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: changed(item) for key, item in value.items()}
        if isinstance(value, list):
            return [changed(item) for item in value]
        return odd if isinstance(value, float) else value

    again = ExportReport.from_dict(changed(page.report.to_dict()))
    assert odd in read(render([again])).text
    bare = [dataclasses.replace(fact, shape=[], singular_values=[]) for fact in again.layers]
    read(render([dataclasses.replace(again, layers=bare)]))


@pytest.mark.parametrize(
    "box", [{"kind": "other"}, {"reads": [7]}, {"reads": [0]}, {"reads": [-1]}]
)
def test_a_drawing_that_cannot_be_is_refused(box: dict[str, Any], page: Any) -> None:
    values = page.report.to_dict()
    values["pictures"][0]["stages"][0]["boxes"][0] |= box
    with pytest.raises(LoraFxError, match="box 0 cannot be"):
        ExportReport.from_dict(values)
