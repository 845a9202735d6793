from __future__ import annotations

import torch

from lora_fx.layers.parameter_readers import readers
from lora_fx.testing import zoo


def test_readers_are_told_by_module_and_not_by_name() -> None:
    _, gm = zoo("qwen2")
    (call, source), *others = readers(gm, "lm_head.weight")
    assert not others
    assert call.target is torch.ops.aten.linear.default
    (table, same), *_ = readers(gm, "model.embed_tokens.weight")
    assert table.target is torch.ops.aten.embedding.default
    assert same.target == source.target
    assert list(readers(gm, "model.embed_tokens.bias")) == []
