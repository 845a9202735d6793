import pytest
import torch
from torch import nn

from lora_fx.errors import AdapterError
from lora_fx.kinds import glora
from lora_fx.testing import by_lycoris, means, read_kind

LAYERS = {
    "linear": lambda: nn.Linear(4, 6),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2)),
    "pointwise": lambda: nn.Conv2d(4, 6, 1),
    "conv3d": lambda: nn.Conv3d(4, 6, (1, 2, 3)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_means_what_lycoris_means(layer):
    foreign = by_lycoris("GLoRAModule", LAYERS[layer](), lora_dim=2, alpha=3)
    scale, shape = float(foreign.tensors["alpha"]) / 2, tuple(foreign.base.shape)
    update = read_kind("glora", foreign.tensors, scale=scale, shape=shape)
    assert update.shape == shape
    off = foreign.base + 1.1 * (foreign.merged - foreign.base)
    means(update, foreign.base, foreign.merged, off)


def test_each_half_acts_alone(noise):
    """By hand: a reads the weight, b does not."""
    tensors = {leaf: noise(*shape) for leaf, shape in PLAIN.items()}
    weight = noise(5, 3)
    a = tensors["a1.weight"] @ tensors["a2.weight"]
    b = tensors["b1.weight"] @ tensors["b2.weight"]
    found = glora.read(tensors, {"scale": 0.5}).weight(weight)
    assert torch.allclose(found, weight + 0.5 * (weight @ a + b), atol=1e-6)
    assert not torch.allclose(found, weight + 0.5 * (weight @ a.T + b), atol=1e-2)


PLAIN = {"a1.weight": (3, 2), "a2.weight": (2, 3), "b1.weight": (5, 2), "b2.weight": (2, 3)}


@pytest.mark.parametrize(
    ("shapes", "settings", "message"),
    [
        (PLAIN | {"a1.weight": (4, 2)}, {}, r"a2.weight is \(2, 3\), expected \(r, in"),
        (PLAIN | {"b1.weight": (5, 3)}, {}, r"b1.weight.* r = 2"),
        ({leaf: PLAIN[leaf] for leaf in list(PLAIN)[:3]}, {}, "b2.weight is missing"),
        (PLAIN | {"bm.weight": (2, 2)}, {}, "bm.weight is not used"),
        (PLAIN | {"a1.weight": (3, 2, 3)}, {}, "have a kernel, expected matrices"),
        (PLAIN, {"shape": (5, 3, 2)}, r"make \(5, 3\), the layer is \(5, 3, 2\)"),
        (PLAIN, {"scale": "1"}, "scale is '1'"),
    ],
)
def test_refuses(shapes, settings, message, noise):
    tensors = {leaf: noise(*shape) for leaf, shape in shapes.items()}
    with pytest.raises(AdapterError, match=message):
        glora.read(tensors, {"scale": 1.0, **settings})
