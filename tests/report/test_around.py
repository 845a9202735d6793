"""The graph around a layer: which calls and tensors are cut out, in every stage of its life."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import PassError
from lora_fx.passes import ChooseForm
from lora_fx.report.around import Surroundings, draw
from lora_fx.testing import Blocks, Notebook, Ragged, Shared, make_adapter

BARE = """
x
weight (5, 3)
bias (5)
linear <- x, weight (5, 3), bias (5)
tanh <- linear
"""
BESIDE = """
x
weight (5, 3)
bias (5)
linear <- x, weight (5, 3), bias (5)
lora_A.french (3, 2)
matmul <- x, lora_A.french (3, 2)
lora_B.french (2, 5)
matmul <- matmul, lora_B.french (2, 5)
add <- linear, matmul
tanh <- add
"""
SLOT = """
lora_A, a slot
lora_B, a slot
matmul <- lora_A, a slot, lora_B, a slot
weight (3, 5)
add <- weight (3, 5), matmul
x
matmul <- x, add
bias (5)
add <- matmul, bias (5)
tanh <- add
"""
WRITTEN = """
x
weight (10, 6)
bias (10)
linear <- x, weight (10, 6), bias (10)
a (10, 2)
b (2, 6)
matmul <- a (10, 2), b (2, 6)
numpy_T <- matmul
matmul <- x, numpy_T
mul <- matmul
add <- linear, mul
output <- add
"""


def test_a_layer_before_and_after_and_folded(ragged: Ragged, x: torch.Tensor) -> None:
    gm = lora_fx.trace(ragged, (x,))
    tuned = lora_fx.inject(gm, make_adapter({"wide": (5, 3)}))
    assert str(draw(gm, "wide")) == BARE.strip()
    assert str(draw(tuned, "wide")) == BESIDE.strip()
    assert str(draw(lora_fx.fold(tuned), "wide")) == BARE.strip()


def test_slots_are_called_so(ragged: Ragged, x: torch.Tensor) -> None:
    tuned = lora_fx.inject(lora_fx.trace(ragged, (x,)), make_adapter({"wide": (5, 3)}))
    opened = ChooseForm(target="input")(tuned).graph_module
    assert str(Surroundings(opened, open=True).draw("wide")) == SLOT.strip()


def test_what_the_model_itself_wrote_around_a_layer_is_of_it() -> None:
    gm = lora_fx.trace(Notebook().eval(), (torch.randn(2, 6),))
    assert str(draw(gm, "fc")) == WRITTEN.strip()
    lines = str(draw(lora_fx.fold(gm), "fc")).splitlines()
    assert lines[-2:] == ["linear <- x, weight (10, 6), bias (10)", "output <- linear"]


def test_a_layer_that_is_called_twice_is_drawn_where_it_is_called_first(
    ragged: Ragged, x: torch.Tensor
) -> None:
    shown = str(draw(lora_fx.trace(ragged, (x,)), "again"))
    assert shown.count("linear <- ") == 1


def test_a_shared_shrink_is_drawn_without_the_layers_that_share_it() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.tanh(self.q(x)), torch.tanh(self.k(x)), torch.tanh(self.v(x))

    gm = lora_fx.trace(Three().eval(), (torch.randn(2, 64),))
    tuned = lora_fx.inject(gm, make_adapter(dict.fromkeys("qkv", (64, 64))))
    chosen = ChooseForm()(tuned).graph_module
    boxes = [box.text for box in draw(chosen, "q").boxes]
    assert "split_with_sizes" in boxes
    assert boxes.count("getitem") == boxes.count("linear") == boxes.count("tanh") == 1


def test_a_path_without_a_layer_is_refused_with_those_that_there_are() -> None:
    gm = lora_fx.trace(Blocks().eval(), (torch.randn(2, 3),))
    with pytest.raises(PassError, match=r"no layer 'layers\.7': it has block\.fc, classifier"):
        draw(gm, "layers.7")


def test_a_notebook_sees_the_boxes_as_a_picture(shared: Shared, x: torch.Tensor) -> None:
    drawing = draw(lora_fx.trace(shared, (x,)), "one")
    picture = ElementTree.fromstring(drawing._repr_html_())
    assert [text.text for text in picture.iter("text")] == [box.text for box in drawing.boxes]
    assert "http" not in drawing._repr_html_()
