"""An adapter that PEFT saved, and the same with other fields or tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lora_fx.testing import SavedCase, save_peft_case


@pytest.fixture(scope="session")
def boft(tmp_path_factory: pytest.TempPathFactory) -> SavedCase:
    return save_peft_case("boft, linear", tmp_path_factory.mktemp("boft") / "a")


@pytest.fixture(scope="session")
def hira(tmp_path_factory: pytest.TempPathFactory) -> SavedCase:
    return save_peft_case("hira, ragged", tmp_path_factory.mktemp("hira") / "a")


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a directory with other fields (``...`` leaves one out) and other tensors."""

    def change(case: SavedCase, tensors: Any = None, **fields: Any) -> Path:
        directory = tmp_path / "changed"
        shutil.copytree(case.directory, directory)
        file = directory / "adapter_config.json"
        known = {**json.loads(file.read_text()), **fields}
        file.write_text(json.dumps({k: v for k, v in known.items() if v is not ...}))
        weights = directory / "adapter_model.safetensors"
        if tensors is not None:
            save_file(tensors(load_file(weights)), weights)
        return directory

    return change
