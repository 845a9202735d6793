"""Random modules that write in place, through the passes in any order, against their weights.

``LORA_FX_GRAPHS=2000 pytest tests/test_property.py`` makes more of them.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import lora_fx
from lora_fx import Adapter, Update, compare
from lora_fx.affine.ways import LAYERS
from lora_fx.branches import branches
from lora_fx.sites import sites

GRAPHS = int(os.environ.get("LORA_FX_GRAPHS", "100"))
Step = Callable[["Random", random.Random, torch.Tensor, torch.Tensor], torch.Tensor]


class Random(nn.Module):
    """Some steps on activations, each one affine layer and something that is none."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.image = bool(seed % 2)
        make: Any = (
            (lambda o: nn.Conv2d(4, o, 3, padding=1)) if self.image else (lambda o: nn.Linear(4, o))
        )
        self.one, self.two, self.tied, self.tail = (make(4) for _ in range(4))
        self.pair, self.single, self.packed = make(2), make(1), make(12)
        self.tied.weight = self.one.weight  # one parameter in two modules
        self.alias = self.two  # one module with two names
        self.norm = nn.BatchNorm2d(4) if self.image else nn.BatchNorm1d(3)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5, inplace=True)
        self.norm.running_mean.normal_()
        self.steps = random.Random(seed).choices(sorted(STEPS), k=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        draw = random.Random(self.seed)
        h = before = x
        for step in self.steps:
            h, before = STEPS[step](self, draw, h, before), h
        return self.tail(h)

    def layer(self, draw: random.Random, h: torch.Tensor) -> torch.Tensor:
        layer: nn.Module = getattr(self, draw.choice(["one", "two", "tied", "alias"]))
        return layer(h)

    def part(self, y: torch.Tensor, start: int | None, stop: int | None, step: int = 1) -> Any:
        cut = slice(start, stop, step)
        return (..., cut, slice(None), slice(None)) if self.image else (..., cut)


def activated(m: Random, d: random.Random, h: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return m.drop(m.act(m.norm(m.layer(d, h))))


def summed(m: Random, d: random.Random, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    y = m.layer(d, h)
    y += m.layer(d, h)
    y -= d.choice([1, h])
    return torch.tanh(y)


def skipped(m: Random, d: random.Random, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    y = m.norm(m.layer(d, h))
    y += b
    return m.act(y).add_(h)


def in_part(m: Random, d: random.Random, h: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    y = m.layer(d, h)
    place = m.part(y, *d.choice([(0, 2), (-2, None), (1, 3), (0, 4, 2)]))
    y[place] += m.pair(h)
    y[m.part(y, -1, None)] = m.single(h) if d.random() < 0.5 else 0.5
    return torch.tanh(y)


def in_all(m: Random, d: random.Random, h: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(h)
    y[...] = m.layer(d, h)
    kept = y.clone()
    y.mul_(0.5).sub_(0.25)
    return torch.sigmoid(y) * torch.tanh(kept)


def through_a_view(m: Random, d: random.Random, h: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    y = m.layer(d, h)
    old = torch.relu(y)
    turned = y.transpose(0, 1)
    turned.mul_(d.choice([2, -1]))
    return old + torch.tanh(y)


def taken_apart(m: Random, d: random.Random, h: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    packed = m.packed(h)
    packed[m.part(packed, 0, 2)] += m.pair(h)
    q, k, v = packed.chunk(3, -3 if m.image else -1)
    return F.relu(q * torch.sigmoid(k), inplace=True) + v


STEPS: dict[str, Step] = {
    f.__name__: f
    for f in (activated, summed, skipped, in_part, in_all, through_a_view, taken_apart)
}


def adapter(gm: fx.GraphModule, name: str) -> Adapter:
    make = torch.Generator().manual_seed(len(name))
    updates = {}
    found = {site.path: site for site in sites(gm)}
    if "two" in found:
        found.pop("alias", None)  # an adapter of one name is the module's
    for site in found.values():
        out, into, *kernel = site.shape
        down, up = (
            torch.randn(2, into, *kernel, generator=make),
            torch.randn(out, 2, generator=make),
        )
        updates[site.path] = Update(down / down.norm(), up / up.norm(), 1.5)
    return Adapter(name, updates)


def by_weight(model: nn.Module, adapters: list[Adapter]) -> nn.Module:
    """A copy with each changed weight put into the module that its path names."""
    changed = copy.deepcopy(model)
    for one in adapters:
        for path, update in one.updates.items():
            assert isinstance(update, Update)
            module = changed.get_submodule(path)
            delta = torch.einsum("or,r...->o...", update.up, update.down)
            weight = module.get_parameter("weight").detach()
            module.weight = nn.Parameter(weight + update.scale * delta)
    return changed


def passed(gm: fx.GraphModule, draw: random.Random) -> tuple[fx.GraphModule, list[Adapter]]:
    """Injected, folded and unfolded in some order; folded at the end."""
    adapters = [adapter(gm, "french"), adapter(gm, "german_too")][: draw.choice([1, 2])]
    for one in adapters:
        if draw.random() < 0.3:
            gm = lora_fx.unfold(lora_fx.fold(gm))
        gm = lora_fx.inject(gm, one)
    return lora_fx.fold(gm), adapters


@pytest.mark.parametrize("seed", range(GRAPHS))
@torch.no_grad()
def test_a_random_module_is_merged_whole_and_right(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    model = Random(seed).eval()
    x = torch.randn((2, 4, 5, 6) if model.image else (2, 3, 4))
    frontend = "symbolic" if seed % 3 == 0 else "export"
    gm = lora_fx.trace(model, (x,), frontend=frontend)
    folded, adapters = passed(gm, random.Random(seed))
    wanted = by_weight(model, adapters)(x)
    assert compare(folded(x), wanted).relative <= 1e-5
    assert compare(gm(x), wanted).relative > 1e-3
    assert branches(folded) == []
    layers = [node for node in folded.graph.nodes if node.target in LAYERS]
    assert len(layers) == len(model.steps) + 1
    if seed % 25 == 2:
        lora_fx.to_onnx(folded, tmp_path / "model.onnx")
        (found,) = lora_fx.Session(tmp_path / "model.onnx").run({"x": x}).values()
        assert compare(torch.as_tensor(found), wanted).relative <= 1e-5
