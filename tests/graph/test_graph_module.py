from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from lora_fx import trace
from lora_fx.errors import PassError
from lora_fx.graph.graph_module import (
    Store,
    assign,
    attribute,
    build_graph_module,
    copy_graph,
    frozen,
    is_free,
    remove,
    shallow_clone,
    split_shared_modules,
    targets,
)
from lora_fx.graph.lazy_tensor import LazyTensor, get_unevaluated
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


def test_a_shell_shares_tensors_and_nothing_else(ragged: Any) -> None:
    copy = shallow_clone(ragged)
    assert all(a is b for a, b in zip(copy.parameters(), ragged.parameters(), strict=True))
    copy.train()
    copy.wide.weight = nn.Parameter(ragged.wide.weight * 2)
    assert not ragged.training
    assert not ragged.drop.training
    assert ragged.wide.weight is not copy.wide.weight


def test_a_module_under_two_names_becomes_two(shared: Any, ragged: Any) -> None:
    copy = split_shared_modules(shared)
    assert copy.one is not copy.two
    assert copy.one.weight is copy.two.weight is shared.one.weight
    assert split_shared_modules(ragged) is ragged


def test_frozen_shares_memory_and_leaves_the_flag_of_the_original(ragged: Any) -> None:
    copy = frozen(ragged)
    assert not any(p.requires_grad for p in copy.parameters())
    assert all(p.requires_grad for p in ragged.parameters())
    pairs = zip(copy.parameters(), ragged.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)


def test_frozen_copies_the_buffers_that_training_writes() -> None:
    norm = nn.BatchNorm1d(3)
    copy = frozen(norm).train()
    copy(torch.randn(4, 3))
    assert torch.equal(norm.running_mean, torch.zeros(3))
    assert not torch.equal(copy.running_mean, torch.zeros(3))


@pytest.fixture
def gm() -> fx.GraphModule:
    """Holds ``fc.weight`` and nothing else."""
    held = fx.GraphModule({}, fx.Graph())
    held.add_module("fc", nn.Linear(3, 5, bias=False))
    return held


def test_a_value_has_the_name_that_it_wishes_for_or_the_next(gm: fx.GraphModule) -> None:
    store = Store(gm)
    assert store.keep("fc.shift", torch.ones(5)) == "fc.shift"
    assert store.keep("fc.weight", torch.ones(5, 3)) == "fc.weight_1"
    assert store.keep("fc.weight", torch.zeros(5, 3)) == "fc.weight_2"
    assert store.settle() == {}


def test_a_name_that_came_free_is_granted_to_the_first_that_asked(gm: fx.GraphModule) -> None:
    store = Store(gm)
    store.keep("fc.weight", torch.ones(5, 3))
    store.keep("fc.weight", torch.zeros(5, 3))
    remove(gm, "fc.weight")
    assert store.settle() == {"fc.weight_1": "fc.weight"}
    assert torch.equal(gm.get_buffer("fc.weight"), torch.ones(5, 3))
    assert torch.equal(gm.get_buffer("fc.weight_2"), torch.zeros(5, 3))


def test_equal_constants_of_one_name_are_kept_once(gm: fx.GraphModule) -> None:
    store = Store(gm)
    first = store.constant("up", torch.ones(5, 2))
    assert store.constant("up", torch.ones(5, 2)) == first == "up"
    assert store.constant("up", torch.zeros(5, 2)) == "up_1"
    assert store.constant("down", torch.ones(5, 2)) == "down"


def test_lazy_tensors_are_equal_by_their_key_and_stay_uncomputed(gm: fx.GraphModule) -> None:
    def never() -> torch.Tensor:
        raise AssertionError("computed")

    def lazy(key: str) -> LazyTensor:
        return LazyTensor((5, 2), torch.float32, never, key)

    store, kept = Store(gm), lazy("a")
    assert store.constant("up", kept) == store.constant("up", lazy("a")) == "up"
    assert store.constant("up", lazy("b")) == "up_1"
    assert get_unevaluated(gm, "up") is kept


def test_a_shared_value_is_kept_once_however_many_fetch_it(gm: fx.GraphModule) -> None:
    store, weight, other = Store(gm), gm.get_parameter("fc.weight"), nn.Parameter(torch.ones(5, 3))
    assert store.shared("fc.weight", weight) == "fc.weight"
    assert store.shared("fc.weight", other) == store.shared("fc.weight", other) == "fc.weight_1"


def test_nothing_is_kept_below_a_tensor(gm: fx.GraphModule) -> None:
    with pytest.raises(PassError, match=r"fc\.weight\.deep lies below a tensor of the model"):
        Store(gm).keep("fc.weight.deep", torch.ones(2))
