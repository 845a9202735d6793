"""PEFT's tensors in one file, PEFT being writer, reader and oracle."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.save_and_load import set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.errors import AdapterError
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.formats.peft import METADATA
from lora_fx.testing import config_in, fits, same_adapter

pytestmark = [
    # PEFT 0.21.2 asks transformers 5.23 for an attribute by the name it had before.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT takes the one-dimensional lora_B.bias for a damaged matrix.
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape"),
]

RAGGED = {"target_modules": "all-linear", "rank_pattern": {"layers.1": 3, "block.fc": 1}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"target_modules": ["fc"], "lora_alpha": 3}, {"alpha": 3}),
    "rank": ({"target_modules": ["fc"], "lora_alpha": 5, "r": 3}, {"alpha": 5, "r": 3}),
    "rslora": ({"use_rslora": True, "lora_alpha": 3}, {"alpha": 3, "use_rslora": True}),
    "ranks": ({**RAGGED, "lora_alpha": 7}, {"alpha": 7}),
    "ranks of rslora": ({**RAGGED, "use_rslora": True}, {"alpha": 3, "use_rslora": True}),
    "lora_bias": ({"target_modules": ["layers.0"], "lora_bias": True}, {"alpha": 3}),
}


def alone(lab: Any, options: dict[str, Any]) -> tuple[Path, Path]:
    """PEFT's directory, and a copy of its tensors away from the config."""
    directory = lab.write(**options)
    file = lab.root / "alone.safetensors"
    shutil.copy(directory / "adapter_model.safetensors", file)
    return directory, file


@pytest.mark.parametrize("case", CASES)
def test_hints_take_the_place_of_the_config(lab: Any, case: str) -> None:
    options, hints = CASES[case]
    directory, file = alone(lab, options)
    expected = load_adapter(directory)
    found = load_adapter(file, **hints)
    same_adapter(found, expected)
    assert {u.kind for u in found.updates.values()} == {u.kind for u in expected.updates.values()}
    louder = load_adapter(file, **{**hints, "alpha": 1.1 * hints["alpha"]})
    with pytest.raises(AssertionError):
        same_adapter(louder, expected)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_peft(lab: Any, case: str) -> None:
    options, hints = CASES[case]
    directory, file = alone(lab, options)
    expected = lab.run("mlp", lab.read("mlp", directory))
    x = torch.linspace(-1, 1, 84).reshape(4, 7, 3)
    fits(load_adapter(file, **hints), lab.base("mlp"), x, expected)


def test_the_file_in_peft_s_directory_has_its_config_beside_it(lab: Any) -> None:
    directory = lab.write(**RAGGED, modules_to_save=["classifier"])
    same_adapter(load_adapter(directory / "adapter_model.safetensors"), load_adapter(directory))
    with pytest.raises(AdapterError, match=r"adapter_config\.json: says what alpha"):
        load_adapter(directory / "adapter_model.safetensors", alpha=3)


def test_a_config_beside_another_file_is_not_its_own(lab: Any) -> None:
    directory = lab.write()
    (directory / "adapter_model.safetensors").rename(directory / "step_500.safetensors")
    with pytest.raises(AdapterError, match=r"step_500\.safetensors: holds no config.*alpha="):
        load_adapter(directory / "step_500.safetensors")


WRITTEN: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["fc"]},
    "ranks": RAGGED,
    "rslora": {**RAGGED, "use_rslora": True},
    "lora_bias": {"target_modules": ["layers.0"], "lora_bias": True},
    "bias": {"target_modules": "fc", "bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["classifier", "norm"]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", WRITTEN)
def test_load_save_load_keeps_every_bit(
    lab: Any, tmp_path: Path, case: str, dtype: torch.dtype
) -> None:
    first = load_adapter(lab.write(dtype=dtype, **WRITTEN[case]), name="same")
    save_adapter(first, tmp_path / "a.safetensors", format="peft_file")
    second = load_adapter(tmp_path / "a.safetensors", name="same")
    same_adapter(second, first)
    assert str(second) == str(first)
    save_adapter(second, tmp_path / "b.safetensors", format="peft_file")
    written = [(tmp_path / name).read_bytes() for name in ("a.safetensors", "b.safetensors")]
    assert written[0] == written[1]


@pytest.mark.parametrize("case", ["plain", "ranks", "rslora", "lora_bias"])
def test_peft_computes_the_same_from_what_is_written(lab: Any, tmp_path: Path, case: str) -> None:
    original = lab.write(**WRITTEN[case])
    file = tmp_path / "a.safetensors"
    save_adapter(load_adapter(original), file, format="peft_file")
    model = peft.get_peft_model(lab.base("mlp"), peft.LoraConfig(**config_in(file))).eval()
    missing: Any = set_peft_model_state_dict(model, load_file(file))
    assert not missing.unexpected_keys
    expected = lab.run("mlp", lab.read("mlp", original))
    assert torch.equal(lab.run("mlp", model), expected)
    assert not torch.allclose(lab.run("mlp", lab.base("mlp")), expected, rtol=1e-2)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no hint": ({}, r"holds no config, so the scale is unknown; pass alpha="),
    "rank alone": ({"r": 2}, r"holds no config, so the scale is unknown; pass alpha="),
    "alpha that is no number": ({"alpha": "3"}, "alpha is '3', expected a finite number"),
    "alpha by path": ({"alpha": {"fc": 3}}, "alpha is .*, expected a finite number"),
    "rank that is no number": ({"alpha": 3, "r": 0}, "r is 0, expected a positive integer"),
    "another rank": ({"alpha": 3, "r": 4}, r"fc: lora_A \(2, .\) .* of rank 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_hints_that_do_not_fit_are_refused(lab: Any, case: str) -> None:
    hints, message = REFUSED[case]
    _, file = alone(lab, {"target_modules": ["fc"]})
    with pytest.raises(AdapterError, match=message):
        load_adapter(file, **hints)


def test_a_tensor_that_hints_give_no_use_is_named(lab: Any) -> None:
    _, file = alone(lab, {"modules_to_save": ["classifier"]})
    with pytest.raises(AdapterError, match=r"2 tensors .* no known use: .*classifier\.bias"):
        load_adapter(file, alpha=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty, expected a JSON object"),
        ("[]", "holds a list"),
        ('{"peft_type": "LORA"}', "lora_alpha is missing"),
        ('{"peft_type": "LORA", "lora_alpha": 3, "use_qalora": true}', "use_qalora is True"),
        ('{"peft_type": "LOHA", "lora_alpha": 3}', "lora_alpha is 3, an unknown field"),
        ('{"peft_type": "HRA", "r": 3}', "peft_type is 'HRA'"),
    ],
)
def test_a_bad_config_in_the_file_is_refused(lab: Any, text: str, message: str) -> None:
    _, file = alone(lab, {})
    save_file(load_file(file), file, metadata={METADATA: text})
    with pytest.raises(AdapterError, match=rf"alone\.safetensors: {METADATA}: .*{message}"):
        load_adapter(file)


def test_a_pickle_holds_no_config(lab: Any, tmp_path: Path) -> None:
    adapter = Adapter("a", {"fc": Update(torch.ones(2, 3), torch.ones(5, 2), 1.5)})
    with pytest.raises(AdapterError, match=r"ends in \.safetensors"):
        save_adapter(adapter, tmp_path / "a.bin", format="peft_file")
    _, file = alone(lab, {"target_modules": ["fc"]})
    torch.save(load_file(file), tmp_path / "a.bin")
    found = load_adapter(tmp_path / "a.bin", alpha=3, allow_pickle=True)
    assert found.updates["fc"].scale == 1.5
