"""The registry of layer types: what is told once, and a type that is registered from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import Adapter, LoraConfig, Update, adapter_from, fold, inject, text, trace
from lora_fx.affine.transfer import TRANSFER
from lora_fx.affine.transfer.linear import dense_layer
from lora_fx.algebra.matrix_expr import number, scaled, transposed
from lora_fx.errors import TraceError
from lora_fx.explanation import explain, unmerged
from lora_fx.layers.layer import Layer
from lora_fx.layers.layer_types import OPERATORS, TYPES, LayerType, Operands, register
from lora_fx.layers.sites import sites
from lora_fx.passes import StripLora
from lora_fx.testing import relative

aten = torch.ops.aten


@torch.library.custom_op("mylib::scaled_linear", mutates_args=())
def scaled_linear(
    x: torch.Tensor, factor: float, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``factor * (x @ W.T) + b``: the weight is not at its usual place."""
    y = factor * (x @ weight.t())
    return y.clone() if bias is None else y + bias


@scaled_linear.register_fake
def _(
    x: torch.Tensor, factor: float, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("mylib::mul", mutates_args=())
def taken_name(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A product of matrices, whatever it is called."""
    return x @ weight


@taken_name.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


class Between(nn.Module):
    """A layer between two functions that are not affine, for either tracer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(torch.sin(x)))


class Scaled(nn.Module):
    def __init__(self, bias: bool = True, by_name: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3) / 2)
        self.bias = nn.Parameter(torch.randn(5)) if bias else None
        self.by_name = by_name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.by_name:
            return torch.ops.mylib.scaled_linear(x, 2.0, bias=self.bias, weight=self.weight)
        return torch.ops.mylib.scaled_linear(x, 2.0, self.weight, self.bias)


class Stored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mylib.mul(x, self.weight)


SCALED = LayerType(
    name="scaled_linear",
    operators={
        torch.ops.mylib.scaled_linear.default: Operands(
            weight=2, bias=3, folded=aten.linear.default
        )
    },
    classes=(Scaled,),
)
TURNED = LayerType(
    name="stored_in_out",
    operators={torch.ops.mylib.mul.default: Operands(bias=None)},
    classes=(Stored,),
    weight="in out",
)


@pytest.fixture
def known() -> Iterator[None]:
    """Both types, for the time of a test."""
    before = dict(TYPES), dict(OPERATORS), dict(TRANSFER)
    register(SCALED)
    register(TURNED)
    yield
    for table, held in zip((TYPES, OPERATORS, TRANSFER), before, strict=True):
        table.clear()
        table.update(held)  # type: ignore[call-overload]


def rule_of_scaled(analysis: Any, node: Any) -> Any:
    """What fold is told of the operator from outside."""
    factor, bias = node.args[1], node.args[3] if len(node.args) > 3 else None
    weight = node.args[2]
    matrix = scaled(number(factor), analysis.matrix(weight))
    return dense_layer(analysis, node, node.args[0], weight, matrix, bias)


def rule_of_scaled_down(analysis: Any, node: Any) -> Any:
    x, weight = node.args
    return dense_layer(analysis, node, x, weight, transposed(analysis.matrix(weight)))


X = torch.randn(4, 7, 3)


def adapter(path: str = "layer", **vectors: torch.Tensor) -> Adapter:
    make = torch.Generator().manual_seed(1)
    down, up = torch.randn(2, 3, generator=make), torch.randn(5, 2, generator=make)
    return Adapter("a", {path: Update(down, up, 0.5, **vectors)})


def wanted(model: Any, factor: float = 1.0) -> torch.Tensor:
    """The module with what the adapter adds to its outputs, by hand."""
    delta = adapter().updates["layer"].delta()  # type: ignore[union-attr]
    inner = torch.sin(X)
    return torch.tanh(model.layer(inner) + factor * F.linear(inner, delta))


def weight_of(gm: Any) -> torch.Tensor:
    (site,) = sites(gm)
    found = gm.get_parameter(str(site.weight.target))
    assert isinstance(found, torch.Tensor)
    return found


MAKE: dict[str, Callable[[], nn.Module]] = {
    "scaled": Scaled,
    "without bias": lambda: Scaled(bias=False),
    "by keywords": lambda: Scaled(by_name=True),
    "stored": Stored,
}


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("name", MAKE)
def test_a_registered_operator_takes_an_adapter_and_gives_it_back(name: str, frontend: str) -> None:
    model = Between(MAKE[name]()).eval()
    gm = trace(model, (X,), frontend=frontend)
    (site,) = sites(gm)
    assert (site.path, site.shape, site.is_linear) == ("layer", (5, 3), False)
    injected = inject(gm, adapter())
    assert relative(injected(X), wanted(model)) <= 1e-6
    assert relative(injected(X), wanted(model, 1.1)) > 1e-3
    back = adapter_from(injected).updates["layer"]
    assert torch.equal(back.delta(), adapter().updates["layer"].delta())


