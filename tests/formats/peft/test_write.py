"""Writing PEFT's directories, PEFT being the reader and oracle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.errors import AdapterError
from lora_fx.formats import load_adapter, save_adapter

pytestmark = [
    # PEFT 0.21.2 asks transformers 5.23 for an attribute by the name it had before.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT turns its own default of fan_in_fan_out around when it meets a Conv1D, and says so.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    # PEFT takes the one-dimensional lora_B.bias for a damaged matrix.
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape"),
]

PATTERNS = {
    "rank_pattern": {"layers.1": 3, "block.fc": 1, "^fc": 4},
    "alpha_pattern": {"fc": 7, r"layers\.\d": 0.5},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("mlp", {"target_modules": ["fc"]}),
    "all-linear rslora": ("mlp", {"target_modules": "all-linear", "use_rslora": True, "r": 3}),
    "patterns": ("mlp", {"target_modules": "all-linear", **PATTERNS}),
    "exclude": ("mlp", {"target_modules": "all-linear", "exclude_modules": ["layers.1"]}),
    "only the outer of two fc": ("mlp", {"target_modules": "fc"}),
    "lora_bias": ("mlp", {"target_modules": ["layers.0"], "lora_bias": True}),
    "bias lora_only": ("mlp", {"target_modules": "fc", "bias": "lora_only"}),
    "bias all": ("mlp", {"bias": "all", "modules_to_save": ["classifier"]}),
    "modules_to_save": ("mlp", {"modules_to_save": ["classifier", "norm"]}),
    "bert": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "bias all with a nested module": (
        "bert",
        {"target_modules": ["query"], "bias": "all", "modules_to_save": ["pooler"]},
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_rslora": True}),
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]}),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same_from_what_is_written(
    lab: Any, tmp_path: Path, case: str, dtype: torch.dtype
) -> None:
    kind, options = CASES[case]
    original = lab.write(kind, dtype, **options)
    save_adapter(load_adapter(original), tmp_path / "written")
    expected = lab.run(kind, lab.read(kind, original))
    assert torch.equal(lab.run(kind, lab.read(kind, tmp_path / "written")), expected)
    assert not torch.allclose(lab.run(kind, lab.base(kind)), expected, rtol=1e-2)


def update(
    out_size: int, in_size: int, rank: int, scale: float = 1.5, kind: str = "lora"
) -> Update:
    return Update(torch.randn(rank, in_size), torch.randn(out_size, rank), scale, kind)


def test_a_bias_of_some_updates_is_zero_for_the_others(lab: Any, tmp_path: Path) -> None:
    bias = torch.randn(5)
    with_bias = dataclasses.replace(update(5, 3, 2), bias=bias)
    adapter = Adapter("a", {"fc": with_bias, "layers.0": update(7, 5, 2)})
    save_adapter(adapter, tmp_path / "written")
    found = load_adapter(tmp_path / "written").updates
    assert found["fc"].bias is not None
    assert torch.equal(found["fc"].bias, bias)
    assert found["layers.0"].bias is not None
    assert not found["layers.0"].bias.any()
    lab.read("mlp", tmp_path / "written")


def test_trained_and_tied_tensors_are_written(tmp_path: Path) -> None:
    down, up = torch.nn.Parameter(torch.randn(2, 3)), torch.randn(2, 5).T
    tied = Update(down, up, 1.0)
    save_adapter(Adapter("a", {"p": tied, "q": tied}), tmp_path / "written")
    found = load_adapter(tmp_path / "written").updates
    assert torch.equal(found["p"].down, down.detach())
    assert torch.equal(found["q"].up, up)


REFUSED = {
    "no update": (Adapter("empty", {}), "empty has no update"),
    "parameter of the model itself": (
        Adapter("a", {"fc": update(5, 3, 2)}, {"scale": torch.ones(3)}),
        "parameter of the model itself.*: scale",
    ),
    "adapted and replaced": (
        Adapter("a", {"fc": update(5, 3, 2)}, {"fc.gain": torch.ones(5)}),
        "both adapt and replace a module: fc",
    ),
    "adapted inside of what is replaced": (
        Adapter("a", {"block.fc": update(5, 3, 2)}, {"block.scale": torch.ones(5)}),
        r"both adapt and replace a module: block\.fc beside the replaced block",
    ),
    "not finite": (
        Adapter("a", {"fc": Update(torch.full((2, 3), torch.nan), torch.ones(5, 2), 1.0)}),
        r"fc\.lora_A\.weight' holds NaN",
    ),
    "infinite scale": (
        Adapter("a", {"fc": update(5, 3, 2, scale=float("inf"))}),
        "scales that are no finite number: fc",
    ),
    "integers": (
        Adapter("a", {"fc": update(5, 3, 2)}, {"bn.count": torch.ones(1, dtype=torch.int64)}),
        r"bn\.count' has dtype torch\.int64",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_express_is_refused(tmp_path: Path, case: str) -> None:
    adapter, message = REFUSED[case]
    with pytest.raises(AdapterError, match=message):
        save_adapter(adapter, tmp_path / "written")
    assert list(tmp_path.iterdir()) == []


def test_modules_inside_of_a_saved_module_are_saved_with_it(tmp_path: Path) -> None:
    replaced = {"head.scale": torch.ones(2), "head.fc.weight": torch.ones(2, 3)}
    save_adapter(Adapter("a", {"fc": update(5, 3, 2)}, replaced), tmp_path / "written")
    config = json.loads((tmp_path / "written" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["head"]
    assert set(load_adapter(tmp_path / "written").replacements) == set(replaced)
