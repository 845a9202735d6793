from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import trace
from lora_fx.graph.graph_module import (
    assign,
    attribute,
    build_graph_module,
    copy_graph,
    is_free,
    remove,
    targets,
)
from lora_fx.testing import zoo


def test_a_copied_graph_keeps_names_meta_and_calling_convention() -> None:
    case, gm = zoo("bert")
    copy = copy_graph(gm.graph)
    assert str(copy) == str(gm.graph)
    pairs = zip(copy.nodes, gm.graph.nodes, strict=True)
    assert all(a.meta.keys() == b.meta.keys() for a, b in pairs)
    built = build_graph_module(gm, copy, training=False)
    built.graph = copy
    assert torch.equal(built(**case.inputs).last_hidden_state, gm(**case.inputs).last_hidden_state)
    assert set(built.state_dict()) == {t for t, op in targets(copy).items() if op == "get_attr"}


def test_called_modules_become_shells(ragged: Any) -> None:
    gm = trace(ragged)
    assert gm.drop is not ragged.drop
    gm.train()
    assert not ragged.drop.training


def test_dotted_names_are_assigned_looked_up_and_removed(ragged: Any) -> None:
    gm = trace(ragged)
    weight = nn.Parameter(torch.ones(2))
    assign(gm, "wide.lora_A.french", weight)
    assign(gm, "mask", torch.ones(3))
    assert attribute(gm, "wide.lora_A.french") is weight
    assert dict(gm.named_buffers()).keys() == {"mask"}
    remove(gm, "wide.lora_A.french")
    assert is_free(gm, "wide.lora_A.french")
    with pytest.raises(AttributeError):
        attribute(gm, "wide.lora_A.french")


def test_a_name_under_a_tensor_is_not_free(ragged: Any) -> None:
    gm = trace(ragged)
    assert not is_free(gm, "wide.weight")
    assert not is_free(gm, "wide.weight.more")
    assert not is_free(gm, "wide")
    assert is_free(gm, "wide.more")
    assert is_free(gm, "new.path.weight")
