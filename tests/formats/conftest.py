from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lora_fx.testing import PEFT_CASES, Lab, SavedCase, save_peft_case

SAVED: dict[str, SavedCase] = {}


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.fixture(params=PEFT_CASES)
def peft_case(
    request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> SavedCase:
    """Every case of the table, saved by PEFT: once, each test has a copy of its directory."""
    if request.param not in SAVED:
        directory = tmp_path_factory.mktemp("saved_by_peft")
        SAVED[request.param] = save_peft_case(request.param, directory / "by_peft")
    saved = SAVED[request.param]
    directory = shutil.copytree(saved.directory, tmp_path / "by_peft")
    return replace(saved, base=copy.deepcopy(saved.base), directory=directory)
