from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx import Adapter, AdapterError, Update, inject, trace
from lora_fx.adapters.adapter import WeightUpdate
from lora_fx.adapters.other_updates import added
from lora_fx.injection.bind import bind
from lora_fx.kinds import KINDS
from lora_fx.layers.base_layers import layers_of
from lora_fx.testing import Experts, Shared, make_adapter, relative


class Tied(nn.Module):
    """One table under two names, a head that shares it, and a kernel that is no module's weight."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.shared = nn.Embedding(11, 5)
        self.encoder = nn.ModuleDict({"table": self.shared})
        self.head = nn.Linear(5, 11, bias=False)
        if tied:
            self.head.weight = self.shared.weight
        self.narrow = Narrow()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.encoder["table"](ids))
        y: torch.Tensor = self.head(torch.tanh(self.narrow(x)))
        return y


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.kernel)


class Called(nn.Module):
    def __init__(self, attn: nn.ModuleDict) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.attn["q"](x)
        return y


def update(into: int, out: int) -> Update:
    make = torch.Generator().manual_seed(into)
    down, up = torch.randn(2, into, generator=make), torch.randn(out, 2, generator=make)
    return Update(down, up, 1.5)


def tokens(rows: torch.Tensor, **settings: Any) -> Any:
    found = KINDS["tokens"].read({"trainable_tokens_delta": rows}, {"indices": [1, 5], **settings})
    assert isinstance(found, WeightUpdate)
    return found


@pytest.fixture
def traced() -> Any:
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (4, 7))
    model = Tied().eval()
    return model, trace(model, (ids,)), ids


@pytest.mark.parametrize(
    ("given", "meant", "sizes"),
    [
        ("shared", "encoder.table", (11, 5)),
        ("head", "head", (5, 11)),
        ("narrow", "narrow.kernel", (5, 5)),
    ],
)
def test_a_path_may_be_another_name_of_the_layer(
    traced: Any, given: str, meant: str, sizes: tuple[int, int]
) -> None:
    _, gm, ids = traced
    by_name, by_place = (Adapter("a", {path: update(*sizes)}) for path in (given, meant))
    binding = bind(layers_of(gm), by_name)
    assert (binding.meant, list(binding.updates)) == ({given: [meant]}, [meant])
    assert list(binding.renamed().updates) == [meant]
    assert relative(inject(gm, by_name)(ids), inject(gm, by_place)(ids)) == 0
    assert relative(inject(gm, by_name)(ids), gm(ids)) > 1e-2


def test_what_is_stored_nowhere_is_refused(traced: Any) -> None:
    _, gm, _ = traced
    strange = Adapter("a", {"shared.table": update(11, 5)})
    binding = bind(layers_of(gm), strange)
    assert (binding.updates, list(binding.refused)) == ({}, ["shared.table"])
    with pytest.raises(AdapterError, match=r"match nothing in the graph: shared\.table"):
        inject(gm, strange)


def test_a_layer_of_another_part_is_not_taken_for_one_that_ends_alike(x: torch.Tensor) -> None:
    attention = nn.ModuleDict({"q": nn.Linear(3, 5)})
    model = nn.Sequential()
    model.add_module("unet", Called(attention))
    gm = trace(model.eval(), (x,))
    for path in ("attn.q", "model.unet.attn.q"):
        found = inject(gm, Adapter("a", {path: update(3, 5)}))
        assert relative(found(x), gm(x)) > 1e-2
    with pytest.raises(AdapterError, match=r"match nothing in the graph: text\.attn\.q"):
        inject(gm, Adapter("a", {"text.attn.q": update(3, 5)}))


def test_rows_of_a_shared_table_must_be_said_of_all_who_share_it(traced: Any) -> None:
    model, gm, ids = traced
    rows = torch.randn(2, 5)
    alone = Adapter("a", {"shared": tokens(rows)})
    with pytest.raises(AdapterError, match=r"encoder\.table, whose table head shares.*base="):
        inject(gm, alone)
    head = tokens(rows, head=True)
    both = Adapter("a", {"shared": tokens(rows), "encoder.table": tokens(rows), "head": head})
    tuned = Tied().eval()
    tuned.load_state_dict(model.state_dict())
    with torch.no_grad():
        tuned.shared.weight[[1, 5]] = rows
        assert relative(inject(gm, both)(ids), tuned(ids)) <= 1e-6
        assert relative(gm(ids), tuned(ids)) > 1e-2
    untied = trace(Tied(tied=False).eval(), (ids,))
    assert inject(untied, alone) is not None


def test_rows_of_a_table_that_is_never_called_are_of_those_who_share_it() -> None:
    model, ids = Tied().eval(), torch.randint(0, 11, (4, 7))
    model.encoder["table"] = nn.Embedding(11, 5)
    model.encoder["table"].weight = model.shared.weight
    layers, rows = layers_of(trace(model, (ids,), frontend="export")), torch.randn(2, 5)
    assert "shared" not in layers
    assert not layers.aliases
    said: dict[str, Any] = {"tied": "shared"}
    own = tokens(rows)
    # Rows that no layer has, unless those who share the table say that they are of it.
    for given, settings, refused in (
        (own, said, []),
        (own, {}, ["shared"]),
        (update(11, 5), said, ["shared"]),
    ):
        head = tokens(rows, head=True, **settings)
        sharing = {"encoder.table": tokens(rows, **settings), "head": head}
        binding = bind(layers, Adapter("a", {"shared": given, **sharing}))
        assert list(binding.updates) == ["encoder.table", "head"]
        assert list(binding.refused) == refused


@pytest.mark.parametrize("given", ["one", "two"])
def test_a_module_that_is_called_by_two_names_is_adapted_at_both(
    given: str, shared: Shared, x: torch.Tensor
) -> None:
    gm = trace(shared, (x,))
    adapter = make_adapter({given: (5, 3)})
    binding = bind(layers_of(gm), adapter)
    assert sorted(binding.meant[given]) == sorted(binding.updates) == ["one", "two"]
    found = inject(gm, adapter)(x)["out"]
    with torch.no_grad():
        shared.one.weight += adapter.updates[given].delta()
        assert relative(found, shared(x)["out"]) <= 1e-6


def test_two_updates_of_one_module_are_the_same_or_refused(shared: Shared, x: torch.Tensor) -> None:
    layers, one = layers_of(trace(shared, (x,))), make_adapter({"one": (5, 3)}).updates["one"]
    assert isinstance(one, Update)
    same = Update(one.down.clone(), one.up.clone(), one.scale)
    assert list(bind(layers, Adapter("a", {"one": one, "two": same})).updates) == ["one", "two"]
    for other in (
        Update(one.down, one.up, 1.1 * one.scale),
        Update(one.down, 1.1 * one.up, one.scale),
        Update(one.down, one.up, one.scale, bias=torch.ones(5)),
        Update(one.down, one.up, one.scale, row=torch.ones(5)),
    ):
        with pytest.raises(AdapterError, match=r"one and two are one layer of the model"):
            bind(layers, Adapter("a", {"one": one, "two": other}))


def test_a_replaced_tensor_is_of_all_names_that_its_module_has(
    shared: Shared, x: torch.Tensor
) -> None:
    layers, value = layers_of(trace(shared, (x,))), torch.randn(5)
    for given in ("one", "two"):
        found = bind(layers, Adapter("a", {}, {f"{given}.bias": value})).replaced
        assert sorted(found) == ["one.bias", "two.bias"]


def test_a_parameter_of_no_layer_alone_is_found_by_its_name() -> None:
    layers = layers_of(trace(Experts().eval(), (torch.randn(2, 5, 4),)))
    assert "up_proj" not in layers
    many = WeightUpdate("full", added(torch.ones(3, 6, 4)), (3, 6, 4))
    assert bind(layers, Adapter("a", {"up_proj": many})).meant == {"up_proj": ["up_proj"]}
    assert list(bind(layers, Adapter("a", {"down_proj": many})).refused) == ["down_proj"]
    turned = Adapter("a", {"up_proj": WeightUpdate("full", added(torch.ones(3, 4, 6)), (3, 4, 6))})
    with pytest.raises(AdapterError, match=r"up_proj: made for a parameter \(3, 4, 6\)"):
        bind(layers, turned)
