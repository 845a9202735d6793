"""Dispatch by format, hints, and the names of adapters."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from lora_fx.errors import AdapterError
from lora_fx.formats import FORMATS, load_adapter, save_adapter
from lora_fx.formats.hints import Hints

OTHERS = ["peft_file", "loralib", "kohya", "diffusers", "onnx_adapter", "nonsense"]


def test_a_directory_is_detected(lab: Any) -> None:
    directory = lab.write()
    for found in (load_adapter(directory), load_adapter(str(directory), format="peft")):
        assert set(found.updates) == {"fc", "block.fc"}


@pytest.mark.parametrize("format", OTHERS)
def test_another_format_is_refused_with_those_supported(lab: Any, format: str) -> None:
    directory = lab.write()
    with pytest.raises(AdapterError, match=f"format '{format}' is not supported; .* peft$"):
        load_adapter(directory, format=format)
    with pytest.raises(AdapterError, match=f"format '{format}' is not supported; .* peft$"):
        save_adapter(load_adapter(directory), lab.root / "out", format=format)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="gone: no such file or directory"):
        load_adapter(tmp_path / "gone")


def test_a_file_is_not_taken_for_a_directory(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match=r"a\.safetensors: not a directory"):
        load_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("hint", ["alpha", "enable_lora", "r"])
def test_a_hint_that_the_format_does_not_take_is_refused(lab: Any, hint: str) -> None:
    hints: dict[str, Any] = {hint: 3}
    with pytest.raises(AdapterError, match=f"unknown hint '{hint}'; .*allow_pickle"):
        load_adapter(lab.write(), **hints)


def test_every_format_takes_hints_that_exist() -> None:
    names = {field.name for field in fields(Hints)}
    assert all(set(format.hints) <= names for format in FORMATS.values())


@pytest.mark.parametrize(
    ("directory", "expected"),
    [
        ("french", "french"),
        ("my.adapter-v2", "my_adapter_v2"),
        ("7b lora", "adapter_7b_lora"),
        ("été", "t"),
        ("...", "adapter"),
    ],
)
def test_the_name_is_made_from_the_directory(lab: Any, directory: str, expected: str) -> None:
    renamed = lab.write().rename(lab.root / directory)
    assert load_adapter(renamed).name == expected


def test_the_name_of_the_working_directory(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab.write().rename(lab.root / "french"))
    assert load_adapter(".").name == "french"


def test_an_explicit_name_is_used(lab: Any) -> None:
    assert load_adapter(lab.write(), name="b_2").name == "b_2"


@pytest.mark.parametrize("name", ["a.b", "", "2a", "a b", "é", "a/b"])
def test_a_bad_explicit_name_is_refused(lab: Any, name: str) -> None:
    with pytest.raises(AdapterError, match="the adapter's name is"):
        load_adapter(lab.write(), name=name)


def test_an_existing_target_is_refused_without_force(lab: Any) -> None:
    directory = lab.write()
    adapter = load_adapter(directory)
    before = (directory / "adapter_model.safetensors").read_bytes()
    with pytest.raises(AdapterError, match="exists already"):
        save_adapter(adapter, directory)
    assert (directory / "adapter_model.safetensors").read_bytes() == before


def test_an_adapter_may_replace_the_file_it_is_mapped_from(lab: Any) -> None:
    directory = lab.write()
    adapter = load_adapter(directory)
    before = adapter.updates["fc"].delta().clone()
    save_adapter(adapter, directory, force=True)
    assert (adapter.updates["fc"].delta() == before).all()
    assert (load_adapter(directory).updates["fc"].delta() == before).all()
