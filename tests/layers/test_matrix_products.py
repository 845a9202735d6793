"""Layers that are written out as products: every spelling, under both frontends, every way in."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from lora_fx import (
    Adapter,
    LoraConfig,
    Session,
    Update,
    adapter_from,
    combine,
    export_adapter,
    fold,
    inject,
    load_adapter,
    save_adapter,
    to_onnx,
    trace,
    unfold,
)
from lora_fx.errors import AdapterError, ExportError
from lora_fx.explanation import unmerged
from lora_fx.graph.ops import op_name
from lora_fx.layers.sites import sites
from lora_fx.passes import FoldLora, RaiseLora
from lora_fx.testing import Computes, relative

Tensor = torch.Tensor


def block(function: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """A layer as (in, out) and one as (out, in), of which a function reads one."""
    return Computes(function, {"w": (3, 5), "v": (5, 3), "b": (5,)})


def model_of(function: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return Computes(lambda m, x: torch.tanh(m.block(x)), block=block(function))


einsum = torch.einsum
SPELLINGS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "operator": lambda m, x: x @ m.w,
    "operator and bias": lambda m, x: x @ m.w + m.b,
    "method": lambda m, x: x.matmul(m.w),
    "mm": lambda m, x: torch.mm(x.reshape(-1, 3), m.w),
    "mm method": lambda m, x: x.reshape(-1, 3).mm(m.w),
    "addmm": lambda m, x: torch.addmm(m.b, x.reshape(-1, 3), m.w),
    "addmm method": lambda m, x: m.b.addmm(x.reshape(-1, 3), m.w),
    "t": lambda m, x: x @ m.v.t(),
    "T": lambda m, x: x @ m.v.T,
    "mT": lambda m, x: x @ m.v.mT,
    "transpose": lambda m, x: x @ m.v.transpose(0, 1),
    "permute": lambda m, x: x @ m.v.permute(1, 0),
    "from the left": lambda m, x: m.v @ x.transpose(-1, -2),
    "from the left and bias": lambda m, x: m.v @ x.mT + m.b[:, None],
    "turned, from the left": lambda m, x: m.w.t() @ x.mT,
    "bmm": lambda m, x: torch.bmm(x, m.w.expand(x.shape[0], -1, -1)),
    "bmm after repeat": lambda m, x: torch.bmm(x, m.w.unsqueeze(0).repeat(x.shape[0], 1, 1)),
    "baddbmm": lambda m, x: torch.baddbmm(m.b, x, m.w.expand(x.shape[0], -1, -1)),
    "einsum": lambda m, x: einsum("bsi,io->bso", x, m.w),
    "einsum of the rest": lambda m, x: einsum("oi, ...i -> ...o", m.v, x),
    "einsum, features moved": lambda m, x: einsum("bsi,io->bos", x, m.w),
    "einsum, features in the middle": lambda m, x: einsum("bis,oi->bos", x.mT, m.v),
    "einsum, batch turned": lambda m, x: einsum("bsi,io->sbo", x, m.w),
    "einsum, all turned": lambda m, x: einsum("bsi,oi->osb", x, m.v),
    "tensordot": lambda m, x: torch.tensordot(x, m.w, 1),
    "tensordot of named axes": lambda m, x: torch.tensordot(x, m.v, dims=([-1], [1])),
    "inner": lambda m, x: torch.inner(x, m.v),
    "inner method": lambda m, x: x.inner(m.v),
    "linear": lambda m, x: F.linear(x, m.v),
    "linear, turned": lambda m, x: F.linear(x, m.w.t(), m.b),
}
FRONTENDS = ("export", "symbolic")
ALL = [(name, frontend) for name in SPELLINGS for frontend in FRONTENDS]
X = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(1))
OTHER = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(2))


@functools.cache
def made(name: str, frontend: str) -> tuple[nn.Module, fx.GraphModule, str]:
    """A model, its graph and the path of its layer: only read."""
    torch.manual_seed(0)
    model = model_of(SPELLINGS[name]).eval().requires_grad_(False)
    gm = trace(model, (X,), dynamic_shapes=({0: "batch"},), frontend=frontend)
    (site,) = sites(gm)
    return model, gm, site.path


def update(scale: float = 1.5) -> Update:
    make = torch.Generator().manual_seed(3)
    return Update(torch.randn(2, 3, generator=make), torch.randn(5, 2, generator=make), scale)


def weight_form(model: nn.Module, path: str, of: Update) -> Tensor:
    """The model's result with the update in a copy of its parameter."""
    changed = copy.deepcopy(model)
    weight = changed.get_parameter(path)
    delta = of.delta() if weight.shape == (5, 3) else of.delta().T
    weight.add_(delta)
    result: Tensor = changed(OTHER)
    return result


