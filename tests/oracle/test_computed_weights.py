"""Parameters that a model computes with before it multiplies: what PEFT does to them is W'."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx import (
    Adapter,
    Session,
    Update,
    export_adapter,
    fold,
    inject,
    load_adapter,
    to_onnx,
    trace,
)
from lora_fx.errors import AdapterError
from lora_fx.explanation import unmerged
from lora_fx.export import merge_onnx, slots_for
from lora_fx.testing import Computes, relative

Tensor = torch.Tensor
X = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(5))
OTHER = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(6))
EVERY = torch.arange(6) % 2 == 0
SPELLINGS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "equalized": lambda m, x: F.linear(x, m.w / 6**0.5, m.b * 0.1),
    "gain": lambda m, x: F.linear(x, m.w * m.gain),
    "cat": lambda m, x: F.linear(x, torch.cat([m.v, m.w])),
    "stack": lambda m, x: F.linear(x, torch.stack([m.w, m.v]).flatten(0, 1)),
    "masked": lambda m, x: F.linear(x, m.w * EVERY),
    "triangle": lambda m, x: x @ m.w.tril().T,
    "unit": lambda m, x: F.linear(F.normalize(x, dim=-1), F.normalize(m.w, dim=-1)),
    "cast": lambda m, x: F.linear(x, m.w.double().float()),
    "standardised": lambda m, x: F.linear(
        x, (m.w - m.w.mean(1, keepdim=True)) / m.w.std(1)[:, None]
    ),
    "written out": lambda m, x: (x[..., None, :] * m.w).sum(-1),
    "sum with a factor": lambda m, x: torch.addmm(m.b, x.reshape(-1, 6), m.w.T, alpha=2.0),
    "both ways": lambda m, x: torch.tanh(F.linear(x, m.w)) @ m.w,
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    inner = Computes(SPELLINGS[name], {"w": (5, 6), "v": (5, 6), "b": (5,), "gain": (5, 1)})
    return Computes(lambda m, x: torch.tanh(m.layer(x)), layer=inner).eval().requires_grad_(False)


def tuned(model: nn.Module, path: Path, target: str = "layer.w") -> nn.Module:
    """PEFT's own, of a saved adapter."""
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=[target])
    owner = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for name, parameter in owner.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, 0, 0.5)
    owner.save_pretrained(path)
    return owner


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
@pytest.mark.parametrize("name", SPELLINGS)
@torch.no_grad()
def test_it_is_the_parameter_that_is_changed(name: str, frontend: str, tmp_path: Path) -> None:
    model = model_of(name)
    wanted = tuned(model, tmp_path / "french")(OTHER)
    gm = trace(model, (X,), dynamic_shapes=({0: "batch"},), frontend=frontend)
    injected = inject(gm, load_adapter(tmp_path / "french", base=model))
    folded = fold(injected)
    for graph in (injected, folded):
        assert relative(graph(OTHER), wanted) <= 1e-5
    assert relative(gm(OTHER), wanted) > 1e-2
    assert unmerged(folded) == {}


@torch.no_grad()
def test_a_parameter_that_is_called_weight_is_no_layer_s_then(tmp_path: Path) -> None:
    """A head that normalises its weight, which is what a layer's own is called."""
    torch.manual_seed(0)
    head = Computes(lambda m, x: F.linear(x, F.normalize(m.weight)), {"weight": (5, 6)})
    model = Computes(lambda m, x: torch.tanh(m.head(x)), head=head).eval().requires_grad_(False)
    wanted = tuned(model, tmp_path / "french", "head.weight")(X)
    gm = trace(model, (X,))
    injected = inject(gm, load_adapter(tmp_path / "french", base=model))
    assert relative(injected(X), wanted) <= 1e-5
    assert relative(fold(injected)(X), wanted) <= 1e-5
    assert relative(gm(X), wanted) > 1e-2


