"""Hints as the command line spells them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Adapter, AdapterError, Update
from lora_fx.cli.adapter_options import AdapterOptions, base_of, named
from lora_fx.tasks import ModelSource


@pytest.mark.parametrize(
    ("given", "hints"),
    [
        (AdapterOptions(), {}),
        (AdapterOptions(alpha=["16"]), {"alpha": 16.0}),
        (AdapterOptions(alpha=["q_proj=16", "v=0.5"]), {"alpha": {"q_proj": 16.0, "v": 0.5}}),
        (AdapterOptions(enable_lora=["1,0,1"]), {"enable_lora": [True, False, True]}),
        (
            AdapterOptions(enable_lora=["attn=true, False"]),
            {"enable_lora": {"attn": [True, False]}},
        ),
        (
            AdapterOptions(use_rslora=True, component="unet", allow_pickle=True),
            {"use_rslora": True, "component": "unet", "allow_pickle": True},
        ),
    ],
)
def test_only_what_is_given_is_a_hint(given: AdapterOptions, hints: dict[str, Any]) -> None:
    assert given.hints() == hints


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (AdapterOptions(alpha=["much"]), "--alpha much: expected a number"),
        (AdapterOptions(alpha=["q=much"]), "--alpha much: expected a number"),
        (
            AdapterOptions(alpha=["1", "2"]),
            "--alpha 1: expected one value for all layers, or LAYER=VALUE",
        ),
        (AdapterOptions(alpha=["q=1", "q=2"]), "--alpha q=2: expected .* each layer once"),
        (AdapterOptions(alpha=["=2"]), "--alpha =2: expected"),
        (AdapterOptions(enable_lora=["yes"]), "--enable-lora yes: expected flags, such as 1,0,1"),
        (AdapterOptions(enable_lora=[""]), "--enable-lora : expected flags"),
    ],
)
def test_what_cannot_be_read_is_refused(given: AdapterOptions, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        given.hints()


@pytest.mark.parametrize("to", [None, "peft", "no format"])
def test_a_component_is_of_what_is_read(to: str | None) -> None:
    given = AdapterOptions(component="unet")
    assert given.split(to) == (given, {})


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_or_of_what_is_written_where_that_has_components(to: str) -> None:
    reading, hints = AdapterOptions(component="unet", alpha=["1"]).split(to)
    assert (reading, hints) == (AdapterOptions(alpha=["1"]), {"component": "unet"})
    assert AdapterOptions().split(to) == (AdapterOptions(), {})


def test_the_base_of_a_program_is_its_graph() -> None:
    model = nn.Sequential(nn.Linear(3, 5))
    program = torch.export.export(model, (torch.randn(4, 7, 3),))
    assert base_of(ModelSource(model)) is model
    assert isinstance(base_of(ModelSource(program)), torch.fx.GraphModule)


@pytest.mark.parametrize("named", [True, False])
def test_lossy_names_are_resolved_against_the_base(
    named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model_of_the_hints.py").write_text(
        "from torch import nn\n\n\ndef make():\n"
        "    return nn.ModuleDict({'a_b': nn.ModuleDict({'c': nn.Linear(3, 5)})})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    updates = {"a_b.c": Update(torch.ones(2, 3), torch.ones(5, 2), 1.5)}
    file = tmp_path / "french.safetensors"
    lora_fx.save_adapter(Adapter("french", updates), file, format="kohya", component="unet")
    model = nn.ModuleDict({"a_b": nn.ModuleDict({"c": nn.Linear(3, 5)})})
    if named:
        adapter = AdapterOptions(base="model_of_the_hints:make").load(file)
    else:
        adapter = AdapterOptions(base="nowhere").load(file, model)
    assert list(adapter.updates) == ["a_b.c"]
    with pytest.raises(AdapterError, match="base="):
        AdapterOptions().load(file)


ONE, TWO = Path("a/french"), Path("b/french")


@pytest.mark.parametrize(
    ("paths", "names", "found"),
    [
        ([ONE], [], [(ONE, None)]),
        ([ONE, TWO], ["x", "y"], [(ONE, "x"), (TWO, "y")]),
        ([], ["x=a/french", "y=b/french"], [(ONE, "x"), (TWO, "y")]),
        ([ONE, TWO], ["y=b/french"], [(ONE, None), (TWO, "y")]),
        ([ONE, TWO], ["y=b/french", "x"], [(ONE, "x"), (TWO, "y")]),
        ([], ["x=a=b"], [(Path("a=b"), "x")]),
        ([], ["x=a/french", "y=a/french"], [(ONE, "x"), (ONE, "y")]),
    ],
)
def test_an_adapter_is_called_as_it_is_said(
    paths: list[Path], names: list[str], found: list[tuple[Path, str | None]]
) -> None:
    assert named(paths, names) == found


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x"], r"1 names \(x\) for 2 adapters of --adapter"),
        (["x", "y", "z"], "3 names"),
        (["x", "2nd"], "--name: .*'2nd', expected letters"),
        (["a b=a/french"], "--name: .*'a b'"),
        (["=a/french"], "--name: .*''"),
    ],
)
def test_a_name_that_is_none_or_of_no_adapter_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        named([ONE, TWO], names)