def calls(gm: fx.GraphModule) -> Counter[str]:
    return Counter(op_name(n) for n in gm.graph.nodes if n.op.startswith(("call_f", "call_meth")))


@pytest.mark.parametrize(("name", "frontend"), ALL)
def test_a_product_is_a_layer(name: str, frontend: str) -> None:
    model, gm, path = made(name, frontend)
    assert torch.equal(gm(X), model(X))
    (site,) = sites(gm)
    assert (site.shape, site.bare) == ((5, 3), True)
    assert path == ("block.v" if site.kind == "linear" else "block.w")
    wanted = weight_form(model, path, update())
    injected = inject(gm, Adapter("french", {path: update()}))
    folded = fold(injected)
    for graph in (injected, folded):
        assert relative(graph(OTHER), wanted) <= 1e-5
    for control in (gm, inject(gm, Adapter("french", {path: update(1.35)}))):
        assert relative(control(OTHER), wanted) > 1e-2
    assert not calls(folded) - calls(gm)
    assert (calls(gm) - calls(folded)).keys() <= {"unsqueeze", "getitem"}  # of a bias, to fit
    assert FoldLora()(folded).modified is FoldLora()(gm).modified is False
    assert torch.equal(unfold(folded)(OTHER), injected(OTHER))
    assert adapter_from(injected).updates[path].delta().allclose(update().delta(), atol=1e-6)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("factor", ["alpha", "beta"])
@pytest.mark.parametrize("name", ["addmm", "addmm method", "baddbmm"])
def test_a_sum_with_factors_is_no_layer(name: str, factor: str, frontend: str) -> None:
    """An adapter beside it would lack the factor: its weight is made anew."""

    def scaled(m: Any, x: Tensor) -> Tensor:
        if name == "baddbmm":
            return torch.baddbmm(m.b, x, m.w.expand(x.shape[0], -1, -1), **{factor: 2.0})
        given = {factor: 2.0}
        rows = x.reshape(-1, 3)
        return (
            torch.addmm(m.b, rows, m.w, **given)
            if name == "addmm"
            else m.b.addmm(rows, m.w, **given)
        )

    torch.manual_seed(0)
    model = model_of(scaled).eval().requires_grad_(False)
    gm = trace(model, (X,), dynamic_shapes=({0: "batch"},), frontend=frontend)
    assert sites(gm) == []
    assert relative(fold(gm)(OTHER), model(OTHER)) <= 1e-6
    changed = copy.deepcopy(model)
    changed.get_parameter("block.w").add_(update().delta().T)
    injected = inject(gm, Adapter("french", {"block.w": update()}))
    for graph in (injected, fold(injected)):
        assert relative(graph(OTHER), changed(OTHER)) <= 1e-5
    assert (
        relative(inject(gm, Adapter("french", {"block.w": update(1.35)}))(OTHER), changed(OTHER))
        > 1e-2
    )
    assert unmerged(fold(injected)) == {}


