from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx.errors import ExportError, TraceError
from lora_fx.export import to_onnx
from lora_fx.export.program.example_inputs import example_inputs
from lora_fx.frontend.trace import trace
from lora_fx.testing import traced

X = torch.randn(4, 7, 3)


def test_inputs_are_those_given_or_remembered() -> None:
    shapes = {"input": {0: "rows"}}
    gm = traced(nn.Linear(3, 5), X, dynamic_shapes=shapes)
    remembered = example_inputs(gm, None, None, None)
    assert remembered.args[0] is X
    assert remembered.dynamic_shapes == shapes
    given = example_inputs(gm, None, {"input": X + 1}, {"input": None})
    assert given.args == ()
    assert torch.equal(given.kwargs["input"], X + 1)
    assert given.dynamic_shapes == {"input": None}


class Several(nn.Module):
    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        return torch.cat(xs)


@pytest.mark.parametrize("shapes", [({0: "a"}, {0: "b"}), {"xs": ({0: "a"}, {0: "b"})}])
def test_shapes_are_given_as_the_traced_model_takes_them(shapes: object) -> None:
    gm = traced(Several(), X, X + 1)
    found = example_inputs(gm, None, None, shapes)
    assert found.dynamic_shapes == {"xs_0": {0: "a"}, "xs_1": {0: "b"}}


def test_without_any_it_is_said_what_to_pass() -> None:
    gm = trace(nn.Linear(3, 5), frontend="symbolic")
    with pytest.raises(ExportError, match=r"pass args=\(x,\) or .* dynamic_shapes="):
        example_inputs(gm, None, None, None)


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        (X, None, r"args is a Tensor: give a tuple, such as \(x,\)"),
        (None, [X], r'kwargs is a list: give a dictionary, such as \{"x": x\}'),
    ],
)
def test_inputs_are_a_tuple_and_a_dictionary(args: Any, kwargs: Any, said: str) -> None:
    gm = traced(nn.Linear(3, 5), X)
    with pytest.raises(ExportError, match=f"^{said}$"):
        example_inputs(gm, args, kwargs, None)
    with pytest.raises(TraceError, match=f"^{said}$"):
        trace(nn.Linear(3, 5), () if args is None else args, kwargs)


def test_sizes_that_were_not_traced_are_said_to_be_that(tmp_path: Path) -> None:
    gm = traced(nn.Linear(3, 5), X)
    with pytest.raises(ExportError, match=r"example inputs: Guard failed.*that it was traced for"):
        to_onnx(gm, tmp_path / "m.onnx", args=(X[:2],))
    assert not list(tmp_path.iterdir())
