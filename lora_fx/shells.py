"""Module shells: new module objects around the same tensors."""

from __future__ import annotations

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
        clone.__dict__[store] = dict(module.__dict__[store])
    clone.__dict__["_modules"] = {
        name: child if child is None else shell(child) for name, child in module._modules.items()
    }
    return clone


def unshared(model: nn.Module) -> nn.Module:
    """The model itself, or a shell of it if some module has two names in it."""
    once = sum(1 for _ in model.modules())
    named = sum(1 for _ in model.named_modules(remove_duplicate=False))
    return model if once == named else shell(model)


def frozen(module: nn.Module) -> nn.Module:
    """A shell whose parameters share memory with the original's and take no gradient."""
    clone = shell(module)
    for child in clone.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)
    return clone
