from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.errors import ExportError
from lora_fx.export import Session, to_onnx
from lora_fx.export.program.io_signature import free_names, output_names
from lora_fx.frontend.trace import trace
from lora_fx.numerics import compare

T = torch.zeros(1)
Pair = namedtuple("Pair", ["left", "right"])


class Unnamed:
    """Registered without names of its parts."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts


class Broken(Unnamed):
    """Registered with names that cannot be asked for."""


class Nothing(Unnamed):
    """Registered, and empty."""


pytree.register_pytree_node(Unnamed, lambda own: (own.parts, None), lambda p, _: Unnamed(*p))
pytree.register_pytree_node(
    Broken,
    lambda own: (own.parts, None),
    lambda p, _: Broken(*p),
    flatten_with_keys_fn=lambda own: own.nowhere,
)
pytree.register_pytree_node(Nothing, lambda own: ((), None), lambda p, _: Nothing())


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (T, ["output"]),
        ((T, T), ["output_0", "output_1"]),
        ([T, None, (T, T)], ["output_0", "output_2_0", "output_2_1"]),
        ({"a": T, "b": (T, None)}, ["a", "b_0"]),
        (Pair(T, T), ["left", "right"]),
        (Unnamed(T, T), ["output_0", "output_1"]),
        (Unnamed(T, None), ["output_0"]),
        (Broken(T, {"a": T}), ["output_0", "output_1_a"]),
        (
            {"logits": T, "rest": [Unnamed(T, Pair(T, Unnamed(T)))]},
            ["logits", "rest_0_0", "rest_0_1_left", "rest_0_1_right_0"],
        ),
        ((T, Nothing()), ["output_0"]),
    ],
)
def test_output_names(outputs: Any, names: list[str]) -> None:
    assert output_names(outputs) == names


def test_an_output_that_is_no_tensor_is_named() -> None:
    with pytest.raises(ExportError, match="'b_0' is a float"):
        output_names({"a": T, "b": [1.0]})


def test_an_output_of_complex_numbers_is_named() -> None:
    with pytest.raises(ExportError, match=r"'b' is torch\.complex64, .*torch\.view_as_real"):
        output_names({"a": T, "b": T.to(torch.complex64)})


def test_an_output_cannot_have_the_name_of_an_input_or_of_another() -> None:
    assert free_names(["y", "z"], taken=["x"]) == ["y", "z"]
    assert free_names(["x", "y"], taken=["x"]) == ["x_out", "y"]
    assert free_names(["x", "x_out", "x"], taken=["x"]) == ["x_out_2", "x_out", "x_out_3"]
    assert free_names(["y", "y"], taken=["y_out"]) == ["y", "y_out_2"]


def test_no_output_at_all_is_told() -> None:
    for outputs in ((), None, {"a": None}, Nothing()):
        with pytest.raises(ExportError, match="returns no tensor"):
            output_names(outputs)


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\ud800"])
def test_a_name_that_cannot_be_printed_is_no_output_s(name: str) -> None:
    with pytest.raises(ExportError, match="a name that can be printed"):
        output_names({name: T})


class Wrapped(nn.Module):
    """Returns what `Unnamed` holds, inside of other containers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"a": Unnamed(self.fc(x), [Unnamed(x * 2)])}


def test_classes_without_names_are_exported_and_verified(tmp_path: Path) -> None:
    x = torch.randn(2, 3)
    report = to_onnx(trace(Wrapped(), (x,)), tmp_path / "model.onnx")
    found = Session(tmp_path / "model.onnx").run({"x": x})
    assert report.verified
    assert list(found) == ["a_0", "a_1_0_0"]
    assert compare(torch.as_tensor(found["a_1_0_0"]), x * 2).relative == 0


class Echo(nn.Module):
    """Returns its input's name as a key, and one name twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"x": self.fc(x), "a": {"b": x + 1}, "a_b": x * 2}


@pytest.mark.parametrize("verify", [True, False])
def test_an_output_called_like_an_input_is_renamed_and_noted(tmp_path: Path, verify: bool) -> None:
    x = torch.randn(4, 7, 3)
    gm = trace(Echo().eval(), (x,))
    report = to_onnx(gm, tmp_path / "model.onnx", verify=verify)
    assert report.verified == verify
    assert (report.inputs, report.outputs) == (["x"], ["x_out", "a_b", "a_b_out"])
    assert report.notes[0] == "output 'x' is called 'x_out': the name was taken"
    found = Session(tmp_path / "model.onnx").run({"x": x})
    expected = gm(x)
    assert compare(found["x_out"], expected["x"]).ok
    assert compare(found["a_b"], expected["a"]["b"]).ok
    assert compare(found["a_b_out"], expected["a_b"]).ok
    assert not compare(found["a_b"], expected["a_b"]).ok


class Clash(nn.Module):
    """An argument, an output and an inner node want the names of one another."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, relu: torch.Tensor, tanh: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.fc(relu))
        return {"linear": torch.tanh(hidden), "add": hidden + tanh, "relu_1": relu * 2}


def test_names_that_clash_inside_are_made_free(tmp_path: Path) -> None:
    example = (torch.randn(4, 7, 3), torch.randn(4, 7, 5))
    gm = trace(Clash().eval(), example)
    report = to_onnx(gm, tmp_path / "model.onnx")
    assert report.verified
    assert (report.inputs, report.outputs) == (["relu", "tanh"], ["linear", "add", "relu_1"])


def test_dimensions_without_a_name_are_called_after_their_input(tmp_path: Path) -> None:
    some = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim("length")}
    gm = trace(nn.Linear(3, 5).eval(), (torch.randn(4, 7, 3),), dynamic_shapes={"input": some})
    to_onnx(gm, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    for value in (*graph.input, *graph.output):
        dims = [dim.dim_param for dim in value.type.tensor_type.shape.dim]
        assert dims[:2] == ["input_dim_0", "length"]
