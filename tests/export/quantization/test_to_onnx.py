"""Small networks exported in a few bits: which layers are, how they are said, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx.branch_lowering.selection import Form
from lora_fx.errors import ExportError, VerificationError
from lora_fx.export import (
    Session,
    export_adapter,
    merge_onnx,
    quantize_onnx,
    verify_onnx,
)
from lora_fx.testing import Attention, Computes, make_adapter
from lora_fx.testing.bitsandbytes import TABLES

SOURCE = torch.Generator().manual_seed(3)
X = torch.randn(4, 7, 32, generator=SOURCE)


class Twice(nn.Module):
    """A layer called twice, in a residual, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(x + torch.tanh(self.inner(torch.tanh(self.inner(x)))))
        return y


class Normed(nn.Module):
    """The last layer is in front of a norm: it is one of the base."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(32, 24), nn.LayerNorm(24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.fc(x))
        return y


class Pooled(nn.Module):
    """Hidden states, and logits of one token; only what gives these by itself is a head."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.dense, self.out = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = x + F.gelu(self.fc(x))
        pooled = torch.tanh(self.dense(hidden[:, 0]))
        return hidden, F.log_softmax(self.out(pooled), -1)


class Scaled(nn.Module):
    """Layers that their own module scales and adds to what they read: folded, these are one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(32, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.fc(2 * x) * 0.25)
        y: torch.Tensor = self.head(x + self.out(x))
        return y


class Head(Scaled):
    """The head is the last layer too, and its result is reshaped by a size of the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.fc(x + self.out(torch.tanh(x))))
        return self.out(x).reshape(x.shape[0], -1, 2)


class Bare(nn.Module):
    """Parameters that no layer holds, stored as (in, out); one read in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 32) / 6)
        self.both = nn.Parameter(torch.randn(64, 32) / 6)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(x @ self.w)
        first, second = self.both.chunk(2)
        hidden = hidden + F.linear(hidden, first) * F.linear(hidden, second)
        y: torch.Tensor = self.head(hidden)
        return y


class TwoOfOne(nn.Module):
    """A module with two weights of its own, whose calls bear one name."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 4)
        self.inner = Computes(
            lambda self, x: torch.tanh(x @ self.w1) + torch.sin(x @ self.w2),
            w1=nn.Parameter(torch.randn(32, 32) / 6),
            w2=nn.Parameter(torch.randn(32, 32) / 6),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(torch.tanh(self.inner(x)))
        return y


IDS = torch.tensor([[1, 5, 2], [3, 3, 18]])
# Model, input, what is quantised, what stays.
NETS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, list[str], list[str]]] = {
    "called twice": (Twice, X, ["inner"], ["head"]),
    "a Gemm with a bias": (Twice, X[0], ["inner"], ["head"]),
    "in front of a norm": (Normed, X, ["fc"], []),
    "two outputs": (Pooled, X, ["fc", "dense"], ["out"]),
    "a head called before": (Head, X, ["fc"], ["out"]),
    "bare parameters": (Bare, X, ["w"], ["head"]),
}


