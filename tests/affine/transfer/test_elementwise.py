"""Arithmetic: sums of maps, and maps with constants, in every order of operands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lora_fx.testing import check_case, check_reason

FRONTENDS = ["symbolic", "export"]


def other(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(F.linear(x, m.down), m.up, m.gain)


def turned(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.low(x).transpose(-1, -2)


# name -> (function, input, the frontends that see enough; all by default)
CASES: dict[str, tuple[Any, ...]] = {
    "add": (lambda m, x: m.low(x) + other(m, x), "batch"),
    "add the other way": (lambda m, x: other(m, x) + m.low(x), "batch"),
    "add with alpha": (lambda m, x: torch.add(m.low(x), other(m, x), alpha=-2), "batch"),
    "add itself": (lambda m, x: (lambda y: y + y)(m.low(x)), "batch"),
    "add a number": (lambda m, x: m.low(x) + 2.5, "batch"),
    "add to a number": (lambda m, x: 2 + m.low(x), "batch"),
    "add a vector": (lambda m, x: m.low(x) + m.gain, "batch"),
    "add to a vector": (lambda m, x: m.gain + m.low(x), "batch"),
    "add a vector with alpha": (lambda m, x: torch.add(m.low(x), m.gain, alpha=3), "batch"),
    "add to a vector with alpha": (lambda m, x: torch.add(m.gain, m.low(x), alpha=3), "batch"),
    "add one element": (lambda m, x: m.low(x) + m.one, "batch"),
    "add no axes": (lambda m, x: m.low(x) + m.one[0], "batch"),
    "add by keyword": (lambda m, x: torch.add(m.low(x), other=m.gain), "batch"),
    "residual": (lambda m, x: x + F.linear(m.low(x), m.w.T), "batch"),
    "residual the other way": (lambda m, x: F.linear(m.low(x), m.w.T) + x, "batch"),
    "add turned": (lambda m, x: turned(m, x) + other(m, x).transpose(-1, -2), "batch"),
    "add a vector, turned": (
        lambda m, x: turned(m, x) + m.gain.unsqueeze(-1),
        "batch",
        "export",
    ),
    "add zeros of data": (lambda m, x: m.low(x) + torch.ones_like(m.low(x)), "batch", "export"),
    "sub": (lambda m, x: m.low(x) - other(m, x), "batch"),
    "sub with alpha": (lambda m, x: torch.sub(m.low(x), other(m, x), alpha=2), "batch"),
    "sub a number": (lambda m, x: m.low(x) - 3, "batch"),
    "sub from a number": (lambda m, x: 3 - m.low(x), "batch", "symbolic"),
    "rsub": (lambda m, x: 3 - m.low(x), "batch"),
    "sub a vector": (lambda m, x: m.low(x) - m.gain, "batch"),
    "sub from a vector": (lambda m, x: m.gain - m.low(x), "batch"),
    "sub from a vector with alpha": (lambda m, x: torch.sub(m.gain, m.low(x), alpha=2), "batch"),
    "mul by a number": (lambda m, x: m.low(x) * 3, "batch"),
    "mul of a number": (lambda m, x: -0.5 * m.low(x), "batch"),
    "mul by a vector": (lambda m, x: m.low(x) * m.gain, "batch"),
    "mul of a vector": (lambda m, x: m.gain * m.low(x), "batch"),
    "mul by one element": (lambda m, x: m.low(x) * m.one, "batch"),
    "mul by ones and a vector": (
        lambda m, x: m.low(x) * m.gain.reshape(1, 1, 5),
        "batch",
        "export",
    ),
    "mul turned": (lambda m, x: turned(m, x) * m.gain.reshape(5, 1), "batch", "export"),
    "mul split": (
        lambda m, x: m.split(x) * m.gain6.reshape(2, 3) * m.gain3,
        "batch",
        "export",
    ),
    "mul split by rows": (
        lambda m, x: m.split(x) * m.gain6.reshape(2, 3)[:, 1:2],
        "batch",
        "export",
    ),
    "mul of an input": (lambda m, x: F.linear(x * m.gain3, m.w, m.b), "batch"),
    "mul then linear": (lambda m, x: F.linear(m.low(x) * m.gain, m.v, m.b6), "batch"),
    "div by a number": (lambda m, x: m.low(x) / 3, "batch"),
    "div by a vector": (lambda m, x: m.low(x) / m.gain, "batch"),
    "div by integers": (lambda m, x: m.low(x) / (m.gain * 3).long().abs().add(1), "batch"),
    "truediv": (lambda m, x: m.low(x).div(m.one), "batch"),
    "neg": (lambda m, x: -m.low(x), "batch"),
    "neg method": (lambda m, x: m.low(x).neg(), "batch"),
}
BROADCASTS = "a sum that broadcasts"
VECTOR = "no constant of the features"
TWO = "a product of two activations"
NEITHER = "neither a map of one source nor a constant"
OPAQUE: dict[str, tuple[Any, ...]] = {
    "why a source is one": (
        lambda m, x: m.low(x) + F.relu(m.low(x)),
        "batch",
        "relu is not known to be affine",
    ),
    "a gate from data in front": (
        lambda m, x: m.low(x).sigmoid() * m.low(x),
        "batch",
        TWO,
    ),
    "two sources": (lambda m, x: m.low(x) + F.linear(torch.sin(x), m.w), "batch", "two sources"),
    "an activation": (lambda m, x: m.low(x) + torch.sin(x @ m.w.T), "batch", "two sources"),
    "two inputs of no map": (lambda m, x: x + torch.sin(x), "batch", NEITHER),
    "a factor from data": (
        lambda m, x: torch.add(m.low(x), other(m, x), alpha=x.shape[0]),
        "batch",
        "no number",
        "symbolic",
    ),
    "laid out differently": (
        lambda m, x: (lambda y: y + y.transpose(-1, -2))(m.low(x[:, :5])),
        "batch",
        BROADCASTS,
    ),
    "added along the batch": (lambda m, x: m.low(x) + m.b.expand(7, 5), "batch", NEITHER),
    "added in new axes": (lambda m, x: m.low(x) + m.b.reshape(1, 1, 1, 5), "batch", NEITHER),
    "broadcast feature": (
        lambda m, x: F.linear(x, m.w[:1]) + m.gain,
        "batch",
        NEITHER,
    ),
    "two widths": (
        lambda m, x: F.linear(x, m.w[:1]) + m.low(x),
        "batch",
        BROADCASTS,
    ),
    "scaled along the batch": (
        lambda m, x: m.low(x) * torch.cat((m.gain, m.one, m.one)).reshape(7, 1),
        "batch",
        VECTOR,
    ),
    "scaled by a broadcast feature": (
        lambda m, x: F.linear(x, m.w[:1]) * m.gain,
        "batch",
        VECTOR,
    ),
    "product of activations": (lambda m, x: m.low(x) * x.sum(-1, keepdim=True), "batch", TWO),
    "product of two maps": (lambda m, x: m.low(x) * other(m, x), "batch", TWO),
    "divided by an activation": (lambda m, x: m.low(x) / x[..., :1], "batch", TWO),
    "a constant divided": (lambda m, x: m.gain / m.low(x), "batch", "no map"),
    "rounded": (
        lambda m, x: torch.div(m.low(x), 2, rounding_mode="floor"),
        "batch",
        "a division that rounds",
    ),
    "an input of unknown sizes": (lambda m, x: x * m.gain3, "batch", "no map", "symbolic"),
    "written in place": (
        lambda m, x: (lambda y: (y.as_strided((3,), (1,)).add_(1), y * 2)[1])(m.low(x)),
        "batch",
        "written in place",
        "symbolic",
    ),
    "ones of data, unknown sizes": (
        lambda m, x: m.low(x) + torch.ones_like(x[..., :1]),
        "batch",
        NEITHER,
    ),
}


@pytest.mark.parametrize(
    ("name", "frontend"), [(n, f) for n, c in CASES.items() for f in c[2:] or FRONTENDS]
)
def test_arithmetic_computes_what_the_graph_does(name: str, frontend: str) -> None:
    check_case(CASES[name], frontend)


@pytest.mark.parametrize(
    ("name", "frontend"), [(n, f) for n, c in OPAQUE.items() for f in c[3:] or FRONTENDS]
)
def test_what_is_not_affine_says_why(name: str, frontend: str) -> None:
    check_reason(OPAQUE[name], frontend)
