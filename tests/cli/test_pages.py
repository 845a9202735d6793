"""The commands that look: a page of what was exported, and two adapters or files compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_fx
from lora_fx.cli import main
from lora_fx.cli.commands import export_model
from lora_fx.cli.pages import make_page, read_report
from lora_fx.cli.parts import Parts
from lora_fx.errors import ExportError
from lora_fx.export import ExportReport
from lora_fx.io.strict_json import to_json
from lora_fx.testing import make_adapter

MODEL = """
import torch
from torch import nn


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    return model.eval(), (torch.randn(3, 6),)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    (home / "looked_at.py").write_text(MODEL)
    shapes = {"0": (5, 6), "2": (4, 5)}
    lora_fx.save_adapter(make_adapter(shapes, scale=0.2), home / "french")
    lora_fx.save_adapter(make_adapter(shapes, rank=3, scale=0.2), home / "german")
    adapters = [home / "french", home / "german"]
    for mode in ("merged", "swappable"):
        spec = f"{home / 'looked_at.py'}:make"
        export_model(spec, adapters, mode, home / mode, False, lambda stage: None, measure=True)
    return home


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    code = ended.value.code
    return code if isinstance(code, int) else 0


@pytest.mark.parametrize("mode", ["merged", "swappable"])
def test_what_was_exported_has_a_page(
    mode: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(file.name for file in (home / mode).iterdir())
    page = tmp_path / "page.html"
    assert call("report", home / mode, "-o", page, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(page), "verified": True}
    text = page.read_text()
    report: Any = read_report(home / mode)
    assert [(f.adapter, f.path) for f in report.layers] == [
        ("french", "0"), ("french", "2"), ("german", "0"), ("german", "2"),
    ]  # fmt: skip
    for name in ("french", "german"):
        update: Any = lora_fx.load_adapter(home / name).updates["0"]
        values = torch.linalg.svdvals(update.delta().double())
        (fact,) = [f for f in report.layers if (f.adapter, f.path) == (name, "0")]
        assert fact.singular_values[:2] == pytest.approx(values[:2].tolist(), rel=1e-6)
        assert f">{name}<" in text
    assert sorted(file.name for file in (home / mode).iterdir()) == before


@pytest.mark.parametrize("mode", ["merged", "swappable"])
def test_a_page_says_that_layers_were_not_measured(mode: str, home: Path, tmp_path: Path) -> None:
    spec, adapters = f"{home / 'looked_at.py'}:make", [home / "french"]
    report: Any = export_model(spec, adapters, mode, tmp_path / "out", False, lambda stage: None)
    assert report.layers == []
    assert "measure" not in report.seconds
    page, _ = make_page(tmp_path / "out", None, False)
    assert "export --measure" in page.read_text()
    measured, _ = make_page(home / mode, tmp_path / "measured.html", False)
    assert "export --measure" not in measured.read_text()


def test_the_page_goes_beside_the_report_and_is_not_replaced(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = home / "merged" / "report.html"
    try:
        assert call("report", home / "merged" / "report.json") == 0
        assert place.exists()
        assert call("report", home / "merged") == 2
        assert "exists: pass --force to replace it" in capsys.readouterr().err
        assert call("report", home / "merged", "--force") == 0
    finally:
        place.unlink()


def test_reports_of_several_files_are_read_as_such(home: Path, tmp_path: Path) -> None:
    one = read_report(home / "merged")
    assert isinstance(one, ExportReport)
    (tmp_path / "report.json").write_text(to_json(Parts((one, one)).to_dict()))
    assert read_report(tmp_path) == Parts((one, one))
    page, _ = make_page(tmp_path, None, False)
    assert page == tmp_path / "report.html"
    assert "2 files" in page.read_text()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "is no report"),
        ('{"score": 1}', "is no report"),
        ('{"parts": []}', "has no parts"),
        ('{"parts": 3}', "has no parts"),
        ('{"parts": [3]}', "it is 3, expected ExportReport"),
        ('{"checks": []}', "path is 'missing'"),
        ('{"checks": [', "cannot be read"),
        ("\xff", "cannot be read"),
    ],
)
def test_what_is_no_report_is_refused_by_name(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ExportError, match=says) as raised:
        make_page(tmp_path, None, False)
    assert "report.json" in str(raised.value)
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_text_that_is_no_text_is_shown_as_far_as_it_goes(home: Path, tmp_path: Path) -> None:
    values = json.loads((home / "merged" / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps(values | {"notes": ["\ud800 a half"]}))
    page, _ = make_page(tmp_path, None, False)
    assert "a half" in page.read_text(encoding="utf-8")
    (tmp_path / "report.json").write_text(json.dumps(values | {"seconds": {"trace": 10**400}}))
    with pytest.raises(ExportError, match="seconds"):
        make_page(tmp_path, None, True)


@pytest.mark.parametrize("damage", ["layers", "pictures", "left", "checks", "coverage", "files"])
def test_a_damaged_report_is_refused_and_makes_no_page(
    damage: str, home: Path, tmp_path: Path
) -> None:
    values = json.loads((home / "merged" / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps(values | {damage: [{"a": [1]}]}))
    with pytest.raises(ExportError, match=damage):
        make_page(tmp_path, None, False)


def test_a_page_is_an_html_file(home: Path) -> None:
    with pytest.raises(ExportError, match=r"model\.onnx: expected the name of an \.html file"):
        make_page(home / "merged", home / "merged" / "model.onnx", True)


def test_adapters_are_compared_by_path(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    french, german = home / "french", home / "german"
    assert call("diff", french, german, "--base", f"{home / 'looked_at.py'}:make") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{french} and {german}: 2 differ, 0 are equal"
    assert "rank 2  scale 0.2 -> " in lines[1]
    assert call("diff", french, home / "swappable" / "french.onnx_adapter", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert all(row["relative"] < 1e-6 for row in values["rows"])
    assert call("diff", french, french, "--json") == 0
    assert json.loads(capsys.readouterr().out)["same"] is True


def test_files_are_compared_and_two_sorts_refused(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged, open_ = home / "merged" / "model.onnx", home / "swappable" / "model.onnx"
    assert call("diff", merged, open_) == 0
    assert "0.lora_A  only in the second" in capsys.readouterr().out
    assert call("diff", merged, home / "french") == 2
    assert "expected two of the same sort" in capsys.readouterr().err
    assert call("diff", merged, home / "nowhere.onnx") == 2
    assert "nowhere.onnx: no such file" in capsys.readouterr().err


def test_who_gives_the_model_is_told_to_give_its_directory(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a\x95")
    with pytest.raises(ExportError, match=r"is no report\.json: give a directory that lora-fx"):
        make_page(tmp_path / "model.onnx", None, False)
