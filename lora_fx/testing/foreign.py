"""One layer that another program wrapped: the tensors that it saves, and the weight it means."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Foreign:
    """A layer that another program wrapped.

    Attributes:
        layer: the wrapped layer.
        base: its weight without the adapter.
        merged: its weight with it.
        tensors: what the program saves, by the names below the layer.
    """

    layer: nn.Module
    base: torch.Tensor
    merged: torch.Tensor
    tensors: dict[str, torch.Tensor]


def by_peft(layer: Any, config: Any) -> Foreign:
    """Wraps one layer by PEFT in float64, with random adapter weights.

    Args:
        layer: is wrapped, and changed to float64.
        config: of PEFT, whose target is ``"layer"``.
    """
    import peft

    model = nn.Sequential()
    model.add_module("layer", layer.double())
    before = layer.weight.detach().clone()
    wrapped = peft.get_peft_model(model, config).double().eval()
    _randomize(p for name, p in wrapped.named_parameters() if "base_layer" not in name)
    start = "base_model.model.layer."
    tensors = {
        name.removeprefix(start).removeprefix("base_model."): tensor.clone()
        for name, tensor in peft.get_peft_model_state_dict(wrapped).items()
    }
    merged = copy.deepcopy(wrapped).merge_and_unload().layer.weight.detach()
    return Foreign(wrapped.base_model.model.layer, before, merged, tensors)


def by_lycoris(
    module: str, layer: Any, *, dtype: torch.dtype = torch.float64, **options: Any
) -> Foreign:
    """Wraps one layer by LyCORIS; what it merges to is read off its forward.

    ``get_merged_weight`` of LyCORIS 4.1.3 scales twice. What it trains, and what a user sees, is
    its forward: its output on one-hot inputs, as large as the kernel, is the weight itself.

    Args:
        module: name of the class of LyCORIS.
        layer: is wrapped.
        dtype: of both.
        **options: of the class.
    """
    import lycoris.modules as modules

    layer = layer.to(dtype)
    wrapped = getattr(modules, module)("layer", layer, **options).to(dtype).eval()
    _randomize(wrapped.parameters())
    tensors = {name: t.detach().clone() for name, t in wrapped.state_dict().items()}
    return Foreign(wrapped, layer.weight.detach(), _forward_weight(wrapped, layer), tensors)


def _randomize(parameters: Iterable[nn.Parameter]) -> None:
    make = torch.Generator().manual_seed(3)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=make, dtype=parameter.dtype)
        parameter.data.copy_(noise)


def _forward_weight(wrapped: nn.Module, layer: Any) -> torch.Tensor:
    """The weight that a forward applies, found by its answers to one-hot inputs."""
    shape = layer.weight.shape
    ones = torch.eye(shape[1:].numel(), dtype=layer.weight.dtype).reshape(-1, *shape[1:])
    answers = wrapped(ones).detach().reshape(len(ones), -1)
    if layer.bias is not None:
        answers = answers - layer.bias.detach()
    weight: torch.Tensor = answers.T.reshape(shape)
    return weight
