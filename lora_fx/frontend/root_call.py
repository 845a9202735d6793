"""Hooks, a patched forward and starred arguments of the root module, as tracers can read them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from lora_fx.errors import TraceError, shorten

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_KINDS = inspect.Parameter


def is_hooked(model: nn.Module) -> bool:
    """Whether a call of a model runs hooks, or a ``forward`` that somebody gave this one object."""
    own = any(model.__dict__.get(name) for name in _HOOKS)
    everywhere = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    return bool(own or everywhere) or "forward" in model.__dict__


def as_called(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> nn.Module:
    """The model itself, or a stand-in for symbolic tracing, which reads ``forward`` of the class.

    The stand-in holds the same dictionaries of modules and tensors; its forward is a call of the
    model with hooks and all, with a name for each argument that is given.

    Args:
        model: what is called.
        args: that it is given by position.
        kwargs: by name, as hooks see them.
    """
    parameters = named_arguments(model, args, kwargs)
    if not is_hooked(model) and parameters == _declared_by(model):
        return model
    own, call = type(model), partial(nn.Module._call_impl, model)
    forward = _forward(call, parameters, kwargs, ["self"])
    stand_in: nn.Module = object.__new__(type(own.__name__, (own,), {"forward": forward}))
    stand_in.__dict__ = {name: v for name, v in model.__dict__.items() if name != "forward"}
    return stand_in


def with_named_arguments(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> nn.Module:
    """The model itself, or a stand-in for torch.export that has a name for each argument.

    torch.export takes no shapes of what ``**kwargs`` takes, and cannot say its guards on them.
    """
    parameters = named_arguments(model, args, kwargs)
    if parameters == _declared_by(model):
        return model
    stand_in: nn.Module = object.__new__(type(model))
    call = model.__dict__.get("forward") or MethodType(type(model).forward, stand_in)
    stand_in.__dict__ = {**model.__dict__, "forward": _forward(call, parameters, kwargs)}
    return stand_in


def named_arguments(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[inspect.Parameter]:
    """The parameters of a model, and a name for each argument that ``*args`` and ``**kwargs`` take.

    ``forward(x, *rest, **more)``, of two and ``mask=`` -> ``x, rest_0, mask``.
    """
    parameters, given = _declared_by(model), _given_to(model, args, kwargs)
    if not any(_star(parameter) and given.get(parameter.name) for parameter in parameters):
        return parameters
    named: list[inspect.Parameter] = []
    for parameter in parameters:
        held = given.get(parameter.name, ())
        if parameter.kind is _KINDS.VAR_POSITIONAL:
            names = [f"{parameter.name}_{place}" for place in range(len(held))]
            named += [_KINDS(name, _KINDS.POSITIONAL_ONLY) for name in names]
        elif parameter.kind is _KINDS.VAR_KEYWORD:
            named += [_KINDS(name, _KINDS.KEYWORD_ONLY) for name in held]
        elif parameter.name in given:  # as all are in front of what *args takes
            named.append(parameter.replace(default=parameter.empty))
        else:
            named.append(parameter)
    return sorted(named, key=lambda parameter: parameter.default is not parameter.empty)


def shapes_by_argument(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: Any
) -> Any:
    """Shapes under the names of arguments; of ``*args`` and ``**kwargs`` they may come as one.

    An argument that a dictionary does not name has the sizes of its example.
    """
    if shapes is None or callable(getattr(shapes, "dynamic_shapes", None)):  # torch.export's own
        return shapes
    given = _given_to(model, args, kwargs)
    spread = _spread(model, given)
    if isinstance(shapes, tuple | list):
        starred = {parameter.name for parameter in _declared_by(model) if _star(parameter)}
        fitting = (each for each in (given, spread) if len(each) == len(shapes))
        heads = next((h for h in fitting if not _are_of_one(h, shapes, starred)), None)
        if heads is None and given:
            raise TraceError(
                f"dynamic_shapes says the axes of {len(shapes)} inputs, and the example gives "
                f"{len(given)}, {shorten(list(given))}: give as many, or a dictionary by name"
            )
        shapes = dict(zip(heads, shapes, strict=True)) if heads else shapes
    if not isinstance(shapes, Mapping):
        if given or not isinstance(shapes, tuple | list):
            raise _no_axes("dynamic_shapes is", shapes, next(iter(given), "x"))
        return shapes
    unknown = [name for name in shapes if name not in {*given, *spread}]
    if given and unknown:
        raise TraceError(
            f"dynamic_shapes: the example has no input {shorten([*map(repr, unknown)])}: name one "
            f"of those that there are: {shorten(list(given))}"
        )
    every = dict.fromkeys(spread) | _spread(model, shapes)
    for name, value in spread.items():
        _refuse_axes(name, value, every[name])
    return every


def _are_of_one(names: Collection[str], shapes: Sequence[Any], starred: Collection[str]) -> bool:
    """Whether ``*args`` or ``**kwargs`` would get the axes of one tensor, which it takes alone."""
    pairs = zip(names, shapes, strict=True)
    own = (shape for name, shape in pairs if name in starred and isinstance(shape, Mapping))
    return any(isinstance(axis, int) for shape in own for axis in shape)


def _no_axes(said: str, found: object, name: str) -> TraceError:
    return TraceError(
        f"{said} {found!r:.80}: give the axes that may change by their place in each input, each "
        f'with a name: dynamic_shapes={{"{name}": {{0: "batch"}}}}'
    )


def _refuse_axes(name: str, value: Any, axes: Any) -> None:
    """torch.export lets an axis that a tensor has not stand, and leaves none open for it."""
    if isinstance(value, torch.Tensor) and axes is not None:
        if not isinstance(axes, Mapping | list | tuple):
            raise _no_axes(f"dynamic_shapes: {name} is said to be", axes, name)
        if not isinstance(axes, Mapping):
            if len(axes) != value.dim():
                raise TraceError(
                    f"dynamic_shapes: {name} has {value.dim()} axes, and {len(axes)} are said: "
                    'give each, None where it is fixed, or those that are free, {0: "batch"}'
                )
            axes = dict(enumerate(axes))
        unknown = [axis for axis in axes if axis not in range(value.dim())]
        if unknown:
            there = ", ".join(map(str, range(value.dim()))) or "none"
            raise TraceError(
                f"dynamic_shapes: {name} has no axis {shorten(list(map(repr, unknown)))}: name one "
                f"of those that there are: {there}"
            )
        for axis, free in axes.items():
            is_other = type(free) is int and free != value.shape[axis]
            if isinstance(free, bool | float) or free == "" or is_other:
                raise TraceError(
                    f"dynamic_shapes: axis {axis} of {name} is said to be {free!r}, and it is of "
                    f"size {value.shape[axis]}: give a name, such as 'batch', or leave it out"
                )
    elif isinstance(value, list | tuple) and isinstance(axes, list | tuple):
        for place, (each, of_it) in enumerate(zip(value, axes, strict=False)):
            _refuse_axes(f"{name}[{place}]", each, of_it)
    elif isinstance(value, Mapping) and isinstance(axes, Mapping):
        for key in value.keys() & axes.keys():
            _refuse_axes(f"{name}[{key!r}]", value[key], axes[key])


def _spread(model: nn.Module, named: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of each parameter, said of each argument that it takes."""
    kinds = {parameter.name: parameter.kind for parameter in _declared_by(model)}
    found: dict[str, Any] = {}
    for name, value in named.items():
        kind = kinds.get(name)
        if kind is _KINDS.VAR_POSITIONAL:
            found |= {f"{name}_{place}": each for place, each in enumerate(value)}
        elif kind is _KINDS.VAR_KEYWORD:
            found |= value
        else:
            found[name] = value
    return found


def _declared_by(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def _given_to(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a call gives to each parameter that it gives anything to."""
    try:
        return inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    except TypeError as error:
        raise TraceError(
            f"{type(model).__name__} does not take these inputs: {error}. Give those that its "
            "forward declares"
        ) from error


def _forward(
    call: Callable[..., Any],
    parameters: Sequence[inspect.Parameter],
    named: Collection[str],
    declared: Sequence[str] = (),
) -> Callable[..., Any]:
    """A function that a tracer can read the arguments of: it looks at the code, not further."""
    space = {f"default_{p.name}": p.default for p in parameters if p.default is not p.empty}
    declared, given = [*declared], []
    for index, parameter in enumerate(parameters):
        before = parameters[index - 1].kind if index else None
        starred = any(p.kind is _KINDS.VAR_POSITIONAL for p in parameters[:index])
        if parameter.kind is _KINDS.KEYWORD_ONLY and before is not parameter.kind and not starred:
            declared.append("*")
        declared.append(_declared(parameter))
        by_name = any(p.name in named for p in parameters[: index + 1])
        given.append(_given(parameter, by_name))
    source = f"def forward({', '.join(declared)}): return call({', '.join(given)})"
    space["call"] = call
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
