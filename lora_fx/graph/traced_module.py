"""The module that a graph was traced from, kept to be run again as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.graph.lazy_tensor import Parameters
from lora_fx.graph.module_state import refill
from lora_fx.graph.wrappers import bare, named_modules, plain

# The dictionaries of every module: parameters, buffers, children, hooks.
_STORES = frozenset(name for name, value in nn.Module().__dict__.items() if isinstance(value, dict))


class TracedModule:
    """A module with its tree as it was: the objects themselves, no copy of a tensor.

    What is done to the tree afterwards (PEFT wraps layers in place) does not concern the graph,
    so what every module held is kept beside it. Hooks, patched calls and references between
    modules are the module's own, because it is run itself, and put back as it was found.
    A copy of a graph shares this, and a pickle drops it.

    Attributes:
        modules: dotted path -> module; one with several names is there under each. Wrappers are
            left out, here and where it is run.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = bare(root)
        self.modules = dict(named_modules(root))
        held = dict.fromkeys(self.modules.values())
        self._then = {module: (type(module), _copied(plain(module.__dict__))) for module in held}

    def parameters(self, module: nn.Module) -> Mapping[str, Any]:
        """What a module held by name: tensors, lazy ones too, or None."""
        held = self._then[module][1].get("_parameters", {})
        if not isinstance(held, Parameters):
            return dict(held)
        return {name: held.unevaluated(name) for name in held}

    def buffers(self, module: nn.Module) -> Mapping[str, Any]:
        """The buffers of a module by name."""
        return dict(self._then[module][1].get("_buffers", {}))

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        """The module as it was, in eval mode: whatever is set on it meanwhile is put back."""
        now = {module: (type(module), dict(module.__dict__)) for module in self._then}
        inner = [v for _, held in now.values() for k, v in held.items() if k not in _STORES]
        containers = [(v, v.copy()) for v in inner if isinstance(v, list | dict | set)]
        copies: dict[int, torch.Tensor] = {}
        try:
            for module, (cls, then) in self._then.items():
                _become(module, cls, _copied(then))
                module.training = False
                buffers = module.__dict__.get("_buffers", {})
                buffers.update({name: _clone(b, copies) for name, b in buffers.items()})
            yield self._root
        finally:
            for module, (cls, held) in now.items():
                _become(module, cls, held)
            for value, copy in containers:
                refill(value, copy)

    def call(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], dress: Callable[[nn.Module], None]
    ) -> Any:
        """Runs the module once it is dressed; what it writes to, inputs too, is a copy."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
        with (
            torch.no_grad(),
            plain_attention(),
            torch.compiler.set_stance("force_eager"),
            self.running() as model,
        ):
            dress(model)
            return model(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModule:
        """A copy of a graph is of the same module."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled graph remembers no module."""
        return type(None), ()


@contextmanager
def plain_attention() -> Iterator[None]:
    """Keeps torch's attention off its fused path, which reads weights past their modules."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _copied(held: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.copy() if name in _STORES else value for name, value in held.items()}


def _become(module: nn.Module, cls: type, held: Mapping[str, Any]) -> None:
    if type(module) is not cls:
        module.__class__ = cls
    module.__dict__.clear()
    module.__dict__.update(held)


def _clone(buffer: torch.Tensor | None, copies: dict[int, torch.Tensor]) -> torch.Tensor | None:
    """One copy for all names of a buffer: a call may write into it."""
    if buffer is None:
        return None
    if id(buffer) not in copies:
        copies[id(buffer)] = buffer.clone()
    return copies[id(buffer)]
