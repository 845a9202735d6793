from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from lora_fx.export import Session, to_onnx
from lora_fx.export.spelling.nan_guards import DropNanGuards
from lora_fx.frontend.trace import trace
from lora_fx.testing import relative

LEAST = "-3.4028234663852886e38"
GRAPH = """
g ({type}[2, 3, 5] q, {type}[2, 5, 4] k, {type}[2, 4, 5] v, {given}) => ({type}[2, 3, 5] y)
<{type} zero = {{0.0}}, {type} one = {{1.0}}, float least = {{LEAST}},
 float minus = {{-inf}}{stored}>
{{
    qk = MatMul(q, k)
    {mask}
    p = Softmax <axis = -1> (s)
    bad = IsNaN(p)
    safe = Where(bad, zero, p)
    y = MatMul(safe, v)
}}
""".replace("LEAST", LEAST)

ROWS = "bool[2, 3, 4] m"
# What is given, and the sum s of the products with it.
NEVER_EMPTY = {
    "no mask": (ROWS, "s = MatMul(q, k)"),
    "the least number": (ROWS, "a = Where(m, zero, least)\n s = Add(qk, a)"),
    "in front": (ROWS, "a = Where(m, zero, least)\n s = Add(a, qk)"),
    "spread out": (
        "bool[2, 1, 4] m",
        "n = Expand(m, sizes)\n a = Where(n, zero, least)\n b = Transpose <perm = [0, 1, 2]> (a)\n"
        "s = Add(qk, b)",
    ),
    "inverted": (
        ROWS,
        "c = Cast <to = 1> (m)\n d = Sub(one, c)\n a = Mul(d, least)\n s = Add(qk, a)",
    ),
    "far away besides": (
        "bool[2, 3, 4] m, int64[2, 3, 4] far",
        "a = Where(m, zero, one)\n b = Cast <to = 1> (far)\n c = Add(qk, b)\n s = Add(c, a)",
    ),
}
MAY_BE_EMPTY = {
    "a mask of the caller's": ("float[2, 3, 4] m", "s = Add(qk, m)"),
    "minus infinity": (ROWS, "a = Where(m, zero, minus)\n s = Add(qk, a)"),
    "in place of the products": (ROWS, "s = Where(m, qk, minus)"),
    "two masks": (
        f"{ROWS}, bool[2, 3, 4] n",
        "a = Where(m, zero, least)\n b = Where(n, zero, least)\n c = Add(qk, a)\n s = Add(c, b)",
    ),
    "whole numbers inverted": (
        "int64[2, 3, 4] m",
        "c = Cast <to = 1> (m)\n d = Sub(one, c)\n a = Mul(d, least)\n s = Add(qk, a)",
    ),
    "twice the least number": (ROWS, "a = Where(m, zero, least)\n b = Add(a, a)\n s = Add(qk, b)"),
    "stored": (ROWS, "s = Add(qk, kept)"),
    "stored, and may be overridden": ("bool[2, 3, 4] m, float[1] open", "s = Add(qk, open)"),
}


def graph(given: str, mask: str, type: str = "float") -> str:
    stored = ", int64[3] sizes = {2, 3, 4}, float[4] kept = {0.0, -inf, 0.0, 0.0}"
    return GRAPH.format(given=given, mask=mask, type=type, stored=stored)


@pytest.mark.parametrize("name", NEVER_EMPTY)
def test_a_guard_goes_where_no_row_can_be_empty(name: str, spelled: Callable[..., Any]) -> None:
    found = spelled(DropNanGuards, graph(*NEVER_EMPTY[name]))
    assert (found.count, found.left) == (1, 0)
    assert found.text[-2:] == ["p = Softmax(s)", "y = MatMul(p, v)"]
    assert found.off == 0


@pytest.mark.parametrize("name", MAY_BE_EMPTY)
def test_a_guard_stays_where_a_row_may_be_empty(name: str, spelled: Callable[..., Any]) -> None:
    found = spelled(DropNanGuards, graph(*MAY_BE_EMPTY[name]))
    assert (found.count, found.left) == (0, 1)
    assert "safe = Where(bad, zero, p)" in found.text
    assert found.off == 0


def test_half_precision_has_no_room_for_a_score_below_the_least(
    spelled: Callable[..., Any],
) -> None:
    text = graph(ROWS, "a = Where(m, zero, low)\n s = Add(qk, a)", "float16")
    text = text.replace("zero = {0.0}", "zero = {0}")
    text = text.replace("one = {1.0}", f"low = {{{0xFBFF}}}")  # -65504, by its bits
    assert spelled(DropNanGuards, text).left == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Where(bad, zero, p)", "Where(bad, one, p)"),
        ("Where(bad, zero, p)", "Where(bad, p, zero)"),
        ("Where(bad, zero, p)", "Where(bad, zero, s)"),
        ("Softmax <axis = -1> (s)", "Sqrt(s)"),
    ],
)
def test_what_is_no_guard_of_a_softmax_stays(
    old: str, new: str, spelled: Callable[..., Any]
) -> None:
    text = graph(*NEVER_EMPTY["no mask"]).replace(old, new)
    found = spelled(DropNanGuards, text)
    assert (found.count, found.left) == (0, 0)


class Masked(nn.Module):
    """Attention under a mask that is computed, or given."""

    def __init__(self, least: float | None) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.least = least

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q = self.fc(x).unflatten(-1, (2, 3)).transpose(1, 2)
        if self.least is None:
            return nn.functional.scaled_dot_product_attention(q, q, q, mask[:, None, None])
        scores = q @ q.mT + torch.where(mask, 0.0, self.least)[:, None, None]
        p = scores.softmax(-1)
        return torch.where(p.isnan(), 0.0, p) @ q


@pytest.mark.parametrize(("least", "goes"), [(None, True), (float("-inf"), False)])
def test_a_file_says_which_guards_it_has(least: float | None, goes: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Masked(least).eval(), torch.randn(2, 7, 6)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    gm = trace(module, (x, mask), dynamic_shapes=({0: "batch", 1: "n"}, {0: "batch", 1: "n"}))
    report = to_onnx(gm, tmp_path / "model.onnx")
    kept, gone = DropNanGuards.kept, DropNanGuards.what
    assert report.verified
    assert report.spellings.get(gone if goes else kept) == 1
    assert (kept if goes else gone) not in report.spellings
    assert f"spelling 1 x {gone if goes else kept}" in str(report)
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert ("IsNaN" in operators) is not goes
    if not goes:  # a row that is wholly masked is what the guard is for
        mask[1] = False
        (y,) = Session(tmp_path / "model.onnx").run({"x": x, "mask": mask}).values()
        found = torch.from_numpy(y)
        assert found.isfinite().all()
        assert relative(found, module(x, mask)) < 1e-5
        assert relative(found, module(x, ~mask)) > 1e-2


def test_a_portable_file_keeps_its_guards(tmp_path: Path) -> None:
    x, mask = torch.randn(2, 7, 6), torch.ones(2, 7, dtype=torch.bool)
    gm = trace(Masked(None).eval(), (x, mask))
    report = to_onnx(gm, tmp_path / "model.onnx", portable=True)
    assert report.verified
    assert report.spellings == {}
    assert "IsNaN" in [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