@pytest.mark.usefixtures("known")
def test_without_a_transfer_function_the_branch_stays_and_fold_says_why() -> None:
    model = Between(Scaled()).eval()
    injected = inject(trace(model, (X,)), adapter())
    folded = fold(injected)
    assert relative(folded(X), wanted(model)) <= 1e-6
    assert "lora_A" in text(folded)
    assert any("mylib::scaled_linear is not known to be affine" in s for s in explain(injected))
    assert list(unmerged(folded)) == ["layer"]


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("name", MAKE)
def test_with_one_the_branch_folds_into_the_stored_weight(name: str, frontend: str) -> None:
    TRANSFER["mylib::scaled_linear"] = rule_of_scaled
    TRANSFER["mylib::mul"] = rule_of_scaled_down
    model: Any = Between(MAKE[name]()).eval()
    bias = torch.randn(5)
    injected = inject(trace(model, (X,), frontend=frontend), adapter(bias=bias))
    folded = fold(injected)
    inner = torch.sin(X)
    delta = adapter().updates["layer"].delta()
    shifted = torch.tanh(model.layer(inner) + F.linear(inner, delta) + 0.5 * bias)
    assert relative(folded(X), shifted) <= 1e-6
    assert relative(folded(X), wanted(model)) > 1e-3
    assert "lora_" not in text(folded)
    if name == "stored":
        assert weight_of(folded).shape == (3, 5)


@pytest.mark.usefixtures("known")
def test_a_registered_layer_trains_and_keeps_other_operators() -> None:
    model = Between(Scaled()).eval()
    gm = inject(trace(model, (X,)), LoraConfig(r=2, alpha=4, target_modules=["layer"], seed=0))
    assert torch.equal(gm(X), model(X))
    named = dict(gm.named_parameters())
    assert named["layer.lora_A.default"].requires_grad
    gm(X).square().mean().backward()
    assert named["layer.lora_B.default"].grad is not None


def test_an_operator_of_a_known_name_is_not_that_operator() -> None:
    """Unregistered, ``mylib::mul`` is no product by elements, so nothing folds through it."""
    model = Between(nn.Sequential(nn.Linear(3, 3), Stored())).eval()
    injected = inject(
        trace(model, (X,)),
        Adapter("a", {"layer.0": Update(torch.randn(2, 3), torch.randn(3, 2), 0.5)}),
    )
    folded = fold(injected)
    assert relative(folded(X), injected(X)) <= 1e-6
    assert [site.path for site in sites(folded)] == ["layer.0"]


@pytest.mark.usefixtures("known")
def test_a_second_type_of_a_name_or_an_operator_is_refused() -> None:
    for again in (SCALED, LayerType(name="other", operators={aten.linear.default: Operands()})):
        with pytest.raises(TraceError, match="registered already"):
            register(again)
    assert "other" not in TYPES


@pytest.mark.parametrize(
    "axes", [{"weight": "out *k"}, {"down": "r out"}, {"up": "r out n"}, {"vector": "out"}]
)
def test_axes_that_are_none_of_a_layer_are_refused(axes: dict[str, Any]) -> None:
    with pytest.raises(TraceError, match=r"layer type 'odd': .* expected the axes of"):
        LayerType(name="odd", operators={}, **axes)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", TYPES)
def test_what_is_stored_is_read_back(kind: str, groups: int) -> None:
    known = TYPES[kind]
    if groups > 1 and not known.kernel:
        return
    kernel = (3, 2, 4)[: known.kernel]
    layer = Layer(
        path="layer", kind=kind, shape=(6, 4, *kernel), dtype=torch.float32, groups=groups
    )
    weight = torch.randn(layer.own_shape)
    stored = known.store("weight", weight, groups)
    assert tuple(stored.shape) == layer.stored_shape
    assert torch.equal(known.canonical("weight", stored, groups), weight)
    assert known.canonical_shape(layer.stored_shape, groups) == layer.own_shape
    shapes = {"down": (2, 4, *kernel), "up": (6, 2), "vector": (6,)}
    sizes = {"out": 6, "in": 4, "r": 2, "n": 6}
    for role, shape in shapes.items():
        tensor = torch.randn(shape)
        own = known.store(role, tensor)
        assert tuple(own.shape) == known.shape(role, sizes, kernel)
        assert torch.equal(known.canonical(role, own), tensor)


