"""A parameter that several modules multiply with, and one of them holds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx import (
    Adapter,
    LoraConfig,
    Session,
    Update,
    adapter_from,
    export_adapter,
    fold,
    inject,
    to_onnx,
    trace,
)
from lora_fx.kinds import full as dense
from lora_fx.layers.sites import sites
from lora_fx.testing import relative

X = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(1))


class Child(nn.Module):
    """Multiplies with what it is given."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight[:5])


class Own(Child):
    """The same beside a weight of its own, of the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight) - torch.cos(F.linear(x, self.w))


class Holder(nn.Module):
    def __init__(self, child: nn.Module, name: str = "w", itself: bool = True) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(5, 3)))
        self.name, self.itself = name, itself
        self.child, self.other = child, Child()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = getattr(self, self.name)
        y = torch.tanh(self.child(x, weight)) + torch.sigmoid(self.other(x.sin(), weight))
        return y + torch.sin(x @ weight.t()) if self.itself else y


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Holder(Child())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.block(x))


MODELS: dict[str, tuple[Any, str]] = {
    "read by itself too": (lambda: Holder(Child()), "w"),
    "read by others alone": (lambda: Holder(Child(), itself=False), "w"),
    "called weight": (lambda: Holder(Child(), "weight"), "weight"),
    "read beside an own one": (lambda: Holder(Own()), "w"),
    "further down": (Deep, "block.w"),
}
CASES = [(name, frontend) for name in MODELS for frontend in ("export", "symbolic")]


def update(scale: float = 1.5) -> Update:
    make = torch.Generator().manual_seed(3)
    return Update(torch.randn(2, 3, generator=make), torch.randn(5, 2, generator=make), scale)


def made(name: str, frontend: str = "export") -> tuple[Any, str, torch.Tensor, nn.Module]:
    """A graph, the path of the parameter, what the model gives with W' there, and the model."""
    torch.manual_seed(0)
    make, path = MODELS[name]
    model = make().eval().requires_grad_(False)
    changed = copy.deepcopy(model)
    changed.get_parameter(path).add_(update().delta())
    return trace(model, (X,), frontend=frontend), path, changed(X), model


@pytest.mark.parametrize(("name", "frontend"), CASES)
def test_an_update_acts_wherever_the_parameter_is_read(name: str, frontend: str) -> None:
    gm, path, wanted, _ = made(name, frontend)
    injected = inject(gm, Adapter("french", {path: update()}))
    for graph in (injected, fold(injected)):
        assert relative(graph(X), wanted) <= 1e-5
    for control in (gm, inject(gm, Adapter("french", {path: update(1.35)}))):
        assert relative(control(X), wanted) > 1e-2
    assert adapter_from(injected).updates.keys() == {path}
    paths = {site.path for site in sites(gm)}
    assert paths == ({"w", "child.w"} if name == "read beside an own one" else {path})


@pytest.mark.parametrize("name", MODELS)
def test_a_full_difference_and_a_fresh_adapter_too(name: str) -> None:
    gm, path, wanted, _ = made(name)
    full = dense.read({"diff": update().delta()}, {})
    assert relative(fold(inject(gm, Adapter("full", {path: full})))(X), wanted) <= 1e-5
    assert relative(gm(X), wanted) > 1e-2
    fresh = inject(gm, LoraConfig(r=2, target_modules=[path]))
    trained = [p for p in fresh.parameters() if p.requires_grad]
    assert len(trained) == 2 * len({site.path for site in sites(gm)})


@pytest.mark.parametrize("name", ["read by itself too", "read beside an own one"])
def test_files_hold_it(name: str, tmp_path: Path) -> None:
    gm, path, wanted, model = made(name)
    french = Adapter("french", {path: update()})
    report = to_onnx(fold(inject(gm, french)), tmp_path / "merged.onnx")
    assert "coverage 2 of 2 adapter tensors, 1 layers changed" in str(report)
    to_onnx(gm, tmp_path / "m.onnx", adapters="input", slots=[path])
    export_adapter(french, tmp_path / "m.onnx", tmp_path / "french.onnx_adapter")
    session = Session(tmp_path / "m.onnx")
    (base,) = session.run({"x": X}).values()
    (adapted,) = session.run({"x": X}, adapter=tmp_path / "french.onnx_adapter").values()
    assert relative(torch.from_numpy(base), model(X)) <= 1e-5
    assert relative(torch.from_numpy(adapted), wanted) <= 1e-5
    assert relative(torch.from_numpy(base), wanted) > 1e-2


class Tied(nn.Module):
    """A parameter of two modules, and a layer's weight that a module is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.child = Own(), Own(), Child()
        self.two.w = self.one.w
        self.layer = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x, self.layer.weight) + self.two(x.sin(), self.layer.weight)
        return torch.tanh(y) + torch.sin(self.layer(x))


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
def test_what_a_module_holds_is_its_own(frontend: str) -> None:
    gm = trace(Tied().eval(), (X,), frontend=frontend)
    paths = {site.path for site in sites(gm)}
    assert {"one.w", "two.w", "layer"} <= paths
    assert not {"w", "layer.weight"} & paths
