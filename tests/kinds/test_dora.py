import peft
import pytest
import torch
from torch import nn

from lora_fx import AdapterError, Update
from lora_fx.adapters.other_updates import Scaling, WeightUpdate, added
from lora_fx.kinds import dora
from lora_fx.testing import by_peft, means


@pytest.mark.parametrize("kernel", [(), (2,), (3, 2)])
@pytest.mark.parametrize("form", ["product", "function"])
@pytest.mark.parametrize("leaf", sorted(dora.LEAVES))
def test_gives_each_row_a_length(leaf, form, kernel, noise):
    down, up, base, length = noise(2, 3, *kernel), noise(5, 2), noise(5, 3, *kernel), noise(5)
    update = Update(down, up, 1.5)
    if form == "function":
        update = WeightUpdate("full", added(update.delta()), (5, None))
    tensors = {leaf: length.reshape(5, *[1] * (1 + len(kernel)))}
    whole = base.double() + 1.5 * torch.einsum("or,r...->o...", up.double(), down.double())
    norm = whole.pow(2).flatten(1).sum(1).sqrt()
    expected = torch.einsum("o,o...->o...", length.double() / norm, whole)
    means(dora.with_magnitude(update, tensors), base, expected, whole, 1.1 * expected)


SHAPES = [(5,), (1, 5), (5, 1), (1, 5, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_takes_any_shape_of_peft(shape, noise):
    update = Update(noise(2, 3), noise(5, 2), 1.0)
    length = noise(*shape)
    found = dora.with_magnitude(update, {"lora_magnitude_vector": length})
    assert torch.equal(found.magnitude, length.flatten())


LAYERS = {
    "linear": (lambda: nn.Linear(3, 5), ("lora_A.weight", "lora_B.weight")),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2)), ("lora_A.weight", "lora_B.weight")),
    "table": (lambda: nn.Embedding(7, 3), ("lora_embedding_A", "lora_embedding_B")),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_means_what_peft_means(layer):
    made, leaves = LAYERS[layer]
    config = peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["layer"])
    foreign = by_peft(made(), config)
    down, up = (foreign.tensors[leaf] for leaf in leaves)
    _, magnitude = dora.split(foreign.tensors)
    update = dora.with_magnitude(Update(down, up.flatten(1), 1.5), magnitude)
    base, merged = foreign.base, foreign.merged
    if layer == "table":
        base, merged = base.T, merged.T
    means(update, base, merged, 1.1 * merged, Update(down, up.flatten(1), 1.5).weight(base))


def test_without_a_magnitude_an_update_stays(noise):
    update = Update(noise(2, 3), noise(5, 2), 1.0)
    own, magnitude = dora.split({"hada_w1_a": update.up})
    assert (own, magnitude) == ({"hada_w1_a": update.up}, {})
    assert dora.with_magnitude(update, magnitude) is update


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"dora_scale": (1, 3)}, r"dora_scale is \(1, 3\), expected \(out, 1, ...\): .*wd_on_out"),
        ({"dora_scale": (1, 5)}, "wd_on_out"),
        ({"dora_scale": (1, 5, 1, 1)}, "wd_on_out"),
        ({"dora_scale": (5,)}, "dora_scale"),
        ({"dora_scale": (4, 1)}, r"dora_scale is \(4, 1\), expected \(5,\)"),
        ({"lora_magnitude_vector": (4,)}, r"is \(4,\), expected \(5,\)"),
        ({"lora_magnitude_vector": (5, 2)}, r"is \(5, 2\)"),
        ({"lora_magnitude_vector": (5,), "dora_scale": (5, 1)}, "expected one"),
    ],
)
def test_refuses(shapes, message, noise):
    tensors = {leaf: noise(*shape) for leaf, shape in shapes.items()}
    update = Update(noise(2, 3), noise(5, 2), 1.0)
    with pytest.raises(AdapterError, match=message):
        dora.with_magnitude(update, tensors)


def test_refuses_a_kind_that_has_none(noise):
    with pytest.raises(AdapterError, match="beside kind 'ia3'"):
        dora.with_magnitude(Scaling(row=noise(5)), {"dora_scale": noise(5, 1)})
