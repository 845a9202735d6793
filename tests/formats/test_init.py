"""Dispatch by format, hints, and the names of adapters."""

from __future__ import annotations

import random
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime import AdapterFormat, OrtValue
from safetensors.torch import save_file

from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.errors import AdapterError, AdapterWarning
from lora_fx.formats import FORMATS, load_adapter, save_adapter
from lora_fx.formats.hints import Hints, check_all_used, value_for
from lora_fx.layers.base_layers import layers_of


def test_a_directory_is_detected(lab: Any) -> None:
    directory = lab.write()
    for found in (load_adapter(directory), load_adapter(str(directory), format="peft")):
        assert set(found.updates) == {"fc", "block.fc"}


def test_another_format_is_refused_with_those_supported(lab: Any) -> None:
    directory = lab.write()
    with pytest.raises(AdapterError, match=r"format 'nonsense': expected .*'peft', .*'kohya'"):
        load_adapter(directory, format="nonsense")
    with pytest.raises(AdapterError, match=r"format 'nonsense': expected .*'peft', .*'kohya'"):
        save_adapter(load_adapter(directory), lab.root / "out", format="nonsense")


FC = torch.nn.ModuleDict({"fc": torch.nn.Linear(3, 5)})
NAMES = {
    "peft_file": ("base_model.model.fc.lora_A.weight", "base_model.model.fc.lora_B.weight"),
    "loralib": ("fc.lora_A", "fc.lora_B"),
    "kohya": ("lora_te_fc.lora_down.weight", "lora_te_fc.lora_up.weight"),
    "diffusers": ("unet.fc.lora_A.weight", "unet.fc.lora_B.weight"),
}


@pytest.mark.parametrize("format", NAMES)
def test_a_file_is_told_by_its_tensors(tmp_path: Path, format: str) -> None:
    down, up = NAMES[format]
    file = tmp_path / "a.safetensors"
    save_file({down: torch.randn(2, 3), up: torch.randn(5, 2)}, file)
    tellers = [form for form, entry in FORMATS.items() if entry.is_it(file, (down, up))]
    assert tellers == [format]
    hints: dict[str, Any] = {"alpha": 3} if "alpha" in FORMATS[format].hints else {}
    found = load_adapter(file, base=FC, **hints).updates
    assert list(found) == ["fc"]  # the base has no part that is called as the file says
    assert load_adapter(file, base=FC, format=format, **hints).updates.keys() == found.keys()


@pytest.mark.parametrize("format", NAMES)
def test_a_base_is_looked_through_once(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    down, up = NAMES[format]
    file = tmp_path / "a.safetensors"
    asked: list[Any] = []
    save_file({down: torch.randn(2, 3), up: torch.randn(5, 2)}, file)
    hints: dict[str, Any] = {"alpha": 3} if "alpha" in FORMATS[format].hints else {}

    def counted(base: object) -> Any:
        asked.append(base)
        return layers_of(base)

    own = [module for name, module in sys.modules.items() if name.startswith("lora_fx.formats")]
    for module in (module for module in own if hasattr(module, "layers_of")):
        monkeypatch.setattr(module, "layers_of", counted)
    assert list(load_adapter(file, base=FC, **hints).updates) == ["fc"]
    assert asked == [FC]


@pytest.mark.parametrize("large", ["a", "b"])
def test_products_that_overflow_are_refused_where_they_are_made(reads: Any, large: str) -> None:
    base = torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 6)})
    shapes = {f"hada_w{n}_{side}": (6, 2) if side == "a" else (2, 4) for n in "12" for side in "ab"}
    tensors = {f"lycoris_fc.{name}": torch.full(shape, 1.5) for name, shape in shapes.items()}

    factor = tensors[f"lycoris_fc.hada_w1_{large}"]
    factor[0, 0] = 1e30
    assert reads(tensors, base=base).updates["fc"].is_finite()
    factor[0, 0] = 3.4e38
    with pytest.raises(AdapterError, match="safetensors: fc: the values are finite, but products"):
        reads(tensors, base=base)


