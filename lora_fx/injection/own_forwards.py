"""Layers whose forward does more than to multiply: a trainer's sum is not the layer with W'."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lora_fx.errors import AdapterWarning
from lora_fx.graph.example import Example, example_of
from lora_fx.graph.graph_module import shallow_clone
from lora_fx.graph.ops import CASTS, asks_sizes, module_path, op_name, reached
from lora_fx.graph.traced_module import TracedModule
from lora_fx.injection.injected_adapters import Injected, injected
from lora_fx.layers.layer import Layer, is_conv1d, layer_of
from lora_fx.layers.sites import sites
from lora_fx.numerics import compare

_OF_NO_NUMBER = CASTS | {"view", "reshape"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "forward")


def tell_own_forwards(gm: fx.GraphModule, tuned: fx.GraphModule) -> None:
    """Warns of layers where PEFT's forward is not what the layer gives with W' in place of W.

    PEFT adds ``B A x`` to what the module gives, x as the module was called with it. That is the
    same where all that the module does is to multiply, to cast and to add; what else its forward or
    a hook does is run once with the example inputs, beside the product alone. PEFT's merge is W'.

    Args:
        gm: the graph before adapters were put into it.
        tuned: the one with them.
    """
    example, known = example_of(gm), {*injected(gm)}
    if example is None or example.model is None:
        return
    for record in injected(tuned):
        if record not in known and not record.fresh:
            _tell(gm, example, example.model, record)


def _tell(gm: fx.GraphModule, example: Example, model: TracedModule, record: Injected) -> None:
    adapter = record.adapter
    bound = ((bound.layer, path) for path, several in record.bound.items() for bound in several)
    updates = {layer.path: adapter.updates[path] for layer, path in bound if layer is not None}
    layers = dict(_with_own_forward(model, updates))
    more = _more(gm, layers) if layers else {}
    added = {path: updates[path].is_added for path in more}
    apart = _apart(example, model, layers, added) if more else {}
    for path, kind in apart.items():
        warnings.warn(
            f"adapter {adapter.name}, {path}: {kind} does more than to multiply with its weight "
            f"({more[path]}). Here it does that with W', as after PEFT's merge. PEFT's own forward "
            "adds B A x to what it gives, with other numbers: if those were trained, trace the "
            "model as PEFT wraps it, and fold that",
            AdapterWarning,
            stacklevel=4,
        )


def _with_own_forward(model: TracedModule, paths: Iterable[str]) -> Iterator[tuple[str, Layer]]:
    """Of the modules at these paths the layers that have a forward of their own, or hooks."""
    for path in paths:
        module = model.modules.get(path)
        hooked = module is not None and any(module.__dict__.get(name) for name in _HOOKS)
        if module is None or (type(module).__module__.startswith("torch.nn") and not hooked):
            continue
        layer = layer_of(module, path)
        if layer is None or not layer.is_matrix:
            continue
        classes: Iterable[Any] = type(module).__mro__
        known = [c.forward for c in classes if c in layer.type.classes or is_conv1d(c)]
        if hooked or type(module).forward not in known:
            yield path, layer


def _more(gm: fx.GraphModule, paths: Collection[str]) -> dict[str, str]:
    """Of the modules at these paths those that call more than a layer, and what."""
    layers = {site.node for site in sites(gm)}
    found: dict[str, str] = {}
    for node in reached(gm.graph):
        is_call = node.op.startswith("call") and node not in layers and not asks_sizes(node)
        if is_call and op_name(node) not in _OF_NO_NUMBER:
            for path in _starts(module_path(node)):
                if path in paths:
                    found.setdefault(path, op_name(node))
    return found


def _starts(path: str) -> Iterator[str]:
    """A path and those that it lies below."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _apart(
    example: Example, model: TracedModule, layers: Mapping[str, Layer], added: Mapping[str, bool]
) -> dict[str, str]:
    """Of these modules those that differ from their product, and their class.

    Without example inputs nothing can be run: then it is all of them.
    """
    if not example.args and not example.kwargs:
        return {path: type(model.modules[path]).__name__ for path in added}
    found: dict[str, str] = {}

    def watch(path: str) -> Callable[..., None]:
        running: list[str] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path in found or running or not args or not isinstance(args[0], torch.Tensor):
                return
            running.append(path)
            if not _Call(module, layers[path], args, kwargs).is_product(added[path]):
                found[path] = type(module).__name__
            running.pop()

        return before

    def dress(_: nn.Module) -> None:
        for path in added:
            module = model.modules[path]
            module.register_forward_pre_hook(watch(path), prepend=True, with_kwargs=True)

    with torch.random.fork_rng(devices=[]):
        model.call(example.args, example.kwargs, dress)
    return found


@dataclass(frozen=True)
class _Call:
    """One call of a layer's module."""

    module: nn.Module
    layer: Layer
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def is_product(self, added: bool) -> bool:
        """Whether another weight does to what it gives what it does to the product alone.

        Args:
            added: whether that is all that counts; else it is the product, and no more.
        """
        weight, bias = self.module.weight, getattr(self.module, "bias", None)
        assert isinstance(weight, torch.Tensor)
        make = torch.Generator().manual_seed(0)
        step = torch.randn(weight.shape, generator=make) * self.layer.in_features**-0.5
        step = step.to(weight.dtype)
        own, other = self._given(weight), self._given(weight + step)
        try:
            by_step, whole = self._product(step, None), self._product(weight, bias)
        except (IndexError, RuntimeError):
            return True  # PEFT's branch, which reads the same, cannot be run either
        if not isinstance(own, torch.Tensor) or own.shape != by_step.shape:
            return True
        coarse = max(weight.dtype, own.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        is_sum = compare(other, own + by_step, coarse).ok
        return is_sum and (added or compare(own, whole, coarse).ok)

    def _given(self, weight: torch.Tensor) -> Any:
        held = self.module.__dict__["_parameters"]
        before = self.module.weight
        held["weight"] = nn.Parameter(weight, requires_grad=False)
        try:
            return self.module(*self.args, **self.kwargs)
        finally:
            held["weight"] = before

    def _product(self, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        """What PEFT computes beside: of a table that scales its rows, PEFT knows the factor."""
        x, kind = self.args[0], self.layer.type
        if kind.is_linear:
            return F.linear(x.to(weight.dtype), kind.canonical("weight", weight), bias)
        cls: Any = kind.classes[0]
        plain = shallow_clone(self.module)
        plain.__class__ = cls
        plain._parameters.update(weight=nn.Parameter(weight, requires_grad=False), bias=bias)
        factor = getattr(self.module, "embed_scale", 1) if kind.reads_ids else 1
        return cls.forward(plain, x) * factor  # type: ignore[no-any-return]
