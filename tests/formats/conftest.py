from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_fx.adapters.adapter import Adapter
from lora_fx.errors import AdapterError
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.testing import PEFT_CASES, Lab, SavedCase, save_peft_case

Tensors = dict[str, torch.Tensor]
SAVED: dict[str, SavedCase] = {}


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.fixture
def reads(tmp_path: Path) -> Callable[..., Adapter]:
    """Writes tensors to a file, and reads that as an adapter."""

    def read(tensors: Tensors, name: str = "a.safetensors", **hints: Any) -> Adapter:
        save = save_file if name.endswith(".safetensors") else torch.save
        save({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name)
        return load_adapter(tmp_path / name, **hints)

    return read


@pytest.fixture
def rewritten(tmp_path: Path) -> Callable[..., tuple[Tensors, Adapter]]:
    """Writes an adapter to a file: its tensors, and what is read of it with the same hints."""

    def again(
        adapter: Adapter, format: str, base: object = None, **hints: Any
    ) -> tuple[Tensors, Adapter]:
        file = tmp_path / f"{adapter.name}_again.safetensors"
        save_adapter(adapter, file, format=format, force=True, **hints)
        read = hints if format == "diffusers" else {}
        return load_file(file), load_adapter(file, name=adapter.name, base=base, **read)

    return again


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