# What stands after the file where the ranks of a pair differ: its layer, and the tensor.
LAYERS = {
    "peft_file": "fc: lora_B.weight",
    "loralib": "fc: lora_A",
    "kohya": "lora_te_fc: lora_te_fc.lora_up.weight",
    "diffusers": "fc: unet.fc.lora_B.weight",
}


@pytest.mark.parametrize("format", NAMES)
def test_file_and_layer_stand_before_what_is_wrong_each_once(
    tmp_path: Path, reads: Any, format: str
) -> None:
    tensors = dict(zip(NAMES[format], (torch.ones(2, 3), torch.ones(5, 7)), strict=True))
    hints: dict[str, Any] = {"alpha": 3} if "alpha" in FORMATS[format].hints else {}
    file = tmp_path / "a.safetensors"
    with pytest.raises(AdapterError) as caught:
        reads(tensors, base=FC, format=format, **hints)
    assert str(caught.value).startswith(f"{file}: {LAYERS[format]} ")
    assert str(caught.value).count(str(file)) == 1


@pytest.mark.parametrize("format", [*NAMES, "peft"])
def test_the_target_stands_before_what_cannot_be_written_once(tmp_path: Path, format: str) -> None:
    target = tmp_path / "a.safetensors"
    empty = Update(torch.ones(0, 3), torch.ones(5, 0), 1.0)
    with pytest.raises(AdapterError) as caught:
        save_adapter(Adapter("a", {"unet.fc": empty}), target, format=format)
    assert str(caught.value).startswith(f"{target}: ")
    assert str(caught.value).count(str(target)) == 1
    assert not target.exists()


def test_names_of_no_format_ask_for_one(reads: Any) -> None:
    with pytest.raises(AdapterError, match=r"names \(fc\.weight\); pass format=, one of .*kohya"):
        reads({"fc.weight": torch.ones(2)})


