"""Types of PEFT that have no kind of ours: PEFT builds their layers, the analysis reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.updates import AnyUpdate
from lora_fx.errors import AdapterError, shorten, within
from lora_fx.formats.hints import Hints
from lora_fx.formats.peft.keys import ClassifiedTensors, as_saved
from lora_fx.layers.base_layers import BaseLayers
from lora_fx.traced_adapters import skeleton
from lora_fx.traced_adapters.base_modules import adapted
from lora_fx.traced_adapters.config import TracedConfig, named
from lora_fx.traced_adapters.layer import update_of
from lora_fx.traced_adapters.traces import Traces

__all__ = ["TracedConfig", "read_traced"]


def read_traced(
    name: str,
    weights: Path,
    tensors: Mapping[str, torch.Tensor],
    config: TracedConfig,
    origin: Path,
    hints: Hints,
) -> Adapter:
    """Reads an adapter of a type that PEFT has and no kind of ours.

    PEFT wraps the layers of the base that are adapted, and those alone, sharing the weights;
    it takes the file's tensors; and each of its layers, traced by itself, says what it makes of W.

    Args:
        name: of the adapter.
        weights: the file of the tensors.
        tensors: by PEFT's keys.
        config: as `config.parse` reads it.
        origin: where the config comes from.
        hints: ``base`` is needed, the model or the traced graph; ``strict`` is heeded.

    Raises:
        AdapterError: there is no base or no PEFT, the type changes no weight, PEFT refuses the
            config or a tensor, a tensor has no use, or a layer is no affine function.
    """
    with within(origin):
        if hints.base is None:
            raise AdapterError(
                f"{named(config.given)}, which PEFT itself reads, around the layers of the base; "
                "pass base=, the model (--base on the command line)"
            )
        base = hints.layers
        layers = adapted(config, base)
    with within(weights):
        return _read(name, tensors, config, base, layers)


def _read(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    config: TracedConfig,
    base: BaseLayers,
    layers: Mapping[str, nn.Module],
) -> Adapter:
    own = {path: _tensors_of(module) for path, module in layers.items()}
    model = skeleton.wrapped(config, layers)
    known = skeleton.keys_of(model)
    tensors = as_saved(tensors, known.__contains__)
    keys = ClassifiedTensors(config, base, {path: {} for path in layers})
    unused = keys.claim_of_base({key: t for key, t in tensors.items() if key not in known})
    if unused:
        raise AdapterError(
            f"{len(unused)} tensors that the config gives no use: {shorten(unused)}; expected "
            f"{shorten(sorted(known), 3)}, biases by the field bias, and modules by modules_to_save"
        )
    keys.check_saved()
    skeleton.fill(model, {key: tensor for key, tensor in tensors.items() if key in known})
    for path in layers:
        own[path] |= skeleton.replace(model, path, keys.replacements)
    updates: dict[str, AnyUpdate] = {}
    traces = Traces()
    for path in layers:
        layer = skeleton.layer_at(model, path)
        with within(path):
            trained = skeleton.trained_whole(layer)
            keys.replacements.update({f"{path}.{leaf}": value for leaf, value in trained.items()})
            if not trained:
                updates[path] = update_of(layer, base[path], own[path], config.name.lower(), traces)
    return Adapter(name, updates, keys.replacements, expects=config.rule)


def _tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in module._parameters.items() if p is not None}
