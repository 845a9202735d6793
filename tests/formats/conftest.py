from __future__ import annotations

from pathlib import Path

import pytest

from lora_fx.testing import PEFT_CASES, Lab, SavedCase, save_peft_case


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.fixture(params=PEFT_CASES)
def peft_case(request: pytest.FixtureRequest, tmp_path: Path) -> SavedCase:
    """Every case of the table, saved by PEFT."""
    return save_peft_case(request.param, tmp_path / "by_peft")