@pytest.mark.parametrize(("name", "frontend"), ALL)
def test_a_fresh_adapter_trains_beside_it(name: str, frontend: str) -> None:
    _, gm, path = made(name, frontend)
    fresh = inject(gm, LoraConfig(r=2, target_modules=[path.rpartition(".")[2]], seed=0))
    assert torch.allclose(fresh(X), gm(X))
    trained = {n: p for n, p in fresh.named_parameters() if p.requires_grad}
    assert [tuple(p.shape) for p in trained.values()] == [(3, 2), (2, 5)]
    fresh(X).square().sum().backward()
    assert any(bool(p.grad.any()) for p in trained.values() if p.grad is not None)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x @ m.w.unsqueeze(0),
        lambda m, x: x @ m.w[None],
        lambda m, x: m.v[None] @ x.mT,
        lambda m, x: torch.matmul(x[:, None], m.w[None, None]),
    ],
)
def test_one_of_a_batch_is_a_matrix(function: Any, frontend: str) -> None:
    torch.manual_seed(0)
    model = model_of(function).eval().requires_grad_(False)
    gm = trace(model, (X,), dynamic_shapes=({0: "batch"},), frontend=frontend)
    path = next(f"block.{n}" for n in "wv" if any(f"block.{n}" == g.target for g in gm.graph.nodes))
    injected = inject(gm, Adapter("french", {path: update()}))
    folded, wanted = fold(injected), weight_form(model, path, update())
    for graph in (injected, folded):
        assert relative(graph(OTHER), wanted) <= 1e-5
    assert relative(gm(OTHER), wanted) > 1e-2
    assert unmerged(folded) == {}


def test_an_ellipsis_behind_the_features_is_as_many_axes_as_were_traced() -> None:
    torch.manual_seed(0)
    model = (
        model_of(lambda m, x: torch.einsum("bi...,io->bo...", x, m.w)).eval().requires_grad_(False)
    )
    image = torch.randn(2, 3, 4, 6)
    gm = trace(model, (image,))
    (site,) = sites(gm)
    assert site.path == "block.w"
    changed = copy.deepcopy(model)
    changed.get_parameter("block.w").add_(update().delta().T)
    injected = inject(gm, Adapter("french", {"block.w": update()}))
    folded = fold(injected)
    for graph in (injected, folded):
        assert relative(graph(image), changed(image)) <= 1e-5
    assert relative(gm(image), changed(image)) > 1e-2
    assert calls(folded) == calls(gm)
    assert sites(trace(model)) == []  # how many axes these are is not known


def test_all_linear_leaves_bare_parameters_out() -> None:
    _, gm, _ = made("operator", "export")
    with pytest.raises(AdapterError, match=r"match none of the 1 layers: block\.w"):
        inject(gm, LoraConfig())


@pytest.mark.parametrize(
    ("name", "frontend"),
    [(name, FRONTENDS[place % 2]) for place, name in enumerate(SPELLINGS)],
)
def test_it_is_a_slot(name: str, frontend: str, tmp_path: Path) -> None:
    model, gm, path = made(name, frontend)
    wanted = weight_form(model, path, update())
    file, adapter = tmp_path / "m.onnx", tmp_path / "french.onnx_adapter"
    to_onnx(gm, file, adapters="input", slots=[path])
    export_adapter(Adapter("french", {path: update()}), file, adapter)
    session = Session(file)
    (base,) = session.run({"x": OTHER}).values()
    (adapted,) = session.run({"x": OTHER}, adapter=adapter).values()
    assert relative(torch.from_numpy(base), model(OTHER)) <= 1e-5
    assert relative(torch.from_numpy(adapted), wanted) <= 1e-5
    assert relative(torch.from_numpy(base), wanted) > 1e-2


VECTORS = ("operator", "t", "from the left", "bmm", "baddbmm", "einsum, features moved")


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_go_along_its_features(name: str) -> None:
    model, gm, path = made(name, "export")
    make = torch.Generator().manual_seed(4)
    row, col = torch.rand(5, generator=make) + 0.5, torch.rand(3, generator=make) + 0.5
    up = Update(update().down, update().up, 1.5, row=row, col=col)
    injected = inject(gm, Adapter("french", {path: up}))
    changed = copy.deepcopy(model)
    weight = changed.get_parameter(path)
    turned = weight.shape == (3, 5)
    new = up.weight(weight.T if turned else weight)
    weight.copy_(new.T if turned else new)
    for graph in (injected, fold(injected)):
        assert relative(graph(OTHER), changed(OTHER)) <= 1e-5
    assert calls(fold(injected)) == calls(gm)


