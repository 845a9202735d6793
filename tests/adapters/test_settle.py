"""Updates by the paths of a base: of packed projections, of their parts, and of experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapters.adapter import Adapter, Update, WeightUpdate
from lora_fx.adapters.other_updates import Scaling
from lora_fx.adapters.settle import settled
from lora_fx.adapters.updates import AnyUpdate
from lora_fx.algebra.matrix_expr import constant, product
from lora_fx.errors import AdapterError
from lora_fx.layers.base_layers import layers_of
from lora_fx.testing import relative
from lora_fx.testing.updates import update_of

X = torch.randn(4, 3)
ROWS = {"q": 6, "k": 4, "v": 4}  # of grouped queries
KINDS = ["lora", "dora", "lokr", "loha", "full"]


class Packed(nn.Module):
    def __init__(self, name: str = "qkv_proj") -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(3, 14))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = self.get_submodule(self.name)(x)
        return packed


class Apart(nn.Module):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        parts = zip(ROWS, weight.split([*ROWS.values()]), bias.split([*ROWS.values()]), strict=True)
        for part, own, shift in parts:
            layer = nn.Linear(3, len(own))
            layer.weight.data, layer.bias.data = own.clone(), shift.clone()
            self.add_module(f"{part}_proj", layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.children()], -1)


def bases() -> tuple[Packed, Apart]:
    torch.manual_seed(0)
    packed = Packed().eval()
    return packed, Apart(packed.qkv_proj.weight.data, packed.qkv_proj.bias.data).eval()


def output(model: nn.Module, updates: dict[str, AnyUpdate]) -> torch.Tensor:
    adapter = Adapter("a", updates)
    found: torch.Tensor = lora_fx.inject(lora_fx.trace(model, (X,)), adapter)(X)
    return found.detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", ["qkv", "qv", "v", "k"])
def test_parts_of_a_packed_projection(kind: str, parts: str) -> None:
    packed, apart = bases()
    updates = {f"{part}_proj": update_of(kind, (ROWS[part], 3)) for part in parts}
    want = output(apart, updates)
    assert relative(output(packed, updates), want) < 1e-5
    assert relative(packed(X), want) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_projection_s_update_on_its_parts(kind: str) -> None:
    packed, apart = bases()
    updates = {"model.qkv_proj": update_of(kind, (14, 3))}
    want = output(packed, {"qkv_proj": updates["model.qkv_proj"]})
    assert relative(output(apart, updates), want) < 1e-5
    assert relative(apart(X), want) > 1e-3


def test_what_is_lora_on_parts_is_lora_on_the_whole() -> None:
    packed, _ = bases()
    pair = {f"{part}_proj": update_of("lora", (ROWS[part], 3)) for part in "qv"}
    found = settled(Adapter("a", pair), layers_of(packed), ()).updates
    assert [*found] == ["qkv_proj"]
    assert isinstance(found["qkv_proj"], Update)
    assert found["qkv_proj"].rank == 4


@pytest.mark.parametrize("name", ["wqkv", "query_key_value"])
def test_rows_in_another_order_are_not_taken_for_parts(name: str) -> None:
    """Such names are of projections whose heads have q, k and v next to each other."""
    updates = {"q_proj": update_of("lora", (6, 3))}
    found = settled(Adapter("a", updates), layers_of(Packed(name)), ())
    assert [*found.updates] == ["q_proj"]


def test_sizes_that_do_not_add_up_are_refused() -> None:
    packed, apart = bases()
    many = {f"{part}_proj": update_of("lora", (6, 3)) for part in "qkv"}
    with pytest.raises(AdapterError, match="would both be of row"):
        settled(Adapter("a", many), layers_of(packed), ())
    with pytest.raises(AdapterError, match="made for 12 rows, q_proj, k_proj, v_proj have 14"):
        settled(Adapter("a", {"qkv_proj": update_of("lora", (12, 3))}), layers_of(apart), ())
    both = {"qkv_proj": update_of("lora", (14, 3)), "q_proj": update_of("lora", (6, 3))}
    with pytest.raises(AdapterError, match="are the same layers"):
        settled(Adapter("a", both), layers_of(packed), ["qkv_proj"])


def test_a_part_that_does_not_tell_its_rows_is_refused() -> None:
    adapter = Adapter("a", {"q_proj": Scaling(col=torch.rand(3))})
    with pytest.raises(AdapterError, match="'ia3' is of a part of qkv_proj and does not tell how"):
        settled(adapter, layers_of(Packed()), ())


def test_what_mixes_rows_is_not_cut() -> None:
    _, apart = bases()
    rotation = torch.eye(14).roll(1, 0)
    update = WeightUpdate("oft", lambda weight: product(constant(rotation), weight), (14, 3))
    with pytest.raises(AdapterError, match=r"'oft' is of several layers .* merge it"):
        settled(Adapter("a", {"qkv_proj": update}), layers_of(apart), ())


def test_an_adapter_that_fits_is_itself_and_says_that_nothing_moved() -> None:
    packed, _ = bases()
    adapter = Adapter("a", {"qkv_proj": update_of("lora", (14, 3))})
    found = settled(adapter, layers_of(packed), ["qkv_proj"])
    assert (found.updates, found.moved) == (adapter.updates, {})


def test_replaced_tensors_are_moved_too() -> None:
    model = nn.Module()
    model.net, _ = bases()
    values = {"old.qkv_proj.bias": torch.ones(14)}
    found = settled(Adapter("a", {}, values), layers_of(model), ())
    assert [*found.replacements] == ["net.qkv_proj.bias"]
    assert found.moves == ["paths moved: old -> net"]
    wide = settled(Adapter("a", {}, {"old.qkv_proj.bias": torch.ones(3)}), layers_of(model), ())
    assert [*wide.replacements] == ["net.qkv_proj.bias"]  # and whoever binds it tells the shapes
