"""What takes features apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_fx.testing import analyse_function, check_case, check_reason

FRONTENDS = ["symbolic", "export"]
aten = torch.ops.aten


# name -> (function, input, the frontends that see enough; all by default)
CASES: dict[str, tuple[Any, ...]] = {
    "slice": (lambda m, x: m.low(x)[..., 1:4], "batch"),
    "slice with a step": (lambda m, x: m.low(x)[..., 1::2], "batch"),
    "slice from behind": (lambda m, x: m.low(x)[..., -3:-1], "batch"),
    "slice past the end": (lambda m, x: m.low(x)[..., 2:99], "batch"),
    "slice of all axes": (lambda m, x: m.low(x)[:, :, 1:4], "batch", "export"),
    "slice of nothing": (lambda m, x: m.low(x)[:, :, :], "batch", "export"),
    "slice turned": (lambda m, x: m.low(x).transpose(1, 2)[:, 1:4], "batch", "export"),
    "slice split": (lambda m, x: m.split(x)[:, :, 1:, :2], "batch", "export"),
    "aten's slice": (lambda m, x: aten.slice(m.low(x), -1, 1, 4), "batch"),
    "narrow": (lambda m, x: m.low(x).narrow(-1, 1, 3), "batch"),
    "narrow an axis from the front": (lambda m, x: m.low(x).narrow(2, 1, 3), "batch", "export"),
    "select": (lambda m, x: torch.select(m.low(x), -1, 3), "batch"),
    "select from behind": (lambda m, x: m.low(x).select(-1, -2), "batch"),
    "select split": (lambda m, x: m.split(x).select(2, 1), "batch", "export"),
    "select split, inner": (lambda m, x: m.split(x).select(-1, 1), "batch", "export"),
    "select turned": (lambda m, x: m.low(x).transpose(-1, -2).select(-2, 3), "batch"),
    "index_select": (lambda m, x: m.low(x).index_select(-1, m.places(3, 0, 2)), "batch"),
    "index_select split": (
        lambda m, x: m.split(x).index_select(2, m.places(1, 0)),
        "batch",
        "export",
    ),
    "split": (lambda m, x: torch.split(m.low(x), 2, -1)[1], "batch"),
    "split, the rest": (lambda m, x: torch.split(m.low(x), 2, dim=-1)[2], "batch"),
    "split with sizes": (lambda m, x: m.low(x).split([1, 3, 1], -1)[1], "batch"),
    "aten's split with sizes": (
        lambda m, x: aten.split_with_sizes(m.low(x), [1, 3, 1], -1)[1],
        "batch",
    ),
    "split turned": (
        lambda m, x: m.low(x).transpose(-1, -2).split([1, 3, 1], -2)[1],
        "batch",
    ),
    "chunk": (lambda m, x: m.low(x).chunk(2, -1)[0], "batch"),
    "chunk, the rest": (lambda m, x: m.low(x).chunk(2, -1)[-1], "batch"),
    "chunk of more than fit": (lambda m, x: m.low(x).chunk(4, -1)[2], "batch"),
}
NO_FEATURES = "something else than the features"
OPAQUE: dict[str, tuple[Any, ...]] = {
    "slice of the batch": (lambda m, x: m.low(x)[:, 1:4], "batch", NO_FEATURES),
    "slice of unknown axes": (lambda m, x: m.low(x)[:, :, 1:], "batch", NO_FEATURES, "symbolic"),
    "slice of no map": (lambda m, x: torch.sin(x)[..., 1:], "batch", NO_FEATURES),
    "one of the batch": (lambda m, x: m.low(x).select(0, 1), "batch", NO_FEATURES),
    "narrow the batch": (lambda m, x: m.low(x).narrow(-2, 0, 2), "batch", NO_FEATURES),
    "split the batch": (lambda m, x: m.low(x).split(2, -2), "batch", NO_FEATURES, "symbolic"),
    "index from data": (
        lambda m, x: m.low(x).index_select(-1, x[0, 0].argsort()),
        "batch",
        "else than a constant",
    ),
    "index twice the same": (
        lambda m, x: m.low(x).index_select(-1, m.places(1, 1)),
        "batch",
        "else than a constant",
    ),
    "index the batch": (
        lambda m, x: m.low(x).index_select(1, m.places(1, 0)),
        "batch",
        NO_FEATURES,
    ),
}


@pytest.mark.parametrize(
    ("name", "frontend"), [(n, f) for n, c in CASES.items() for f in c[2:] or FRONTENDS]
)
def test_features_hold_what_the_graph_computes(name: str, frontend: str) -> None:
    check_case(CASES[name], frontend)


@pytest.mark.parametrize(
    ("name", "frontend"), [(n, f) for n, c in OPAQUE.items() for f in c[3:] or FRONTENDS]
)
def test_what_is_not_about_features_says_why(name: str, frontend: str) -> None:
    check_reason(OPAQUE[name], frontend)


KEYWORDS = {
    "split": lambda m, x: m.low(x).split(split_size=2, dim=-1)[0],
    "chunk": lambda m, x: torch.chunk(m.low(x), chunks=2, dim=-1)[0],
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_calls_by_keyword_are_refused_or_right(name: str) -> None:
    analysis, node = analyse_function(KEYWORDS[name], "batch", "symbolic")
    assert node in analysis.values
