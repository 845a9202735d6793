"""What puts features together, and what overwrites some of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lora_fx.testing import analyse_function, check_case, check_reason

FRONTENDS = ["symbolic", "export"]
aten = torch.ops.aten


def three(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, m.square, m.b3)


def zeros(x: torch.Tensor, size: int = 6) -> torch.Tensor:
    return x.new_zeros(4, 7, size)


def put(into: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return aten.index_put(into, [None, None, index], values)


def sent(m: Any, x: torch.Tensor, *places: int) -> torch.Tensor:
    """Features scattered to places, the same for all rows."""
    index = m.places(*places).reshape(1, 1, -1).expand(4, 7, -1)
    return zeros(x, 7).scatter(-1, index, m.low(x))


# name -> (function, input, the frontends that see enough; all by default)
CASES: dict[str, tuple[Any, ...]] = {
    "cat with ones": (
        lambda m, x: torch.cat((m.low(x), torch.ones(4, 7, 2, dtype=x.dtype)), -1),
        "batch",
        "export",
    ),
    "cat with a number that whole ones cut": (
        lambda m, x: torch.cat((torch.full_like(m.low(x), 2.7, dtype=torch.int64), m.low(x)), -1),
        "batch",
    ),
    "cat with a constant number that whole ones cut": (
        lambda m, x: torch.cat((torch.full((4, 7, 2), 2.7, dtype=torch.int64), m.low(x)), -1),
        "batch",
        "export",
    ),
    "cat with a number copied into whole ones": (
        lambda m, x: torch.cat(
            (aten.copy(m.low(x).mul(0).long(), torch.full_like(m.low(x), 2.7)), m.low(x)), -1
        ),
        "batch",
        "export",
    ),
    "cat of an input and ones": (
        lambda m, x: torch.cat((torch.ones(4, 7, 1, dtype=x.dtype), x * 1), -1),
        "batch",
        "export",
    ),
    "cat of an input and what is full": (
        lambda m, x: F.linear(torch.cat((x.clone(), x.new_full((4, 7, 2), 3.0)), -1), m.v[:, :5]),
        "batch",
        "export",
    ),
    "scatter": (lambda m, x: sent(m, x, 3, 0, 6, 2, 1), "batch", "export"),
    "scatter into a map": (
        lambda m, x: m.wide(x).scatter(2, m.places(4, 1, 0, 5, 2).expand(4, 7, 5), m.low(x)),
        "batch",
        "export",
    ),
    "pad of an input": (lambda m, x: F.pad(x, (1, 2)), "batch", "export"),
    "cat": (lambda m, x: torch.cat((m.low(x), m.wide(x) * 2), -1), "batch"),
    "cat of one's own parts": (
        lambda m, x: (lambda p: torch.cat((p[2], p[0], p[1]), -1))(m.low(x).split([1, 2, 2], -1)),
        "batch",
    ),
    "cat without biases": (
        lambda m, x: torch.cat((F.linear(x, m.w), m.wide(x), F.linear(x, m.square)), dim=-1),
        "batch",
    ),
    "cat turned": (
        lambda m, x: torch.cat((F.conv1d(x, m.kernel1, m.b), F.conv1d(x, m.kernel1)), 1),
        "long",
        "export",
    ),
    "cat turned, from behind": (
        lambda m, x: torch.concat((F.conv1d(x, m.kernel1, m.b), F.conv1d(x, m.kernel1)), -2),
        "long",
    ),
    "cat of split features": (
        lambda m, x: torch.cat((m.split(x), m.split(x) * 2), -1),
        "batch",
        "export",
    ),
    "cat of split features, the outer axis": (
        lambda m, x: torch.concatenate((m.split(x), m.split(x)[:, :, :1] * 2), 2),
        "batch",
        "export",
    ),
    "cat of split features and zeros": (
        lambda m, x: torch.cat((x.new_zeros(4, 7, 2, 2), m.split(x)), -1),
        "batch",
        "export",
    ),
    "cat of pieces as they came": (lambda m, x: torch.cat(m.low(x).chunk(2, -1), -1), "batch"),
    "cat of pieces turned": (
        lambda m, x: torch.cat(m.low(x).split(2, -1)[::-1], -1),
        "batch",
    ),
    "stack of pieces as they came": (
        lambda m, x: torch.stack(m.low(x).unbind(-1), -1),
        "batch",
    ),
    "stack": (lambda m, x: torch.stack((m.low(x), m.low(x) * 2), -1), "batch"),
    "stack in front": (lambda m, x: torch.stack((m.low(x), m.low(x) * 2), 2), "batch", "export"),
    "stack split": (
        lambda m, x: torch.stack((m.split(x), m.split(x) * 2, m.split(x) * 3), -2),
        "batch",
        "export",
    ),
    "stack turned": (
        lambda m, x: (lambda y: torch.stack((y, y * 2), -3))(m.low(x).transpose(-1, -2)),
        "batch",
    ),
    "stack of single features": (
        lambda m, x: torch.stack([m.low(x)[..., k] for k in (3, 1, 2)], -1),
        "batch",
        "export",
    ),
    "stack with zeros": (
        lambda m, x: torch.stack((zeros(x), m.wide(x)), -1),
        "batch",
        "export",
    ),
    "pad": (lambda m, x: F.pad(m.low(x), (1, 2)), "batch"),
    "pad by keyword": (lambda m, x: F.pad(m.low(x), pad=(0, 2), value=0.0), "batch"),
    "pad turned": (lambda m, x: F.pad(m.low(x).transpose(-1, -2), (0, 0, 1, 2)), "batch"),
    "aten's pad": (lambda m, x: aten.constant_pad_nd(m.low(x), [1, 2]), "batch"),
    "assignment of places": (
        lambda m, x: put(zeros(x), m.places(4, 0, 3), three(m, x)),
        "batch",
        "export",
    ),
    "assignment of places from behind": (
        lambda m, x: put(zeros(x), m.places(-1, 0, 3), three(m, x)),
        "batch",
        "export",
    ),
    "assignment of a mask": (
        lambda m, x: put(zeros(x), m.b6 > m.b6.sort()[0][2], three(m, x)),
        "batch",
        "export",
    ),
    "assignment into a map": (
        lambda m, x: put(m.wide(x), m.places(4, 0, 3), three(m, x)),
        "batch",
        "export",
    ),
    "assignment into a map without bias": (
        lambda m, x: put(F.linear(x, m.six), m.places(1, 5, 3), three(m, x)),
        "batch",
        "export",
    ),
    "assignment of a slice": (
        lambda m, x: torch.slice_scatter(zeros(x), three(m, x), 2, 1, 6, 2),
        "batch",
        "export",
    ),
    "assignment of a slice, turned": (
        lambda m, x: torch.slice_scatter(x.new_zeros(4, 8, 7), m.low(x).transpose(-1, -2), 1, 2, 7),
        "batch",
        "export",
    ),
    "assignment of a slice into a map": (
        lambda m, x: torch.slice_scatter(m.wide(x), three(m, x), -1, 2, 5),
        "batch",
        "export",
    ),
    "assignment into ones": (
        lambda m, x: put(x.new_ones(4, 7, 6), m.places(0, 1, 2), three(m, x)),
        "batch",
        "export",
    ),
    "assignment of one place": (
        lambda m, x: aten.select_scatter(m.wide(x), m.wide(x)[..., 2], -1, 4),
        "batch",
        "export",
    ),
    "assignment of one place of zeros": (
        lambda m, x: aten.select_scatter(zeros(x), m.wide(x)[..., 2], 2, 4),
        "batch",
        "export",
    ),
    "assignment of channels": (
        lambda m, x: torch.slice_scatter(
            F.conv2d(x, m.kernel, m.b), F.conv2d(x, m.other_kernel)[:, 1:3], 1, 0, 4, 2
        ),
        "image",
        "export",
    ),
    "assignment from behind": (
        lambda m, x: torch.slice_scatter(m.wide(x), three(m, x), -1, -3, 9),
        "batch",
    ),
    "assignment to split features": (
        lambda m, x: torch.slice_scatter(m.split(x), m.split(x)[:, :, :1] * 2, 2, 1, 2),
        "batch",
        "export",
    ),
    "assignment of a number": (
        lambda m, x: torch.slice_scatter(m.wide(x), zeros(x, 2), -1, 1, 3),
        "batch",
        "export",
    ),
    "assignment of a constant": (
        lambda m, x: torch.slice_scatter(m.wide(x), aten.copy(m.wide(x)[..., :3], m.b3), -1, 2, 5),
        "batch",
        "export",
    ),
    "assignment of what is filled": (
        lambda m, x: torch.slice_scatter(m.wide(x), aten.fill(m.wide(x)[..., :3], 2.5), -1, 2, 5),
        "batch",
    ),
    "copied": (lambda m, x: aten.copy(m.low(x), m.low(x) * 2), "batch"),
    "copied constant": (lambda m, x: aten.copy(m.low(x), m.b), "batch"),
    "masked": (lambda m, x: m.low(x).masked_fill(m.b > m.b.sort()[0][2], 2.5), "batch"),
    "masked with zeros": (lambda m, x: m.low(x).masked_fill(m.b > m.b.sort()[0][2], 0), "batch"),
}
WHOLE = "something else than whole features"
OPAQUE: dict[str, tuple[Any, ...]] = {
    "scatter to one place twice": (
        lambda m, x: sent(m, x, 3, 0, 3, 2, 1),
        "batch",
        "no constant",
        "export",
    ),
    "scatter that hangs on the row": (
        lambda m, x: zeros(x, 7).scatter(
            -1,
            torch.stack([m.b.argsort()] * 27 + [m.b.argsort().flip(0)]).reshape(4, 7, 5),
            m.low(x),
        ),
        "batch",
        "no constant",
        "export",
    ),
    "scatter that adds": (
        lambda m, x: zeros(x, 7).scatter_add(-1, m.places(3, 0, 3, 2, 1).expand(4, 7, 5), m.low(x)),
        "batch",
        "scatter_add",
        "export",
    ),
    "cat with an activation": (
        lambda m, x: torch.cat((m.low(x), torch.sin(x)), -1),
        "batch",
        "one source",
    ),
    "cat of two sources": (
        lambda m, x: torch.cat((m.low(x), m.low(torch.sin(x))), -1),
        "batch",
        "one source",
    ),
    "cat of the batch": (
        lambda m, x: torch.cat((m.low(x), m.low(x)), -2),
        "batch",
        "else than features",
    ),
    "stack of the batch": (
        lambda m, x: torch.stack((m.low(x), m.low(x)), 0),
        "batch",
        "else than features",
        "export",
    ),
    "stack with an activation": (
        lambda m, x: torch.stack((m.low(x), torch.sin(m.low(x))), -1),
        "batch",
        "one source",
    ),
    "pad with ones": (lambda m, x: F.pad(m.low(x), (1, 2), value=1.0), "batch", "zeros"),
    "pad by reflection": (lambda m, x: F.pad(m.low(x), (1, 2), "reflect"), "batch", "zeros"),
    "pad the batch": (
        lambda m, x: F.pad(m.low(x), (1, 2, 1, 0)),
        "batch",
        "else than the features",
    ),
    "pad less": (lambda m, x: F.pad(m.low(x), (-1, 0)), "batch", "zeros"),
    "assignment to the batch": (
        lambda m, x: aten.index_put(zeros(x, 5), [None, m.places(*range(7))], m.low(x)),
        "batch",
        WHOLE,
        "export",
    ),
    "assignment that adds": (
        lambda m, x: aten.index_put(
            zeros(x), [None, None, m.places(0, 1, 2)], three(m, x), accumulate=True
        ),
        "batch",
        "accumulates",
        "export",
    ),
    "assignment to places from data": (
        lambda m, x: put(zeros(x), x[0, 0].argsort(), three(m, x)),
        "batch",
        "no constant",
        "export",
    ),
    "assignment that broadcasts": (
        lambda m, x: put(zeros(x), m.places(0, 1, 2), three(m, x[:, :1])),
        "batch",
        "broadcasts",
        "export",
    ),
    "assignment of one feature to all": (
        lambda m, x: put(zeros(x), m.places(0, 1, 2), F.linear(x, m.down[:1])),
        "batch",
        "else than features",
        "export",
    ),
    "assignment into another source": (
        lambda m, x: put(m.wide(torch.sin(x)), m.places(0, 1, 2), three(m, x)),
        "batch",
        "one source",
        "export",
    ),
    "a slice that the input moves": (
        lambda m, x: torch.slice_scatter(m.low(x), m.low(x)[..., :4], -1, 0, x.shape[0]),
        "batch",
        "moves",
        "symbolic",
    ),
    "a place of the batch assigned": (
        lambda m, x: aten.select_scatter(m.low(x), m.low(x)[:, 2], 1, 4),
        "batch",
        "else than features",
        "export",
    ),
    "copied and repeated": (
        lambda m, x: aten.copy(m.low(x), m.low(x)[:, :1]),
        "batch",
        "broadcasts",
        "export",
    ),
    "copied into whole numbers": (
        lambda m, x: aten.copy(m.low(x).mul(0).long(), m.low(x)),
        "batch",
        "whole numbers",
        "export",
    ),
    "masked by data": (lambda m, x: m.low(x).masked_fill(x[..., :1] > 0, 1.0), "batch", "a mask"),
    "filled with data": (lambda m, x: aten.fill(m.low(x), x.sum()), "batch", "than a number"),
    "a slice of the batch assigned": (
        lambda m, x: torch.slice_scatter(m.low(x), m.low(x)[:, :2], 1, 0, 2),
        "batch",
        "else than features",
        "export",
    ),
}


@pytest.mark.parametrize(
    ("name", "frontend"), [(n, f) for n, c in CASES.items() for f in c[2:] or FRONTENDS]
)
def test_joined_features_hold_what_the_graph_computes(name: str, frontend: str) -> None:
    check_case(CASES[name], frontend)


@pytest.mark.parametrize(
    ("name", "frontend"), [(n, f) for n, c in OPAQUE.items() for f in c[3:] or FRONTENDS]
)
def test_what_joins_something_else_says_why(name: str, frontend: str) -> None:
    check_reason(OPAQUE[name], frontend)


def test_a_call_by_keyword_is_refused_or_right() -> None:
    def scattered(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.slice_scatter(m.low(x), src=m.low(x)[..., :2], dim=-1, end=2)

    analysis, node = analyse_function(scattered, "batch", "symbolic")
    assert node in analysis.values
