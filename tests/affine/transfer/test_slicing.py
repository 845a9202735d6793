"""What takes features apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_fx.affine.affine_map import Link
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
    "chunk split": (lambda m, x: m.split(x).chunk(2, 2)[1], "batch", "export"),
    "unsafe_split": (lambda m, x: aten.unsafe_split(m.low(x), 2, -1)[1], "batch"),
    "unsafe_split_with_sizes": (
        lambda m, x: aten.unsafe_split_with_sizes(m.low(x), [1, 3, 1], -1)[1],
        "batch",
    ),
    "unsafe_chunk": (lambda m, x: torch.unsafe_chunk(m.low(x), 2, -1)[1], "batch"),
    "tensor_split": (lambda m, x: m.low(x).tensor_split(3, -1)[1], "batch"),
    "tensor_split at places": (lambda m, x: m.low(x).tensor_split((1, 4), dim=-1)[1], "batch"),
    "unbind": (lambda m, x: m.low(x).unbind(-1)[3], "batch"),
    "unbind split": (lambda m, x: m.split(x).unbind(2)[1], "batch", "export"),
    "unbind split, inner": (lambda m, x: torch.unbind(m.split(x), dim=-1)[1], "batch", "export"),
    "unbind turned": (lambda m, x: m.low(x).transpose(-1, -2).unbind(-2)[2], "batch"),
    "flip": (lambda m, x: m.low(x).flip(-1), "batch"),
    "flip split": (lambda m, x: torch.flip(m.split(x), [2]), "batch", "export"),
    "flip both": (lambda m, x: m.split(x).flip(-1, -2), "batch", "export"),
    "flip by keyword": (lambda m, x: m.low(x).flip(dims=[-1]), "batch"),
    "roll": (lambda m, x: m.low(x).roll(2, -1), "batch"),
    "roll back": (lambda m, x: torch.roll(m.low(x), -1, dims=-1), "batch"),
    "roll both": (lambda m, x: m.split(x).roll((1, 2), (2, 3)), "batch", "export"),
    "index": (lambda m, x: m.low(x)[..., m.places(3, 0, 2)], "batch"),
    "index from behind": (lambda m, x: m.low(x)[:, :, m.places(-1, 0)], "batch", "export"),
    "index split": (lambda m, x: m.split(x)[:, :, m.places(1, 0)], "batch", "export"),
    "index turned": (lambda m, x: m.low(x).transpose(-1, -2)[..., m.places(3, 0), :], "batch"),
    "index by a mask": (lambda m, x: m.low(x)[..., m.b > m.b.sort()[0][1]], "batch"),
    "index by a grid": (
        lambda m, x: m.low(x)[..., m.places(4, 0, 3, 1).reshape(2, 2)],
        "batch",
    ),
    "brackets of two axes": (lambda m, x: m.split(x)[..., 1, 1:], "batch", "export"),
    "narrow split": (lambda m, x: m.split(x).narrow(-1, 1, 2), "batch", "export"),
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
    "index from data in brackets": (
        lambda m, x: m.low(x)[..., x[0, 0].argsort()],
        "batch",
        "else than a constant",
    ),
    "index the batch in brackets": (
        lambda m, x: m.low(x)[:, m.places(1, 0)],
        "batch",
        NO_FEATURES,
    ),
    "index by itself": (
        lambda m, x: (lambda y: y[..., y])(m.low(x)[0, 0].long()),
        "batch",
        NO_FEATURES,
    ),
    "slice that the input moves": (
        lambda m, x: m.low(x)[..., : x.shape[0]],
        "batch",
        "else than a constant",
        "symbolic",
    ),
    "roll that the input moves": (
        lambda m, x: m.low(x).roll(x.shape[0], -1),
        "batch",
        NO_FEATURES,
        "symbolic",
    ),
    "index by two lists": (
        lambda m, x: m.split(x)[:, :, m.places(1, 0), m.places(2, 0)],
        "batch",
        NO_FEATURES,
        "export",
    ),
    "flip the batch": (lambda m, x: m.low(x).flip(-2), "batch", NO_FEATURES),
    "flip batch and features": (lambda m, x: m.low(x).flip(-1, -2), "batch", NO_FEATURES),
    "roll the batch": (lambda m, x: m.low(x).roll(1, -2), "batch", NO_FEATURES),
    "roll all that there is": (lambda m, x: m.low(x).roll(1), "batch", NO_FEATURES),
    "unbind the batch": (lambda m, x: m.low(x).unbind(-2), "batch", NO_FEATURES, "symbolic"),
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


SPELLINGS = {
    "slice": lambda m, x: m.low(x)[..., 1:4],
    "narrow": lambda m, x: m.low(x).narrow(-1, 1, 3),
    "split": lambda m, x: m.low(x).split([1, 3, 1], -1)[1],
    "tensor_split": lambda m, x: m.low(x).tensor_split((1, 4), -1)[1],
    "index_select": lambda m, x: m.low(x).index_select(-1, m.places(1, 2, 3)),
    "index": lambda m, x: m.low(x)[..., m.places(1, 2, 3)],
}


def test_the_same_places_are_equal_however_they_are_spelled() -> None:
    found = {}
    for name, function in SPELLINGS.items():
        analysis, node = analyse_function(function, "batch", "export")
        found[name] = analysis.map_of(node)
    first = found["slice"]
    assert first is not None
    assert all(other is not None and other.weight == first.weight for other in found.values())
    analysis, node = analyse_function(lambda m, x: m.low(x)[..., 0:3], "batch", "export")
    assert analysis.map_of(node).weight != first.weight


def test_a_slice_of_all_moves_and_a_slice_of_some_picks() -> None:
    for stop, link in ((None, Link.LAYER), (5, Link.PRODUCT)):
        analysis, node = analyse_function(
            lambda m, x, stop=stop: torch.ops.aten.slice(m.low(x), -1, 0, stop), "batch", "symbolic"
        )
        value = analysis.map_of(node)
        assert value is not None
        assert (value.link is Link.PRODUCT) == (link is Link.PRODUCT)
