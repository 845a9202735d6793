"""One exported file, every later adapter: PEFT's and loralib's, of many kinds and ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import loralib
import peft
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import AdapterError, load_adapter, trace
from lora_fx.testing import relative, zoo

pytestmark = [
    # PEFT says what it does about Conv1D, and loralib's adapter has no PEFT owner.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]
ADAPTERS: dict[str, Any] = {
    "lora_2": lambda t: peft.LoraConfig(r=2, lora_alpha=3, target_modules=t),
    "rslora_8": lambda t: peft.LoraConfig(r=8, lora_alpha=3, use_rslora=True, target_modules=t),
    "some_layers": lambda t: peft.LoraConfig(r=5, lora_alpha=9, target_modules=t[-1:]),
    "adalora_3": lambda t: peft.AdaLoraConfig(
        init_r=3, target_r=2, lora_alpha=6, total_step=10, target_modules=t
    ),
    "vera_7": lambda t: peft.VeraConfig(r=7, projection_prng_key=3, target_modules=t),
    "loha_3": lambda t: peft.LoHaConfig(r=3, alpha=4, target_modules=t),
    "dora_4": lambda t: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=t),
    "ia3": lambda t: peft.IA3Config(target_modules=t, feedforward_modules=t[-1:]),
}
VECTORS = ("dora_4", "ia3")
SPREAD = {"lora_E": 1.0, "lora_": 0.15, "hada_": 0.4, "vera_lambda": 0.7}


@pytest.fixture(scope="module", params=["llama", "bert"])
def exported(request: Any, tmp_path_factory: Any) -> tuple[Any, Path, Path]:
    """A model exported twice, with vectors and without, before any adapter is known."""
    case, gm = zoo(request.param)
    plain, vectors = (tmp_path_factory.mktemp(n) / "model.onnx" for n in ("plain", "vectors"))
    lora_fx.to_onnx(gm, plain, adapters="input")
    lora_fx.to_onnx(gm, vectors, adapters="input", vectors=True)
    return case, plain, vectors


def saved(case: Any, kind: str, path: Path) -> Any:
    owner = peft.get_peft_model(copy.deepcopy(case.model), ADAPTERS[kind](case.targets))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in owner.named_parameters():
            if parameter.requires_grad and ("magnitude" in name or "ia3" in name):
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
            elif parameter.requires_grad:
                parameter.normal_(0.0, next(s for part, s in SPREAD.items() if part in name))
    owner.save_pretrained(path)
    return owner.eval()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_one_file_takes_every_kind_that_peft_saves(
    exported: tuple[Any, Path, Path], kind: str, tmp_path: Path
) -> None:
    case, plain, vectors = exported
    owner = saved(case, kind, tmp_path / "a")
    adapter = load_adapter(tmp_path / "a", base=case.model)
    file = tmp_path / "a.onnx_adapter"
    if kind in VECTORS:
        with pytest.raises(AdapterError, match="vectors=True"):
            lora_fx.export_adapter(adapter, plain, file)
        assert not file.exists()
    model = vectors if kind in VECTORS else plain
    lora_fx.export_adapter(adapter, model, file)
    session = lora_fx.Session(model, threads=1)
    found, alone = (session.run(case.others, a) for a in (file, None))
    with torch.no_grad():
        wanted = [t for t in owner(**case.others).to_tuple() if isinstance(t, torch.Tensor)]
    found_tensors = [torch.from_numpy(value) for value in found.values()][: len(wanted)]
    base = [torch.from_numpy(value) for value in alone.values()][: len(wanted)]
    assert relative(found_tensors, wanted) <= 1e-5
    assert relative(base, wanted) > 1e-2


class Fused(nn.Module):
    """Query, key and value in one projection."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.qkv, self.out = projection, nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        mixed = torch.softmax(query @ key.transpose(-1, -2), dim=-1) @ value
        y: torch.Tensor = self.out(mixed)
        return y


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A base, which is only read, and its file."""
    torch.manual_seed(0)
    base, path = Fused(nn.Linear(5, 18)).eval(), tmp_path_factory.mktemp("fused") / "m.onnx"
    gm = trace(base, (torch.randn(3, 7, 5),), dynamic_shapes=({0: "batch", 1: "length"},))
    lora_fx.to_onnx(gm, path, adapters="input")
    return base, path


@pytest.mark.parametrize("enable", [[True, False, True], [False, True, False], [True] * 3])
@pytest.mark.parametrize("rank", [2, 5])
def test_one_file_takes_fused_adapters_of_loralib(
    fused: tuple[nn.Module, Path], enable: list[bool], rank: int, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    (base, model), other = fused, torch.randn(2, 4, 5)
    layer = loralib.MergedLinear(
        5, 18, r=rank, lora_alpha=3, enable_lora=enable, merge_weights=False
    )
    owner = Fused(layer).eval()
    owner.load_state_dict(base.state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in owner.named_parameters():
            if "lora_" in name:
                parameter.normal_()
        wanted = owner(other)
    torch.save(loralib.lora_state_dict(owner), tmp_path / "a.pt")
    adapter = load_adapter(
        tmp_path / "a.pt",
        format="loralib",
        base=base,
        alpha=3,
        enable_lora=enable,
        allow_pickle=True,
    )
    lora_fx.export_adapter(adapter, model, tmp_path / "a.onnx_adapter")
    session = lora_fx.Session(model, threads=1)
    (found,) = session.run({"x": other}, tmp_path / "a.onnx_adapter").values()
    (alone,) = session.run({"x": other}).values()
    assert relative(torch.from_numpy(found), wanted) <= 1e-5
    assert relative(torch.from_numpy(alone), wanted) > 1e-2
