"""What stands beside a layer, and the update that says the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from lora_fx import inject, to_onnx, trace
from lora_fx.adapters.adapter import Adapter, AnyUpdate, Scaling, Update, WeightUpdate
from lora_fx.adapters.other_updates import added
from lora_fx.adapters.source_record import is_embedding
from lora_fx.algebra.matrix_expr import Kron, Sum, constant
from lora_fx.errors import AdapterError
from lora_fx.export import export_adapter
from lora_fx.injection.branch_tensors import (
    BranchTensors,
    branch_tensors,
    check_branches,
    update_of,
)
from lora_fx.layers.layer import Layer
from lora_fx.testing import relative

# down, up and what broadcasts over outputs and inputs, as the calls of each kind read them.
SIZES: dict[str, tuple[tuple[int, ...], ...]] = {
    "linear": ((3, 2), (2, 5), (5,), (3,)),
    "linear_transposed": ((3, 2), (2, 5), (5,), (3,)),
    "embedding": ((3, 2), (2, 5), (5,), (3,)),
    "conv1d": ((2, 3, 4), (5, 2, 1), (5, 1), (3, 1)),
}
VECTORS = ("gain", "bias", "col")


def drawn(kind: str, vectors: tuple[str, ...]) -> BranchTensors:
    draw = torch.Generator().manual_seed(0)
    down, up, out, into = (torch.rand(size, generator=draw) + 0.5 for size in SIZES[kind])
    whole = {"gain": out, "bias": out + 1, "col": into}
    return BranchTensors(down, up, **{name: whole[name] for name in vectors})


@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("vectors", [(), *((name,) for name in VECTORS), VECTORS])
@pytest.mark.parametrize("kind", SIZES)
def test_what_is_beside_a_layer_is_read_back(
    kind: str, vectors: tuple[str, ...], scale: float
) -> None:
    terms = drawn(kind, vectors)
    site = Layer(path="fc", kind=kind, shape=(5, 3, 4)[: 2 + (kind == "conv1d")], dtype=torch.float)
    update = update_of(terms, site, scale)
    assert (update.scale, update.shape, update.rank) == (scale, site.shape, 2)
    assert is_embedding(update.stored) == (kind == "embedding")
    base = torch.rand(site.stored_shape)
    again = branch_tensors(update, site, lambda: base, lambda: None).each()
    assert again.keys() == terms.each().keys() == {"down", "up", *vectors}
    for name, value in terms.each().items():
        wanted = value * scale if name == "up" else value  # which the branch multiplies it by
        assert again[name].shape == value.shape
        assert relative(again[name], wanted) <= 1e-6, name


def test_outputs_that_are_cut_off_have_no_factors_to_read() -> None:
    terms = drawn("linear", ("gain",))
    assert terms.gain is not None
    assert terms.up is not None
    terms.gain[1], terms.up[:, 1] = -1.0, 0.0  # a row of zeros: W' is zero there
    site = Layer(path="fc", kind="linear", shape=(5, 3), dtype=torch.float)
    update = update_of(terms, site)
    assert update.row is not None
    assert float(update.row[1]) == 0
    assert not update.up[1].any()
    assert bool(update.up.isfinite().all())
    assert not update.weight(torch.rand(5, 3))[1].any()


HALF, SINGLE = torch.float16, torch.float32


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.fc = nn.Embedding(9, 4), nn.Conv1d(4, 6, 3), nn.Linear(6, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(self.conv(self.table(ids).mT).mT)
        return y


@pytest.fixture(scope="module", params=[HALF, SINGLE], ids=str)
def graph(request: pytest.FixtureRequest) -> fx.GraphModule:
    torch.manual_seed(0)
    return trace(Net().to(request.param).eval(), (torch.arange(7).reshape(1, 7),))


@pytest.fixture(scope="module")
def swappable(graph: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finite") / "model.onnx"
    slots = ["table", "conv", "fc"]
    to_onnx(graph, path, adapters="input", slots=slots, vectors=True, verify=False)
    return path


def largest(graph: fx.GraphModule) -> float:
    return torch.finfo(graph.fc.weight.dtype).max  # type: ignore[union-attr, arg-type]


SHAPES = {"table": (4, 9), "conv": (6, 4, 3), "fc": (5, 6)}


def low_rank(
    path: str, down: float, up: float, scale: float = 1.0, opposed: bool = False
) -> Update:
    out, into, *kernel = SHAPES[path]
    ups = torch.full((out, 2), up, dtype=torch.float64)
    if opposed:  # the product is zero, and each of its two terms is beyond the dtype
        ups[:, 1] *= -1
    return Update(torch.full((2, into, *kernel), down, dtype=torch.float64), ups, scale)


def refused(graph: fx.GraphModule, model: Path, update: AnyUpdate, path: str, reason: str) -> None:
    adapter, out = Adapter("a", {path: update}), model.with_name("a.onnx_adapter")
    if isinstance(update, Update):  # merged, the layer may hold it
        with pytest.raises(AdapterError, match=f"{path}: adapter a: .*{reason}"):
            to_onnx(inject(graph, adapter), out)
    else:
        with pytest.raises(AdapterError, match=f"{path}: adapter a: .*{reason}.* overflows torch"):
            inject(graph, adapter)
    if not isinstance(update, WeightUpdate):
        with pytest.raises(AdapterError, match=f"{path}: adapter a: .*{reason}.* overflows torch"):
            export_adapter(adapter, model, out)
    assert not out.exists()


@pytest.mark.parametrize("path", SHAPES)
@pytest.mark.parametrize("opposed", [False, True])
def test_a_product_that_overflows_is_refused(
    graph: fx.GraphModule, swappable: Path, path: str, opposed: bool
) -> None:
    root = largest(graph) ** 0.5
    update = low_rank(path, 1.5 * root, 1.5 * root, opposed=opposed)
    refused(graph, swappable, update, path, "the product of down and up")
    fits = low_rank(path, 0.01 * root, 0.01 * root, opposed=opposed)
    check_branches(inject(graph, Adapter("a", {path: fits})))


def test_a_scale_that_overflows_is_refused(graph: fx.GraphModule, swappable: Path) -> None:
    adapter = Adapter("a", {"fc": low_rank("fc", 1.0, 1.0, 2 * largest(graph))})
    for act in (
        lambda: inject(graph, adapter),
        lambda: export_adapter(adapter, swappable, swappable.with_name("b")),
    ):
        with pytest.raises(AdapterError, match=r"values overflow torch\.float.*in up"):
            act()


def test_what_down_gives_may_overflow_alone(graph: fx.GraphModule, swappable: Path) -> None:
    update = low_rank("fc", 0.9 * largest(graph), 1e-6)
    refused(graph, swappable, update, "fc", "what down gives")
    table = low_rank("table", 0.4 * largest(graph), 1e-6)  # one value is looked up, none summed
    check_branches(inject(graph, Adapter("a", {"table": table})))


def test_a_column_may_make_down_overflow(graph: fx.GraphModule, swappable: Path) -> None:
    col = torch.full((6,), 0.3 * largest(graph), dtype=torch.float64)
    loud = replace(low_rank("fc", 6.0, 1e-6), col=col)
    refused(graph, swappable, loud, "fc", "what down gives")
    quiet = replace(low_rank("fc", 0.9 * largest(graph), 1e-6), col=torch.full((6,), 0.1))
    check_branches(inject(graph, Adapter("a", {"fc": quiet})))


def test_the_largest_number_of_a_dtype_is_one(graph: fx.GraphModule) -> None:
    base = trace(nn.Sequential(nn.Embedding(9, 4)).to(graph.fc.weight.dtype).eval())  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        base.get_parameter("0.weight").clamp_(-1.0, 1.0)[0, 0] = 1.0
    row = torch.full((4,), largest(graph), dtype=torch.float64)
    found = inject(base, Adapter("a", {"0": Scaling(row=row)}))
    assert float(found(torch.tensor([0])).detach().max()) == largest(graph)
    with torch.no_grad():
        base.get_parameter("0.weight")[0, 0] = 1.1
    with pytest.raises(AdapterError, match="its gain times the weight overflows"):
        inject(base, Adapter("a", {"0": Scaling(row=row)}))


def test_a_vector_times_the_weight_may_overflow(graph: fx.GraphModule, swappable: Path) -> None:
    assert float(graph.get_parameter("table.weight").detach().abs().max()) > 1.2
    row = torch.full((4,), 0.9 * largest(graph), dtype=torch.float64)
    for sign in (1, -1):
        refused(graph, swappable, Scaling(row=sign * row), "table", "its gain times the weight")
    inject(graph, Adapter("a", {"table": Scaling(row=row / 9)}))


def test_a_weight_made_anew_may_overflow(graph: fx.GraphModule, swappable: Path) -> None:
    def product(root: torch.Tensor) -> WeightUpdate:
        left, right = constant(root[:, :1]), constant(root[:1])
        return WeightUpdate("full", lambda weight: Sum(weight, Kron(left, right)), (5, 6))

    root = torch.full((5, 6), 1.5 * largest(graph) ** 0.5, dtype=torch.float64)
    update = product(root)
    refused(graph, swappable, update, "fc", "the weight that it makes")
    inject(graph, Adapter("a", {"fc": product(root / 9)}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_wherever_it_is(graph: fx.GraphModule, bad: float) -> None:
    values = torch.zeros(5, 6)
    values[1, 2] = bad
    made = Adapter("a", {"fc": WeightUpdate("full", added(values), (5, 6))})
    with pytest.raises(AdapterError, match=r"^fc\.lora_weight_0\.a: NaN or infinity in torch"):
        inject(graph, made)
    biased = replace(low_rank("fc", 1.0, 1.0), bias=values[1, :5])
    for update in (biased, low_rank("fc", bad, 1.0), Scaling(row=values[1, :5])):
        with pytest.raises(AdapterError, match=r"^fc: adapter a holds NaN or infinity; save it ag"):
            inject(graph, Adapter("a", {"fc": update}))
    with pytest.raises(AdapterError, match=r"fc\.weight: adapter a replaces it by NaN or infinity"):
        inject(graph, Adapter("a", {}, {"fc.weight": values}))


def test_a_replacement_that_overflows_is_refused(graph: fx.GraphModule) -> None:
    values = torch.full((5,), 2 * largest(graph), dtype=torch.float64)
    with pytest.raises(AdapterError, match=r"fc\.bias: .* overflow torch\.float"):
        inject(graph, Adapter("a", {}, {"fc.bias": values}))


def _nan(branch: torch.Tensor) -> None:
    branch.flatten()[0] = float("nan")


def _huge(branch: torch.Tensor) -> None:
    branch.fill_(torch.finfo(branch.dtype).max / 2)


@pytest.mark.parametrize("spoil", [_nan, _huge])
def test_branches_that_were_spoilt_later_are_not_exported(
    graph: fx.GraphModule, tmp_path: Path, spoil: Callable[[torch.Tensor], None]
) -> None:
    gm = inject(graph, Adapter("a", {"fc": low_rank("fc", 0.1, 0.1)}))
    with torch.no_grad():
        spoil(gm.get_parameter("fc.lora_A.a"))
    with pytest.raises(AdapterError, match=r"fc: adapter a: .*not finite in torch"):
        to_onnx(gm, tmp_path / "model.onnx", verify=False)
    assert list(tmp_path.iterdir()) == []