def exported(make: Callable[[], nn.Module], x: torch.Tensor, path: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    model = make().eval()
    gm = lora_fx.trace(model, (x,), dynamic_shapes=({0: "batch"},))
    return gm, lora_fx.to_onnx(gm, path, **options)


@pytest.mark.parametrize("what", NETS)
def test_layers_of_the_base_are_quantised_and_heads_stay(what: str, tmp_path: Path) -> None:
    make, x, wanted, left = NETS[what]
    gm, report = exported(make, x, tmp_path / "a.onnx", quantize=4)
    assert report.verified
    assert list(report.quantised.weights) == wanted
    assert list(report.quantised.left) == left
    with torch.no_grad():
        expected = gm(x)
    first = expected[0] if isinstance(expected, tuple) else expected
    found = Session(tmp_path / "a.onnx").run({next(iter(report.inputs)): x})
    gap = np.linalg.norm(found[report.outputs[0]] - first.numpy()) / first.norm()
    assert 1e-4 < gap < 0.2
    nodes = [n.op_type for n in onnx.load(tmp_path / "a.onnx").graph.node]
    assert nodes.count("MatMulNBits") == (2 if make in (Twice, Pooled) else 1)
    again = verify_onnx(gm, tmp_path / "a.onnx")
    assert again.verified
    assert set(again.quantised.weights) == set(wanted)


def test_two_weights_of_one_module_are_two_layers(tmp_path: Path) -> None:
    gm, report = exported(TwoOfOne, X, tmp_path / "a.onnx", quantize=4)
    assert report.verified
    again = verify_onnx(gm, tmp_path / "a.onnx")
    assert again.verified
    assert again.quantised is not None
    assert set(again.quantised.weights) == set(report.quantised.weights)
    assert len(again.quantised.weights) == 2


class Averaged(nn.Module):
    """A matrix of numbers, which no weight is, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(32, 64), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = torch.eye(32).repeat(1, 2) / 2
        y: torch.Tensor = self.head(F.linear(torch.tanh(self.fc(x)), mean).sin())
        return y


@pytest.mark.parametrize("mode", ["constant", "input"])
def test_a_matrix_that_is_no_weight_is_not_quantised(mode: Any, tmp_path: Path) -> None:
    gm, report = exported(Averaged, X, tmp_path / "a.onnx", quantize=4, adapters=mode)
    assert report.verified
    assert list(report.quantised.weights) == ["fc"]
    (other,) = report.quantised.left.keys() - {"head"}
    assert report.quantised.left[other] == "computed from numbers, no weight of the model"
    assert verify_onnx(gm, tmp_path / "a.onnx").verified


@pytest.mark.parametrize("what", NETS)
def test_the_swappable_file_is_quantised_likewise(what: str, tmp_path: Path) -> None:
    make, x, wanted, _ = NETS[what]
    options = {"adapters": "input", "slots": [*wanted], "vectors": True, "quantize": 8}
    _, report = exported(make, x, tmp_path / "a.onnx", **options)
    assert report.verified
    assert list(report.quantised.weights) == wanted
    assert {"base, dequantised", "adapted, dequantised"} <= {row.what for row in report.checks}


@pytest.mark.parametrize("adapters", ["input", "required"])
def test_a_head_stays_beside_its_own_slot(adapters: str, tmp_path: Path) -> None:
    options = {"adapters": adapters, "slots": ["inner", "head"], "quantize": 8, "verify": False}
    _, report = exported(Twice, X, tmp_path / "a.onnx", **options)
    assert list(report.quantised.weights) == ["inner"]
    assert report.quantised.left == {"head": "a head"}


@pytest.mark.parametrize("mode", ["merged", "unmerged"])
def test_an_adapter_in_the_file_is_in_the_bits_or_in_float(mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm = lora_fx.trace(Twice().eval(), (X,))
    injected = lora_fx.inject(gm, make_adapter({"inner": (32, 32)}, rank=2, scale=0.5))
    whole = lora_fx.fold(injected) if mode == "merged" else injected
    report = lora_fx.to_onnx(whole, tmp_path / "a.onnx", quantize=4)
    assert report.verified
    assert report.mode == mode
    assert report.coverage[0].used == 2
    names = {t.name: t.data_type for t in onnx.load(tmp_path / "a.onnx").graph.initializer}
    factors = [name for name in names if ".lora_" in name]
    assert len(factors) == (0 if mode == "merged" else 2)
    assert all(names[name] == onnx.TensorProto.FLOAT for name in factors)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "lokr"])
def test_what_was_merged_from_file_to_file_is_verified_in_bits(kind: str, tmp_path: Path) -> None:
    """merge_onnx knows a layer alone; fold takes a scale and a residual for parts of it."""
    plain, merged, packed = (tmp_path / f"{name}.onnx" for name in ("a", "b", "c"))
    shapes = {"fc": (32, 32), "out": (32, 32)}
    adapter, other = make_adapter(shapes, kind=kind), make_adapter(shapes, rank=3, scale=0.2)
    form = {"lora": "factors", "lokr": "weight"}.get(kind, "vectors")
    gm, _ = exported(Scaled, X, plain, adapters="input", slots=dict.fromkeys(shapes, form))
    merge_onnx(plain, adapter, merged)
    assert set(quantize_onnx(merged, packed).quantised.weights) == set(shapes)
    assert verify_onnx(gm, packed, adapters=[adapter]).verified
    for wrong in ([], [other]):
        with pytest.raises(VerificationError, match="weights are off by more than"):
            verify_onnx(gm, packed, adapters=wrong)


def test_an_adapter_that_shares_a_weight_with_its_base_is_not_rounded(tmp_path: Path) -> None:
    """The cheapest form of a branch puts rows of B under W: that weight stays, and is named."""
    torch.manual_seed(0)
    gm = lora_fx.trace(Twice().eval(), (X,))
    injected = lora_fx.inject(gm, make_adapter({"inner": (32, 32)}, rank=2, scale=0.5))
    chosen = lora_fx.passes.ChooseForm(form=Form("augmented"))(injected).graph_module
    lora_fx.to_onnx(chosen, tmp_path / "a.onnx")
    with pytest.raises(ExportError, match="inner: an adapter is a part of its weight"):
        quantize_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


def test_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm = lora_fx.trace(Twice().half().eval(), (X.half(),), dynamic_shapes=({0: "batch"},))
    for bits in (4, 8):
        report = lora_fx.to_onnx(gm, tmp_path / f"{bits}.onnx", quantize=bits, adapters="input")
        assert report.verified
        again = verify_onnx(gm, tmp_path / f"{bits}.onnx")
        assert again.verified


def test_what_cannot_be_quantised_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    double = lora_fx.trace(Twice().double().eval(), (X.double(),))
    with pytest.raises(ExportError, match="inner: float64"):
        lora_fx.to_onnx(double, tmp_path / "a.onnx", quantize=4)
    convolution = lora_fx.trace(nn.Conv1d(7, 3, 2).eval(), (X,))
    with pytest.raises(ExportError, match="no layer is quantised: none is linear"):
        lora_fx.to_onnx(convolution, tmp_path / "a.onnx", quantize=4)
    with pytest.raises(ExportError, match="quantize to 3: expected 4 or 8 bits"):
        lora_fx.to_onnx(double, tmp_path / "a.onnx", quantize=3)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_no_numbers_are_not_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    gm = lora_fx.trace(model, (X,))
    lora_fx.to_onnx(gm, tmp_path / "a.onnx")
    with torch.no_grad():
        model.inner.weight[3, 4] = torch.inf
    with pytest.raises(ExportError, match="inner: 1 of 1024 weights are NaN or infinite"):
        lora_fx.to_onnx(gm, tmp_path / "b.onnx", quantize=4, verify=False)
    assert {file.name for file in tmp_path.iterdir()} == {"a.onnx"}


def test_a_packed_projection_is_one_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm = lora_fx.trace(Attention(16).eval(), (torch.randn(2, 5, 16),))
    report = lora_fx.to_onnx(gm, tmp_path / "a.onnx", quantize="fp4")
    assert report.verified
    assert report.quantised is not None
    assert list(report.quantised.weights) == ["layer"]
    assert report.quantised.left == {"layer.out_proj": "a head"}


def test_numbers_that_are_of_the_table_already_do_not_change(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    codes = torch.randint(16, (16, 64))
    codes[:, 5] = 15  # the largest of each block
    factors = torch.rand(16, 1) + 0.1
    with torch.no_grad():
        model.inner.weight.copy_((TABLES["nf4"][codes] * factors).reshape(32, 32))
    gm = lora_fx.trace(model, (X,), dynamic_shapes=({0: "batch"},))
    report = lora_fx.to_onnx(gm, tmp_path / "a.onnx", quantize="nf4")
    assert report.verified
    assert report.quantised is not None
    assert report.quantised.weights == {"inner": 0.0}
    assert report.quantised.outputs == {"output": 0.0}
    assert {row.what for row in report.controls if row.ok} >= {"control: inner.weight x 1.1"}
    other = lora_fx.to_onnx(gm, tmp_path / "b.onnx", quantize=4)
    assert other.quantised is not None
    assert other.quantised.weights["inner"] > 0.01
    lora_fx.to_onnx(gm, tmp_path / "c.onnx")
    report = quantize_onnx(tmp_path / "c.onnx", tmp_path / "d.onnx", bits="nf4")
    assert report.verified  # by weights that are scaled: plain ones are the same
    assert {row.what for row in report.controls if row.ok} == {"control: weights x 1.1"}


@pytest.mark.parametrize("above", [0, 1 << 30])
def test_weights_may_lie_beside_either_file(above: int, tmp_path: Path) -> None:
    """A file whose weights lie beside it was once not written inline."""
    exported(Twice, X, tmp_path / "a.onnx", adapters="input", external_data_above=0)
    report = quantize_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", external_data_above=above)
    assert report.verified
    assert (tmp_path / "b.onnx.data").exists() == (above == 0)
    (tmp_path / "a.onnx.data").unlink()
    assert Session(tmp_path / "b.onnx").run({"x": X})


def test_one_adapter_swaps_on_every_number_of_bits(tmp_path: Path) -> None:
    """A wrong scale of the adapter is told apart, as without bits."""
    torch.manual_seed(0)
    gm = lora_fx.trace(Twice().eval(), (X,), dynamic_shapes=({0: "batch"},))
    adapter = make_adapter({"inner": (32, 32)}, rank=2, scale=0.5)
    other = make_adapter({"inner": (32, 32)}, rank=2, scale=0.55)
    found = {}
    for bits in ("float", 8):
        path = tmp_path / f"{bits}.onnx"
        lora_fx.to_onnx(gm, path, adapters="input", quantize=bits)
        for name, one in (("right", adapter), ("wrong", other)):
            export_adapter(one, path, tmp_path / f"{bits}_{name}.onnx_adapter")
            file = tmp_path / f"{bits}_{name}.onnx_adapter"
            found[bits, name] = next(iter(Session(path).run({"x": X}, file).values()))
    norm = np.linalg.norm(found["float", "right"])
    assert np.linalg.norm(found["float", "right"] - found[8, "right"]) / norm < 0.01
    assert np.linalg.norm(found["float", "right"] - found[8, "wrong"]) / norm > 0.01
