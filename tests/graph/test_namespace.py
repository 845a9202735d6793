"""Names of new values in a graph under work."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from lora_fx.errors import PassError
from lora_fx.graph.graph_module import remove
from lora_fx.graph.lazy_tensor import LazyTensor, get_unevaluated
from lora_fx.graph.namespace import Store


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