def three(cut: Any) -> list[Any]:
    return [cut[place] for place in range(3)]


def each(product: Callable[[Any, Any], Any], x: Any, weights: list[Any]) -> list[Any]:
    return [product(y, w) for y, w in zip((x.sin(), x.cos(), x), weights, strict=True)]


# Products with parts of (5, 12), or of (12, 5).
PARTS: dict[str, Callable[[Any, Any], list[Any]]] = {
    "chunks": lambda m, x: each(torch.matmul, x, three(m.w.chunk(3, 1))),
    "slices and bias": lambda m, x: [
        x.sin() @ m.w[:, :4],
        x.cos() @ m.w[:, 4:8] + m.b[4:8],
        x @ m.w[:, -4:] + m.b.chunk(3)[2],
    ],
    "steps": lambda m, x: each(torch.matmul, x, [m.w[:, place::3] for place in range(3)]),
    "heads": lambda m, x: each(torch.matmul, x, three(m.w.view(5, 3, 4).unbind(1))),
    "turned": lambda m, x: [x.sin() @ m.v[:4].t(), x.cos() @ m.v.T[:, 4:8], x @ m.v[8:].mT],
    "einsum": lambda m, x: each(
        lambda y, w: einsum("bsi,io->bso", y, w), x, three(m.w.split(4, 1))
    ),
    "einsum, features moved": lambda m, x: each(
        lambda y, w: einsum("bsi,oi->bos", y, w), x, three(m.v.chunk(3))
    ),
    "bmm": lambda m, x: each(
        lambda y, w: torch.bmm(y, w.expand(x.shape[0], -1, -1)), x, three(m.w.chunk(3, 1))
    ),
    "tensordot": lambda m, x: each(
        lambda y, w: torch.tensordot(y, w, 1), x, three(m.w.chunk(3, 1))
    ),
    "from the left": lambda m, x: each(lambda y, w: w @ y.mT, x, three(m.v.chunk(3))),
    "all spellings": lambda m, x: [
        F.linear(x.sin(), m.v[:4], m.b[:4]),
        x.cos() @ m.v[4:8].T + m.b[4:8],
        einsum("...i,oi->...o", x, m.v[8:]),
    ],
    "parts of the inputs": lambda m, x: [
        x.sin()[..., :2] @ m.w[:2] + x.sin()[..., 2:] @ m.w[2:],
        x.cos() @ m.w,
        x @ m.w,
    ],
    "parts that meet": lambda m, x: [
        (x.sin() @ m.w)[..., :4],
        x.cos() @ m.w[:, 2:6],
        x @ m.w[:, 8:],
    ],
}
WIDE = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(5))
WIDER = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(6))


def parts_of(function: Any) -> nn.Module:
    """A weight of which three products read parts."""

    def mixed(m: Any, x: Tensor) -> Tensor:
        one, two, three = function(m, x)
        y: Tensor = one.tanh() * two.sigmoid() + three.sin()
        return y

    return Computes(mixed, {"w": (5, 12), "v": (12, 5), "b": (12,)})


