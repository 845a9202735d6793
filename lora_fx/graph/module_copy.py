"""Structural copies of modules: new module objects around the same tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from lora_fx.graph.module_state import snapshot


def shallow_clone(module: nn.Module) -> nn.Module:
    """Copies the tree of modules and shares every tensor.

    Training mode and tensor attributes of the copy can be set without the original noticing. A
    module that the tree holds under two names becomes two modules, so that each call can be told
    by the name it was made under.
    """
    clone: nn.Module = module.__new__(type(module))
    clone.__dict__ = dict(module.__dict__)
    for store in ("_parameters", "_buffers"):
        clone.__dict__[store] = module.__dict__[store].copy()
    clone.__dict__["_modules"] = {
        name: child if child is None else shallow_clone(child)
        for name, child in module._modules.items()
    }
    if "forward" in clone.__dict__:
        clone.__dict__["forward"] = _moved(clone.__dict__["forward"], module, clone)
    return clone


def _moved(forward: Any, module: nn.Module, clone: nn.Module) -> Any:
    """A ``forward`` that somebody bound to a module, bound to its clone."""
    if isinstance(forward, MethodType) and forward.__self__ is module:
        return MethodType(forward.__func__, clone)
    if isinstance(forward, partial):
        given = [clone if value is module else value for value in forward.args]
        return partial(_moved(forward.func, module, clone), *given, **forward.keywords)
    return forward


def split_shared_modules(model: nn.Module) -> nn.Module:
    """The model itself, or a shell of it if some module has two names in it."""
    once = sum(1 for _ in model.modules())
    named = sum(1 for _ in model.named_modules(remove_duplicate=False))
    return model if once == named else shallow_clone(model)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Puts back every attribute that the model's own code sets, in objects that it holds too."""
    before = snapshot(model)
    try:
        yield
    finally:
        before.restore()


def frozen(module: nn.Module) -> nn.Module:
    """A shell whose parameters share memory with the original's and take no gradient.

    Buffers are copies: batch-norm writes its statistics into them in training.
    """
    clone = shallow_clone(module)
    for child in clone.modules():
        for name, buffer in child._buffers.items():
            child._buffers[name] = None if buffer is None else buffer.clone()
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)
    return clone
