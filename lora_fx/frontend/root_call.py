"""Hooks and a patched forward of the root module, made part of what is traced."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_KINDS = inspect.Parameter


def is_hooked(model: nn.Module) -> bool:
    """Whether a call of a model runs hooks, or a ``forward`` that somebody gave this one object."""
    own = any(model.__dict__.get(name) for name in _HOOKS)
    everywhere = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    return bool(own or everywhere) or "forward" in model.__dict__


def as_called(model: nn.Module, named: Collection[str]) -> nn.Module:
    """The model itself, or a stand-in for symbolic tracing, which reads ``forward`` of the class.

    The stand-in holds the same dictionaries of modules and tensors; its forward, of the same
    signature, is a call of the model with hooks and all.

    Args:
        model: what is called.
        named: the arguments that it is given by name, as hooks see them.
    """
    if not is_hooked(model):
        return model
    own = type(model)
    stand_in: nn.Module = object.__new__(
        type(own.__name__, (own,), {"forward": _forward(model, named)})
    )
    stand_in.__dict__ = {name: v for name, v in model.__dict__.items() if name != "forward"}
    return stand_in


def _forward(model: nn.Module, named: Collection[str]) -> Callable[..., Any]:
    """A function that a tracer can read the arguments of: it looks at the code, not further."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    space = {f"default_{p.name}": p.default for p in parameters if p.default is not p.empty}
    declared, given = ["self"], []
    for index, parameter in enumerate(parameters):
        before = parameters[index - 1].kind if index else None
        starred = any(p.kind is _KINDS.VAR_POSITIONAL for p in parameters[:index])
        if parameter.kind is _KINDS.KEYWORD_ONLY and before is not parameter.kind and not starred:
            declared.append("*")
        declared.append(_declared(parameter))
        by_name = any(p.name in named for p in parameters[: index + 1])
        given.append(_given(parameter, by_name))
    source = f"def forward({', '.join(declared)}): return call({', '.join(given)})"
    space["call"] = partial(nn.Module._call_impl, model)
    exec(source, space)  # names and defaults of the user's own signature, nothing else
    forward: Callable[..., Any] = space["forward"]
    return forward


def _declared(parameter: inspect.Parameter) -> str:
    default = "" if parameter.default is parameter.empty else f"=default_{parameter.name}"
    return f"{_star(parameter)}{parameter.name}{default}"


def _given(parameter: inspect.Parameter, by_name: bool) -> str:
    star, name = _star(parameter), parameter.name
    if star or parameter.kind is _KINDS.POSITIONAL_ONLY:
        return f"{star}{name}"
    return f"{name}={name}" if by_name or parameter.kind is _KINDS.KEYWORD_ONLY else name


def _star(parameter: inspect.Parameter) -> str:
    if parameter.kind is _KINDS.VAR_POSITIONAL:
        return "*"
    return "**" if parameter.kind is _KINDS.VAR_KEYWORD else ""
