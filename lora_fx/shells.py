"""Module shells: new module objects around the same tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def shell(module: nn.Module) -> nn.Module:
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
        name: child if child is None else shell(child) for name, child in module._modules.items()
    }
    return clone


def unshared(model: nn.Module) -> nn.Module:
    """The model itself, or a shell of it if some module has two names in it."""
    once = sum(1 for _ in model.modules())
    named = sum(1 for _ in model.named_modules(remove_duplicate=False))
    return model if once == named else shell(model)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Puts back every attribute that the model's own code sets while it is traced."""
    before = {module: dict(module.__dict__) for module in model.modules()}
    held = [v for values in before.values() for v in values.values()]
    containers = [(value, value.copy()) for value in held if isinstance(value, list | dict | set)]
    try:
        yield
    finally:
        for module, values in before.items():
            module.__dict__.clear()
            module.__dict__.update(values)
        for value, copy in containers:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(copy)


def frozen(module: nn.Module) -> nn.Module:
    """A shell whose parameters share memory with the original's and take no gradient.

    Buffers are copies: batch-norm writes its statistics into them in training.
    """
    clone = shell(module)
    for child in clone.modules():
        for name, buffer in child._buffers.items():
            child._buffers[name] = None if buffer is None else buffer.clone()
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)
    return clone
