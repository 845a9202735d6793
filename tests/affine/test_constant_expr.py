"""Constants as expressions of what they are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import trace
from lora_fx.affine.constant_expr import factored
from lora_fx.affine.transfer import analyse
from lora_fx.algebra.evaluate import dense
from lora_fx.algebra.matrix_expr import Leaf, Matrix, Product, Sum, Transposed, parts
from lora_fx.testing import Computes


def constant(function: Callable[[Any], torch.Tensor]) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"w": (5, 3), "a": (5, 2), "b": (2, 3), "v": (5,), "s": (), "one": (1, 1)}
    return Computes(lambda m, x: x * function(m).sum(), sizes)


CASES: dict[str, tuple[Callable[[Any], torch.Tensor], type]] = {
    "product": (lambda m: m.a @ m.b, Product),
    "turned": (lambda m: (m.a @ m.b).T, Product),
    "turned by transpose": (lambda m: (m.a @ m.b).transpose(0, 1), Product),
    "turned by permute": (lambda m: (m.a @ m.b).permute(1, 0), Product),
    "turned leaf": (lambda m: m.w.T, Transposed),
    "scaled": (lambda m: 1.5 * (m.a @ m.b), Product),
    "divided": (lambda m: (m.a @ m.b) / 4, Product),
    "sum": (lambda m: m.w + 2 * m.a @ m.b, Sum),
    "difference": (lambda m: m.w - m.a @ m.b, Sum),
    "difference with a factor": (lambda m: torch.sub(m.w, m.a @ m.b, alpha=2), Sum),
    "addmm": (lambda m: torch.addmm(m.w, m.a, m.b), Sum),
    "addmm with factors": (lambda m: torch.addmm(m.w, m.a, m.b, beta=2, alpha=0.5), Sum),
    "addmm of a row": (lambda m: torch.addmm(m.b[0], m.a, m.b), Leaf),
    "scaled by a tensor": (lambda m: m.s * (m.a @ m.b), Product),
    "scaled by a matrix of one": (lambda m: (m.a @ m.b) * m.one, Product),
    "divided by a tensor": (lambda m: (m.a @ m.b) / m.s, Leaf),
    "viewed": (lambda m: (m.a @ m.b).view(m.w.shape), Product),
    "viewed as another": (lambda m: (m.a @ m.b).view(3, 5).reshape_as(m.w), Leaf),
    "passed on": (lambda m: (m.a @ m.b).contiguous().float(), Product),
    "Hadamard": (lambda m: m.w * (m.a @ m.b), Leaf),
    "broadcast": (lambda m: m.w + m.v[:, None], Leaf),
}


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("name", CASES)
def test_an_expression_equals_the_constant(name: str, frontend: str) -> None:
    function, kind = CASES[name]
    module = constant(function)
    gm = trace(module, (torch.ones(4, 3),), frontend=frontend)
    analysis = analyse(gm)
    total = next(n for n in gm.graph.nodes if "sum" in n.name)
    found: Matrix | None = factored(analysis.constants, total.args[0])
    assert isinstance(found, kind)
    wanted = function(module)
    torch.testing.assert_close(dense(found, torch.float32), wanted)
    assert not torch.allclose(dense(found, torch.float32) * 1.1, wanted)
    if kind is Product:
        assert min(part.shape[0] for part in parts(found, Product)) == 2
