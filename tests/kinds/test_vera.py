import peft
import pytest
import torch
from torch import nn

from lora_fx import AdapterError
from lora_fx.kinds import vera
from lora_fx.testing import means, read_kind

OWN = ("vera_lambda_b", "vera_lambda_d")
SHAPES = {"vera_lambda_b": (5,), "vera_lambda_d": (2,), "vera_A": (2, 4), "vera_B": (7, 2)}


def test_is_two_vectors_between_slices_of_shared_projections(noise, dtype):
    tensors = {leaf: noise(*shape, dtype=dtype) for leaf, shape in SHAPES.items()}
    b, d, A, B = (tensor.double() for tensor in tensors.values())
    base, update = noise(5, 3), read_kind("vera", tensors, shape=(5, 3))
    delta = torch.diag(b) @ B[:5] @ torch.diag(d) @ A[:, :3]
    other_slice = torch.diag(b) @ B[2:] @ torch.diag(d) @ A[:, 1:]
    means(update, base, base + delta, base + 1.1 * delta, base + other_slice)


def test_without_a_shape_it_is_as_wide_as_the_projection(noise):
    tensors = {leaf: noise(*shape) for leaf, shape in SHAPES.items()}
    assert read_kind("vera", tensors).shape == (5, 4)


def test_means_what_peft_means():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    bases = [layer.weight.detach().clone() for layer in model]
    config = peft.VeraConfig(r=2, target_modules=["0", "1"], init_weights=False)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "vera_lambda" in name:
            parameter.data.normal_()
    saved = peft.get_peft_model_state_dict(wrapped)
    shared = {leaf: saved[f"base_model.{leaf}"] for leaf in ("vera_A", "vera_B")}
    merged = wrapped.merge_and_unload()
    for place, base in enumerate(bases):
        own = {leaf: saved[f"base_model.model.{place}.{leaf}"] for leaf in OWN}
        update = read_kind("vera", own | shared, shape=tuple(base.shape))
        expected = merged[place].weight.detach()
        means(update, base, expected, base + 1.1 * (expected - base))


@pytest.mark.parametrize(
    ("shapes", "settings", "message"),
    [
        (SHAPES | {"vera_lambda_d": (3,)}, {}, r"vera_A is \(2, 4\), expected .* r = 3"),
        (SHAPES | {"vera_B": (7, 3)}, {}, "vera_B.* r = 2"),
        (SHAPES | {"vera_B": (4, 2)}, {}, r"vera_B is \(4, 2\), expected at least 5 rows"),
        (SHAPES | {"vera_lambda_b": (5, 1)}, {}, r"expected \(out,\)"),
        (SHAPES, {"shape": (5, 9)}, r"in up to 4, the layer is \(5, 9\)"),
        (SHAPES, {"shape": (4, 3)}, "out 5"),
        (SHAPES, {"shape": (5, 3, 3)}, "the layer is"),
        (SHAPES, {"shape": "5x3"}, "shape is '5x3'"),
        ({leaf: SHAPES[leaf] for leaf in OWN}, {}, "vera_A is missing.*save_projection"),
        ({leaf: SHAPES[leaf] for leaf in list(SHAPES)[1:]}, {}, "vera_lambda_b is missing"),
    ],
)
def test_refuses(shapes, settings, message, noise):
    tensors = {leaf: noise(*shape) for leaf, shape in shapes.items()}
    with pytest.raises(AdapterError, match=message):
        vera.read(tensors, settings)
