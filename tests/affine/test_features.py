"""What takes features apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

FRONTENDS = ["symbolic", "export"]
aten = torch.ops.aten


def low(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, m.w, m.b)


def six(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, m.six, m.b6)


def split(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Six features as two by three."""
    return six(m, x).reshape(4, 7, 2, 3)


def places(m: Any, *order: int) -> torch.Tensor:
    """Places that a graph computes from constants."""
    return torch.stack([m.b.argsort()[0] * 0 + place for place in order])


# name -> (function, input, the frontends that see enough; all by default)
CASES: dict[str, tuple[Any, ...]] = {
    "slice": (lambda m, x: low(m, x)[..., 1:4], "batch"),
    "slice with a step": (lambda m, x: low(m, x)[..., 1::2], "batch"),
    "slice from behind": (lambda m, x: low(m, x)[..., -3:-1], "batch"),
    "slice past the end": (lambda m, x: low(m, x)[..., 2:99], "batch"),
    "slice of all axes": (lambda m, x: low(m, x)[:, :, 1:4], "batch", "export"),
    "slice of nothing": (lambda m, x: low(m, x)[:, :, :], "batch", "export"),
    "slice turned": (lambda m, x: low(m, x).transpose(1, 2)[:, 1:4], "batch", "export"),
    "slice split": (lambda m, x: split(m, x)[:, :, 1:, :2], "batch", "export"),
    "aten's slice": (lambda m, x: aten.slice(low(m, x), -1, 1, 4), "batch"),
    "narrow": (lambda m, x: low(m, x).narrow(-1, 1, 3), "batch"),
    "narrow an axis from the front": (lambda m, x: low(m, x).narrow(2, 1, 3), "batch", "export"),
    "select": (lambda m, x: torch.select(low(m, x), -1, 3), "batch"),
    "select from behind": (lambda m, x: low(m, x).select(-1, -2), "batch"),
    "select split": (lambda m, x: split(m, x).select(2, 1), "batch", "export"),
    "select split, inner": (lambda m, x: split(m, x).select(-1, 1), "batch", "export"),
    "select turned": (lambda m, x: low(m, x).transpose(-1, -2).select(-2, 3), "batch"),
    "index_select": (lambda m, x: low(m, x).index_select(-1, places(m, 3, 0, 2)), "batch"),
    "index_select split": (
        lambda m, x: split(m, x).index_select(2, places(m, 1, 0)),
        "batch",
        "export",
    ),
    "split": (lambda m, x: torch.split(low(m, x), 2, -1)[1], "batch"),
    "split, the rest": (lambda m, x: torch.split(low(m, x), 2, dim=-1)[2], "batch"),
    "split with sizes": (lambda m, x: low(m, x).split([1, 3, 1], -1)[1], "batch"),
    "aten's split with sizes": (
        lambda m, x: aten.split_with_sizes(low(m, x), [1, 3, 1], -1)[1],
        "batch",
    ),
    "split turned": (
        lambda m, x: low(m, x).transpose(-1, -2).split([1, 3, 1], -2)[1],
        "batch",
    ),
    "chunk": (lambda m, x: low(m, x).chunk(2, -1)[0], "batch"),
    "chunk, the rest": (lambda m, x: low(m, x).chunk(2, -1)[-1], "batch"),
    "chunk of more than fit": (lambda m, x: low(m, x).chunk(4, -1)[2], "batch"),
}
NO_FEATURES = "something else than the features"
OPAQUE: dict[str, tuple[Any, ...]] = {
    "slice of the batch": (lambda m, x: low(m, x)[:, 1:4], "batch", NO_FEATURES),
    "slice of unknown axes": (lambda m, x: low(m, x)[:, :, 1:], "batch", NO_FEATURES, "symbolic"),
    "slice of no map": (lambda m, x: torch.sin(x)[..., 1:], "batch", NO_FEATURES),
    "one of the batch": (lambda m, x: low(m, x).select(0, 1), "batch", NO_FEATURES),
    "narrow the batch": (lambda m, x: low(m, x).narrow(-2, 0, 2), "batch", NO_FEATURES),
    "split the batch": (lambda m, x: low(m, x).split(2, -2), "batch", NO_FEATURES, "symbolic"),
    "index from data": (
        lambda m, x: low(m, x).index_select(-1, x[0, 0].argsort()),
        "batch",
        "else than a constant",
    ),
    "index twice the same": (
        lambda m, x: low(m, x).index_select(-1, places(m, 1, 1)),
        "batch",
        "else than a constant",
    ),
    "index the batch": (
        lambda m, x: low(m, x).index_select(1, places(m, 1, 0)),
        "batch",
        NO_FEATURES,
    ),
}


@pytest.mark.parametrize(
    ("name", "frontend"), [(n, f) for n, c in CASES.items() for f in c[2:] or FRONTENDS]
)
def test_features_hold_what_the_graph_computes(name: str, frontend: str, check_case: Any) -> None:
    check_case(CASES[name], frontend)


@pytest.mark.parametrize(
    ("name", "frontend"), [(n, f) for n, c in OPAQUE.items() for f in c[3:] or FRONTENDS]
)
def test_what_is_not_about_features_says_why(name: str, frontend: str, check_reason: Any) -> None:
    check_reason(OPAQUE[name], frontend)


KEYWORDS = {
    "split": lambda m, x: low(m, x).split(split_size=2, dim=-1)[0],
    "chunk": lambda m, x: torch.chunk(low(m, x), chunks=2, dim=-1)[0],
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_calls_by_keyword_are_refused_or_right(name: str, analyse_function: Any) -> None:
    analysis, node = analyse_function(KEYWORDS[name], "batch", "symbolic")
    assert node in analysis.values
