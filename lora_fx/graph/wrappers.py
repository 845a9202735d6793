"""Wrappers that compute what they wrap, and compiled calls: no part of a path, nor of a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

# Class of a wrapper -> what it calls the module that it wraps. Told by name: some are slow to
# import, and what nobody imported wraps nothing.
_INNER = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.optim.swa_utils", "AveragedModel"): "module",
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "CheckpointWrapper"): (
        "_checkpoint_wrapped_module"
    ),
}
# What torch calls a wrapped module in a state dict's keys, and nobody one of their own.
PARTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# What PEFT puts before the paths of a model that it wraps, and behind that of a layer.
PEFT_MODEL, PEFT_LAYER = "base_model.model.", ".base_layer"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_COMPILED = "_compiled_call_impl"  # what nn.Module.compile sets, in place
_CHANGED = {"_modules", "forward", _COMPILED}


def bare(module: nn.Module) -> nn.Module:
    """What a module wraps, however often, or itself.

    A wrapper that somebody hooked, or whose forward is another than torch's, is no mere wrapper.
    """
    while (inner := _inner(module)) is not None:
        module = inner
    return module


def named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by each of its paths, as `nn.Module.named_modules`, wrappers left out."""
    yield from _named("", bare(root))


def plain(held: Mapping[str, Any]) -> dict[str, Any]:
    """The ``__dict__`` of a module without wrappers around its children and compiled calls."""
    result = {name: value for name, value in held.items() if name != _COMPILED}
    result["_modules"] = {n: m if m is None else bare(m) for n, m in held["_modules"].items()}
    original = getattr(held.get("forward"), "_torchdynamo_orig_callable", None)
    if original is not None:
        result["forward"] = original
    return result


@contextmanager
def unwrapped(root: nn.Module) -> Iterator[None]:
    """Takes wrappers and compiled calls out of a tree whose root is bare, and puts them back."""
    every = dict.fromkeys(module for _, module in named_modules(root))
    then = {m: dict(m.__dict__) for m in every if plain(m.__dict__) != m.__dict__}
    try:
        for module, held in then.items():
            module.__dict__.update(plain(held))
            module.__dict__.pop(_COMPILED, None)
        yield
    finally:
        for module, held in then.items():
            module.__dict__.update({name: held[name] for name in _CHANGED & held.keys()})


def _named(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _named(f"{path}.{name}" if path else name, bare(child))


def _inner(module: nn.Module) -> nn.Module | None:
    """What a wrapper wraps; None for what is no mere wrapper."""
    for cls in type(module).__mro__:
        name = _INNER.get((cls.__module__, cls.__name__))
        if name is not None:
            is_mere = type(module).forward is cls.forward  # type: ignore[attr-defined]
            is_mere = is_mere and not any(module.__dict__[hooks] for hooks in _HOOKS)
            return module._modules[name] if is_mere else None
    return None
