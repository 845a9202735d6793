"""The metadata of a diffusers file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_fx.errors import AdapterError
from lora_fx.formats.diffusers_config import config_of, fields_in, is_bare
from lora_fx.formats.peft_file import METADATA

FILE = Path("a.safetensors")


def fields(component: str, **more: Any) -> dict[str, Any]:
    own = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **more}
    return {f"{component}.{key}" if component else key: value for key, value in own.items()}


def test_fields_are_in_the_metadata_or_nowhere(tmp_path: Path) -> None:
    for name, metadata in (("a", {METADATA: json.dumps(fields("unet"))}), ("b", None)):
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors", metadata=metadata)
    assert fields_in(tmp_path / "a.safetensors") == fields("unet")
    assert fields_in(tmp_path / "b.safetensors") is None
    save_file({"x": torch.ones(1)}, tmp_path / "c.safetensors", metadata={METADATA: "["})
    with pytest.raises(AdapterError, match=f"{METADATA}: not strict JSON"):
        fields_in(tmp_path / "c.safetensors")


def test_a_model_by_itself_has_no_component() -> None:
    assert [is_bare(found) for found in (fields(""), fields("unet"), None)] == [True, False, False]


@pytest.mark.parametrize("component", ["unet", "transformer_2", ""])
def test_each_component_has_its_config(component: str) -> None:
    more = fields("other", r=5) if component else {}
    found = config_of(FILE, fields(component) | more, component, "LORA", True)
    assert found is not None
    assert (found.r, found.alpha) == (2, 3)
    assert config_of(FILE, None, component, "LORA", True) is None


@pytest.mark.parametrize(
    ("found", "kind", "message"),
    [
        (fields("transformer"), "LORA", f"{METADATA} has no field of unet, whose tensors it has"),
        (fields("unet", lora_alpha="3"), "LORA", "of unet: lora_alpha is '3'"),
        (fields("unet"), "LOKR", "peft_type is 'LORA'"),
        (fields("unet", kasa_config={}), "LORA", "kasa_config"),
    ],
)
def test_a_config_that_is_not_of_the_tensors_is_refused(
    found: dict[str, Any], kind: str, message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        config_of(FILE, found, "unet", kind, True)
