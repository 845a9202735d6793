"""What has a weight: a Map computes what the graph does, under both frontends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lora_fx.testing import analyse_function, check_case, check_reason

FRONTENDS = ["symbolic", "export"]

# name -> (function, input, the frontends that see enough; all by default)
CASES: dict[str, tuple[Any, ...]] = {
    "linear": (lambda m, x: F.linear(x, m.w, m.b), "batch"),
    "linear without bias": (lambda m, x: F.linear(x, m.w), "batch"),
    "linear of one vector": (lambda m, x: F.linear(x, m.w, m.b), "one"),
    "linear of a computed weight": (
        lambda m, x: F.linear(x, m.w + 2 * m.up @ m.down, m.b * m.gain),
        "batch",
    ),
    "linear of a transposed weight": (lambda m, x: F.linear(x, m.w.T @ m.w, m.b3), "flat"),
    "linear after linear": (lambda m, x: F.linear(F.linear(x, m.w, m.b), m.v, m.b6), "batch"),
    "linear of a frozen norm": (
        lambda m, x: F.linear(x, m.w * (m.gain / torch.linalg.norm(m.w, dim=1)).unsqueeze(1)),
        "flat",
    ),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w.T), "flat"),
    "addmm to a map": (lambda m, x: torch.addmm(m.low(x), x @ m.square, m.w.T), "flat"),
    "addmm to a map, with factors": (
        lambda m, x: torch.addmm(m.low(x), x @ m.square, m.w.T, beta=0.5, alpha=2),
        "flat",
    ),
    "addmm to a map in place": (
        lambda m, x: m.low(x).addmm_(x @ m.square, m.w.T, alpha=1.5),
        "flat",
    ),
    "baddbmm to a map": (
        lambda m, x: torch.baddbmm(m.low(x), x, m.w.T.expand(4, 3, 5), alpha=0.25),
        "batch",
    ),
    "matmul": (lambda m, x: F.linear(x, m.w, m.b) @ m.v.T, "batch"),
    "matmul method": (lambda m, x: F.linear(x, m.w, m.b).matmul(m.v.T), "batch"),
    "matmul by keyword": (lambda m, x: torch.matmul(x, other=m.w.T), "batch"),
    "matmul with eye": (lambda m, x: x @ (m.square + torch.eye(3, dtype=torch.float64)), "batch"),
    "mm": (lambda m, x: torch.mm(x, m.w.T), "flat"),
    "mm by keyword": (lambda m, x: torch.mm(x, mat2=m.w.T), "flat"),
    "bmm": (lambda m, x: torch.bmm(x, m.w.T.unsqueeze(0).expand(4, 3, 5)), "batch"),
    "bmm after expand": (lambda m, x: torch.bmm(x, m.w.T.expand(4, 3, 5)), "batch"),
    "matmul from the left": (lambda m, x: m.w @ x, "turned", "export"),
    "matmul from the left twice": (
        lambda m, x: m.v @ (m.w @ x + m.b.unsqueeze(-1)),
        "turned",
        "export",
    ),
    "bmm after repeat": (lambda m, x: torch.bmm(x, m.w.T.unsqueeze(0).repeat(4, 1, 1)), "batch"),
    "one of a batch": (lambda m, x: x @ m.w.T.unsqueeze(0), "batch", "export"),
    "one of a batch of one": (lambda m, x: x[None] @ m.w.T[None, None], "batch", "export"),
    "one of a batch from the left": (lambda m, x: m.w[None] @ x, "turned", "export"),
    "queries of the model's own, one set a row": (
        lambda m, x: m.square.expand(x.shape[0], 3, 3) @ m.w.T,
        "batch",
        "symbolic",
    ),
    "bmm from the left": (lambda m, x: torch.bmm(m.w.expand(4, 5, 3), x), "turned", "export"),
    "baddbmm": (lambda m, x: torch.baddbmm(m.b, x, m.w.T.expand(4, 3, 5)), "batch"),
    "matmul from the left, turned": (lambda m, x: m.w @ x.mT, "batch"),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, dims=([-1], [1])), "batch"),
    "tensordot by a number": (lambda m, x: torch.tensordot(x, m.w.T, 1), "batch"),
    "tensordot from the left": (
        lambda m, x: torch.tensordot(m.w, x.t(), ([1], [0])),
        "flat",
        "export",
    ),
    "tensordot that moves the axis": (
        lambda m, x: torch.tensordot(x, m.w, ([1], [1])) * m.gain,
        "turned",
        "export",
    ),
    "tensordot from the left that moves the axis": (
        lambda m, x: torch.tensordot(m.w, x, ([1], [2])) * m.gain[:, None, None],
        "batch",
        "export",
    ),
    "embedding": (lambda m, x: F.embedding(x, m.table), "ids"),
    "embedding with padding": (lambda m, x: F.embedding(x, m.table, padding_idx=2), "ids"),
    "embedding then linear": (
        lambda m, x: F.linear(F.embedding(x, m.table), m.w, m.b) + F.embedding(x, m.wide_table),
        "ids",
    ),
}

# name -> (function, input, words of the reason, the frontends that can trace it)
OPAQUE: dict[str, tuple[Any, ...]] = {
    "weight from data": (lambda m, x: x @ (m.w * x.sum()).T, "batch", "no constant matrix"),
    "bias from data": (lambda m, x: F.linear(x, m.w, x.sum((0, 1))[:1] + m.b), "batch", "bias"),
    "bias of two axes": (lambda m, x: torch.addmm(m.b.expand(4, 5), x, m.w.T), "flat", "bias"),
    "addmm with factors": (lambda m, x: torch.addmm(m.b, x, m.w.T, beta=2), "flat", "factors"),
    "addmm to another source": (
        lambda m, x: torch.addmm(m.low(torch.sin(x)), x, m.w.T),
        "flat",
        "two sources",
    ),
    "two activations": (lambda m, x: x @ x.transpose(1, 2), "batch", "no constant matrix"),
    "a matrix for each of the batch": (
        lambda m, x: torch.bmm(x, m.square.expand(4, 3, 3) * torch.arange(4).reshape(4, 1, 1)),
        "batch",
        "no constant matrix",
        "export",
    ),
    "a batch of one where there was none": (
        lambda m, x: x @ m.w.T[None],
        "flat",
        "no constant matrix",
        "export",
    ),
    "a vector": (lambda m, x: x @ m.b3, "batch", "no constant matrix"),
    "from the left, axes unknown": (lambda m, x: m.w @ x, "turned", "unknown", "symbolic"),
    "from the left onto a vector": (lambda m, x: m.w @ x, "one", "unknown"),
    "a table from data": (
        lambda m, x: F.embedding(x, m.table * x.sum()),
        "ids",
        "no constant matrix",
    ),
    "ids that are constants": (
        lambda m, x: F.embedding(x, m.table) @ F.embedding(x, m.table).mT,
        "ids",
        "no constant matrix",
    ),
    "called by keywords": (
        lambda m, x: torch.matmul(input=x, other=m.w.T),
        "batch",
        "keywords",
        "symbolic",
    ),
}


@pytest.mark.parametrize(
    ("name", "frontend"), [(n, f) for n, c in CASES.items() for f in c[2:] or FRONTENDS]
)
def test_a_layer_computes_what_the_graph_does(name: str, frontend: str) -> None:
    check_case(CASES[name], frontend)


@pytest.mark.parametrize(
    ("name", "frontend"), [(n, f) for n, c in OPAQUE.items() for f in c[3:] or FRONTENDS]
)
def test_what_is_no_layer_says_why(name: str, frontend: str) -> None:
    check_reason(OPAQUE[name], frontend)


def test_a_repeated_row_is_not_seen_through() -> None:
    """``expand`` from (1, 3) makes rows: the matrix that bmm multiplies with is (3, 3)."""
    analysis, node = analyse_function(
        lambda m, x: torch.bmm(x, m.gain3.reshape(1, 3).expand(4, 3, 3)), "batch"
    )
    value = analysis.map_of(node)
    assert value is None or value.relative_to(value.parent)[0].shape == (3, 3)


def test_unsqueeze_by_keyword_in_front_of_bmm() -> None:
    case = (lambda m, x: torch.bmm(x, m.w.T.unsqueeze(dim=0).expand(4, 3, 5)), "batch")
    check_case(case, "symbolic")
