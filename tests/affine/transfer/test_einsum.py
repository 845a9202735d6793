"""Einsum with one constant: dense, and block diagonal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lora_fx.testing import check_case, check_reason

FRONTENDS = ["symbolic", "export"]
einsum = torch.einsum


# name -> (function, input, the frontends that see enough; all by default)
CASES: dict[str, tuple[Any, ...]] = {
    "dense": (lambda m, x: einsum("...i,oi->...o", m.low(x), m.v), "batch"),
    "dense, transposed": (lambda m, x: einsum("...i,io->...o", m.low(x), m.v.T), "batch"),
    "of an input": (lambda m, x: einsum("bsi,oi->bso", x, m.w), "batch"),
    "of an input, features in front": (lambda m, x: einsum("oi,...ib->...ob", m.w, x), "turned"),
    "features to another place": (
        lambda m, x: einsum("bsi,oi->bos", m.low(x), m.v),
        "batch",
    ),
    "the constant in front": (lambda m, x: einsum("oi,bsi->bso", m.v, m.low(x)), "batch"),
    "features in front of the last axis": (
        lambda m, x: einsum("bis,oi->bos", m.low(x).transpose(-1, -2), m.v),
        "batch",
    ),
    "features moved to the end": (
        lambda m, x: einsum("bis,oi->bos", F.conv1d(x, m.kernel1, m.b), m.v),
        "long",
    ),
    "block diagonal": (
        lambda m, x: einsum("bsgi,goi->bsgo", m.split(x), m.blocks),
        "batch",
        "export",
    ),
    "block diagonal, transposed": (
        lambda m, x: einsum("...gi,gio->...go", m.split(x), m.blocks.transpose(1, 2)),
        "batch",
        "export",
    ),
    "split features made one": (
        lambda m, x: einsum("...gi,goi->...o", m.split(x), m.blocks),
        "batch",
        "export",
    ),
    "the batch permuted": (lambda m, x: einsum("bsi,oi->sbo", m.low(x), m.v), "batch"),
    "all permuted": (lambda m, x: einsum("bsi,oi->osb", m.low(x), m.v), "batch"),
    "the batch permuted there and back": (
        lambda m, x: einsum("sbi,oi->bso", einsum("bsi,oi->sbo", x, m.square), m.w),
        "batch",
    ),
    "one feature axis made two": (
        lambda m, x: einsum("bsi,opi->bsop", F.linear(x, m.square, m.b3), m.blocks),
        "batch",
    ),
    "two matrices": (lambda m, x: einsum("bsi,ri,or->bso", x, m.w, m.v), "batch"),
    "two matrices, the second one first": (
        lambda m, x: einsum("or,ir,...i->...o", m.v, m.w.T, x),
        "batch",
    ),
    "two square matrices": (
        lambda m, x: einsum("bsi,ir,or->bso", x, m.square, m.square.exp()),
        "batch",
    ),
    "a matrix and a gain": (lambda m, x: einsum("bsi,oi,o->bso", x, m.w, m.b), "batch"),
    "a matrix that two gains are in": (
        lambda m, x: einsum("bsi,i,ri,r,or->bso", x, m.gain3, m.w, m.b, m.v),
        "batch",
    ),
    "a matrix once more": (lambda m, x: einsum("bsi,oi,oi->bso", x, m.w, m.w), "batch"),
    "an input for each head": (lambda m, x: einsum("bsi,hoi->bsho", x, m.blocks), "batch"),
    "two matrices for each head": (
        lambda m, x: einsum("bsi,hri,hro->bsho", x, m.blocks, m.blocks),
        "batch",
    ),
}
REFUSED = "sums over the batch, or has features out of order"
OPAQUE: dict[str, tuple[Any, ...]] = {
    "no arrow": (lambda m, x: einsum("bsi,oi", x, m.w), "batch", "no output"),
    "two activations": (lambda m, x: einsum("bsi,bti->bst", x, x), "batch", "several activations"),
    "two activations and a constant": (
        lambda m, x: einsum("bsi,bsi,oi->bso", x, x, m.w),
        "batch",
        "several activations",
    ),
    "a constant that broadcasts": (
        lambda m, x: einsum("bsi,oi,o->bso", x, m.w, m.one),
        "batch",
        "sizes that differ",
    ),
    "the batch summed": (lambda m, x: einsum("bsi,oi->so", m.low(x), m.v), "batch", REFUSED),
    "a label of the constant alone": (
        lambda m, x: einsum("bsi,oi->bs", m.low(x), m.v),
        "batch",
        REFUSED,
    ),
    "no map": (lambda m, x: einsum("bsi,io->bsio", x, m.w.T), "batch", "no map"),
    "shared labels behind": (
        lambda m, x: einsum("bsgi,gi->bsig", m.split(x), m.blocks[:, 0]),
        "batch",
        REFUSED,
        "export",
    ),
    "a diagonal": (
        lambda m, x: einsum("bsrr,ro->bso", m.split(x)[..., :2], m.down),
        "batch",
        "",
        "export",
    ),
}


@pytest.mark.parametrize(
    ("name", "frontend"), [(n, f) for n, c in CASES.items() for f in c[2:] or FRONTENDS]
)
def test_an_einsum_computes_what_the_graph_does(name: str, frontend: str) -> None:
    check_case(CASES[name], frontend)


@pytest.mark.parametrize(
    ("name", "frontend"), [(n, f) for n, c in OPAQUE.items() for f in c[3:] or FRONTENDS]
)
def test_what_is_no_layer_says_why(name: str, frontend: str) -> None:
    check_reason(OPAQUE[name], frontend)
