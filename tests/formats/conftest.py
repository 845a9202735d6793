from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_fx.errors import AdapterError
from lora_fx.testing import PEFT_CASES, Lab, SavedCase, save_peft_case

SAVED: dict[str, SavedCase] = {}


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.fixture
def refusals() -> Callable[..., list[str]]:
    """Damages a file many times over, and gives what is said by those that refuse it."""

    def said(
        file: Path, load: Callable[[random.Random], Any], times: int, within: int
    ) -> list[str]:
        sound, source, refused = file.read_bytes(), random.Random(0), list[str]()
        for _ in range(times):
            damaged = bytearray(sound)
            for _ in range(source.choice((1, 1, 2, 8))):
                damaged[source.randrange(min(len(damaged), within))] = source.randrange(256)
            end = len(damaged) if source.random() < 0.8 else source.randrange(len(damaged))
            file.write_bytes(damaged[:end])
            try:
                load(source)
            except AdapterError as error:
                refused.append(str(error))
        return refused

    return said


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
