"""An update of any expression: made, injected, folded, exported, with other values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import Adapter, AdapterError, Update, fold, inject, text, trace
from lora_fx.adapters.adapter import Scaling, WeightUpdate
from lora_fx.algebra.index_expr import slice_of
from lora_fx.algebra.matrix_expr import (
    Kron,
    Leaf,
    Matrix,
    Replaced,
    Sum,
    constant,
    exchanged,
    leaves,
    number,
    product,
    scaled,
    transposed,
)
from lora_fx.injection.injected_adapters import injected
from lora_fx.passes import StripLora
from lora_fx.testing import Between, means, relative

DRAW = torch.Generator().manual_seed(5)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAW) * 0.4


LAYERS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "linear": (lambda: nn.Linear(6, 8), noise(4, 7, 6)),
    "transposed": (lambda: Conv1D(8, 6), noise(4, 7, 6)),
    "embedding": (lambda: nn.Embedding(6, 8), torch.tensor([[0, 3, 5], [1, 2, 4]])),
    "conv2d": (lambda: nn.Conv2d(3, 8, (2, 1)), noise(2, 3, 5, 4)),
    "grouped": (lambda: nn.Conv2d(6, 8, (2, 1), groups=2), noise(2, 6, 5, 4)),
    "conv_transpose": (lambda: nn.ConvTranspose2d(3, 8, (2, 1)), noise(2, 3, 5, 4)),
}
UP, DOWN, ROW, ONE, TWO = noise(8, 2), noise(2, 6), noise(8), noise(4, 2), noise(2, 3)


def mixed(weight: Matrix) -> Matrix:
    """``diag(row) W + 1.5 up @ down + kron(one, two)``, W of (8, 6)."""
    low = scaled(number(1.5), product(constant(UP), constant(DOWN)))
    whole = Sum(scaled(constant(ROW), weight), low)
    return Sum(whole, Kron(constant(ONE), constant(TWO)))


def exact(weight: torch.Tensor, loud: float = 1.0) -> torch.Tensor:
    flat = weight.double().flatten(1)
    low = 1.5 * loud * UP.double() @ DOWN.double() + torch.kron(ONE.double(), TWO.double())
    return (ROW.double()[:, None] * flat + low).reshape(weight.shape)


UPDATE = WeightUpdate("mixed", mixed, (8, 6))


def test_the_values_are_the_leaves_of_the_expression() -> None:
    expected = [ROW, UP, DOWN, ONE, TWO]
    assert len(UPDATE.values) == len(expected)
    assert all(found is value for found, value in zip(UPDATE.values, expected, strict=True))
    assert list(UPDATE.tensors()) == expected
    for shape in ((8, 6), (8, 3, 2, 1)):
        base = noise(*shape)
        means(UPDATE, base, exact(base), exact(base, 1.1))


def merged(model: nn.Module, loud: float = 1.0) -> nn.Module:
    tuned: Any = copy.deepcopy(model)
    weight = tuned.layer.weight
    turned = not isinstance(tuned.layer, nn.Linear | nn.Conv2d)
    with torch.no_grad():
        own = weight.transpose(0, 1) if turned else weight
        made = exact(own.contiguous(), loud).float()
        weight.copy_(made.transpose(0, 1) if turned else made)
    return tuned


@pytest.mark.parametrize("name", LAYERS)
def test_any_expression_is_injected_folded_and_taken_out(name: str) -> None:
    torch.manual_seed(0)
    make, x = LAYERS[name]
    model = Between(make()).eval()
    gm = trace(model, (x,))
    adapted = inject(gm, Adapter("a", {"layer": UPDATE}))
    with torch.no_grad():
        wanted, louder = merged(model)(x), merged(model, 1.1)(x)
        for graph in (adapted, fold(adapted)):
            assert relative(graph(x), wanted) <= 1e-5
            assert relative(graph(x), louder) > 1e-3
        assert relative(gm(x), wanted) > 1e-2
    assert "lora_" not in text(fold(adapted))
    assert text(StripLora()(adapted).graph_module) == text(gm)


@pytest.mark.parametrize("form", ["merged", "unmerged"])
def test_any_expression_is_exported(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, x = LAYERS["linear"]
    model = Between(make()).eval()
    adapted = inject(trace(model, (x,)), Adapter("a", {"layer": UPDATE}))
    graph = fold(adapted) if form == "merged" else adapted
    lora_fx.to_onnx(graph, tmp_path / "m.onnx")
    (found,) = lora_fx.Session(tmp_path / "m.onnx").run({"x": x}).values()
    with torch.no_grad():
        assert relative(torch.from_numpy(found), merged(model)(x)) <= 1e-5
        assert relative(torch.from_numpy(found), model(x)) > 1e-2


def test_values_that_changed_in_the_graph_are_read_back() -> None:
    torch.manual_seed(0)
    make, x = LAYERS["linear"]
    adapted = inject(trace(Between(make()).eval(), (x,)), Adapter("a", {"layer": UPDATE}))
    assert injected(adapted)[0].now(adapted).updates["layer"] is UPDATE
    held: Any = adapted.get_parameter("layer.lora_weight_1.a")
    held.data = 2 * held.data
    now = injected(adapted)[0].now(adapted).updates["layer"]
    base = noise(8, 6)
    low = 1.5 * UP.double() @ DOWN.double()
    assert relative(now.weight(base), exact(base) + low) <= 1e-6
    assert relative(now.weight(base), exact(base)) > 1e-2


def test_places_are_values_too() -> None:
    new, where = noise(2, 6), slice_of(8, slice(1, 5, 3))
    update = WeightUpdate("rows", lambda w: Replaced(w, where, constant(new)), (8, 6))
    base = noise(8, 6)
    expected = base.clone()
    expected[[1, 4]] = new
    means(update, base, expected, within=0)
    assert [value.dtype for value in update.values] == [torch.int64, torch.float32]
    moved = update.with_values([torch.tensor([0, 7]), 2 * new])
    assert torch.equal(moved.weight(base)[[0, 7]], 2 * new)
    assert torch.equal(moved.weight(base)[1:7], base[1:7])


def test_an_expression_in_another_weight_becomes_one_in_w() -> None:
    """As an analysis of somebody else's layer gives it: the base is one of its leaves."""
    base = Leaf((8, 6), "their weight", lambda: noise(8, 6))
    theirs = transposed(mixed(base))

    def ours(weight: Matrix) -> Matrix:
        found: Matrix = exchanged(theirs, lambda leaf: weight if leaf == base else leaf)
        return transposed(found)

    own = noise(8, 6)
    means(WeightUpdate("theirs", ours, (8, 6)), own, exact(own), exact(own, 1.1))
    assert base in set(leaves(theirs))
    assert base not in set(leaves(ours(constant(own))))


