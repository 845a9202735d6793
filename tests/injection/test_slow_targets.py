"""A regex that cannot be run: the keys of a file say what is adapted, and the file is used."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lora_fx
from lora_fx.errors import AdapterError, AdapterWarning, LoraFxError
from lora_fx.testing import relative

HANGS = "(?:(?:l|la|lay|layers|.|a|y|e|r|s)*)+[AB]"


class Deep(nn.Module):
    """A layer at a path of 209 characters."""

    def __init__(self, depth: int = 29) -> None:
        super().__init__()
        self.layers = Deep(depth - 1) if depth else nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layers(x)
        return found


PATH = ".".join(["layers"] * 30)


def written(directory: Path, **fields: Any) -> tuple[Path, torch.Tensor]:
    """An adapter of rank 2 and scale 2, and what it adds to the weight."""
    torch.manual_seed(0)
    down, up = torch.randn(2, 5), torch.randn(3, 2)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layers"], **fields}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    key = f"base_model.model.{PATH}"
    tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory, 2 * up @ down


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": HANGS},
        {"target_modules": "a|" * 40_000},
        {"target_modules": ".*", "exclude_modules": HANGS.replace("B", "C")},
        {"layers_to_transform": [1], "layers_pattern": HANGS},
    ],
)
def test_it_costs_the_check_of_completeness_and_no_more(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    path, added = written(tmp_path, **fields)
    base, x = Deep().eval(), torch.randn(4, 7, 5)
    begin = time.process_time()
    adapter = lora_fx.load_adapter(path)
    with pytest.warns(AdapterWarning, match=r"not done with .* layers that it targets was not"):
        found = lora_fx.inject(lora_fx.trace(base, (x,)), adapter)(x)
    assert time.process_time() - begin < 3
    assert relative(found, base(x) + x @ added.T) < 1e-5
    assert relative(found, base(x)) > 0.1


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_where_it_decides_a_number_the_file_is_refused(field: str, tmp_path: Path) -> None:
    path, _ = written(tmp_path, **{field: {HANGS: 2}})
    begin = time.process_time()
    with pytest.raises(AdapterError, match=r"the regex .* is not done with 'layers"):
        lora_fx.load_adapter(path)
    assert time.process_time() - begin < 2


def test_where_it_decides_what_is_trained_it_is_refused() -> None:
    gm = lora_fx.trace(Deep().eval(), (torch.randn(4, 5),))
    with pytest.raises(LoraFxError, match=r"the regex .* is not done with 'layers"):
        lora_fx.inject(gm, lora_fx.LoraConfig(r=2, target_modules=HANGS))
