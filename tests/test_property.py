"""Random modules that write in place, through the passes in any order, against their weights.

``LORA_FX_GRAPHS=500 LORA_FX_FROM=1000 pytest tests/test_property.py`` makes others, or more.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import lora_fx
from lora_fx import Adapter, Update, compare, passes
from lora_fx.affine.region_boundary import is_layer
from lora_fx.injection.branches import branches

GRAPHS = int(os.environ.get("LORA_FX_GRAPHS", "100"))
FIRST = int(os.environ.get("LORA_FX_FROM", "0"))
Tensor = torch.Tensor
einsum = torch.einsum


class Twice(nn.Module):
    """A bare parameter that is read by two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w) @ self.w


class Lent(nn.Module):
    """Multiplies with what it is given."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.matmul(x, weight)


class Random(nn.Module):
    """Some steps on activations, each one affine region, or as many as its line says.

    Those of sequences have features on the last axis of three, those of images on the second of
    four. ``w``, ``packs`` and the table are stored as (in, out), all else as (out, in).
    """

    def __init__(self, seed: int, frontend: str) -> None:
        super().__init__()
        self.seed, self.image, self.sized = seed, bool(seed % 2), frontend == "export"
        make: Any = (
            (lambda o: nn.Conv2d(4, o, 3, padding=1)) if self.image else (lambda o: nn.Linear(4, o))
        )
        self.one, self.two, self.tied, self.tail = (make(4) for _ in range(4))
        self.pair, self.single, self.packed = make(2), make(1), make(12)
        self.tied.weight = self.one.weight  # one parameter in two modules
        self.alias = self.two  # one module with two names
        self.seen = nn.Buffer(self.two.weight.detach())  # its memory under a third name
        self.norm = nn.BatchNorm2d(4) if self.image else nn.BatchNorm1d(3)
        self.norm.running_mean.normal_()
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)
        self.w, self.v = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        self.packs, self.rows = nn.Parameter(torch.randn(4, 12)), nn.Parameter(torch.randn(12, 4))
        self.b, self.order = nn.Parameter(torch.randn(12)), nn.Buffer(torch.tensor([3, 8, 0, 5]))
        self.kernels = nn.Parameter(torch.randn(12, 4, 3, 3) / 3)
        self.twice, self.lent = Twice(), Lent()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.table = nn.Embedding(3, 4)
        self.line = nn.Conv1d(4, 4, 3, padding=1)
        self.features = nn.BatchNorm1d(4)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.thin = nn.Conv1d(4, 4, 3, padding="same", groups=2)
        kinds = {"any", "image" if self.image else "sequence", "image" if self.image else frontend}
        known = [name for name, step in STEPS.items() if step.kind in kinds]
        self.steps = random.Random(seed).choices(sorted(known), k=4)

    def forward(self, x: Tensor) -> Tensor:
        draw = random.Random(self.seed)
        h = before = x
        for step in self.steps:
            h, before = STEPS[step].run(self, draw, h, before), h
        return self.tail(h)

    def layer(self, draw: random.Random, h: Tensor, alike: bool = False) -> Tensor:
        """Some layer of its own size: a module, or a product that is written out."""
        if draw.random() < 0.4:
            known = (*ALIKE[self.image], *(() if alike else OTHERS[self.image, self.sized]))
            return draw.choice(known)(self, h)
        layer: nn.Module = getattr(self, draw.choice(["one", "two", "tied", "alias"]))
        return layer(h)

    def part(self, start: int | None, stop: int | None, step: int = 1) -> Any:
        cut = slice(start, stop, step)
        return (..., cut, slice(None), slice(None)) if self.image else (..., cut)


Layer = Callable[["Random", Tensor], Tensor]
# One layer of a weight that no module of its own holds, or of a part of one, by whether it is of
# images: such as read what the modules read, so that a sum of both is one layer.
ALIKE: dict[bool, tuple[Layer, ...]] = {
    False: (
        lambda m, h: h @ m.w + m.b[4:8],
        lambda m, h: h.matmul(m.packs[:, ::3]),
        lambda m, h: h @ m.v.T,
        lambda m, h: h @ m.seen.mT,
        lambda m, h: torch.bmm(h, m.w.expand(h.shape[0], -1, -1)),
        lambda m, h: torch.bmm(h, m.v.t().unsqueeze(0).repeat(2, 1, 1)),
        lambda m, h: torch.baddbmm(m.b[:4], h, m.packs[:, -4:].expand(2, 4, 4)),
        lambda m, h: einsum("bsi,io->bso", h, m.w),
        lambda m, h: einsum("oi,...i->...o", m.rows.chunk(3)[1], h),
        lambda m, h: torch.tensordot(h, m.w, 1),
        lambda m, h: torch.tensordot(h, m.rows[8:], dims=([-1], [1])),
        lambda m, h: F.linear(h, m.rows.index_select(0, m.order), m.b[m.order]),
        lambda m, h: F.linear(h, m.w.t(), m.b[:4]),
        lambda m, h: F.linear(h, m.rows.view(3, 4, 4)[2]),
        lambda m, h: m.lent(h, m.w),
    ),
    True: (
        lambda m, h: F.conv2d(h, m.kernels[:4], m.b[:4], padding=1),
        lambda m, h: F.conv2d(h, m.kernels[m.order], padding=1),
        lambda m, h: F.conv2d(h, m.kernels.split(4)[2], padding=1),
        lambda m, h: F.conv2d(h, m.seen, padding=1),
    ),
}
_IMAGES: tuple[Layer, ...] = (
    lambda m, h: F.conv2d(h, m.kernels[m.order], padding="same"),
    lambda m, h: einsum("bihw,oi->bohw", h, m.v),
    lambda m, h: (h.permute(0, 2, 3, 1) @ m.packs[:, 4:8] + m.b[:4]).permute(0, 3, 1, 2),
    lambda m, h: m.grouped(h),
)
_SEQUENCES: tuple[Layer, ...] = (
    lambda m, h: (m.v @ h.mT).mT,
    lambda m, h: (m.rows[4:8] @ h.transpose(1, 2) + m.b[:4, None]).transpose(1, 2),
    lambda m, h: einsum("bsi,oi->bos", h, m.v).mT,
    lambda m, h: torch.mm(h.reshape(-1, 4), m.w).view(h.shape),
    lambda m, h: torch.addmm(m.b[::3], h.flatten(0, 1), m.w).unflatten(0, (2, 3)),
    lambda m, h: m.line(h.mT).mT,
    lambda m, h: m.thin(h.transpose(1, 2)).transpose(1, 2),
)
# And such as read it otherwise; some are layers only where sizes are known.
OTHERS: dict[tuple[bool, bool], tuple[Layer, ...]] = {
    (False, False): _SEQUENCES,
    (False, True): _SEQUENCES,
    (True, False): _IMAGES,
    (True, True): (
        *_IMAGES,
        lambda m, h: einsum("bi...,io->bo...", h, m.w),
        lambda m, h: (m.v @ h.flatten(2)).view(h.shape),
        lambda m, h: torch.tensordot(m.rows[:4], h, dims=([1], [1])).movedim(0, 1),
    ),
}
# Three layers of one weight, which read three inputs.
CUT: dict[bool, tuple[Callable[[Random, list[Tensor]], list[Tensor]], ...]] = {
    False: (
        lambda m, x: [x[k] @ m.packs.chunk(3, 1)[k] for k in range(3)],
        lambda m, x: [
            F.linear(x[k], m.rows.split(4)[k], m.b.view(3, 4).unbind()[k]) for k in range(3)
        ],
        lambda m, x: [x[k] @ m.packs[:, k::3] for k in range(3)],
        lambda m, x: [x[0] @ m.rows[:4].T, einsum("bsi,oi->bso", x[1], m.rows[4:8]), x[2] @ m.w],
        lambda m, x: [torch.bmm(x[k], m.packs[:, k : k + 4].expand(2, -1, -1)) for k in range(3)],
        lambda m, x: [x[k] @ m.packs.index_select(1, m.order + k) for k in range(3)],
    ),
    True: (
        lambda m, x: [F.conv2d(x[k], m.kernels[k::3], padding=1) for k in range(3)],
        lambda m, x: [F.conv2d(x[k], m.kernels.chunk(3)[k], padding=1) for k in range(3)],
        lambda m, x: [einsum("bihw,oi->bohw", x[k], m.rows[4 * k :][:4]) for k in range(3)],
    ),
}


def activated(m: Random, d: random.Random, h: Tensor, _: Tensor) -> Tensor:
    return m.drop(m.act(m.norm(m.layer(d, h))))


def summed(m: Random, d: random.Random, h: Tensor, b: Tensor) -> Tensor:
    y = m.layer(d, h, alike=True)
    y += m.layer(d, h, alike=True)
    y -= d.choice([1, h])
    return torch.tanh(y)


def skipped(m: Random, d: random.Random, h: Tensor, b: Tensor) -> Tensor:
    y = m.norm(m.layer(d, h))
    y += b
    return m.act(y).add_(h)


def in_part(m: Random, d: random.Random, h: Tensor, _: Tensor) -> Tensor:
    y = m.layer(d, h, alike=True)
    y[m.part(*d.choice([(0, 2), (-2, None), (1, 3), (0, 4, 2)]))] += m.pair(h)
    y[m.part(-1, None)] = m.single(h) if d.random() < 0.5 else 0.5
    return torch.tanh(y)


def in_all(m: Random, d: random.Random, h: Tensor, _: Tensor) -> Tensor:
    y = torch.zeros_like(h)
    y[...] = m.layer(d, h)
    kept = y.clone()
    y.mul_(0.5).sub_(0.25)
    return torch.sigmoid(y) * torch.tanh(kept)


def copied(m: Random, d: random.Random, h: Tensor, b: Tensor) -> Tensor:
    y = torch.zeros_like(h)
    y[m.part(0, 2)].copy_(m.pair(h))
    y[m.part(2, None)].copy_(m.layer(d, torch.tanh(h))[m.part(0, 2)])
    y[m.part(1, 3)].relu_()
    return y.tanh_()


def masked(m: Random, d: random.Random, h: Tensor, b: Tensor) -> Tensor:
    y = m.layer(d, h).clamp_(-9)
    if m.sized:
        y.masked_fill_(b > 0.5, 0.25)
    else:
        y[b > 0.5] = 0.25  # masked_fill puts axes in order, and what reads it rounds otherwise
    y[m.part(0, 4, 2)].masked_fill_(y[m.part(1, 4, 2)] < 0, -0.5)
    y.select(1, 0).neg_()
    return y.sigmoid_()


def through_a_view(m: Random, d: random.Random, h: Tensor, _: Tensor) -> Tensor:
    y = m.layer(d, h)
    old = torch.relu(y)
    turned = y.transpose(0, 1)
    turned.mul_(d.choice([2, -1]))
    return old + torch.tanh(y)


def taken_apart(m: Random, d: random.Random, h: Tensor, _: Tensor) -> Tensor:
    packed = m.packed(h)
    packed[m.part(0, 2)] += m.pair(h)
    q, k, v = packed.chunk(3, -3 if m.image else -1)
    return F.relu(q * torch.sigmoid(k), inplace=True) + v


def cut(m: Random, d: random.Random, h: Tensor, b: Tensor) -> Tensor:
    q, k, v = d.choice(CUT[m.image])(m, [h, h.sin(), h.cos()])
    q *= torch.sigmoid(k)
    return torch.tanh(q.add_(v.relu_()))


def behind_a_norm(m: Random, d: random.Random, h: Tensor, b: Tensor) -> Tensor:
    return m.layer(d, m.norm(h)).tanh_()


def behind_features(m: Random, d: random.Random, h: Tensor, b: Tensor) -> Tensor:
    y = m.features(m.layer(d, h).mT).mT
    return m.act(m.features(y.flatten(0, 1)).view(h.shape)) + torch.tanh(y)


def called_again(m: Random, d: random.Random, h: Tensor, b: Tensor) -> Tensor:
    return m.act(m.twice(h)).sub_(torch.sigmoid(m.layer(d, h)))


def lent(m: Random, d: random.Random, h: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(m.lent(h, m.w)) + torch.sin(h.sigmoid() @ m.w)


def looked_up(m: Random, d: random.Random, h: Tensor, b: Tensor) -> Tensor:
    y = m.table((h[..., 0] > 0.1).long() + (h[..., 1] > 0.1).long())
    return torch.tanh(y.mul_(torch.sigmoid(m.layer(d, h))))


def attended(m: Random, d: random.Random, h: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(m.attention(h, h, h, need_weights=False)[0])


class Step(NamedTuple):
    """What may be drawn, for which inputs or frontend, and how many layers it folds to."""

    run: Callable[[Random, random.Random, Tensor, Tensor], Tensor]
    kind: str = "any"
    layers: int = 1


STEPS = {
    step.run.__name__: step
    for step in [
        *map(Step, (activated, summed, skipped, in_part, in_all, masked, through_a_view)),
        *map(Step, (taken_apart, behind_a_norm)),
        Step(copied, layers=2),
        Step(cut, layers=3),
        Step(behind_features, "sequence"),
        Step(called_again, "sequence", 3),
        Step(lent, "sequence", 2),
        Step(looked_up, "sequence", 2),
        Step(attended, "export", 2),
    ]
}
TURNED = ("w", "packs", "twice.w", "table")
GROUPED = {"grouped", "thin"}  # LoRA beside these stays: together they are no convolution of groups


class Reading(Random):
    """The same, noting what it reads by its own names."""

    def __getattr__(self, name: str) -> Any:
        self.__dict__.setdefault("read", {})[name] = None
        return super().__getattr__(name)


def read_by(model: Random, x: Tensor) -> dict[str, Tensor]:
    """The weights that a module reads, by the paths of their layers."""
    reading = copy.copy(model)
    reading.__class__ = Reading
    reading(x)
    found: dict[str, Tensor] = {}
    for name in reading.read:
        value = getattr(model, name)
        if isinstance(value, nn.MultiheadAttention):
            found |= {name: value.in_proj_weight, f"{name}.out_proj": value.out_proj.weight}
        elif isinstance(value, Twice):
            found[f"{name}.w"] = value.w
        elif not isinstance(value, nn.BatchNorm1d | nn.BatchNorm2d):
            found[name] = getattr(value, "weight", value)
    if "two" in found:
        found.pop("alias", None)  # an adapter of one name is the module's
    return {
        path: weight
        for path, weight in found.items()
        if isinstance(weight, Tensor) and weight.ndim > 1
    }


def adapter(model: Random, weights: dict[str, Tensor], name: str) -> Adapter:
    make = torch.Generator().manual_seed(len(name))
    updates = {}
    for path, weight in weights.items():
        out, into, *kernel = weight.mT.shape if path in TURNED else weight.shape
        groups = getattr(getattr(model, path, None), "groups", 1)
        down = torch.randn(2, into * groups, *kernel, generator=make)
        up = torch.randn(out, 2 // groups, generator=make)
        updates[path] = Update(down / down.norm(), up / up.norm(), 1.5)
    return Adapter(name, updates)


def spread(weight: Tensor, groups: int) -> Tensor:
    """A grouped convolution's weight as that of one without groups."""
    ones = torch.ones(weight.shape[0] // groups, weight.shape[1])
    blocks = torch.block_diag(*[ones] * groups)
    whole = weight.repeat(1, groups, *[1] * (weight.ndim - 2))
    return whole * blocks.reshape(*blocks.shape, *[1] * (weight.ndim - 2))


def anew(module: Any, done: dict[int, Any]) -> Any:
    """The same tensors in modules of their own: one that has two names is one again."""
    if id(module) not in done:
        made = done[id(module)] = copy.copy(module)
        inner = {name: anew(part, done) for name, part in module._modules.items()}
        own = {"_parameters": module._parameters.copy(), "_buffers": module._buffers.copy()}
        vars(made).update(own, _modules=inner)
    return done[id(module)]


def by_weight(model: Random, adapters: list[Adapter], but: str = "") -> Random:
    """A copy with each changed weight put where its path names it."""
    changed = anew(model, {})
    for one in adapters:
        for path, update in one.updates.items():
            if path != but:
                put(changed, path, update)
    return changed


def put(changed: Random, path: str, update: Any) -> None:
    owner, _, leaf = path.rpartition(".")
    held = getattr(changed.get_submodule(owner), leaf)
    if isinstance(held, Tensor):
        module = changed.get_submodule(owner)
    else:
        module = held
        leaf = "in_proj_weight" if isinstance(held, nn.MultiheadAttention) else "weight"
    weight, up = getattr(module, leaf).detach(), update.up
    if up.shape[1] < 2:
        up = spread(up, 2)
    if getattr(module, "groups", 1) > 1:
        weight, module.groups = spread(weight, module.groups), 1
    delta = torch.einsum("or,r...->o...", up, update.down) * update.scale
    new = weight + (delta.mT if path in TURNED else delta)
    setattr(module, leaf, new if leaf == "seen" else nn.Parameter(new))


class Drawn(NamedTuple):
    """A module, what it is called with, and what it gives with none, one, ... of its adapters."""

    model: Random
    x: Tensor
    adapters: list[Adapter]
    wanted: list[Tensor]


def drawn(seed: int, frontend: str) -> Drawn:
    """The first module of a seed whose output every update changes, so that none is lost unseen."""
    for again in range(100):
        torch.manual_seed(seed + 10**6 * again)
        model = Random(seed, frontend).eval().requires_grad_(False)
        x = torch.randn((2, 4, 5, 6) if model.image else (2, 3, 4))
        weights = read_by(model, x)
        adapters = [adapter(model, weights, name) for name in ("french", "german_too")]
        adapters = adapters[: random.Random(seed).choice([1, 2])]
        wanted = [by_weight(model, adapters[:n])(x) for n in range(len(adapters) + 1)]
        without = [by_weight(model, adapters, path)(x) for path in weights]
        if all(compare(other, wanted[-1]).relative > 1e-3 for other in (wanted[0], *without)):
            return Drawn(model, x, adapters, wanted)
    raise AssertionError(f"no module of seed {seed} depends on all of its weights")


def walked(
    gm: fx.GraphModule, adapters: list[Adapter], draw: random.Random
) -> Iterator[tuple[fx.GraphModule, int]]:
    """The graph after injections, folds and unfolds in some order, with how many are in it."""
    steps = ["inject"] * len(adapters) + draw.choices(["fold", "unfold"], k=2)
    draw.shuffle(steps)
    if random.Random(len(gm.graph.nodes)).random() < 0.2:  # all is taken out, and put in again
        steps += ["strip"] + ["inject"] * len(adapters)
    done = folds = 0
    for step in steps:
        if step in ("inject", "strip"):  # a folded layer is another than the one that is meant
            for _ in range(folds):
                gm = lora_fx.unfold(gm)
            folds = 0
        if step == "inject":
            gm, done = lora_fx.inject(gm, adapters[done]), done + 1
        elif step == "strip":
            gm, done = passes.StripLora()(gm).graph_module, 0
        else:
            gm, folds = getattr(lora_fx, step)(gm), folds + (step == "fold")
        yield gm, done


def agrees(session: lora_fx.Session, x: Tensor, wanted: Tensor, file: Path | None = None) -> bool:
    (found,) = session.run({"x": x}, adapter=file).values()
    return compare(torch.as_tensor(found), wanted).relative <= 1e-5


def is_right_in_files(made: Drawn, state: fx.GraphModule, wanted: Tensor, path: Path) -> bool:
    lora_fx.to_onnx(state, path / "model.onnx", force=True)
    return agrees(lora_fx.Session(path / "model.onnx"), made.x, wanted)


def is_right_in_slots(made: Drawn, gm: fx.GraphModule, path: Path) -> bool:
    """Whether one file takes each of the adapters, and none; grouped convolutions have no slot."""
    file, ends = path / "slots.onnx", []
    slots = [name for name in made.adapters[0].updates if name not in GROUPED]
    lora_fx.to_onnx(gm, file, adapters="input", slots=slots)
    session = lora_fx.Session(file)
    for given in made.adapters:
        one = replace(given, updates={name: given.updates[name] for name in slots})
        mine = path / f"{one.name}.onnx_adapter"
        lora_fx.export_adapter(one, file, mine)
        ends.append(agrees(session, made.x, by_weight(made.model, [one])(made.x), mine))
    return all(ends) and agrees(session, made.x, made.wanted[0])


@pytest.fixture(scope="module", autouse=True)
def plain_attention() -> Iterator[None]:
    """The way that a tracer follows, and not one kernel for all, which rounds otherwise."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("seed", range(FIRST, FIRST + GRAPHS))
@torch.no_grad()
def test_a_random_module_is_merged_whole_and_right(seed: int, tmp_path: Path) -> None:
    frontend = "symbolic" if seed // 2 % 2 else "export"
    made = drawn(seed, frontend)
    model, x, adapters, wanted = made
    draw = random.Random(seed)
    # What `check` compares is compared here.
    gm = lora_fx.trace(model, (x,), frontend=frontend, check=False)
    assert torch.equal(gm(x), wanted[0])
    states = list(walked(gm, adapters, draw))
    for state, done in states:
        assert compare(state(x), wanted[done]).relative <= 1e-5
    if seed % 10 == 7:
        state, done = states[seed % len(states)]
        assert compare(passes.ChooseForm()(state).graph_module(x), wanted[done]).relative <= 1e-5
    folded = lora_fx.fold(states[-1][0])
    assert compare(folded(x), wanted[-1]).relative <= 1e-5
    left = branches(folded)
    assert {branch.path for branch in left} <= GROUPED
    layers = [node for node in folded.graph.nodes if is_layer(node)]
    assert len(layers) - 2 * len(left) == sum(STEPS[step].layers for step in model.steps) + 1
    if seed % 25 == 2:
        assert is_right_in_files(made, folded, wanted[-1], tmp_path)
    if seed % 100 == 2:
        some, done = draw.choice(states)
        assert is_right_in_files(made, some, wanted[done], tmp_path)
    if seed % 100 == 27:
        assert is_right_in_slots(made, gm, tmp_path)
