from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_fx.export.program.decompose import LoweredProgram
from lora_fx.export.program.example_inputs import example_inputs
from lora_fx.export.program.without_retracing import program_of
from lora_fx.testing import traced


class Mixed(nn.Module):
    """A tied weight, a buffer, a layer called twice, and outputs of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 5)
        self.fc = nn.Linear(5, 5, bias=False)
        self.register_buffer("shift", torch.randn(5))

    def forward(self, ids: torch.Tensor, k: int = 2) -> Any:
        x = self.fc(torch.relu(self.fc(self.table(ids)))) * k + self.shift
        return {"logits": nn.functional.linear(x, self.table.weight), "nothing": None, "ids": ids}


@pytest.fixture
def program() -> LoweredProgram:
    gm = traced(Mixed(), torch.randint(0, 6, (4, 7)), 3)
    found = program_of(gm, example_inputs(gm, None, None, None))
    assert isinstance(found, LoweredProgram)
    return found


def test_each_tensor_is_one_input_under_its_name(program: LoweredProgram) -> None:
    signature = program.graph_signature
    assert set(signature.inputs_to_parameters.values()) == {"table.weight", "fc.weight"}
    assert set(signature.inputs_to_buffers.values()) == {"shift"}
    assert signature.user_inputs == ("ids", 3)
    assert not program.graph.find_nodes(op="get_attr")
    held = {name: tensor.shape for name, tensor in program.state_dict.items()}
    assert held == {"table.weight": (6, 5), "fc.weight": (5, 5), "shift": (5,)}


def test_outputs_are_tensors_and_constants(program: LoweredProgram) -> None:
    first, second, third = (spec.arg for spec in program.graph_signature.output_specs)
    assert (getattr(second, "value", 0), getattr(third, "name", "")) == (None, "ids")
    assert program.graph_signature.user_outputs[0] == getattr(first, "name", "")
