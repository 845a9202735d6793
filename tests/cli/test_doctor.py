"""Whether an installation is what it promises, by the package's own metadata."""

from __future__ import annotations

import json
import platform
import re
import tomllib
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from lora_fx.cli import main
from lora_fx.cli.doctor import Found, Health, examined, packages
from lora_fx.errors import LoraFxError, VerificationError

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
TORCH = Found("torch", ">=2.13", "2.13.0+cpu")


@pytest.fixture(scope="module")
def health() -> Health:
    """By a clock of its own: what takes how long here is the machine's."""
    ticks = iter((1.0, 8.0, 8.25))
    with mock.patch("lora_fx.cli.doctor.time", SimpleNamespace(perf_counter=lambda: next(ticks))):
        return examined()


def names(wanted: list[str]) -> list[str]:
    return [re.split(r"[<>=!~ \[]", one)[0] for one in wanted]


def test_every_promise_is_read_from_the_metadata() -> None:
    found = list(packages())
    always = [one.name for one in found if not one.extra]
    assert always == ["python", *names(PROJECT["dependencies"])]
    extras = {
        name for wanted in PROJECT["optional-dependencies"].values() for name in names(wanted)
    }
    assert {one.name for one in found if one.extra} == extras - {*always}
    assert found[0] == Found("python", PROJECT["requires-python"], platform.python_version())
    torch = next(one for one in found if one.name == "torch")
    assert torch.version == metadata.version("torch")
    assert f"torch{torch.wanted}" in PROJECT["dependencies"]


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        (TORCH, True),
        (replace(TORCH, version="2.14.0.dev20261101"), True),
        (replace(TORCH, version="2.12.1"), False),
        (replace(TORCH, version=None), False),
        (replace(TORCH, version=None, extra="demo"), True),
        (replace(TORCH, version="1.0", extra="demo"), False),
        (replace(TORCH, wanted=""), True),
    ],
)
def test_a_range_holds_or_not(found: Found, holds: bool) -> None:
    assert found.holds is holds
    assert str(found).startswith("WRONG") is not holds


def test_a_tiny_export_runs_with_an_adapter_and_a_control(health: Health) -> None:
    assert [*health.checks] == ["the base", "an adapter swapped in", "a control that must differ"]
    far = [relative for relative, _ in health.checks.values()]
    assert far[0] < 1e-5
    assert far[1] < 1e-5
    assert far[2] > 0.1
    assert health.broken == []
    assert (health.first, health.seconds) == (7.0, 0.25)
    assert "CPUExecutionProvider" in health.providers
    health.judge()


def test_what_is_wrong_is_said_with_its_exit_code(health: Health) -> None:
    old = replace(health, packages=(*health.packages, replace(TORCH, version="2.12.1")))
    with pytest.raises(LoraFxError, match=r"torch 2\.12\.1, >=2\.13 is promised") as raised:
        old.judge()
    assert not isinstance(raised.value, VerificationError)
    wrong = replace(old, checks={"the base": (0.5, False)})
    with pytest.raises(VerificationError, match="the self-test is wrong: the base"):
        wrong.judge()
    failing = replace(health, checks={}, failure="ImportError: no onnxruntime")
    with pytest.raises(LoraFxError, match="the self-test fails: ImportError: no onnxruntime"):
        failing.judge()
    assert "WRONG  torch 2.12.1" in str(old)


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json"])
    assert ended.value.code in (0, None)
    values: Any = json.loads(capsys.readouterr().out)
    assert values["broken"] == []
    assert all(check["ok"] for check in values["checks"].values())
    assert values["packages"][0]["name"] == "python"
