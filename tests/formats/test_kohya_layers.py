"""One layer's tensors; the oracle is sd-scripts' rule, made again from its definition.

There a convolution's ``lora_down`` has the layer's kernel, stride and padding, ``lora_up`` is of
single points, and what they give is added at ``alpha / rank``. LoCon in its Tucker form has the
kernel in a third convolution between two of single points.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx.adapters.adapter import Update
from lora_fx.errors import AdapterError
from lora_fx.formats.kohya import updates_of
from lora_fx.layers.base_layers import layers_of
from lora_fx.testing import relative

NAME = "lora_unet_x"
CONVS: dict[int, tuple[Any, Any]] = {
    1: (nn.Conv1d, F.conv1d),
    2: (nn.Conv2d, F.conv2d),
    3: (nn.Conv3d, F.conv3d),
}
KERNELS = [(3,), (1,), (3, 3), (3, 2), (1, 1), (2, 1, 3)]


def update_of(tensors: dict[str, torch.Tensor], layer: nn.Module) -> Any:
    roles = {leaf: (f"{NAME}.{leaf}", tensor) for leaf, tensor in tensors.items()}
    base = layers_of(nn.ModuleDict({"x": layer}))["x"]
    return {f"x.{key}".rstrip("."): update for key, update in updates_of(roles, base).items()}


def random(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=make, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_a_convolution_is_two_or_three_convolutions(kernel: tuple[int, ...], tucker: bool) -> None:
    size = len(kernel)
    points = [1] * size
    make, conv = CONVS[size]
    layer = make(3, 5, kernel, stride=2, padding=1).double()
    shapes = ((2, 3, *points), (2, 2, *kernel)) if tucker else ((2, 3, *kernel),)
    up, down, *core = random((5, 2, *points), *shapes)
    x = torch.randn(4, 3, *[7] * size, dtype=torch.float64)
    hidden = conv(conv(x, down), core[0], stride=2, padding=1) if tucker else None
    hidden = conv(x, down, stride=2, padding=1) if hidden is None else hidden
    with torch.no_grad():
        expected = layer(x) + conv(hidden, up) * 3.0 / 2
        tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(3.0)}
        tensors |= {"lora_mid.weight": core[0]} if tucker else {}
        [update] = update_of(tensors, layer).values()
        found = conv(x, update.weight(layer.weight), layer.bias, stride=2, padding=1)
    assert relative(found, expected) <= 1e-12
    assert relative(layer(x), expected) > 1e-2
    assert (update.rank, update.shape) == (2, (5, 3, *kernel))


@pytest.mark.parametrize(
    ("layer", "down", "up"),
    [
        (nn.Conv2d(3, 5, 1), (2, 3), (5, 2)),
        (nn.Linear(3, 5), (2, 3, 1, 1), (5, 2, 1, 1)),
        (nn.Embedding(3, 5), (2, 3), (5, 2)),
        (nn.Conv2d(6, 4, 3, groups=2), (2, 3, 3, 3), (4, 2, 1, 1)),
    ],
    ids=["a matrix of points", "points of a matrix", "a table", "groups"],
)
def test_a_layer_may_be_stored_in_another_shape(
    layer: nn.Module, down: tuple[int, ...], up: tuple[int, ...]
) -> None:
    one, other = random(down, up)
    [update] = update_of({"lora_down.weight": one, "lora_up.weight": other}, layer).values()
    assert isinstance(update, Update)
    assert (update.scale, update.kind) == (1, "lora")
    assert torch.equal(update.down, one)


def test_a_norm_has_updates_of_its_parameters() -> None:
    weight, bias = random((5,), (5,))
    found = update_of({"w_norm": weight, "b_norm": bias}, nn.LayerNorm(5))
    assert list(found) == ["x.weight", "x.bias"]
    assert torch.equal(found["x.weight"].weight(bias), bias + weight)
    assert found["x.bias"].shape == (5,)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.ones(5)}, "expected weight, and on_input of one number"),
        ({"weight": torch.ones(5), "on_input": torch.ones(2)}, "on_input of one number"),
        ({"weight": torch.ones(4), "on_input": torch.ones(())},
         r"weight is \(4,\), expected \(3,\)"),
        ({"diff": torch.ones(5, 4)}, r"diff is \(5, 4\), the layer is \(5, 3\)"),
        ({"oft_blocks": torch.ones(2, 2, 2)}, r"the layer is \(5, 3\)"),
        ({"b_norm": torch.ones(5)}, "^.'b_norm'. do not fit x, a Linear"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_of_the_layer_are_refused(
    tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        update_of(tensors, nn.Linear(3, 5))


def test_a_layer_that_no_adapter_acts_on_is_not_asked_for() -> None:
    assert layers_of(nn.ModuleDict({"x": nn.ConvTranspose1d(3, 5, 1)}))["x"].in_files is False
