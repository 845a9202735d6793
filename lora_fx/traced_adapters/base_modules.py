"""The layers of a base that an adapter means, as modules around the base's own tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from lora_fx.errors import AdapterError
from lora_fx.graph.example import example_of
from lora_fx.graph.lazy_tensor import evaluate
from lora_fx.graph.traced_module import TracedModule
from lora_fx.injection.bind import targeted
from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.layer import Layer
from lora_fx.traced_adapters.config import TracedConfig

_HOOKS = tuple(name for name, value in nn.Module().__dict__.items() if name.endswith("hooks"))


def adapted(config: TracedConfig, base: BaseLayers) -> dict[str, nn.Module]:
    """The layers of a base that a config means, in its order: modules that share its tensors.

    Raises:
        AdapterError: there are none, or what is adapted is no module that is known here.
    """
    wanted = set(targeted(config.rule, base) or ())
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for path, module in _modules(base):
        if path in wanted and id(module) not in seen:
            seen.add(id(module))
            found[path] = module
    if not found:
        targets = config.rule.target_modules if config.rule else None
        raise AdapterError(
            f"target_modules is {targets!r:.80}, which means no layer of the base; give the base "
            "that the adapter was trained on"
        )
    return found


def _modules(base: BaseLayers) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a base, each a shell of its own around the base's tensors."""
    example = example_of(base.base) if isinstance(base.base, fx.GraphModule) else None
    if example is not None and example.model is None:
        for path, layer in base.items():
            if (module := _made(path, layer, base)) is not None:
                yield path, module
        return
    assert base.base is not None
    known = example.model if example else None
    model = TracedModule(base.base) if known is None else known
    shells: dict[int, nn.Module] = {}
    for path, module in model.modules.items():
        if path not in base:
            continue
        if id(module) not in shells:
            shells[id(module)] = _shell(module, model.parameters(module))
        yield path, shells[id(module)]


def _shell(module: nn.Module, parameters: Mapping[str, Any]) -> nn.Module:
    """A module of the same class and the same tensors, which may be wrapped and written to."""
    shell = copy.copy(module)
    held = {name: None if value is None else _shared(value) for name, value in parameters.items()}
    shell.__dict__["_parameters"] = held
    shell.__dict__["_buffers"] = dict(module._buffers)
    for name in _HOOKS:
        shell.__dict__[name] = type(module.__dict__[name])()
    return shell


def _shared(value: Any) -> nn.Parameter:
    return nn.Parameter(evaluate(value).detach(), requires_grad=False)


def _made(path: str, layer: Layer, base: BaseLayers) -> Any:
    """A module for a layer of a graph that remembers none: linear layers and tables."""
    weight, bias = base.parameter(base.weights[path]) if path in base.weights else None, None
    if weight is None or layer.kind not in ("linear", "linear_transposed", "embedding"):
        return None
    bias = base.parameter(f"{path}.bias")
    module: Any
    with torch.device("meta"):
        if layer.kind == "embedding":
            module = nn.Embedding(*weight.shape)
        elif layer.kind == "linear":
            module = nn.Linear(layer.in_features, layer.out_features, bias is not None)
        else:
            from transformers.pytorch_utils import Conv1D

            module = Conv1D(  # type: ignore[no-untyped-call]
                layer.out_features, layer.in_features
            )
    module.weight = _shared(weight)
    if layer.kind != "embedding":
        module.bias = None if bias is None else _shared(bias)
    return module
