"""Snapshots of a module's state beside its weights, to be put back: attributes, buffers, RNGs."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_fx.numerics import same_values

_Read = Callable[[], Any]
_Put = Callable[[Any], Any]

_CONTAINERS: Any = dict | list | set | deque
_OPAQUE = (type, FunctionType, MethodType, BuiltinFunctionType, ModuleType, torch.Tensor)
_PLAIN = (str, bytes, bool, int, float, type(None))
# Of objects that are no modules, those of these packages hold no state of a model.
_FOREIGN = ("torch", "lora_fx", "builtins", "typing", "weakref", "logging")


@dataclass
class Snapshot:
    """What was there at the start.

    Attributes:
        containers: dotted name, the container, and a copy: attributes of objects are dictionaries.
        tensors: dotted name, the tensor, and a copy.
        generators: dotted name of what draws random numbers, its state, what reads and sets it.
    """

    containers: list[tuple[str, Any, Any]] = field(default_factory=list)
    tensors: list[tuple[str, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    generators: list[tuple[str, Any, _Read, _Put]] = field(default_factory=list)

    def changes(self) -> list[str]:
        """Dotted names of the attributes and tensors that are not what they were."""
        names = [n for name, now, old in self.containers for n in _changed(name, now, old)]
        names += [name for name, now, old in self.tensors if not same_values(now, old)]
        names += [name for name, old, read, _ in self.generators if str(read()) != str(old)]
        return list(dict.fromkeys(names))

    def restore(self) -> None:
        """Puts everything back that changed."""
        for _, now, old in self.containers:
            refill(now, old)
        for _, tensor, old in self.tensors:
            if tensor.shape != old.shape:
                tensor.data = old
            elif not same_values(tensor, old):
                tensor.data.copy_(old)
        for _, state, _, put in self.generators:
            put(state)

    def held_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor in one of the containers, once."""
        seen: set[int] = set()
        for name, _, held in self.containers:
            for key, value in _items(held):
                if isinstance(value, torch.Tensor) and id(value) not in seen:
                    seen.add(id(value))
                    yield _join(name, key), value


def snapshot(model: nn.Module) -> Snapshot:
    """Walks all that a model holds: attributes of modules and of plain objects, containers."""
    found = Snapshot()
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [("", model)]
    while pending:
        name, value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        generator = _generator(value)
        if generator is not None:
            read, put = generator
            found.generators.append((name, read(), read, put))
            continue
        held = value if isinstance(value, _CONTAINERS | tuple) else _attributes(value)
        if held is None:
            continue
        if not isinstance(held, tuple):
            found.containers.append((name, held, held.copy()))
        pending += [(_join(name, k), v) for k, v in _items(held) if _is_holder(v)]
    return found


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Puts back every attribute that the model's own code sets, in objects that it holds too."""
    before = snapshot(model)
    try:
        yield
    finally:
        before.restore()


def _items(held: Any) -> Any:
    return held.items() if isinstance(held, dict) else enumerate(held)


def _is_holder(value: Any) -> bool:
    return not isinstance(value, _PLAIN) and not isinstance(value, _OPAQUE)


def _join(name: str, key: Any) -> str:
    if key in ("_modules", "_buffers", "_parameters"):
        return name
    return f"{name}.{key}" if name else str(key)


def _attributes(value: Any) -> dict[str, Any] | None:
    home = type(value).__module__.partition(".")[0]
    if home in _FOREIGN and not isinstance(value, nn.Module):
        return None
    found = getattr(value, "__dict__", None)
    return found if isinstance(found, dict) else None


def _generator(value: Any) -> tuple[_Read, _Put] | None:
    if isinstance(value, torch.Generator):
        return lambda: value.get_state().tolist(), lambda s: value.set_state(torch.tensor(s).byte())
    if isinstance(value, np.random.RandomState):
        return value.get_state, value.set_state
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    return None


def refill(container: Any, old: Any) -> None:
    """Puts back what a container held; one that is as it was may be frozen, and is left alone."""
    if not _same(container, old):
        container.clear()
        (container.update if isinstance(container, dict | set) else container.extend)(old)


def _same(now: Any, old: Any) -> bool:
    if len(now) != len(old):
        return False
    if isinstance(now, set):
        return bool(now == old)
    if isinstance(now, dict):
        pairs = zip(now.items(), old.items(), strict=True)
        return all(a is b and x is y for (a, x), (b, y) in pairs)
    return all(a is b for a, b in zip(now, old, strict=True))


def _changed(name: str, now: Any, old: Any) -> list[str]:
    if _same(now, old):
        return []
    if not isinstance(now, dict):
        return [name]
    gone = object()
    keys = [*old, *(key for key in now if key not in old)]
    return [_join(name, key) for key in keys if now.get(key, gone) is not old.get(key, gone)]