@pytest.mark.parametrize(
    ("update", "shape", "reason"),
    [
        (UPDATE, (8, 7), r"made for a weight \(8, 6\), found \(8, 7\)"),
        (Scaling(col=torch.ones(6)), (8, 3, 2), "made for a weight"),
        (Update(DOWN, UP, 1.0), (6, 8), "made for a weight"),
        (Update(noise(2, 6, 2), noise(8, 1), 1.0), (8, 3, 2), "grouped convolution has no weight"),
    ],
)
def test_another_weight_is_refused(update: Any, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        update.weight(torch.ones(shape))


def test_a_row_scales_the_bias_of_the_layer_too() -> None:
    bias, by_row = noise(8).double(), Scaling(row=ROW)
    shift = by_row.shift(lambda: bias)
    assert shift is not None
    assert relative(bias + shift, bias * ROW) <= 1e-12
    assert relative(bias, bias * ROW) > 1e-2
    assert by_row.shift(lambda: None) is None, "the layer has no bias"
    assert Scaling(col=ROW).shift(lambda: bias) is None


def test_the_update_of_groups_has_the_weight_form_of_the_whole() -> None:
    update = Update(noise(4, 6, 2), noise(8, 2), 1.5)
    base, up = noise(8, 6, 2), torch.block_diag(update.up[:4], update.up[4:])
    expected = base + 1.5 * (up @ update.down.flatten(1)).reshape(8, 6, 2)
    assert relative(update.weight(base), expected) <= 1e-6
    assert relative(update.weight(base), base) > 1e-2


def test_a_magnitude_is_of_what_stands_before_the_columns() -> None:
    length, col, base = noise(8).abs() + 0.5, noise(6) + 1, noise(8, 6)
    update = Update(DOWN, UP, 1.5, magnitude=length, col=col)
    whole = base.double() + 1.5 * UP.double() @ DOWN.double()
    rows = whole * (length.double() / whole.norm(dim=1))[:, None]
    means(update, base, rows * col.double(), rows, whole * col.double())
    columns = whole * col.double()
    other = columns * (length.double() / columns.norm(dim=1))[:, None]
    assert relative(other, rows * col.double()) > 1e-2, "the control: the order matters"
    gm = trace(nn.Sequential(nn.Linear(6, 8)).eval(), (noise(4, 6),))
    with torch.no_grad():
        own, shift, x = gm.get_parameter("0.weight"), gm.get_parameter("0.bias"), noise(4, 6)
        found = inject(gm, Adapter("a", {"0": update}))(x)
        assert relative(found, x @ update.weight(own).T + shift) <= 1e-5
