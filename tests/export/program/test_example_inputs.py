from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_fx.errors import ExportError
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
