from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import ExportError, to_onnx
from lora_fx.export.program.io_signature import TensorInput, dimension_names, input_leaves
from lora_fx.frontend.torch_export import export_program
from lora_fx.frontend.trace import trace

X = torch.randn(4, 7)


class Many(nn.Module):
    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        return xs[0] + xs[1]


class Sum(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


class Named(nn.Module):
    def forward(self, x: Any, k: int = 2, *, last: torch.Tensor | None = None) -> torch.Tensor:
        total = x["b"][0] + x["b"][1] * k
        return total if last is None else total + last


def leaves(module: nn.Module, args: Any, kwargs: Any, shapes: Any) -> list[TensorInput]:
    gm = trace(module.eval(), args, kwargs, dynamic_shapes=shapes)
    return input_leaves(gm, export_program(gm, args, kwargs, shapes), shapes)


def test_nested_arguments_are_named_by_their_path() -> None:
    shapes = {"x": {"b": [{0: "rows"}, {0: "rows"}]}, "k": None, "last": {0: "rows"}}
    found = leaves(Named(), ({"b": [X, X + 1]},), {"k": 3, "last": X + 2}, shapes)
    assert [leaf.name for leaf in found] == ["x_b_0", "x_b_1", "last"]
    assert [leaf.axes for leaf in found] == [{0: "rows"}] * 3
    assert set(dimension_names(found).values()) == {"rows"}


def test_shapes_by_position_and_per_axis_lists() -> None:
    shapes = ({"b": [(torch.export.Dim("n"), None), (torch.export.Dim("n"), None)]}, None)
    found = leaves(Named(), ({"b": [X, X + 1]}, 3), {}, shapes)
    assert [leaf.axes for leaf in found] == [{0: "n"}] * 2


def test_starred_arguments_are_numbered() -> None:
    found = leaves(Many(), (X, X + 1), {}, None)
    assert [leaf.name for leaf in found] == ["xs_0", "xs_1"]


class Apart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.sin() * self.weight, y.cos() * self.weight


@pytest.mark.parametrize(
    ("y", "shapes", "said"),
    [
        (X[:2], {"x": {0: "n"}, "y": {0: "n"}}, "'n' is 4 in x and 2 in y"),
        (X, {"x": {0: "n", 1: "n"}, "y": None}, "'n' is 4 in x and 7 in x"),
    ],
)
def test_axes_of_one_name_are_of_one_size(y: Any, shapes: Any, said: str, tmp_path: Path) -> None:
    gm = trace(Apart(), (X, y), dynamic_shapes=shapes)
    with pytest.raises(ExportError, match=said):
        to_onnx(gm, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    apart = {name: {a: f"{name}{a}" for a in axes or ()} for name, axes in shapes.items()}
    assert to_onnx(trace(Apart(), (X, y), dynamic_shapes=apart), tmp_path / "m.onnx").verified


def test_a_given_name_wins_over_a_made_up_one() -> None:
    free, given = {0: torch.export.Dim.AUTO}, {0: "rows"}
    found = leaves(Sum(), (X, X + 1), {}, {"x": free, "y": given})
    assert "rows" in dimension_names(found).values()
    found = leaves(Sum(), (X, X + 1), {}, {"x": free, "y": free})
    assert "x_dim_0" in dimension_names(found).values()


@pytest.mark.parametrize("shapes", [None, {"input": None}])
def test_fixed_sizes_have_no_axes(shapes: Any) -> None:
    (leaf,) = leaves(nn.Linear(7, 5), (X,), {}, shapes)
    assert leaf == TensorInput("input", {}, (4, 7))