CONV: Any = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_weight_of_a_transposed_convolution_is_that_of_its_gradient(
    dims: int, groups: int
) -> None:
    """An oracle for the axes: what torch's own convolution of the canonical weight undoes."""
    kernel = (3, 2, 1)[:dims]
    stored = torch.randn(4, 6 // groups, *kernel, dtype=torch.float64)
    known = TYPES[f"conv_transpose{dims}d"]
    own = known.canonical("weight", stored, groups)
    assert own.shape == (6, 4 // groups, *kernel)
    x = torch.randn(2, 4, *(5, 6, 7)[:dims], dtype=torch.float64)
    full = [size - 1 for size in kernel]
    flipped = own.flip(list(range(2, 2 + dims)))
    conv: Any = getattr(F, f"conv{dims}d")
    wanted = conv(x, flipped, padding=full, groups=groups)
    assert relative(CONV[dims](x, stored, groups=groups), wanted) < 1e-12
    assert relative(CONV[dims](x, stored, groups=groups), 1.1 * wanted) > 1e-2


def test_an_export_says_what_runs_no_operator_of_ones_own(known: None, tmp_path: Path) -> None:
    gm = inject(trace(Between(Scaled()).eval(), (X,)), adapter())
    with pytest.raises(lora_fx.ExportError):
        lora_fx.to_onnx(gm, tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: aten.conv_transpose1d(x, w.transpose(0, 1), stride=[2]),
        lambda x, w: aten.conv_transpose1d.default(x, weight=w.transpose(0, 1), stride=[2]),
        lambda x, w: aten.conv1d(x, w, padding="same"),
        lambda x, w: aten.conv1d(x, w, None, [2], [1]),
        lambda x, w: F.conv1d(input=x, weight=w, stride=(2,), padding="valid"),
        lambda x, w: aten.linear(x.transpose(1, 2), weight=w[:, :, 0]),
    ],
)
def test_however_an_operator_is_called_its_layer_is_found(call: Callable[..., Any]) -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = call(x, self.weight)
            return y

    x = torch.randn(2, 3, 8)
    model = Calls().eval()
    gm = trace(model, (x,), frontend="symbolic")
    assert torch.equal(gm(x), model(x))
    names = {str(node.target).split(".")[0] for node in gm.graph.nodes if node.op != "output"}
    assert names & {"aten"}
    assert all(not node.kwargs for node in gm.graph.nodes if node.target in OPERATORS)
    assert any(node.target in OPERATORS for node in gm.graph.nodes)


def _scaled_down(site: Any, x: Any, down: Any) -> Any:
    """Down is the third operand: only who writes the call knows that."""
    return torch.ops.mylib.scaled_linear.default, (x, 1.0, down)


def _scaled_back(site: Any, h: Any, up: Any, groups: int) -> Any:
    return torch.ops.mylib.scaled_linear.default, (h, 1.0, up)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_a_type_with_calls_of_its_own_needs_no_reader(frontend: str) -> None:
    own = LayerType(
        name="own",
        operators={torch.ops.mylib.mul.default: Operands(bias=None)},
        classes=(Stored,),
        weight="in out",
        down="r in",
        up="out r",
        shrink=_scaled_down,
        expand=_scaled_back,
    )
    before = dict(TYPES), dict(OPERATORS)
    register(own)
    try:
        model = Between(Stored()).eval()
        injected = inject(trace(model, (X,), frontend=frontend), adapter())
        assert relative(injected(X), wanted(model)) <= 1e-6
        assert relative(injected(X), wanted(model, 1.1)) > 1e-3
        back = adapter_from(injected).updates["layer"]
        assert torch.equal(back.delta(), adapter().updates["layer"].delta())
        assert text(StripLora()(injected).graph_module) == text(
            trace(model, (X,), frontend=frontend)
        )
    finally:
        for table, held in zip((TYPES, OPERATORS), before, strict=True):
            table.clear()
            table.update(held)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("padding", [None, 2])
def test_the_padding_of_a_table_learns_nothing(padding: int | None, frontend: str) -> None:
    table, ids = nn.Embedding(5, 3, padding_idx=padding), torch.arange(5)[None]
    gm = trace(nn.Sequential(table), (ids,), frontend=frontend)
    gm(ids).sum().backward()
    grad = gm.get_parameter("0.weight").grad
    assert grad is not None
    assert grad.any(1).tolist() == [row != padding for row in range(5)]
