"""Whose tensors are the weights of layers that an update can act on, in modules and graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import AdapterError, trace
from lora_fx.adapters.model_diff import matched, shared


class Every(nn.Module):
    """A layer of every kind, and some that are none."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.table = nn.Embedding(11, 6)
        self.capped = nn.Embedding(11, 6, max_norm=1.0)
        self.fc = nn.Linear(6, 5, bias=False)
        self.turned = Conv1D(4, 5)
        self.conv = nn.Conv1d(4, 6, 3)
        self.grouped = nn.Conv1d(6, 4, 2, groups=2)
        self.back = nn.ConvTranspose1d(4, 3, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.turned(self.fc(self.table(ids) + 1))
        return self.back(self.grouped(self.conv(x.transpose(1, 2))))


KINDS = {
    "table": "embedding",
    "fc": "linear",
    "turned": "linear_transposed",
    "conv": "conv1d",
    "back": "conv_transpose1d",
}


@pytest.mark.parametrize("by_graph", [False, True])
def test_layers_are_told_by_kind(by_graph: bool) -> None:
    model: Any = Every().eval()
    if by_graph:
        model = trace(model, (torch.zeros(4, 7, dtype=torch.long),))
    pairs = matched(model, model)
    assert {one.layer: one.kind for one, _ in pairs if one.layer is not None} == KINDS
    names = {one.name for one, _ in pairs if one.layer is None}
    assert {"turned.bias", "conv.bias", "grouped.weight", "back.bias"} <= names
    assert ("capped.weight" in names) is not by_graph


def test_a_tensor_of_several_places_is_one_group() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["table"].weight
    groups = [sorted(one.name for one, _ in pairs) for pairs in shared(matched(model, model))]
    assert sorted(groups) == [["head.bias"], ["head.weight", "table.weight"]]


@pytest.mark.parametrize(
    ("base", "tuned", "message"),
    [
        (nn.Linear(5, 5), nn.Embedding(5, 5), r"the tuned one alone weight \(num, dim\)"),
        (nn.Conv1d(5, 4, 3), nn.Conv1d(5, 4, 2), r"shape \(4, 5, 3\) in the base, \(4, 5, 2\)"),
        (nn.Linear(3, 5), nn.Linear(3, 5, bias=False), r"the base alone has bias"),
    ],
)
def test_layers_of_one_shape_are_not_mixed_up(base: Any, tuned: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        matched(base, tuned)
