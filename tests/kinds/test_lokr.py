import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization
from torch import nn

from lora_fx import AdapterError
from lora_fx.kinds import lokr
from lora_fx.testing import by_lycoris, by_peft, means, read_kind

W1 = {"lokr_w1": (5, 3)}
W1_LOW = {"lokr_w1_a": (5, 2), "lokr_w1_b": (2, 3)}
W2 = {"lokr_w2": (2, 4)}
W2_LOW = {"lokr_w2_a": (2, 3), "lokr_w2_b": (3, 4)}


def kron(t):
    """Spelled by indices: entry (a c, b d) is w1[a, b] * w2[c, d]."""
    t = {leaf: tensor.double() for leaf, tensor in t.items()}
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    second = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    return torch.einsum("ab,cd->acbd", first, second).flatten(2).flatten(0, 1)


@pytest.mark.parametrize("second", [W2, W2_LOW])
@pytest.mark.parametrize("first", [W1, W1_LOW])
@pytest.mark.parametrize("settings", [{}, {"shape": (10, 12)}])
def test_is_a_kronecker_product(first, second, settings, noise, dtype):
    shapes = {**first, **second}
    tensors = {leaf: noise(*shape, dtype=dtype) for leaf, shape in shapes.items()}
    base, update = noise(10, 12), read_kind("lokr", tensors, scale=1.5, **settings)
    means(update, base, base + 1.5 * kron(tensors), base + 1.65 * kron(tensors))
    assert update.shape == (10, 12)


LAYERS = {
    "linear": lambda: nn.Linear(6, 10),
    "conv1d": lambda: nn.Conv1d(6, 10, 3),
    "conv2d": lambda: nn.Conv2d(6, 10, (3, 2)),
    "pointwise": lambda: nn.Conv2d(6, 10, 1),
}
FORMS = {
    "full": {"r": 9},
    "low": {"r": 1},
    "both low": {"r": 1, "decompose_both": True, "decompose_factor": 3},
    "effective": {"r": 2, "use_effective_conv2d": True},
}


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_means_what_peft_means(layer, form, is_known):
    config = peft.LoKrConfig(**FORMS[form], alpha=3, target_modules=["layer"])
    foreign = by_peft(LAYERS[layer](), config)
    settings = {"shape": tuple(foreign.base.shape)} if is_known else {}
    scale = 3 / FORMS[form]["r"]
    update = read_kind("lokr", foreign.tensors, scale=scale, writer="peft", **settings)
    off = foreign.base + 1.1 * (foreign.merged - foreign.base)
    means(update, foreign.base, foreign.merged, off)


LYCORIS = {
    "full": {"lora_dim": 9},
    "low": {"lora_dim": 1},
    "both low": {"lora_dim": 1, "decompose_both": True, "factor": 3},
    "tucker": {"lora_dim": 2, "use_tucker": True},
    "dora": {"lora_dim": 1, "weight_decompose": True},
}


@pytest.mark.parametrize("form", LYCORIS)
@pytest.mark.parametrize("layer", [*LAYERS, "conv3d"])
def test_means_what_lycoris_means(layer, form):
    made = LAYERS[layer]() if layer in LAYERS else nn.Conv3d(6, 10, (1, 2, 3))
    foreign = by_lycoris("LokrModule", made, alpha=3, **LYCORIS[form])
    scale = 1.0 if form == "full" else 3.0 / LYCORIS[form]["lora_dim"]
    update = read_kind("lokr", foreign.tensors, scale=scale, writer="lycoris")
    off = foreign.base + 1.1 * (foreign.merged - foreign.base)
    means(update, foreign.base, foreign.merged, off)


def test_the_two_programs_differ_in_a_one_dimensional_kernel(noise):
    tensors, base = {"lokr_w1": noise(2, 3), "lokr_w2": noise(3, 2, 4)}, noise(6, 6, 4)
    by = {w: read_kind("lokr", tensors, scale=1.0, writer=w) for w in ("peft", "lycoris")}
    assert not torch.allclose(by["peft"].weight(base), by["lycoris"].weight(base), rtol=1e-2)


@pytest.mark.parametrize(
    ("shapes", "settings", "message"),
    [
        (W1, {}, "lokr_w2 is missing"),
        (W2_LOW, {}, "lokr_w1 is missing"),
        ({"lokr_w1_a": (5, 2), **W2}, {}, "lokr_w1_b is missing"),
        ({**W1, "lokr_w2_a": (2, 3)}, {}, "lokr_w2_b is missing"),
        ({**W1, **W1_LOW, **W2}, {}, "lokr_w1 is not used"),
        ({**W1, **W2, **W2_LOW}, {}, "lokr_w2 is not used"),
        ({"lokr_w1": (5, 3, 1), **W2}, {}, r"lokr_w1 is \(5, 3, 1\), expected \(a, b\)"),
        ({**W1_LOW, "lokr_w1_b": (3, 3), **W2}, {}, "lokr_w1_b.* r = 2"),
        ({**W1, **W2_LOW, "lokr_w2_b": (2, 4)}, {}, "lokr_w2_b.* s = 3"),
        ({**W1, **W2_LOW, "lokr_t2": (3, 3, 2)}, {}, "lokr_w2_a.* s = 3"),
        ({**W1, **W2}, {"shape": (12, 10)}, r"make \(10, 12\), the layer is \(12, 10\)"),
        ({**W1, "lokr_w2": (2, 4, 3)}, {}, "writer is None"),
        ({**W1, "lokr_w2": (2, 4, 3)}, {"writer": "who"}, "writer is 'who'"),
        ({**W1, **W2}, {"scale": True}, "scale is True"),
        ({**W1, **W2, "dora_scale": (1, 12)}, {}, "wd_on_out"),
        ({**W1, **W2, "dora_scale": (9, 1)}, {}, r"dora_scale is \(9, 1\), expected \(10,\)"),
    ],
)
def test_refuses(shapes, settings, message, noise):
    tensors = {leaf: noise(*shape) for leaf, shape in shapes.items()}
    with pytest.raises(AdapterError, match=message):
        lokr.read(tensors, {"scale": 1.0, **settings})


@pytest.mark.parametrize("factor", [-1, *range(1, 17)])
def test_sizes_are_split_as_peft_splits_them(factor):
    assert [lokr.split(n, factor) for n in range(1, 130)] == [
        factorization(n, factor) for n in range(1, 130)
    ]
