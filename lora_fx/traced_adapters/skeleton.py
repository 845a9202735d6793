"""The adapted layers of a base alone, wrapped by PEFT, the file's tensors in them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_fx.errors import AdapterError, shorten
from lora_fx.traced_adapters.bounded import Bounded
from lora_fx.traced_adapters.config import TracedConfig, by_peft

ADAPTER = "default"


def wrapped(config: TracedConfig, layers: Mapping[str, nn.Module]) -> Any:
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
            raise AdapterError(f"PEFT cannot build {config.name} here: {error}") from error


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
