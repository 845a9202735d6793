import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_fx import AdapterError
from lora_fx.kinds import loha
from lora_fx.testing import by_lycoris, by_peft, means, read_kind


def tensors_of(noise, out, into, r, s, dtype=torch.float32):
    shapes = {"hada_w1_a": (out, r), "hada_w1_b": (r, into)}
    shapes |= {"hada_w2_a": (out, s), "hada_w2_b": (s, into)}
    return {leaf: noise(*shape, dtype=dtype) for leaf, shape in shapes.items()}


def hadamard(t):
    t = {leaf: tensor.double() for leaf, tensor in t.items()}
    return (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def test_is_a_hadamard_product_of_products(noise, dtype):
    tensors, base = tensors_of(noise, 5, 3, 2, 2, dtype), noise(5, 3)
    update = read_kind("loha", tensors, scale=1.5)
    means(update, base, base + 1.5 * hadamard(tensors), base + 1.65 * hadamard(tensors))
    assert update.rank == 4


sizes = st.integers(1, 6)


@given(out=sizes, into=sizes, r=sizes, s=sizes)
def test_the_reduction_is_exact_at_any_size(out, into, r, s):
    make = torch.Generator().manual_seed(out + 7 * into + 49 * r + 343 * s)
    tensors = tensors_of(
        lambda *shape, dtype: torch.randn(shape, generator=make).double(), out, into, r, s
    )
    update = loha.read(tensors, {"scale": 0.5})
    expected = 0.5 * hadamard(tensors)
    assert update.rank == r * s
    assert torch.allclose(update.delta(), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(1.1 * update.delta(), expected, rtol=1e-2, atol=0)


LAYERS = {
    "linear": lambda: nn.Linear(3, 5),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2)),
    "pointwise": lambda: nn.Conv2d(4, 6, 1),
}


@pytest.mark.parametrize("is_effective", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_means_what_peft_means(layer, is_effective):
    config = peft.LoHaConfig(
        r=2, alpha=3, target_modules=["layer"], use_effective_conv2d=is_effective
    )
    foreign = by_peft(LAYERS[layer](), config)
    update = read_kind("loha", foreign.tensors, scale=1.5, shape=tuple(foreign.base.shape))
    off = foreign.base + 1.1 * (foreign.merged - foreign.base)
    means(update, foreign.base, foreign.merged, off)


@pytest.mark.parametrize("is_dora", [False, True])
@pytest.mark.parametrize("is_tucker", [False, True])
@pytest.mark.parametrize("layer", [*LAYERS, "conv3d"])
def test_means_what_lycoris_means(layer, is_tucker, is_dora):
    made = LAYERS[layer]() if layer in LAYERS else nn.Conv3d(4, 6, (1, 2, 3))
    options = {"use_tucker": is_tucker, "weight_decompose": is_dora}
    foreign = by_lycoris("LohaModule", made, lora_dim=2, alpha=3, **options)
    scale = float(foreign.tensors["alpha"]) / 2
    update = read_kind("loha", foreign.tensors, scale=scale, shape=tuple(foreign.base.shape))
    off = foreign.base + 1.1 * (foreign.merged - foreign.base)
    means(update, foreign.base, foreign.merged, off)
    assert (update.magnitude is not None) == is_dora


def test_without_a_shape_a_convolution_is_a_matrix_in_the_order_of_its_kernel(noise):
    tensors = tensors_of(noise, 5, 3 * 4, 2, 2)
    flat, whole = (
        read_kind("loha", tensors, scale=1.0, **s) for s in ({}, {"shape": (5, 3, 2, 2)})
    )
    assert flat.down.shape == (4, 12)
    assert torch.equal(flat.down.reshape(4, 3, 2, 2), whole.down)


def test_factors_may_have_the_axes_of_the_kernel(noise):
    """As OneTrainer's have; they are written as others do, which PEFT and LyCORIS load."""
    flat = tensors_of(noise, 5, 3 * 2 * 4, 2, 2)
    axes = {"a": (5, 2, 1, 1), "b": (2, 3, 2, 4)}
    whole = {leaf: tensor.reshape(axes[leaf[-1]]) for leaf, tensor in flat.items()}
    shape, base = (5, 3, 2, 4), noise(5, 3, 2, 4)
    update = loha.read(whole, {"scale": 1.5, "shape": shape})
    delta = hadamard(flat).reshape(shape)
    means(update, base, base + 1.5 * delta, base + 1.65 * delta)
    assert all(torch.equal(update.stored_tensors[leaf], t) for leaf, t in flat.items())
    whole["hada_w1_a"] = noise(5, 2, 3, 1)
    with pytest.raises(AdapterError, match="r = 6"):
        loha.read(whole, {"scale": 1.5, "shape": shape})


TUCKER = {"hada_t1": (2, 2, 3), "hada_t2": (2, 2, 3), "hada_w1_a": (2, 5), "hada_w1_b": (2, 3)}
TUCKER |= {"hada_w2_a": (2, 5), "hada_w2_b": (2, 3)}
PLAIN = {"hada_w1_a": (5, 2), "hada_w1_b": (2, 3), "hada_w2_a": (5, 2), "hada_w2_b": (2, 3)}


@pytest.mark.parametrize(
    ("shapes", "settings", "message"),
    [
        (PLAIN | {"hada_w1_b": (4, 3)}, {}, r"hada_w1_b is \(4, 3\), expected \(r, in\) with r"),
        (PLAIN | {"hada_w2_b": (2, 4)}, {}, "hada_w2_b.* in = 3"),
        (PLAIN | {"hada_w2_a": (4, 2)}, {}, "hada_w2_a.* out = 5"),
        ({leaf: PLAIN[leaf] for leaf in list(PLAIN)[:3]}, {}, "hada_w2_b is missing"),
        (PLAIN | {"hada_t1": (2, 2, 3)}, {}, "hada_t2 is missing"),
        (PLAIN | {"lokr_w1": (2, 2)}, {}, "lokr_w1 is not used"),
        (TUCKER | {"hada_t2": (2, 2, 2)}, {}, "equal kernels"),
        (TUCKER | {"hada_t1": (3, 2, 3)}, {}, "hada_w1_a.* r = 3"),
        (PLAIN, {"shape": (5, 2, 2)}, r"columns \(3,\), the layer is \(5, 2, 2\)"),
        (PLAIN, {"scale": "1"}, "scale is '1'"),
        (PLAIN | {"dora_scale": (1, 3)}, {}, "wd_on_out"),
    ],
)
def test_refuses(shapes, settings, message, noise):
    tensors = {leaf: noise(*shape) for leaf, shape in shapes.items()}
    with pytest.raises(AdapterError, match=message):
        loha.read(tensors, {"scale": 1.0, **settings})
