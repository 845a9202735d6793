from __future__ import annotations

import pytest
import torch

from lora_fx import trace
from lora_fx.choices import Frontend
from lora_fx.layers.parameter_readers import readers
from lora_fx.testing import Computes, zoo


def test_readers_are_told_by_module_and_not_by_name() -> None:
    _, gm = zoo("qwen2")
    (call, source), *others = readers(gm, "lm_head.weight")
    assert not others
    assert call.target is torch.ops.aten.linear.default
    (table, same), *_ = readers(gm, "model.embed_tokens.weight")
    assert table.target is torch.ops.aten.embedding.default
    assert same.target == source.target
    assert list(readers(gm, "model.embed_tokens.bias")) == []


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_a_parameter_that_is_an_output_is_read_by_calls_alone(frontend: Frontend) -> None:
    model = Computes(lambda m, x: (x @ m.w, m.w), {"w": (3, 5)})
    gm = trace(model, (torch.randn(4, 3),), frontend=frontend)
    assert [call.name for call, _ in readers(gm, "w")] == ["matmul"]
