"""Two layers as people write them in notebooks, folded to one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from lora_fx import (
    Session,
    TraceError,
    adapter_from,
    export_adapter,
    fold,
    text,
    to_onnx,
    trace,
    unfold,
)
from lora_fx.graph.ops import GUARDS, op_name
from lora_fx.passes import FoldLora, RaiseLora
from lora_fx.testing import relative


class LinearLora(nn.Module):
    """``linear(x) + scale * x @ (lora_a @ lora_b).T``, with dropout on what comes out."""

    def __init__(self, into: int, out: int, rank: int = 2, alpha: float = 3.0) -> None:
        super().__init__()
        self.into = into
        self.linear = nn.Linear(into, out)
        self.lora_a = nn.Parameter(torch.randn(out, rank))
        self.lora_b = nn.Parameter(torch.randn(rank, into))
        self.scale = alpha / rank
        self.dropout = nn.Dropout(0.1)

    def merge(self) -> None:
        self.linear.weight.data += self.scale * (self.lora_a @ self.lora_b)

    def unmerge(self) -> None:
        self.linear.weight.data -= self.scale * (self.lora_a @ self.lora_b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.linear(x) + self.scale * (x @ (self.lora_a @ self.lora_b).T)
        result: torch.Tensor = self.dropout(output)
        return result

    def base(self) -> nn.Module:
        return nn.Sequential(self.linear, self.dropout).eval()


class FusedLora(nn.Module):
    """A fused QKV layer: A is an nn.Linear, B a grouped nn.Conv1d, some groups have neither."""

    def __init__(self, into: int, out: int, r: int, enable_lora: list[bool]) -> None:
        super().__init__()
        groups = sum(enable_lora)
        self.into, self.out = into, out
        self.adapted = out // len(enable_lora) * groups
        self.target = nn.Linear(into, out, bias=False)
        self.lora_A = nn.Linear(into, r * groups, bias=False)
        self.lora_B = nn.Conv1d(r * groups, self.adapted, 1, groups=groups, bias=False)
        self.lora_ind: torch.Tensor
        lora_ind = torch.zeros(out, dtype=torch.bool).view(len(enable_lora), -1)
        lora_ind[enable_lora, :] = True
        self.register_buffer("lora_ind", lora_ind.view(-1))

    def low_rank(self, x: torch.Tensor) -> torch.Tensor:
        after_A = self.lora_A(x.to(self.lora_A.weight.dtype))
        result: torch.Tensor = self.lora_B(after_A.transpose(-2, -1)).transpose(-2, -1)
        return result

    def zero_pad(self, x: torch.Tensor) -> torch.Tensor:
        result = x.new_zeros((*x.shape[:-1], self.out))
        result = result.view(-1, self.out)
        result[:, self.lora_ind] = x.reshape(-1, self.adapted)
        return result.view((*x.shape[:-1], self.out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.target(x) + self.zero_pad(self.low_rank(x))
        return result

    def base(self) -> nn.Module:
        return self.target


class ConcatLora(FusedLora):
    """The same of Q and V, padded by concatenation, which symbolic tracing can follow."""

    def __init__(self, into: int, out: int, r: int) -> None:
        super().__init__(into, out, r, [True, False, True])

    def zero_pad(self, x: torch.Tensor) -> torch.Tensor:
        query, value = x.chunk(2, dim=-1)
        return torch.cat([query, torch.zeros_like(query), value], dim=-1)


class PadLora(FusedLora):
    """Only K, padded by a function."""

    def __init__(self, into: int, out: int, r: int) -> None:
        super().__init__(into, out, r, [False, True, False])

    def zero_pad(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (self.out // 3, self.out // 3))


Layer = LinearLora | FusedLora
AXES = ({0: "batch", 1: "length"},)
LAYERS = {
    "linear": lambda: LinearLora(3, 5),
    "linear_of_more_rank": lambda: LinearLora(3, 5, rank=7),
    "fused": lambda: FusedLora(5, 21, 2, [True, False, True]),
    "fused_of_four": lambda: FusedLora(5, 28, 3, [False, True, True, False]),
    "fused_all": lambda: FusedLora(5, 21, 2, [True, True, True]),
    "concat": lambda: ConcatLora(5, 21, 2),
    "pad": lambda: PadLora(5, 21, 2),
}


def made(name: str) -> Layer:
    torch.manual_seed(0)
    layer: Layer = LAYERS[name]()
    return layer.eval()


def batch(layer: Layer, *sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, layer.into, generator=torch.Generator().manual_seed(sizes[0]))


def traced(layer: nn.Module, x: torch.Tensor, frontend: str = "export") -> fx.GraphModule:
    shapes = AXES if frontend == "export" else None
    return trace(layer, (x,), dynamic_shapes=shapes, frontend=frontend)


def operators(gm: fx.GraphModule) -> Counter[str]:
    own = (n for n in gm.graph.nodes if n.op != "get_attr" and n.target != GUARDS)
    return Counter(map(op_name, own))


@pytest.mark.parametrize(
    ("name", "frontend"),
    [(name, "export") for name in LAYERS]
    + [(name, "symbolic") for name in ("linear", "linear_of_more_rank", "concat", "pad")],
)
def test_a_notebook_layer_folds_to_one_linear(name: str, frontend: str) -> None:
    layer = made(name)
    x, other = batch(layer, 4, 7), batch(layer, 2, 9)
    gm, base = (traced(m, x, frontend) for m in (layer, layer.base()))
    folded = fold(gm)
    assert operators(folded) == operators(base)
    assert operators(folded)["linear"] == 1
    assert FoldLora()(folded).modified is False
    with torch.no_grad():
        wanted = layer(other)
        assert relative(gm(other), wanted) == 0
        assert relative(folded(other), wanted) <= 1e-5
        assert relative(layer.base()(other), wanted) >= 1e-2


def test_symbolic_tracing_says_that_it_cannot_follow_zero_pad() -> None:
    layer = made("fused")
    with pytest.raises(TraceError, match=r"(?s)x\.new_zeros.*cannot be iterated"):
        traced(layer, batch(layer, 4, 7), "symbolic")


@pytest.mark.parametrize("name", ["linear", "fused", "concat"])
def test_folding_and_back_is_exact_a_hundred_times(name: str) -> None:
    layer = made(name)
    x = batch(layer, 4, 7)
    gm = first = traced(layer, x)
    before = {k: v.clone() for k, v in gm.state_dict().items()}
    wanted, merged = gm(x), fold(gm)(x)
    for _ in range(100):
        folded = fold(gm)
        assert torch.equal(folded(x), merged)
        gm = unfold(folded)
    assert text(gm) == text(first)
    assert torch.equal(gm(x), wanted)
    assert gm.state_dict().keys() == before.keys()
    assert all(torch.equal(gm.state_dict()[k], v) for k, v in before.items())


def test_merging_in_place_and_back_is_not_exact() -> None:
    layer = made("linear")
    assert isinstance(layer, LinearLora)
    before = layer.linear.weight.clone()
    for _ in range(100):
        layer.merge()
        layer.unmerge()
    assert not torch.equal(layer.linear.weight, before)


@pytest.mark.parametrize("name", ["linear", "fused", "concat", "pad"])
def test_the_merged_layer_runs_in_onnxruntime(name: str, tmp_path: Path) -> None:
    layer = made(name)
    assert_runs(layer, fold(traced(layer, batch(layer, 4, 7))), tmp_path / "merged.onnx")


def assert_runs(layer: Layer, folded: fx.GraphModule, path: Path) -> None:
    to_onnx(folded, path)
    other = batch(layer, 2, 9)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"x": other.numpy()})
    with torch.no_grad():
        wanted = layer(other)
        assert relative(torch.from_numpy(actual), wanted) <= 1e-5
        assert relative(folded(other), wanted) <= 1e-5
        assert relative(layer.base()(other), wanted) >= 1e-2


PATTERNS = [tuple(bool(bits >> place & 1) for place in range(3)) for bits in range(1, 8)]


@pytest.mark.parametrize("rank", [2, 7])
@pytest.mark.parametrize("enabled", PATTERNS)
def test_every_pattern_of_a_fused_layer_runs_as_it_is_and_merged(
    enabled: tuple[bool, ...], rank: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    layer = FusedLora(5, 21, rank, list(enabled)).eval()
    gm, other = traced(layer, batch(layer, 4, 7)), batch(layer, 2, 9)
    folded = fold(gm)
    assert operators(folded) == operators(traced(layer.base(), batch(layer, 4, 7)))
    assert relative(folded(other), layer(other)) <= 1e-5
    to_onnx(gm, tmp_path / "beside.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "beside.onnx")
    (actual,) = session.run(None, {"x": other.numpy()})
    with torch.no_grad():
        assert relative(torch.from_numpy(actual), layer(other)) <= 1e-5
        assert relative(layer.base()(other), layer(other)) >= 1e-2


@pytest.mark.parametrize("name", ["linear", "fused", "concat"])
def test_a_notebook_layer_becomes_swappable(name: str, tmp_path: Path) -> None:
    layer = made(name)
    raised = RaiseLora("french")(traced(layer, batch(layer, 4, 7))).graph_module
    adapter = adapter_from(raised, "french")
    to_onnx(raised, tmp_path / "model.onnx", adapters="input")
    export_adapter(adapter, tmp_path / "model.onnx", tmp_path / "french.onnx_adapter")
    other, session = batch(layer, 2, 9), Session(tmp_path / "model.onnx")
    (base,) = session.run({"x": other}).values()
    (adapted,) = session.run({"x": other}, adapter=tmp_path / "french.onnx_adapter").values()
    with torch.no_grad():
        wanted = layer(other)
        assert relative(raised(other), wanted) <= 1e-5
        assert relative(torch.from_numpy(adapted), wanted) <= 1e-5
        assert relative(torch.from_numpy(base), layer.base()(other)) <= 1e-5
        assert relative(torch.from_numpy(base), wanted) >= 1e-2
    (update,) = adapter.updates.values()
    assert update.rank == 2 if isinstance(layer, LinearLora) else 4


def test_the_fused_layer_at_the_size_of_the_notebook(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        layer = FusedLora(4096, 3 * 4096, 8, [True, False, True])
    layer = layer.to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.uniform_(0.0, 0.1)
    layer.lora_ind.copy_(torch.arange(3).ne(1).repeat_interleave(4096))
    gm = traced(layer, batch(layer, 2, 5))
    folded = fold(gm)
    assert operators(folded)["linear"] == 1
    assert operators(folded).total() == 3  # its input, the layer, its output
    raised = RaiseLora()(gm).graph_module
    assert adapter_from(raised).updates["target"].rank == 16  # two groups of 8
    assert relative(raised(batch(layer, 2, 5)), layer(batch(layer, 2, 5))) <= 1e-5
    assert_runs(layer, folded, tmp_path / "merged.onnx")
