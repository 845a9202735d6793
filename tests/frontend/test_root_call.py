"""Arguments that ``*args`` and ``**kwargs`` take have a name each, and shapes of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_fx.errors import TraceError
from lora_fx.frontend.trace import trace
from lora_fx.graph.example import example_of
from lora_fx.testing import relative

OPEN = {0: "batch"}


class Starred(nn.Module):
    """Goes through whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(3, 5), nn.Dropout(0.5)

    def forward(
        self, x: torch.Tensor, *rest: torch.Tensor, scale: float = 1.0, **more: torch.Tensor
    ) -> torch.Tensor:
        y = self.fc(x)
        for place, each in enumerate((*rest, *more.values())):
            y = y + each / (place + 1)
        return self.drop(y * scale)


def call(rows: int) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    x, *others = (torch.randn(rows, size, generator=draw) for size in (3, 5, 5, 5))
    return (x, *others[:2]), {"bias": others[2]}


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
@pytest.mark.parametrize(
    "shapes",
    [
        (OPEN, (OPEN, OPEN), {"bias": OPEN}),
        (OPEN, OPEN, OPEN, OPEN),
        {"x": OPEN, "rest": (OPEN, OPEN), "more": {"bias": OPEN}},
        {"x": OPEN, "rest_0": OPEN, "rest_1": OPEN, "bias": OPEN},
    ],
)
def test_each_starred_argument_is_an_input(frontend: Any, shapes: Any) -> None:
    torch.manual_seed(0)
    model, (args, kwargs) = Starred().eval(), call(4)
    gm = trace(model, args, kwargs, dynamic_shapes=shapes, frontend=frontend)
    names = dict.fromkeys(("x", "rest_0", "rest_1", "bias"), OPEN)
    example = example_of(gm)
    assert example is not None
    assert example.dynamic_shapes == names
    args, kwargs = call(7)
    assert torch.equal(gm(*args, **kwargs), model(*args, **kwargs))
    assert relative(gm(*args, **kwargs), model(*args)) > 1e-2
    gm.train()
    gm.eval()
    assert torch.equal(gm(*args, **kwargs), model(*args, **kwargs))
    again = trace(gm, args, kwargs, dynamic_shapes=names)
    assert torch.equal(again(*args, **kwargs), model(*args, **kwargs))


@pytest.mark.parametrize("shapes", [(OPEN, OPEN, OPEN), (OPEN, (OPEN,), {"bias": OPEN})])
def test_a_star_that_takes_one_argument_has_its_axes(shapes: Any) -> None:
    """As the forward of PeftModel takes all that it is given."""
    model, (args, kwargs) = Starred().eval(), call(4)
    gm = trace(model, args[:2], kwargs, dynamic_shapes=shapes)
    args, kwargs = call(7)
    assert torch.equal(gm(*args[:2], **kwargs), model(*args[:2], **kwargs))
    with pytest.raises(TraceError, match="rest_0 has no axis 2"):
        trace(model, args[:2], kwargs, dynamic_shapes=(OPEN, {2: "batch"}, OPEN))


def test_what_a_model_does_not_take_is_refused_by_name() -> None:
    with pytest.raises(TraceError, match="Linear does not take these inputs: too many positional"):
        trace(nn.Linear(3, 5), (torch.randn(2, 3), torch.randn(2, 3)))


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (
            "batch",
            r"^dynamic_shapes is 'batch': give .* dynamic_shapes=\{\"x\": \{0: \"batch\"\}\}",
        ),
        (("batch", None), r"^dynamic_shapes: x is said to be 'batch': give the axes"),
        ({"x": "batch"}, r"^dynamic_shapes: x is said to be 'batch': give the axes"),
        ({0: "batch"}, r"^dynamic_shapes: the example has no input 0: name one .*: x, y$"),
        (({0: "batch"},), r"^dynamic_shapes says the axes of 1 inputs, .* gives 2, x, y: give as"),
        ((("batch",), None), r"^dynamic_shapes: x has 2 axes, and 1 are said: give each"),
        (
            ({0: 5}, None),
            r"^dynamic_shapes: axis 0 of x is said to be 5, and .* size 4: give a name",
        ),
        (({0: True}, None), r"^dynamic_shapes: axis 0 of x is said to be True"),
        (({0: ""}, None), r"^dynamic_shapes: axis 0 of x is said to be ''"),
    ],
)
@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_shapes_that_say_no_axes_are_refused_in_words(
    shapes: object, says: str, frontend: Any
) -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    args = torch.randn(4, 3), torch.randn(3)
    with pytest.raises(TraceError, match=says):
        trace(Sum(), args, dynamic_shapes=shapes, frontend=frontend)
    for taken in ({"x": {0: "batch"}}, (("batch", None), None), ({0: "batch", 1: 3}, None)):
        trace(Sum(), args, dynamic_shapes=taken, frontend=frontend)
