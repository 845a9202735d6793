"""Names of a graph under edit: free ones, and what is stored under them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import fx, nn

from lora_fx.errors import PassError
from lora_fx.graph.graph_module import assign, is_free, remove
from lora_fx.graph.lazy_tensor import LazyTensor, get_unevaluated
from lora_fx.graph.module_copy import shallow_clone

_TRIES = 10_000


class Store:
    """Keeps new values in a graph module under the names that are wished for.

    What is called ``name`` by somebody else is called ``name_1`` and so on, until `settle` grants
    the names that came free meanwhile.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._wishes: dict[str, str] = {}
        self._again: dict[str, str] = {}
        self._constants: dict[str, list[tuple[str, torch.Tensor | LazyTensor]]] = defaultdict(list)

    def keep(self, name: str, value: Any) -> str:
        """Keeps a value, and gives the name that it has for now."""
        candidate, number = name, 0
        while not is_free(self._gm, candidate):
            if number > _TRIES:
                raise PassError(f"{name} lies below a tensor of the model: no name like it is free")
            number += 1
            candidate = f"{name}_{number}"
        assign(self._gm, candidate, value)
        if candidate != name:
            self._wishes[candidate] = name
        return candidate

    def constant(self, name: str, value: torch.Tensor | LazyTensor) -> str:
        """Keeps a tensor; an equal one of the same name is kept once."""
        for target, known in self._constants[name]:
            if _equal(known, value):
                return target
        target = self.keep(name, value)
        self._constants[name].append((target, value))
        return target

    def shared(self, name: str, value: Any) -> str:
        """Keeps a value that several nodes of another graph fetch under one name: once."""
        if not is_free(self._gm, name) and get_unevaluated(self._gm, name) is value:
            return name
        if name not in self._again:
            kept = shallow_clone(value) if isinstance(value, nn.Module) else value
            self._again[name] = self.keep(name, kept)
        return self._again[name]

    def settle(self) -> dict[str, str]:
        """Grants the names that are free by now: what a value was called -> what it is."""
        granted = {}
        for old, new in self._wishes.items():
            if is_free(self._gm, new):
                assign(self._gm, new, get_unevaluated(self._gm, old))
                remove(self._gm, old)
                granted[old] = new
        return granted


def _equal(one: torch.Tensor | LazyTensor, other: torch.Tensor | LazyTensor) -> bool:
    if isinstance(one, LazyTensor) or isinstance(other, LazyTensor):
        return isinstance(one, LazyTensor) and one.equals(other)
    return torch.equal(one, other)
