"""What moves features: casts, dropout, reshapes, permutations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lora_fx.testing import check_case, check_reason

FRONTENDS = ["symbolic", "export"]


# name -> (function, input, the frontends that see enough; all by default)
CASES: dict[str, tuple[Any, ...]] = {
    "batch and features on one axis": (lambda m, x: m.wide(x).reshape(-1, 3), "batch", "export"),
    "and apart again": (
        lambda m, x: (lambda y: torch.stack((-y[:, 1], y[:, 0], y[:, 2]), 1).reshape(4, 7, 6))(
            m.wide(x).reshape(-1, 3)
        ),
        "batch",
        "export",
    ),
    "the batch turned": (lambda m, x: m.low(x).transpose(0, 1), "batch", "export"),
    "the batch turned, from behind": (lambda m, x: m.low(x).transpose(-2, -3), "batch"),
    "features over a batch that turns": (lambda m, x: m.low(x).permute(2, 1, 0), "batch"),
    "the batch turned and made one axis": (
        lambda m, x: m.low(x).transpose(0, 1).reshape(28, 5),
        "batch",
        "export",
    ),
    "and turned again": (
        lambda m, x: m.low(x).transpose(0, 1).reshape(2, 14, 5).transpose(0, 1),
        "batch",
        "export",
    ),
    "scaled on one axis": (lambda m, x: m.wide(x).reshape(-1, 3) * m.b3, "batch", "export"),
    "and cut there": (lambda m, x: m.wide(x).reshape(56, 3)[:, 1:] * 2, "batch", "export"),
    "clone": (lambda m, x: m.low(x).clone().contiguous().detach(), "batch"),
    "alias": (lambda m, x: torch.ops.aten.alias(m.low(x)), "batch"),
    "fresh copy": (lambda m, x: torch.ops.aten.lift_fresh_copy(m.low(x)), "batch"),
    "identity": (lambda m, x: m.same(m.low(x)), "batch"),
    "identity of an input": (lambda m, x: m.low(m.same(x)), "batch"),
    "dropout in eval": (lambda m, x: m.drop(m.low(x)), "batch"),
    "dropout told to be off": (lambda m, x: F.dropout(m.low(x), 0.5, False), "batch"),
    "dropout off by keyword": (lambda m, x: F.dropout(m.low(x), training=False), "batch"),
    "reshape": (lambda m, x: m.low(x).reshape(28, 5), "batch", "export"),
    "reshape back": (
        lambda m, x: F.linear(m.low(x).reshape(-1, 5), m.v, m.b6).reshape(4, 7, 6),
        "batch",
        "export",
    ),
    "reshape of an input": (lambda m, x: m.low(x.reshape(28, 3)), "batch", "export"),
    "view": (lambda m, x: m.wide(x).view(4, 7, 2, 3), "batch", "export"),
    "unsafe view": (
        lambda m, x: torch.ops.aten._unsafe_view(m.low(x), [2, 14, 5]),
        "batch",
        "export",
    ),
    "view_as": (lambda m, x: m.low(x).view_as(m.low(x)), "batch", "export"),
    "reshape_as": (lambda m, x: m.low(x).reshape_as(m.low(x)), "batch", "export"),
    "flatten": (lambda m, x: m.low(x).flatten(0, 1), "batch", "export"),
    "flatten features": (
        lambda m, x: m.wide(x).unflatten(-1, (3, 2)).flatten(-2),
        "batch",
        "export",
    ),
    "unflatten the batch": (lambda m, x: m.low(x).unflatten(0, (2, 2)), "batch", "export"),
    "squeeze": (lambda m, x: m.low(x).unsqueeze(1).squeeze(1), "batch", "export"),
    "unsqueeze behind": (lambda m, x: m.low(x).unsqueeze(-1), "batch", "export"),
    "reshape the batch in front": (
        lambda m, x: F.conv1d(x, m.kernel1, m.b).unsqueeze(1),
        "long",
        "export",
    ),
    "transpose": (lambda m, x: m.low(x).transpose(-1, -2), "batch"),
    "transpose and back": (
        lambda m, x: m.low(x).transpose(-1, -2).transpose(-2, -1) @ m.v.T,
        "batch",
    ),
    "transpose, axes from the front": (lambda m, x: m.low(x).transpose(1, 2), "batch", "export"),
    "swapaxes": (lambda m, x: m.low(x).swapaxes(-1, -2), "batch"),
    "transpose by keyword": (lambda m, x: m.low(x).transpose(dim0=-2, dim1=-1), "batch"),
    "transpose over two axes": (
        lambda m, x: m.wide(x).view(4, 7, 2, 3).permute(0, 2, 3, 1),
        "batch",
        "export",
    ),
    "feature axes swapped": (
        lambda m, x: m.wide(x).view(4, 7, 2, 3).transpose(-1, -2),
        "batch",
        "export",
    ),
    "feature axes swapped and merged": (
        lambda m, x: m.wide(x).view(4, 7, 2, 3).transpose(2, 3).reshape(4, 7, 6) @ m.v,
        "batch",
        "export",
    ),
    "feature axes permuted": (
        lambda m, x: m.wide(x).view(4, 7, 2, 1, 3).permute(0, 1, 4, 2, 3),
        "batch",
        "export",
    ),
    "permute": (lambda m, x: m.low(x).permute(2, 0, 1), "batch"),
    "permute, negative": (lambda m, x: m.low(x).permute(0, -1, -2), "batch"),
    "permute of a list": (lambda m, x: torch.permute(m.low(x), [0, 2, 1]), "batch"),
    "t": (lambda m, x: m.low(x).t(), "flat"),
    "mT": (lambda m, x: torch.ops.aten.mT(m.low(x)), "batch"),
    "features in front of a kernel": (
        lambda m, x: F.conv1d(m.low(x).transpose(-2, -1), m.v.unsqueeze(-1), m.b6),
        "batch",
    ),
}
CASTS: dict[str, tuple[Any, ...]] = {
    "to": (lambda m, x: m.low(x).to(torch.float32), "batch"),
    "to by keyword": (lambda m, x: m.low(x).to(dtype=torch.float32), "batch"),
    "to another's": (lambda m, x: m.low(x).float().to(m.w), "batch"),
    "type_as": (lambda m, x: m.low(x).float().type_as(m.w), "batch"),
    "to copy": (
        lambda m, x: torch.ops.aten._to_copy(m.low(x), dtype=torch.float32),
        "batch",
    ),
    "float and double": (lambda m, x: m.low(x).float().double(), "batch"),
    "of an input": (lambda m, x: F.linear(x.float(), m.w.float(), m.b.float()), "batch"),
    "to the device it is on": (lambda m, x: m.low(x).to("cpu"), "batch"),
}
HALVES: dict[str, tuple[Any, ...]] = {
    "half": (lambda m, x: m.low(x).half(), "batch"),
    "bfloat16": (lambda m, x: m.low(x).bfloat16().float(), "batch"),
}
APART = "takes the features apart"
MOVES = "takes features apart"
OPAQUE: dict[str, tuple[Any, ...]] = {
    "dropout in training": (lambda m, x: F.dropout(m.low(x), 0.5, True), "batch", "in training"),
    "dropout by default": (lambda m, x: F.dropout(m.low(x)), "batch", "in training"),
    "to integers": (lambda m, x: m.low(x).to(torch.int32), "batch", "integers"),
    "to truth": (lambda m, x: m.low(x).to(dtype=torch.bool), "batch", "integers"),
    "one axis of batch and features, turned": (
        lambda m, x: m.wide(x).reshape(-1, 3).transpose(0, 1),
        "batch",
        "permutation",
        "export",
    ),
    "one axis of batch and features, cut": (
        lambda m, x: m.wide(x).reshape(-1, 3)[:3],
        "batch",
        "takes apart",
        "export",
    ),
    "one axis of batch and features, scaled by rows": (
        lambda m, x: m.wide(x).reshape(-1, 3) * torch.cat([m.b[:4]] * 14)[:, None],
        "batch",
        "no constant of the features",
        "export",
    ),
    "batch and features mixed": (lambda m, x: m.low(x).reshape(4, 35), "batch", APART),
    "features dealt out": (lambda m, x: m.wide(x).reshape(4, 14, 3), "batch", APART),
    "features against the batch": (
        lambda m, x: m.low(x).transpose(-1, -2).reshape(4, 35),
        "batch",
        APART,
    ),
    "read in another order": (
        lambda m, x: m.low(x).transpose(-1, -2).reshape(4, 7, 5),
        "batch",
        APART,
    ),
    "sizes unknown": (lambda m, x: m.low(x).reshape(28, 5), "batch", "unknown", "symbolic"),
    "axes that are not known": (
        lambda m, x: m.low(x).transpose(0, 1),
        "batch",
        "unknown axes",
        "symbolic",
    ),
    "feature axes torn apart": (
        lambda m, x: m.wide(x).view(4, 7, 2, 3).permute(0, 2, 1, 3),
        "batch",
        MOVES,
        "export",
    ),
    "bits read as another dtype": (
        lambda m, x: m.low(x).view(torch.int64).double(),
        "batch",
        "",
        "export",
    ),
    "bits read as another float": (
        lambda m, x: m.low(x).half().view(torch.bfloat16),
        "batch",
        "",
        "export",
    ),
    "to what only the input knows": (
        lambda m, x: m.low(F.embedding(x, m.table)).type_as(x),
        "ids",
        "",
    ),
    "to what another input has": (
        lambda m, x: m.low(F.embedding(x, m.table)).to(x.dtype),
        "ids",
        "",
    ),
    "to another input": (lambda m, x: m.low(F.embedding(x, m.table)).to(x), "ids", ""),
}


@pytest.mark.parametrize(
    ("name", "frontend"), [(n, f) for n, c in CASES.items() for f in c[2:] or FRONTENDS]
)
def test_a_move_computes_what_the_graph_does(name: str, frontend: str) -> None:
    check_case(CASES[name], frontend)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", CASTS | HALVES)
def test_a_cast_computes_what_the_graph_does(name: str, frontend: str) -> None:
    check_case((CASTS | HALVES)[name], frontend, 1e-6 if name in CASTS else 1e-2)


@pytest.mark.parametrize(
    ("name", "frontend"), [(n, f) for n, c in OPAQUE.items() for f in c[3:] or FRONTENDS]
)
def test_what_is_no_move_says_why(name: str, frontend: str) -> None:
    check_reason(OPAQUE[name], frontend)


def test_t_of_one_axis_moves_nothing() -> None:
    check_case((lambda m, x: m.low(x).t() * m.gain, "one"), "export")