@functools.cache
def apart_graph(name: str, frontend: str) -> tuple[nn.Module, fx.GraphModule, str]:
    """A model of parts, its graph and the path of its layer: only read."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("block", parts_of(PARTS[name]))
    model.add_module("end", nn.Tanh())
    model.eval().requires_grad_(False)
    gm = trace(model, (WIDE,), dynamic_shapes=({0: "batch"},), frontend=frontend)
    (path,) = {site.path for site in sites(gm)}
    return model, gm, path


def apart(name: str, frontend: str, scale: float = 1.5) -> tuple[fx.GraphModule, Adapter, Tensor]:
    """A graph, an adapter of its layer, and what the model then gives."""
    model, gm, path = apart_graph(name, frontend)
    make = torch.Generator().manual_seed(3)
    factors = torch.randn(2, 5, generator=make), torch.randn(12, 2, generator=make)
    adapter = Adapter("french", {path: Update(*factors, scale)})
    changed = copy.deepcopy(model)
    weight = changed.get_parameter(path)
    delta = Update(*factors, 1.5).delta()
    weight.add_(delta if weight.shape == (12, 5) else delta.T)
    return gm, adapter, changed(WIDER)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", PARTS)
def test_a_product_with_a_part_of_a_weight_is_a_layer(name: str, frontend: str) -> None:
    gm, adapter, wanted = apart(name, frontend)
    injected = inject(gm, adapter)
    folded = fold(injected)
    for graph in (injected, folded):
        assert relative(graph(WIDER), wanted) <= 1e-5
    for control in (gm, inject(gm, apart(name, frontend, 1.35)[1])):
        assert relative(control(WIDER), wanted) > 1e-2
    assert not calls(folded) - calls(gm)
    assert {site.path for site in sites(folded)} == adapter.updates.keys()
    assert FoldLora()(folded).modified is FoldLora()(gm).modified is False
    assert torch.equal(unfold(folded)(WIDER), injected(WIDER))
    ((path, found),) = adapter_from(injected).updates.items()
    assert found.delta().allclose(adapter.updates[path].delta(), atol=1e-6)


@pytest.mark.parametrize("name", ["chunks", "einsum, features moved", "bmm", "all spellings"])
def test_a_file_of_it_is_held_against_the_weight_form(name: str, tmp_path: Path) -> None:
    gm, adapter, wanted = apart(name, "export")
    report = to_onnx(fold(inject(gm, adapter)), tmp_path / "merged.onnx")
    assert "coverage 2 of 2 adapter tensors, 1 layers changed" in str(report)
    to_onnx(gm, tmp_path / "m.onnx", adapters="input", slots=list(adapter.updates))
    export_adapter(adapter, tmp_path / "m.onnx", tmp_path / "french.onnx_adapter")
    session = Session(tmp_path / "m.onnx")
    (base,) = session.run({"input": WIDER}).values()
    (adapted,) = session.run({"input": WIDER}, adapter=tmp_path / "french.onnx_adapter").values()
    assert relative(torch.from_numpy(adapted), wanted) <= 1e-5
    assert relative(torch.from_numpy(base), wanted) > 1e-2


class BothWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x @ self.w) @ self.w.t())


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_weight_that_is_read_both_ways_is_made_anew(frontend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = BothWays().eval().requires_grad_(False), torch.randn(3, 6)
    gm = trace(model, (x,), frontend=frontend)
    mine = Update(torch.randn(2, 6), torch.randn(4, 2), 0.5)
    changed = copy.deepcopy(model)
    changed.w.add_(mine.delta().T)
    injected = inject(gm, Adapter("french", {"w": mine}))
    folded = fold(injected)
    for graph in (injected, folded):
        assert relative(graph(x), changed(x)) <= 1e-5
    assert relative(gm(x), changed(x)) > 1e-2
    assert unmerged(folded) == {}
    assert to_onnx(folded, tmp_path / "merged.onnx").mode == "merged"


def test_no_factors_stand_beside_a_weight_that_is_read_both_ways(tmp_path: Path) -> None:
    gm = trace(BothWays(), (torch.randn(3, 6),))
    with pytest.raises(AdapterError, match="w: one call multiplies with its weight w, another"):
        inject(gm, LoraConfig(r=2, target_modules=["w"]))
    with pytest.raises(ExportError, match="slots: w: one call multiplies with the weight"):
        to_onnx(gm, tmp_path / "m.onnx", adapters="input", slots=["w"])
    assert not list(tmp_path.iterdir())


class Square(nn.Module):
    """Its shape does not tell whether the weight is (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("make", [Square, lambda: block(SPELLINGS["operator"])])
def test_target_parameters_act_on_it_as_in_peft(make: Any, frontend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Tanh()).eval()
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=["0.w"])
    owner = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for name, parameter in owner.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, 0, 0.5)
    owner.save_pretrained(tmp_path / "french")
    adapter = load_adapter(tmp_path / "french")
    gm = trace(model, (X,), dynamic_shapes=({0: "batch"},), frontend=frontend)
    injected = inject(gm, adapter)
    save_adapter(adapter_from(injected), tmp_path / "again", format="peft")
    again = load_adapter(tmp_path / "again")
    half = combine([(adapter, 0.5), (adapter_from(injected), 0.5)])
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "again").eval()
    with torch.no_grad():
        wanted = owner(OTHER)
        for graph in (injected, fold(injected), inject(gm, again), inject(gm, half), loaded):
            assert relative(graph(OTHER), wanted) <= 1e-5
        assert relative(gm(OTHER), wanted) > 1e-2


