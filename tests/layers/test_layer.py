"""Layers told by their class."""

from __future__ import annotations

from typing import Any

import loralib
import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from lora_fx.layers.layer import Layer, is_conv1d_of_transformers, layer_of

MAKE: Any = Conv1D


class Named(nn.Linear):
    """Somebody's own linear layer."""


class NormOfOne(nn.Module):
    """Has one number as its weight, and no axis."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))


class Imposter(nn.Module):
    """Called as transformers' layer, and none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 7))


Imposter.__name__ = "Conv1D"


def layer(kind: str, shape: tuple[int, ...], groups: int = 1) -> Layer:
    return Layer(path="x", kind=kind, shape=shape, dtype=torch.float32, groups=groups)


TOLD: dict[str, tuple[nn.Module, Layer]] = {
    "linear": (nn.Linear(3, 5), layer("linear", (5, 3))),
    "derived": (Named(3, 5), layer("linear", (5, 3))),
    "loralib": (loralib.Linear(3, 5, r=2), layer("linear", (5, 3))),
    "loralib turned": (
        loralib.Linear(3, 5, r=2, fan_in_fan_out=True),
        layer("linear_transposed", (5, 3)),
    ),
    "transformers": (MAKE(7, 5), layer("linear_transposed", (7, 5))),
    "embedding": (nn.Embedding(11, 5), layer("embedding", (5, 11))),
    "conv1d": (nn.Conv1d(3, 5, 4), layer("conv1d", (5, 3, 4))),
    "conv2d": (nn.Conv2d(4, 6, (3, 1), groups=2), layer("conv2d", (6, 4, 3, 1), 2)),
    "conv3d": (nn.Conv3d(3, 5, (1, 2, 3)), layer("conv3d", (5, 3, 1, 2, 3))),
    "conv_transpose1d": (nn.ConvTranspose1d(3, 5, 4), layer("conv_transpose1d", (5, 3, 4))),
    "conv_transpose2d": (
        nn.ConvTranspose2d(4, 6, (3, 1), groups=2),
        layer("conv_transpose2d", (6, 4, 3, 1), 2),
    ),
    "conv_transpose3d": (
        nn.ConvTranspose3d(3, 5, (1, 2, 3)),
        layer("conv_transpose3d", (5, 3, 1, 2, 3)),
    ),
    "layer norm": (nn.LayerNorm((4, 5)), layer("norm", (4, 5))),
    "group norm": (nn.GroupNorm(2, 6), layer("norm", (6,))),
    "batch norm": (nn.BatchNorm2d(6), layer("norm", (6,))),
    "RMS norm": (LlamaRMSNorm(6), layer("norm", (6,))),
}


@pytest.mark.parametrize("case", TOLD)
def test_a_layer_is_told_by_its_class(case: str) -> None:
    module, expected = TOLD[case]
    found = layer_of(module, "x")
    assert found == expected
    assert found.name == type(module).__name__
    weight: Any = module.weight
    shape = tuple(weight.shape)
    count = found.groups
    turned = (shape[1] * count, shape[0] // count, *shape[2:]) if found.transposed else shape
    assert turned == found.own_shape


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(),
        nn.LayerNorm(5, elementwise_affine=False),
        nn.Bilinear(2, 3, 5),
        Imposter(),
        NormOfOne(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_another_module_is_no_layer(module: nn.Module) -> None:
    assert layer_of(module) is None
    assert not is_conv1d_of_transformers(module)
