from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from lora_fx.layers.weight_parts import part_of


class Cuts(nn.Module):
    def __init__(self, shape: tuple[int, ...], cut: Any) -> None:
        super().__init__()
        self.w, self.cut = nn.Parameter(torch.randn(shape)), cut

    def forward(self) -> Any:
        return self.cut(self.w)


def operand(shape: tuple[int, ...], cut: Any) -> tuple[fx.GraphModule, Any]:
    gm = fx.symbolic_trace(Cuts(shape, cut))
    return gm, gm.graph.output_node().args[0]


CUTS: list[tuple[tuple[int, ...], Any, Any]] = [
    ((6, 5), lambda w: w[2:5], (range(2, 5), None, False)),
    ((6, 5), lambda w: w[:, 1::2], (None, range(1, 4, 2), False)),
    ((6, 5), lambda w: w[1:3, [4, 0]], (range(1, 3), (4, 0), False)),
    ((6, 5), lambda w: w.t(), (None, None, True)),
    ((6, 5), lambda w: w.t()[:, 2:4], (range(2, 4), None, True)),
    ((6, 6), lambda w: w.t(), (None, None, True)),
    ((6, 5), lambda w: w.view(2, 3, 5)[1], (range(3, 6), None, False)),
    ((6, 5), lambda w: w[4:5], (range(4, 5), None, False)),
    ((6, 5), lambda w: w.clone(), (None, None, False)),
    ((6, 5), lambda w: w[[1, 1, 1]], ((1, 1, 1), None, False)),
    ((6, 5, 3), lambda w: w[2:4, :2], (range(2, 4), range(2), False)),
    ((6,), lambda w: w[::2], (range(0, 5, 2), None, False)),
    ((6,), lambda w: w.flip(0), ((5, 4, 3, 2, 1, 0), None, False)),
]


@pytest.mark.parametrize(("shape", "cut", "wanted"), CUTS)
def test_a_part_is_rows_and_columns(shape: tuple[int, ...], cut: Any, wanted: Any) -> None:
    gm, value = operand(shape, cut)
    part = part_of(gm, value)
    assert part is not None
    assert part[1:4] == wanted
    assert part.source.target == "w"
    assert part.calls[-1] is value
    assert all(source is part.source or source.target == "w" for _, source in part.reads)


@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ((6, 5), lambda w: w.reshape(5, 6)),
        ((6, 5), lambda w: w[0]),
        ((6, 5), lambda w: w.view(2, 3, 5)),
        ((6, 5, 3), lambda w: w.transpose(0, 1)),
        ((6, 5, 3), lambda w: w[..., :2]),
        ((6, 5), lambda w: w.diagonal()),
        ((6, 5), lambda w: w * 2),
    ],
)
def test_what_is_no_rows_and_columns_is_no_part(shape: tuple[int, ...], cut: Any) -> None:
    assert part_of(*operand(shape, cut)) is None


def test_the_stored_tensor_is_all_of_itself() -> None:
    gm, value = operand((6, 5), lambda w: w)
    part = part_of(gm, value)
    assert part is not None
    assert part[1:] == (None, None, False, (), ())
    assert part_of(gm, None) is None


def test_what_an_adapter_made_stands_for_the_stored_tensor() -> None:
    gm, value = operand((6, 5), lambda w: (w * 2)[2:4])
    made, source = value.args[0], value.args[0].args[0]
    assert part_of(gm, value) is None
    part = part_of(gm, value, {made: source})
    assert part is not None
    assert (part.source, part.rows, part.reads) == (source, range(2, 4), ((value, made),))