@pytest.mark.parametrize("format", FORMATS)
def test_the_wrong_kind_of_path_is_refused(tmp_path: Path, format: str) -> None:
    save_file({"fc.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    directory = tmp_path / "directory"
    directory.mkdir()
    path = tmp_path / "a.safetensors" if format == "peft" else directory
    with pytest.raises(AdapterError, match=f"{path.name}.*: "):
        load_adapter(path, format=format, base=torch.nn.Linear(3, 5))


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="gone: no such file or directory"):
        load_adapter(tmp_path / "gone")


def test_a_file_of_text_is_said_to_be_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# French\nAn adapter.")
    with pytest.raises(
        AdapterError, match=r"README\.md: .* no adapter: give the directory that PEFT"
    ):
        load_adapter(tmp_path / "README.md")


@pytest.mark.parametrize("name", ["a.safetensors", "a.txt", "french"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(AdapterError, match=f"{name}: 0 bytes(, expected| that hold no)"):
        load_adapter(tmp_path / name)


@pytest.mark.parametrize("hint", ["alpha", "enable_lora", "r"])
@pytest.mark.parametrize("form", ["peft takes allow_pickle", "onnx_adapter takes none"])
def test_a_hint_that_the_format_does_not_take_is_refused(lab: Any, form: str, hint: str) -> None:
    path = lab.write() if form.startswith("peft") else lab.root / "a"
    if not path.exists():
        path.write_bytes(b"\0\0\0\0TORT")
    hints: dict[str, Any] = {hint: 3}
    with pytest.raises(AdapterError, match=f"unknown hint '{hint}'; format {form}"):
        load_adapter(path, **hints)


def test_every_format_takes_hints_that_exist() -> None:
    names = {field.name for field in fields(Hints)}
    assert all({*entry.hints, *entry.write_hints} <= names for entry in FORMATS.values())


def test_a_hint_that_no_writer_takes_is_refused(lab: Any) -> None:
    with pytest.raises(AdapterError, match="unknown hint 'component'; format peft takes none"):
        save_adapter(load_adapter(lab.write()), lab.root / "out", component="unet")
    assert not (lab.root / "out").exists()


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("french", "french"),
        ("my.adapter-v2", "my_adapter_v2"),
        ("7b lora", "adapter_7b_lora"),
        ("été", "t"),
        ("...", "adapter"),
        ("my.french-v2.safetensors", "my_french_v2"),  # a file's, without its ending
    ],
)
def test_the_name_is_made_from_the_path(tmp_path: Path, place: str, expected: str) -> None:
    adapter = Adapter("a", {"fc": Update(torch.ones(2, 3), torch.ones(5, 2), 1.5)})
    form = "loralib" if place.endswith(".safetensors") else "peft"
    save_adapter(adapter, tmp_path / place, format=form)
    assert load_adapter(tmp_path / place).name == expected


def test_the_name_of_the_working_directory(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab.write().rename(lab.root / "french"))
    assert load_adapter(".").name == "french"


def test_an_explicit_name_is_used_if_it_is_one(lab: Any) -> None:
    directory = lab.write()
    assert load_adapter(directory, name="b_2").name == "b_2"
    for name in ("a.b", "", "2a", "a b", "é", "a/b"):
        with pytest.raises(AdapterError, match="the adapter's name is"):
            load_adapter(directory, name=name)


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


@pytest.mark.parametrize("format", [*NAMES, "onnx_adapter"])
def test_a_damaged_file_loads_or_raises_the_typed_error(
    tmp_path: Path, format: str, refusals: Any
) -> None:
    file = damageable(tmp_path, format)

    def load(source: random.Random) -> Adapter:
        return load_adapter(file, base=FC, format=source.choice(["auto", format]))

    refused = refusals(file, load, 150, within=400)
    assert len(refused) > 20
    assert all(str(file) in message for message in refused)


def damageable(tmp_path: Path, format: str) -> Path:
    file = tmp_path / "a.safetensors"
    if format == "onnx_adapter":
        content = AdapterFormat()
        shapes = {"fc.lora_A": (3, 2), "fc.lora_B": (2, 5)}
        values = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
        content.set_parameters({k: OrtValue.ortvalue_from_numpy(v) for k, v in values.items()})
        content.export_adapter(str(file))
        return file
    path = "unet.fc" if format == "diffusers" else "fc"
    adapter = Adapter("a", {path: Update(torch.randn(2, 3), torch.randn(5, 2), 1.5)})
    hints: dict[str, Any] = {"component": "te"} if format == "kohya" else {}
    save_adapter(adapter, file, format=format, **hints)
    return file


def test_the_defaults_are_the_careful_ones() -> None:
    assert Hints() == Hints(strict=True, allow_pickle=False)
    others = {k: v for k, v in vars(Hints()).items() if k not in ("strict", "allow_pickle")}
    assert not any(others.values()), "no hint says anything until it is given"


def test_the_longest_end_of_a_path_wins() -> None:
    values = {"fc": 1, "block.fc": 2, "a.block.fc": 3}
    found = [value_for(values, path) for path in ("fc", "x.fc", "x.block.fc", "a.block.fc")]
    assert found == [1, 1, 2, 3]
    for path in ("xfc", "fc.x", "FC", ""):  # an end begins after a dot
        assert value_for({"fc": 1}, path) is None


def test_a_name_that_ends_no_path_is_refused() -> None:
    check_all_used("alpha", {"fc": 1, "b.fc": 2}, ["a.b.fc"])
    with pytest.raises(AdapterError, match=r"alpha names what is no layer of the file: cf, a$"):
        check_all_used("alpha", {"fc": 1, "cf": 2, "a": 3}, ["a.b.fc"])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("init_lora_weights", "pissa", "is 'pissa'"),
        ("rank_pattern", {"misspelt": 3}, "has keys .* misspelt"),
        ("alpha_pattern", {"misspelt": 3}, "has keys .* misspelt"),
    ],
)
def test_a_doubt_is_refused_or_warned_of_at_the_line_that_loads(
    lab: Any, field: str, value: Any, message: str
) -> None:
    directory = lab.write()
    lab.edit_config(directory, **{field: value})
    message = rf"adapter_config\.json: {field} {message}"
    with pytest.raises(AdapterError, match=f"{message}.* pass strict=False"):
        load_adapter(directory)
    with pytest.warns(AdapterWarning, match=message) as warned:
        load_adapter(directory, strict=False)
    assert [warning.filename for warning in warned] == [__file__]
