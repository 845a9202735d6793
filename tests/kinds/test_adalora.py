import copy

import peft
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import AdapterError
from lora_fx.kinds import adalora
from lora_fx.testing import fits, means, read_kind

SHAPES = {"lora_A": (2, 3), "lora_B": (5, 2), "lora_E": (2, 1)}


def test_is_a_product_with_its_singular_values(noise, dtype):
    tensors = {leaf: noise(*shape, dtype=dtype) for leaf, shape in SHAPES.items()}
    A, B, E = (tensor.double() for tensor in tensors.values())
    base, update = noise(5, 3), read_kind("adalora", tensors, scale=6.0, ranknum=4)
    delta = B @ torch.diag(E[:, 0]) @ A
    rate = 6 / (4 + 1e-5)
    means(update, base, base + rate * delta, base + 1.1 * rate * delta, base + rate * B @ A)


LAYERS = {"linear": lambda: nn.Linear(3, 5), "conv2d": lambda: nn.Conv2d(4, 6, (3, 2))}


def config(**changes):
    return peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["0"], **changes)


# PEFT 0.21.2 looks for modules by the names of AdaLoRA's rank_pattern, which are of tensors.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("alpha", [3, 0])
@pytest.mark.parametrize("kept", [None, [True, False, True, True], [False, False, True, False]])
@pytest.mark.parametrize("layer", LAYERS)
def test_means_what_peft_means_after_it_was_saved_and_loaded(layer, kept, alpha, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[layer]())
    base = model[0].weight.detach().clone()
    wrapped = peft.get_peft_model(model, config(lora_alpha=alpha))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=3)
    if kept is not None:
        wrapped.peft_config["default"].rank_pattern = {"0.lora_E": kept}
    wrapped.save_pretrained(tmp_path)
    again = nn.Sequential(LAYERS[layer]())
    again[0].weight.data.copy_(base)
    merged = peft.PeftModel.from_pretrained(again, tmp_path).merge_and_unload()[0].weight.detach()
    tensors = {
        leaf: tensor
        for name, tensor in peft.utils.load_peft_weights(tmp_path).items()
        if (leaf := name.rsplit(".", 1)[-1]) in adalora.LEAVES
    }
    rank = len(tensors["lora_E"])
    assert rank == (4 if kept is None else sum(kept))
    update = read_kind("adalora", tensors, scale=alpha or rank, ranknum=4, shape=tuple(base.shape))
    off = base + 1.1 * (merged - base)
    means(update, base, merged, off)


def test_a_layer_may_be_pruned_to_nothing(noise):
    tensors = {"lora_A": noise(0, 3), "lora_B": noise(5, 0), "lora_E": noise(0, 1)}
    update = read_kind("adalora", tensors, scale=1.0, ranknum=4)
    assert torch.equal(update.weight(torch.ones(5, 3)), torch.ones(5, 3))
    assert not update.has_effect()


# PEFT 0.21.2 looks for modules by the names of AdaLoRA's rank_pattern, which are of tensors.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor.s. have invalid shape")
def test_a_file_with_a_layer_pruned_to_nothing_is_read_and_written(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).eval()
    tuned = config(lora_alpha=6)
    tuned.target_modules = {"0", "2"}
    wrapped = peft.get_peft_model(copy.deepcopy(model), tuned).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    rows = {"0.lora_E": [False] * 4, "2.lora_E": [True, False, True, True]}
    wrapped.peft_config["default"].rank_pattern = rows
    wrapped.save_pretrained(tmp_path / "pruned")
    adapter = lora_fx.load_adapter(tmp_path / "pruned", base=model)
    assert [update.rank for update in adapter.updates.values()] == [0, 3]
    lora_fx.save_adapter(adapter, tmp_path / "again")
    assert [layer.error for layer in adapter.to_lora(energy=1.0).layers.values()] == [0, 0]
    x = torch.randn(7, 3)
    for path in ("pruned", "again"):
        owner = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / path).eval()
        fits(adapter, model, x, owner(x).detach())


@pytest.mark.parametrize(
    ("shapes", "settings", "message"),
    [
        (SHAPES | {"lora_B": (5, 3)}, {}, "lora_B.* r = 2"),
        (SHAPES | {"lora_E": (3, 1)}, {}, "lora_E.* r = 2"),
        (SHAPES | {"lora_E": (2, 2)}, {}, r"lora_E is \(2, 2\), expected \(r, 1\)"),
        (SHAPES | {"lora_E": (2,)}, {}, r"lora_E is \(2,\), expected \(r, 1\)"),
        ({"lora_A": (2, 3), "lora_E": (2, 1)}, {}, "lora_B is missing"),
        (SHAPES | {"ranknum": (1,)}, {}, "ranknum is not used"),
        (SHAPES, {"ranknum": None}, "ranknum is None"),
        (SHAPES, {"ranknum": 0}, "ranknum is 0.0, expected a positive number"),
        (SHAPES, {"scale": float("inf")}, "scale is inf"),
        (SHAPES, {"shape": (5, 4)}, r"lora_A gives columns \(3,\), the layer is \(5, 4\)"),
    ],
)
def test_refuses(shapes, settings, message, noise):
    tensors = {leaf: noise(*shape) for leaf, shape in shapes.items()}
    with pytest.raises(AdapterError, match=message):
        adalora.read(tensors, {"scale": 1.0, "ranknum": 4, **settings})
