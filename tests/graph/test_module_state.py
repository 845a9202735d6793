from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lora_fx.frontend.isolated_run import own_inputs, preserved, random_kept, seed
from lora_fx.graph.module_state import refill, snapshot, untouched
from lora_fx.graph.traced_module import TracedModule


class Notes:
    """A plain object that a model holds."""

    def __init__(self) -> None:
        self.count, self.recent = 0, deque([1])


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.notes, self.nested = nn.Linear(3, 5), Notes(), ({"a": [1]},)
        self.generators = [random.Random(1), np.random.default_rng(1), torch.Generator()]
        self.table = {"t": torch.ones(2)}


def test_changes_are_named_and_put_back() -> None:
    model = Holder()
    before = snapshot(model)
    assert before.changes() == []
    model.notes.count += 1
    model.notes.recent.append(2)
    model.nested[0]["a"].append(2)
    model.fc.note = "x"
    model.generators[0].random()
    torch.rand(2, generator=model.generators[2])
    assert set(before.changes()) == {
        *("notes.count", "notes.recent", "nested.0.a", "fc.note", "generators.0", "generators.2"),
    }
    before.restore()
    assert before.changes() == []
    assert (model.notes.count, list(model.notes.recent), model.nested) == (0, [1], ({"a": [1]},))
    assert not hasattr(model.fc, "note")


def test_small_tensors_and_those_that_are_written_are_put_back() -> None:
    model = Holder()
    model.register_buffer("big", torch.zeros(1 << 19))
    weight, bias = model.fc.weight.detach().clone(), model.fc.bias.detach().clone()
    with preserved(model, [model.fc.weight]) as before, torch.no_grad():
        model.table["t"].add_(1)
        model.fc.weight.mul_(2)
        model.fc.bias.mul_(2)
        model.big.add_(1)
        assert set(before.changes()) == {"table.t", "fc.weight"}
    assert torch.equal(model.table["t"], torch.ones(2))
    assert torch.equal(model.fc.weight, weight)
    assert not torch.equal(model.fc.bias, bias)  # control: not known to be written
    assert not torch.equal(model.big, torch.zeros(1 << 19))  # control: as large as a weight


def test_inputs_of_ones_own_share_memory_as_the_given_do() -> None:
    x = torch.randn(4, 6)
    a, b, c = own_inputs((x, x, x[:, ::2]))
    assert a is b
    assert a is not x
    assert c.stride() == (6, 2)
    a.zero_()
    assert not c.any()
    assert x.any()


def test_random_states_are_set_watched_and_put_back() -> None:
    states = random.getstate(), torch.get_rng_state()
    with random_kept():
        drawn = seed()
        torch.rand(3)
        assert drawn() == []
        np.random.rand()
        assert drawn() == ["numpy.random"]
        random.random()
        assert drawn() == ["random", "numpy.random"]
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


class Frozen(dict[str, int]):
    """A config that nobody may change, as diffusers has them."""

    def update(self, *_: object, **__: object) -> None:
        raise TypeError("frozen")

    clear = update


def test_a_frozen_container_that_is_as_it_was_is_left_alone() -> None:
    model = nn.Linear(3, 5)
    model.config, model.seen = Frozen(a=1), [1]  # type: ignore[assignment]
    with TracedModule(model).running() as running:
        running.seen.append(2)  # type: ignore[operator, union-attr]
    assert model.seen == [1]
    assert model.config == {"a": 1}
    with pytest.raises(TypeError, match="frozen"):
        refill(model.config, {"a": 2})


def test_untouched_puts_attributes_and_containers_back(ragged: Any) -> None:
    ragged.log = [1]
    with untouched(ragged):
        ragged.wide.note, ragged.drop.p = "x", 0.1
        ragged.log.append(2)
    assert ragged.log == [1]
    assert ragged.drop.p == 0.5
    assert not hasattr(ragged.wide, "note")