@pytest.mark.parametrize("name", ["gain", "cat"])
@torch.no_grad()
def test_it_is_merged_and_swapped(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    wanted = tuned(model, tmp_path / "french")(OTHER)
    adapter = load_adapter(tmp_path / "french", base=model)
    gm = trace(model, (X,), dynamic_shapes=({0: "batch"},))
    assert slots_for(gm, [adapter]) == {"layer.w": "factors"}
    merged, model_file = tmp_path / "merged.onnx", tmp_path / "model.onnx"
    assert to_onnx(fold(inject(gm, adapter)), merged).mode == "merged"
    to_onnx(gm, model_file, adapters="input", slots={"layer.w": "factors"})
    export_adapter(adapter, model_file, tmp_path / "french.onnx_adapter")
    merge_onnx(model_file, tmp_path / "french.onnx_adapter", tmp_path / "again.onnx")
    swapped = Session(model_file)
    runs = [
        Session(merged).run({"x": OTHER}),
        swapped.run({"x": OTHER}, adapter=tmp_path / "french.onnx_adapter"),
        Session(tmp_path / "again.onnx").run({"x": OTHER}),
    ]
    for run in runs:
        assert relative(torch.as_tensor(*run.values()), wanted) <= 1e-5
    (base,) = swapped.run({"x": OTHER}).values()
    assert relative(torch.as_tensor(base), model(OTHER)) <= 1e-5
    assert relative(torch.as_tensor(base), wanted) > 1e-2


@torch.no_grad()
def test_a_module_that_is_not_called_lends_its_weight(tmp_path: Path) -> None:
    """Two layers that are one call, and an adapter of one of them, as its parameter is called."""
    torch.manual_seed(0)

    def both(m: Any, x: Tensor) -> Tensor:
        return torch.tanh(
            F.linear(x, torch.cat([m.q.weight, m.k.weight]), torch.cat([m.q.bias, m.k.bias]))
        )

    model = Computes(both, q=nn.Linear(6, 5), k=nn.Linear(6, 3)).eval().requires_grad_(False)
    mine = Update(torch.randn(2, 6), torch.randn(3, 2), 0.7)
    changed = copy.deepcopy(model)
    changed.get_parameter("k.weight").add_(mine.delta())
    gm = trace(model, (X,))
    folded = fold(inject(gm, Adapter("french", {"k.weight": mine})))
    assert relative(folded(X), changed(X)) <= 1e-5
    assert relative(gm(X), changed(X)) > 1e-2
    assert to_onnx(folded, tmp_path / "m.onnx").mode == "merged"


def test_what_no_weight_says_is_refused() -> None:
    gm = trace(model_of("gain"), (X,))
    biased = Update(torch.randn(2, 6), torch.randn(5, 2), 1.0, bias=torch.ones(5))
    with pytest.raises(AdapterError, match=r"layer\.w: a bias .* a parameter that no layer reads"):
        inject(gm, Adapter("french", {"layer.w": biased}))
    with pytest.raises(
        AdapterError, match=r"made for a parameter \(5, 4\), the model's is \(5, 6\)"
    ):
        inject(
            gm, Adapter("french", {"layer.w": Update(torch.randn(2, 4), torch.randn(5, 2), 1.0)})
        )


@torch.no_grad()
def test_a_cell_has_parameters_that_are_read_and_a_kept_module_says_so() -> None:
    torch.manual_seed(0)
    model = Computes(lambda m, x: m.cell(x[:, 0])[0], cell=nn.LSTMCell(6, 5)).eval()
    mine = Update(torch.randn(2, 6), torch.randn(20, 2), 0.7)
    changed = copy.deepcopy(model)
    changed.get_parameter("cell.weight_ih").add_(mine.delta())
    adapter = Adapter("french", {"cell.weight_ih": mine})
    assert relative(fold(inject(trace(model, (X,)), adapter))(X), changed(X)) <= 1e-5
    assert relative(model(X), changed(X)) > 1e-2
    whole = trace(model, (X,), frontend="symbolic")
    for name in ("cell.weight_ih", "cell"):
        with pytest.raises(
            AdapterError, match=r"symbolic tracing keeps whole.*with example inputs"
        ):
            inject(whole, Adapter("french", {name: mine}))


class Standardised(nn.Conv2d):
    """As in BiT and NFNets."""

    def forward(self, x: Tensor) -> Tensor:
        apart = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, apart / apart.std((1, 2, 3), keepdim=True), self.bias)


def test_beside_a_kernel_that_its_own_code_computes_what_peft_wraps_is_folded(
    tmp_path: Path,
) -> None:
    """PEFT's branch stands beside the computed kernel, which an update of the stored one is not."""
    torch.manual_seed(0)
    base, x = nn.Sequential(Standardised(3, 5, 2), nn.Tanh()).eval(), torch.randn(4, 3, 6, 7)
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    owner = peft.get_peft_model(copy.deepcopy(base), config).eval()
    owner.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    with pytest.raises(
        AdapterError, match=r"own code computes it.*trace the model that PEFT wraps"
    ):
        inject(trace(base, (x,)), adapter)
    folded = fold(trace(owner, (x,)))
    assert unmerged(folded) == {}
    with torch.no_grad():
        assert relative(folded(x), owner(x)) < 1e-5
        assert relative(base(x), owner(x)) > 1e-2
