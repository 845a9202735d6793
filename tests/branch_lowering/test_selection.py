"""Which branches are rewritten, and by which sizes it is decided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import Adapter, Update, inject, trace
from lora_fx.branch_lowering.selection import FACTORED, TOKENS, Form, choices, tokens_of
from lora_fx.testing import make_adapter


def layer(into: int, out: int, rank: int = 8, shape: Any = (2, 7), dynamic: Any = None) -> Any:
    x = torch.randn(*shape, into)
    gm = trace(nn.Sequential(nn.Linear(into, out)).eval(), (x,), dynamic_shapes=dynamic)
    update = Update(torch.randn(rank, into), torch.randn(out, rank), 1.0)
    return inject(gm, Adapter("a", {"0": update}))


BOTH = ({0: "batch", 1: "length"},)


@pytest.mark.parametrize(
    ("into", "out", "rank", "form"),
    [
        (768, 768, 8, Form("augmented", ones=True)),
        (768, 768, 32, Form("augmented")),  # 33 columns would be another panel
        (384, 1536, 8, Form("augmented", ones=True)),
        (1536, 192, 8, FACTORED),
    ],
)
def test_the_form_hangs_on_the_sizes(into: int, out: int, rank: int, form: Form) -> None:
    (group,) = choices(layer(into, out, rank, dynamic=BOTH))
    assert [member.form.kind for member in group.members] == [form.kind]


def test_rows_are_counted_where_they_are_known_and_assumed_where_not() -> None:
    for shape, dynamic, rows in (((3, 7), None, 21), ((3, 7), BOTH, TOKENS)):
        (group,) = choices(layer(3, 5, 2, shape, dynamic))
        assert group.members[0].shape.n == rows
    (group,) = choices(layer(3, 5, 2, (1000, 7), ({1: "length"},)))
    assert group.members[0].shape.n == 1000
    symbolic = trace(nn.Linear(3, 5))
    assert tokens_of(next(iter(symbolic.graph.nodes)), 99) == 99


@pytest.mark.parametrize(("rows", "kind"), [(16, "factored"), (4096, "weight")])
def test_slots_make_a_weight_for_many_rows_that_are_known(rows: int, kind: str) -> None:
    (group,) = choices(layer(64, 48, shape=(2, rows)), "input")
    assert group.members[0].form.kind == kind
    (group,) = choices(layer(64, 48, shape=(2, rows), dynamic=BOTH), "input", tokens=4096)
    assert group.members[0].form == FACTORED  # an assumption proves nothing


def test_a_wanted_form_is_taken_where_it_exists() -> None:
    wanted = Form("factored", ones=True)
    (group,) = choices(layer(768, 768), form=wanted)
    assert group.members[0].form == wanted


def test_a_layer_that_is_called_twice_has_one_form(ragged: Any, x: Any) -> None:
    gm = inject(trace(ragged, (x,)), make_adapter({"again": (5, 5)}))
    forms = {member.form for group in choices(gm) for member in group.members}
    assert len(choices(gm)) == 2
    assert len(forms) == 1


def test_a_branch_whose_base_is_read_elsewhere_is_left_out(x: Any) -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.down = nn.Linear(3, 5), nn.Linear(3, 2, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    gm = inject(
        trace(Leaky().eval(), (x,)),
        Adapter("a", {"fc": Update(torch.randn(2, 3), torch.randn(5, 2), 1.0)}),
    )
    assert len(choices(gm)) == 1
    (site,) = (node for node in gm.graph.nodes if "linear" in node.name)
    output = gm.graph.output_node()
    output.args = ((output.args[0], site),)
    assert choices(gm) == []
