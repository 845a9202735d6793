from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from lora_fx.export.report import Check, Clock, ExportReport

GOOD = Check("model", "batch=2", "off", "output", 1e-7, 2e-7, 1e-5, ok=True)
CONTROL = Check(
    "control: no adapters", "batch=2", "all", "output", 1.0, float("inf"), 1e-5, ok=True
)
REPORT = ExportReport("model.onnx", "merged", {"model.onnx": 1200}, 20, {"trace": 0.5})


def test_verified_needs_checks_that_agree_and_a_control_that_does_not() -> None:
    full = replace(REPORT, checks=[GOOD], controls=[CONTROL])
    assert full.verified
    assert replace(full, controls=[replace(CONTROL, ok=False), CONTROL]).verified
    assert not replace(full, checks=[GOOD, replace(GOOD, ok=False)]).verified
    assert not replace(full, controls=[replace(CONTROL, ok=False)]).verified
    assert not replace(full, checks=[]).verified
    assert not replace(full, controls=[]).verified


def test_json_holds_everything_and_stays_json(tmp_path: Path) -> None:
    report = replace(REPORT, checks=[GOOD], controls=[CONTROL], notes=["a note"])
    report.save_json(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    values = json.loads(text, parse_constant=lambda name: f"not JSON: {name}")
    assert values["verified"] is True
    assert values["controls"][0]["relative"] == "inf"
    assert values["checks"][0]["max_abs"] == 1e-7
    assert values["files"] == {"model.onnx": 1200}


def test_table_shows_the_farthest_row_of_each_model() -> None:
    worse = replace(GOOD, output="score", shape="batch=5", relative=9e-7)
    other = replace(GOOD, what="adapted")
    same = replace(CONTROL, ok=False, relative=3e-7)
    rows = replace(REPORT, checks=[GOOD, worse, other], controls=[same, CONTROL], notes=["why"])
    checks = [line for line in str(rows).split("\n") if line.startswith("check ")]
    assert [line.split()[2] for line in checks] == ["model", "adapted"]
    assert "score" in checks[0]
    assert checks[0].endswith("the farthest of 2")
    assert "farthest" not in checks[1]
    [control] = [line for line in str(rows).split("\n") if line.startswith("control ")]
    assert control.startswith("control  ok")
    assert "note     why" in str(rows)


def test_what_failed_is_shown_before_what_is_farther_off_and_allowed() -> None:
    wrong = replace(GOOD, output="score", ok=False)
    far = replace(GOOD, relative=9e-7)
    same = replace(CONTROL, ok=False)
    table = str(replace(REPORT, checks=[far, wrong], controls=[same]))
    assert "check    FAIL model" in table
    assert "control  same" in table


def test_clock_adds_up_and_tells_who_watches() -> None:
    seen: list[str] = []
    clock = Clock(seen.append)
    for name in ("trace", "write", "trace"):
        with clock.stage(name):
            pass
    assert seen == ["trace", "write", "trace"]
    assert clock.seconds.keys() == {"trace", "write"}