class Written(nn.Module):
    """A hand-written layer with hand-written factors beside it, and a constant vector."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6))
        self.u, self.v = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 6))
        self.g: Tensor
        self.register_buffer("g", torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        d = einsum("...r,ro->...o", x @ self.u, self.v) / 3
        a, b = d.chunk(2, -1)
        return torch.relu((x @ self.w - torch.cat([a, b], -1)) * self.g)


class SquareFactors(Written):
    """Factors as large as the layer: any of the three has its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u, self.v = (nn.Parameter(torch.randn(3, 3)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.u @ self.v + x @ self.w)


class TurnedBehind(Written):
    """The layer reads a turned batch, and what its factors give is turned."""

    def forward(self, x: Tensor) -> Tensor:
        low = (x @ self.u @ self.v).transpose(-2, -3)
        return torch.relu(x.transpose(-2, -3) @ self.w + low)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("function", [
    lambda m, x: x @ m.w + (x @ m.u @ m.v).transpose(-2, -3),
    lambda m, x: x @ m.w + einsum("bsr,ro->sbo", x @ m.u, m.v),
    lambda m, x: x @ m.w + (x @ m.u @ m.v).transpose(-2, -3).reshape(16, 5).reshape(4, 4, 5),
], ids=["transpose", "einsum", "reshape"])  # fmt: skip
def test_rows_that_do_not_line_up_are_never_added(function: Any, frontend: str) -> None:
    torch.manual_seed(0)
    model = Computes(function, {"w": (3, 5), "u": (3, 2), "v": (2, 5)}).eval()
    x = torch.randn(4, 4, 3)
    folded = fold(trace(model, (x,), frontend=frontend))
    assert relative(folded(x), model(x)) <= 1e-5
    assert relative(x @ (model.w + model.u @ model.v), model(x)) > 1e-2
    assert any(n.target == "w" for n in folded.graph.nodes)  # the layer has its own weight


WRITTEN = [(make, frontend) for make in (Written, SquareFactors) for frontend in FRONTENDS]


# A symbolic trace does not know that an input which is turned has features.
@pytest.mark.parametrize(("make", "frontend"), [*WRITTEN, (TurnedBehind, "export")])
def test_a_written_adapter_folds_into_its_layer(make: Any, frontend: str) -> None:
    torch.manual_seed(0)
    model = make().eval()
    gm = trace(model, (X,), dynamic_shapes=({0: "batch"},), frontend=frontend)
    folded = fold(gm)
    assert calls(folded) - Counter(["transpose"]) == {"matmul": 1, "relu": 1}
    (site,) = sites(folded)
    assert site.path == "w"
    assert relative(folded(OTHER), model(OTHER)) <= 1e-5
    base = OTHER.transpose(0, 1) if make is TurnedBehind else OTHER
    assert relative(torch.relu(base @ model.w), model(OTHER)) > 1e-2


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 5))
        self.down, self.up = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w + 1.5 * (x @ self.down @ self.up))


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_it_is_raised_beside_its_layer(frontend: str) -> None:
    torch.manual_seed(0)
    model, x = Beside().eval(), torch.randn(4, 6)
    raised = RaiseLora("french")(trace(model, (x,), frontend=frontend)).graph_module
    assert [site.path for site in sites(raised)] == ["w"]
    (found,) = adapter_from(raised).updates.values()
    assert relative(found.delta(), 1.5 * (model.down @ model.up).T.detach()) <= 1e-5
    assert relative(raised(x), model(x)) <= 1e-5


def test_experts_and_activations_are_no_layer() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.w).mT @ x

    assert sites(trace(Experts(), (torch.randn(4, 7, 3),))) == []
    assert sites(trace(Experts())) == []
