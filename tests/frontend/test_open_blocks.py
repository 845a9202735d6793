from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import fold, inject, text, trace
from lora_fx.explanation import unmerged
from lora_fx.layers.sites import sites
from lora_fx.testing import Computes, make_adapter, relative

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def frozen(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = torch.tanh(m.wide(x))
    return m.narrow(y)


def nested(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        y, z = m.wide(x), x.sum()
        with torch.enable_grad():
            y = torch.tanh(y)
    return m.narrow(y) + z


def decorated(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.narrow(torch.tanh(torch.no_grad()(m.wide)(x)))


def uncast(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return torch.tanh(m.narrow(torch.tanh(m.wide(x.float()))))


def model_of(function: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    made = Computes(function, wide=nn.Linear(3, 5), narrow=nn.Linear(5, 2))
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("function", [frozen, nested, decorated, uncast])
@torch.no_grad()
def test_layers_in_a_block_are_layers(function: Callable[..., Any], tmp_path: Path) -> None:
    model = model_of(function)
    gm = trace(model, (X,), dynamic_shapes=({0: "batch"},))
    assert "wrap" not in text(gm)
    assert [site.path for site in sites(gm)] == ["wide", "narrow"]
    adapter = make_adapter({"wide": (5, 3), "narrow": (2, 5)})
    changed = copy.deepcopy(model)
    for path, update in adapter.updates.items():
        changed.get_parameter(f"{path}.weight").add_(update.delta())
    injected = inject(gm, adapter)
    folded = fold(injected)
    for graph in (injected, folded):
        assert relative(graph(X), changed(X)) <= 1e-5
    assert relative(gm(X), changed(X)) > 1e-2
    assert unmerged(folded) == {}
    assert lora_fx.to_onnx(folded, tmp_path / "m.onnx").mode == "merged"


def test_autocast_that_is_on_stays_a_block() -> None:
    def cast(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = m.wide(x)
        return m.narrow(torch.tanh(y.float()))

    model = model_of(cast)
    gm = trace(model, (X,))
    assert "wrap_with_autocast" in text(gm)
    assert torch.equal(gm(X), model(X))
