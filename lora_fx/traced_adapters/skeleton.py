"""The adapted layers of a base alone, sharing its weights, wrapped by PEFT."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from lora_fx.errors import AdapterError, shorten
from lora_fx.formats.peft_record import PeftConfig
from lora_fx.graph.example import example_of
from lora_fx.graph.lazy_tensor import evaluate
from lora_fx.graph.traced_module import TracedModule
from lora_fx.injection.bind import targeted
from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.layer import Layer
from lora_fx.traced_adapters.bounded import Bounded
from lora_fx.traced_adapters.config import by_peft

ADAPTER = "default"
_HOOKS = tuple(name for name, value in nn.Module().__dict__.items() if name.endswith("hooks"))


def adapted(config: PeftConfig, base: BaseLayers) -> dict[str, nn.Module]:
    """The layers of a base that a config means, in its order: modules that share its tensors.

    Raises:
        AdapterError: there are none, or what is adapted is no module that is known here.
    """
    wanted = set(targeted(config.rule, base))
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


def wrapped(config: PeftConfig, layers: Mapping[str, nn.Module]) -> Any:
    """PEFT's model of these layers and nothing else, its values those that PEFT starts with.

    Raises:
        AdapterError: PEFT refuses a layer or the config; says why.
    """
    import peft

    settings = by_peft(config, list(layers))
    root = nn.Module()
    for path, module in layers.items():
        _place(root, path, module)
    tensors = [p for module in layers.values() for p in module.parameters()]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), Bounded(tensors):
        warnings.simplefilter("ignore")  # PEFT advises those who train
        try:
            return peft.get_peft_model(root, settings, adapter_name=ADAPTER).eval()
        except Exception as error:  # PEFT's own code may raise anything
            raise AdapterError(f"PEFT cannot build {config.type.name} here: {error}") from error


def keys_of(model: Any) -> set[str]:
    """The names that PEFT gives an adapter's tensors in its file."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = peft.get_peft_model_state_dict(
            model, adapter_name=ADAPTER, save_embedding_layers=False
        )
    return set(state)


def fill(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts a file's tensors into PEFT's model, all of them.

    Raises:
        AdapterError: a tensor that the adapter needs is missing, or does not fit.
    """
    import peft

    missing = sorted(keys_of(model) - tensors.keys())
    if missing:
        raise AdapterError(f"{len(missing)} tensors are missing: {shorten(missing)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result: Any = peft.set_peft_model_state_dict(model, dict(tensors), adapter_name=ADAPTER)
        except Exception as error:  # shapes that differ, and whatever PEFT's own code raises
            raise AdapterError(f"PEFT cannot load the tensors: {error}") from error
    if result.unexpected_keys:
        raise AdapterError(
            f"PEFT has no use for the tensors {shorten(sorted(result.unexpected_keys))}"
        )


def layer_at(model: Any, path: str) -> Any:
    """PEFT's layer in the place of one that was adapted."""
    return model.base_model.model.get_submodule(path)


def replace(
    model: Any, path: str, replacements: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Puts what a file stores of an adapted layer's own tensors in their place, and gives it."""
    held = getattr(layer_at(model, path), "base_layer", None)
    parameters = {} if held is None else held._parameters
    found = {
        name: replacements[f"{path}.{name}"]
        for name in parameters
        if f"{path}.{name}" in replacements
    }
    for name, value in found.items():
        parameters[name] = nn.Parameter(value.to(parameters[name].dtype), requires_grad=False)
    return found


def trained_whole(layer: Any) -> dict[str, torch.Tensor]:
    """The tensors that take the place of a module's own, if its type trains a copy of it."""
    copies = getattr(layer, "ln_tuning_layers", None)
    named = () if copies is None else copies[ADAPTER].named_parameters()
    return {name: value.detach() for name, value in named}


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)


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
