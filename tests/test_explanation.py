"""What fold would do, in words."""

from __future__ import annotations

from xml.etree import ElementTree

import torch
from torch import nn

import lora_fx
from lora_fx import trace
from lora_fx.explanation import explain
from lora_fx.graph.lazy_tensor import get_unevaluated


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.down, self.up = nn.Linear(3, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.act = nn.ReLU()
        self.head = nn.Linear(5, 7)
        self.kept = nn.Linear(7, 7)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.head(self.act(self.fc(x) + self.up(self.down(x))))
        y = self.kept(x)
        return y + torch.sin(x) @ self.kept.weight, torch.relu(y)


LINES = [
    "fc: linear 3 -> 5 of x: becomes the layer of 4 calls up to add; "
    "act (act) reads it: relu is not known to be affine",
    "down: linear 3 -> 2 of x: goes into fc, with 4 calls up to add",
    "up: linear 2 -> 5 of x: goes into fc, with 4 calls up to add",
    "head: linear 5 -> 7 of act: one layer; linear_4 (kept) reads it: a layer of its own, "
    "sin (the model itself) reads it: sin is not known to be affine",
]


def test_each_layer_has_a_line_in_the_graphs_own_words() -> None:
    lines = explain(trace(Model()))
    assert [*lines[:4]] == LINES
    assert lines[4].startswith("kept: linear 7 -> 7 of act: one layer; add_1 (the model itself)")
    assert "two sources" in lines[4]


def test_they_are_printed_and_a_table_in_a_notebook() -> None:
    lines = lora_fx.explain(trace(Model()))
    assert str(lines).splitlines() == repr(lines).splitlines() == [*lines]
    table = ElementTree.fromstring(lines._repr_html_())
    rows = [[cell.text for cell in row] for row in table]
    assert rows[1:] == [[*line.split(": ", 1)] for line in lines]


def test_no_weight_is_computed() -> None:
    gm = trace(Model()).requires_grad_(False)
    folded = lora_fx.fold(gm)
    lora_fx.explain(folded)
    assert get_unevaluated(folded, "fc.weight")._cached is None


def test_a_branch_has_its_form_and_what_each_form_costs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(768, 768), nn.Tanh(), nn.Linear(768, 96, bias=False)).eval()
    updates = {
        path: lora_fx.Update(torch.randn(8, 768), torch.randn(out, 8), 1.0)
        for path, out in (("0", 768), ("2", 96))
    }
    shapes = ({0: "batch", 1: "length"},)
    gm = trace(model, (torch.randn(2, 7, 768),), dynamic_shapes=shapes)
    first, second = explain(lora_fx.inject(gm, lora_fx.Adapter("a", updates)))
    says = "unmerged: augmented, bias in B (n = 256; beyond merged: augmented +9.44 MFLOP, "
    assert says in first
    assert "; factored +9.44 MFLOP, 4 MB, 3 calls; " in first
    assert first.endswith("; as a slot: factored")
    assert "unmerged: factored (n = 256; beyond merged: augmented +" in second
    assert all("unmerged" not in line for line in explain(gm))
