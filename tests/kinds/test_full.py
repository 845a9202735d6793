import pytest
import torch
from lycoris.modules import FullModule
from torch import nn

from lora_fx import AdapterError, Update
from lora_fx.adapters.other_updates import WeightUpdate
from lora_fx.kinds import full as dense
from lora_fx.testing import means, read_kind


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (6, 4, 3, 2), (6, 2, 2)])
@pytest.mark.parametrize("settings", [{}, {"scale": 0.5}])
@pytest.mark.parametrize("has_bias", [False, True])
def test_is_a_sum(has_bias, settings, shape, noise, dtype):
    tensors = {"diff": noise(*shape, dtype=dtype)}
    if has_bias:
        tensors["diff_b"] = noise(shape[0], dtype=dtype)
    base, update = noise(*shape), read_kind("full", tensors, **settings)
    scale = settings.get("scale", 1)
    delta = scale * tensors["diff"].double()
    means(update, base, base + delta, base + 1.1 * delta)
    assert update.shape == shape
    assert isinstance(update, WeightUpdate)
    assert (update.bias is not None) == has_bias
    if has_bias:
        assert torch.equal(update.bias.double(), scale * tensors["diff_b"].double())


@pytest.mark.parametrize("leaves", ["diff", "diff_b", "diff diff_b"])
@pytest.mark.parametrize("is_biased", [False, True])
def test_is_added_beside_what_another_kind_makes(leaves, is_biased, noise):
    tensors = {"diff": noise(5, 3), "diff_b": noise(5)}
    diff, shift = (tensors[name] if name in leaves.split() else None for name in tensors)
    low = Update(noise(2, 3), noise(5, 2), 1.5, bias=noise(5) if is_biased else None)
    update, base = dense.beside(low, diff, shift), noise(5, 3)
    wanted = low.weight(base) + (0 if diff is None else diff)
    torch.testing.assert_close(update.weight(base), wanted)
    assert isinstance(update, type(low)) == (diff is None)
    found, own = update.shift(lambda: None), 1.5 * low.bias if is_biased else None
    assert (found is None) == (shift is None and own is None)
    if found is not None:
        both = sum(part for part in (own, shift) if part is not None)
        torch.testing.assert_close(found, both)


@pytest.mark.parametrize("has_bias", [False, True])
def test_means_what_lycoris_means(has_bias):
    torch.manual_seed(0)
    layer = nn.Linear(3, 5, bias=has_bias).double()
    base, bias = (None if p is None else p.detach().clone() for p in (layer.weight, layer.bias))
    x, module = torch.randn(4, 7, 3, dtype=torch.float64), FullModule("layer", layer).double()
    before = layer(x)
    for parameter in module.parameters():
        parameter.data.normal_()
    module.apply_to()  # only what is applied saves a difference
    update = read_kind("full", {leaf: t.detach() for leaf, t in module.state_dict().items()})
    if has_bias:
        bias = bias + update.bias
    actual = nn.functional.linear(x, update.weight(base), bias)
    assert torch.allclose(actual, layer(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before, layer(x), rtol=1e-2)


@pytest.mark.parametrize(
    ("shapes", "settings", "message"),
    [
        ({"diff_b": (5,)}, {}, "diff is missing"),
        ({"diff": (5,)}, {}, r"diff is \(5,\)"),
        ({"diff": (5, 3), "diff_b": (3,)}, {}, "diff_b.* out = 5"),
        ({"diff": (5, 3), "lora_A": (2, 3)}, {}, "lora_A is not used"),
        ({"diff": (5, 3)}, {"shape": (3, 5)}, r"diff is \(5, 3\), the layer is \(3, 5\)"),
        ({"diff": (5, 3)}, {"scale": None}, "scale is None"),
    ],
)
def test_refuses(shapes, settings, message, noise):
    tensors = {leaf: noise(*shape) for leaf, shape in shapes.items()}
    with pytest.raises(AdapterError, match=message):
        dense.read(tensors, settings)
