from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_fx.export.program.example_inputs import example_inputs
from lora_fx.export.program.io_signature import input_leaves
from lora_fx.export.program.shape_variants import Case, allowed_by, cases
from lora_fx.frontend.torch_export import export_program
from lora_fx.frontend.trace import trace


class Pair(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.sum(-1) + y.sum(-1)


def tried(module: nn.Module, *args: torch.Tensor, dynamic_shapes: Any) -> list[Case]:
    gm = trace(module.eval(), args, dynamic_shapes=dynamic_shapes)
    inputs = example_inputs(gm, None, None, None)
    program = export_program(gm, inputs.args, inputs.kwargs, inputs.dynamic_shapes)
    return cases(program, input_leaves(gm, program, inputs.dynamic_shapes), allowed_by(gm))


def sizes(found: list[Case]) -> list[list[tuple[int, ...]]]:
    return [[tuple(tensor.shape) for tensor in case.tensors()] for case in found]


def test_dimensions_of_one_name_change_together() -> None:
    shapes = {"x": {0: "batch", 1: "length"}, "y": {0: "batch", 1: "length"}}
    found = tried(Pair(), torch.rand(4, 7, 3), torch.rand(4, 7, 2), dynamic_shapes=shapes)
    assert [case.label for case in found] == [
        "batch=4, length=7",
        "batch=5, length=9",
        "batch=2, length=4",
    ]
    assert sizes(found)[1] == [(5, 9, 3), (5, 9, 2)]


def test_a_dimension_named_as_a_sum_is_as_large_as_its_parts() -> None:
    class Longer(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return x.sum() + y.sum() + z.sum()

    shapes = ({0: "past"}, {0: "new"}, {0: "past + new"})
    found = tried(Longer(), torch.rand(5), torch.rand(3), torch.rand(8), dynamic_shapes=shapes)
    assert sizes(found) == [[(5,), (3,), (8,)], [(6,), (5,), (11,)], [(3,), (2,), (5,)]]
    assert found[0].label == "past=5, new=3, past + new=8"


def test_nameless_dimensions_of_one_size_change_together() -> None:
    some = {0: torch.export.Dim.DYNAMIC}
    found = tried(
        Pair(),
        torch.rand(4, 7, 3),
        torch.rand(4, 7, 2),
        dynamic_shapes={"x": some, "y": some},
    )
    assert sizes(found)[1:] == [[(5, 7, 3), (5, 7, 2)], [(2, 7, 3), (2, 7, 2)]]
    assert found[1].label.startswith("x_dim_0=5")


def test_sizes_stay_within_the_range_and_derived_ones_follow() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y[::2]

    dim = torch.export.Dim("n", min=3, max=5)
    shapes = {"x": {0: dim}, "y": {0: 2 * dim}}
    found = tried(Halves(), torch.rand(4, 7), torch.rand(8, 7), dynamic_shapes=shapes)
    assert sizes(found) == [[(4, 7), (8, 7)], [(5, 7), (10, 7)], [(3, 7), (6, 7)]]


def test_new_rows_repeat_the_traced_ones() -> None:
    x = torch.arange(8).reshape(4, 2) % 3
    found = tried(nn.Embedding(3, 5), x, dynamic_shapes={"input": {0: "rows"}})
    assert torch.equal(found[1].tensors()[0], torch.cat([x, x])[:5])


def test_offsets_rise_in_every_case() -> None:
    some = torch.tensor([7, 1, 3]), torch.tensor([0, 2, 5])
    found = tried(Starts(), *some, dynamic_shapes=({0: "ids"}, {0: "bags"}))
    assert [case.args[0].tolist() for case in found] == [[7, 1, 3], [7, 1, 3, 7], [7, 1]]
    assert [case.args[1].tolist() for case in found] == [[0, 2, 5], [0, 2, 5, 5, 5], [0, 2]]


class Starts(nn.Module):
    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return ids.sum() + offsets.sum()


def test_without_dynamic_dimensions_there_is_one_case() -> None:
    found = tried(Pair(), torch.rand(4, 7, 3), torch.rand(4, 7, 2), dynamic_shapes=None)
    assert [case.label for case in found] == ["as traced"]


class Halves(nn.Module):
    """Takes sizes that can be halved: twice in one direction, and once in the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] % 4 or x.shape[2] % 2:
            return x
        return x[:, ::4, ::2]


def test_sizes_that_the_graph_is_not_good_for_are_rounded_up_to_some_that_it_is() -> None:
    shapes = ({0: "batch", 1: "height", 2: "width"},)
    found = tried(Halves(), torch.rand(2, 16, 10), dynamic_shapes=shapes)
    assert sizes(found) == [[(2, 16, 10)], [(3, 20, 14)], [(2, 8, 6)]]


def test_a_size_that_none_of_the_steps_allows_stays_as_it_was_traced() -> None:
    class Threes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.shape[1] % 77 == 0 else x

    found = tried(Threes(), torch.rand(4, 77), dynamic_shapes=({0: "batch", 1: "length"},))
    assert sizes(found) == [[(4, 77)], [(5, 77)], [(2, 77)]]
