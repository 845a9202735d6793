from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_fx.graph.module_copy import frozen, shallow_clone, split_shared_modules, untouched


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


def test_untouched_puts_attributes_and_containers_back(ragged: Any) -> None:
    ragged.log = [1]
    with untouched(ragged):
        ragged.wide.note, ragged.drop.p = "x", 0.1
        ragged.log.append(2)
    assert ragged.log == [1]
    assert ragged.drop.p == 0.5
    assert not hasattr(ragged.wide, "note")
