"""Adapters as plain LoRA, beside PEFT's own conversion, and swapped in onnxruntime."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lora_fx
from lora_fx import Adapter, inject, load_adapter, save_adapter, trace
from lora_fx.adapters.updates import Update
from lora_fx.testing import Two, relative

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

KINDS: dict[str, Any] = {
    "loha": lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=["wide", "narrow"]),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=["wide", "narrow"]),
    "vera": lambda: peft.VeraConfig(r=3, target_modules=["wide", "narrow"]),
    "delora": lambda: peft.DeloraConfig(r=3, target_modules=["wide", "narrow"]),
}
X = torch.randn(4, 7, 8, generator=torch.Generator().manual_seed(5))


def base() -> Any:
    torch.manual_seed(0)
    return Two(torch.nn.Linear(8, 12), torch.nn.Linear(12, 6, bias=False)).eval()


def by_peft(config: Any, directory: Path) -> Any:
    """PEFT's model with random values, saved."""
    torch.manual_seed(1)
    model = peft.get_peft_model(base(), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.5)
    model.save_pretrained(str(directory))
    return model


@pytest.mark.parametrize("cut", [{"rank": 2}, {"energy": 0.9}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_become_what_peft_converts_them_to(
    kind: str, cut: dict[str, Any], tmp_path: Path
) -> None:
    model = by_peft(KINDS[kind](), tmp_path / "french")
    _, tensors = peft.convert_to_lora(model, next(iter(cut.values())))
    lora, layers, _ = load_adapter(tmp_path / "french", base=base()).to_lora(**cut, base=base())
    for path, update in lora.updates.items():
        start = f"base_model.model.{path}.lora_"
        theirs = tensors[f"{start}B.weight"] @ tensors[f"{start}A.weight"]
        assert isinstance(update, Update)
        assert update.rank <= len(tensors[f"{start}A.weight"])
        assert relative(update.delta(), theirs) <= 1e-5
        assert relative(1.1 * update.delta(), theirs) > 1e-2
        whole = model.base_model.model.get_submodule(path).get_delta_weight("default").detach()
        told = float((whole - theirs).norm() / whole.norm())
        assert layers[path].error == pytest.approx(told, rel=1e-4, abs=1e-6)


def test_peft_loads_what_was_converted(tmp_path: Path) -> None:
    by_peft(KINDS["lokr"](), tmp_path / "french")
    lora = load_adapter(tmp_path / "french", base=base()).to_lora(energy=0.9, base=base())
    save_adapter(lora.adapter, tmp_path / "lora")
    assert {layer.rank for layer in lora.layers.values()} != {1}
    loaded = peft.PeftModel.from_pretrained(base(), str(tmp_path / "lora")).eval()
    with torch.no_grad():
        wanted = loaded(X)
        assert relative(inject(trace(base(), (X,)), lora.adapter)(X), wanted) <= 1e-6
        assert relative(base()(X), wanted) > 1e-2


class TestSwapped:
    """What made weights anew goes into slots of factors once it is LoRA."""

    def test_kinds_without_factors_swap_in_one_file(self, tmp_path: Path) -> None:
        gm = trace(base(), (X,), dynamic_shapes=({0: "batch", 1: "length"},))
        adapters = {}
        for kind in ("lokr", "loha"):
            by_peft(KINDS[kind](), tmp_path / kind)
            adapters[kind] = load_adapter(tmp_path / kind, base=base())
        lora = {kind: a.to_lora(energy=1.0, base=base()).adapter for kind, a in adapters.items()}
        path = tmp_path / "model.onnx"
        lora_fx.to_onnx(gm, path, adapters="input", slots="all-linear")
        with pytest.raises(lora_fx.AdapterError, match="makes the weight anew"):
            lora_fx.export_adapter(adapters["lokr"], path, tmp_path / "a.onnx_adapter")
        session = lora_fx.Session(path)
        for kind, converted in lora.items():
            file = tmp_path / f"{kind}.onnx_adapter"
            lora_fx.export_adapter(converted, path, file)
            (outputs,) = session.run({"x": X}, adapter=file).values()
            with torch.no_grad():
                wanted = inject(gm, adapters[kind])(X)
                assert relative(torch.from_numpy(outputs), wanted) <= 1e-5
                assert relative(gm(X), wanted) > 1e-2

    def test_a_loss_is_told(self, tmp_path: Path) -> None:
        by_peft(KINDS["lokr"](), tmp_path / "lokr")
        adapter = load_adapter(tmp_path / "lokr", base=base())
        found = adapter.to_lora(1, base=copy.deepcopy(base()))
        assert all(0.05 < error < 1 for error in found.errors.values())
        assert isinstance(found.adapter, Adapter)
