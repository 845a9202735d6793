from __future__ import annotations

import torch
from torch import nn
from torch.fx.experimental import proxy_tensor

from lora_fx.graph.lean_tracing import lean_tracing


def test_contiguity_is_not_noted_and_torch_is_left_as_it_was() -> None:
    model, x, own = nn.Linear(3, 5), (torch.randn(4, 3),), proxy_tensor._extract_tensor_metadata
    with lean_tracing():
        lean = torch.export.export(model, x)
    plain = torch.export.export(model, x)
    noted = [[node.meta.get("tensor_meta") for node in p.graph.nodes] for p in (lean, plain)]
    assert not any(noted[0])
    assert any(noted[1])
    assert str(lean.graph) == str(plain.graph)
    assert proxy_tensor._extract_tensor_metadata is own
