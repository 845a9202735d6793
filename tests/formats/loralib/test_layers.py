"""loralib's embedding and convolution layers, and whole state dicts; loralib is the oracle.

Its convolutions of a line or a volume work for kernels of one point alone: the product of its two
matrices has as many numbers as the weight of a convolution of a plane.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx.adapters.adapter import Adapter, Update, WeightUpdate
from lora_fx.errors import AdapterError, AdapterWarning
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.formats.loralib.layers import as_points
from lora_fx.testing import relative, same_adapter, same_tensors

PLANE = torch.linspace(-1, 1, 4 * 6 * 5 * 7, dtype=torch.float64).reshape(4, 6, 5, 7)
IDS = torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5], [3, 5, 8]])
R2: dict[str, Any] = {"r": 2, "lora_alpha": 3}
R1: dict[str, Any] = {"r": 1, "lora_alpha": 3}


class Net(nn.Module):
    """A layer that is adapted, a norm that may be trained, and a layer of torch's."""

    def __init__(self, layer: nn.Module, out: int) -> None:
        super().__init__()
        self.body = nn.ModuleList([layer])
        self.norm = nn.LayerNorm(out)
        self.head = nn.Linear(out, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body[0](x)
        x = x if x.shape[-1] == self.norm.normalized_shape[0] else x.flatten(2).mean(2)
        result: torch.Tensor = self.head(torch.tanh(self.norm(x)))
        return result


# The class, of loralib as of torch, what both take, what loralib's takes, an input, and
# what the pair becomes.
Case = tuple[str, tuple[int, ...], dict[str, Any], dict[str, Any], torch.Tensor, type]
HIGH, GROUPED, TURNED = {"r": 3, "lora_alpha": 5}, {"groups": 2}, {"fan_in_fan_out": True}
CASES: dict[str, Case] = {
    "embedding": ("Embedding", (11, 5), {}, R2, IDS, Update),
    "linear, turned": ("Linear", (7, 5), {}, R2 | TURNED, PLANE, Update),
    "conv2d": ("Conv2d", (6, 4, 3), {"stride": 2, "padding": 1}, R1, PLANE, Update),
    "conv2d of a high rank": (
        "Conv2d", (6, 4, 3), {"dilation": 2, "bias": False}, HIGH, PLANE, WeightUpdate,
    ),
    "conv2d in groups": ("Conv2d", (6, 4, 3), GROUPED, R1, PLANE, WeightUpdate),
    "conv2d of a point": ("Conv2d", (6, 4, 1), {}, R2, PLANE, Update),
    "conv1d of a point": ("Conv1d", (6, 4, 1), {}, R2, PLANE.flatten(2), Update),
    "conv3d of a point": ("Conv3d", (6, 4, 1), {}, R2, PLANE[:, :, None], Update),
}  # fmt: skip


def owner(case: str) -> Net:
    """loralib's model, as if trained, in training mode: nothing is merged."""
    name, sizes, options, adapted, _, _ = CASES[case]
    torch.manual_seed(0)
    model = Net(getattr(loralib, name)(*sizes, **options, **adapted), sizes[1]).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.7)
    return model


def base_of(case: str) -> Net:
    """torch's model with the owner's weights."""
    name, sizes, options, *_ = CASES[case]
    base, state = Net(getattr(nn, name)(*sizes, **options), sizes[1]).double(), {}
    for key, value in owner(case).state_dict().items():
        if "lora_" not in key:
            turned = case == "linear, turned" and key == "body.0.weight"
            state[key.replace(".conv.", ".")] = value.T if turned else value
    base.load_state_dict(state)
    return base.eval()


def write(path: Path, state: dict[str, torch.Tensor]) -> Path:
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def run(case: str, model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(CASES[case][-2])
    return result


@pytest.mark.parametrize("case", CASES)
def test_weights_and_graphs_are_those_of_loralib(tmp_path: Path, case: str) -> None:
    model, base = owner(case), base_of(case)
    file = write(tmp_path / "a.safetensors", loralib.lora_state_dict(model))
    gm = lora_fx.trace(base, (CASES[case][-2],))
    expected = run(case, model)
    for known in (base, gm):
        adapter = load_adapter(file, alpha=model.body[0].lora_alpha, base=known)
        [(path, update)] = adapter.updates.items()
        assert (path, type(update)) == ("body.0", CASES[case][-1])
        assert relative(run(case, lora_fx.inject(gm, adapter)), expected) <= 1e-6
    assert relative(run(case, base), expected) > 1e-2
    layer: Any = base.body[0]
    turned = case == "embedding"
    weight = layer.weight.detach().T if turned else layer.weight.detach()
    whole = update.weight(weight)
    layer.weight.data.copy_(whole.T if turned else whole)
    assert relative(run(case, base), expected) <= 1e-6


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_whole_state_dict_says_the_same(
    tmp_path: Path, case: str, with_base: bool, mode: str
) -> None:
    """In evaluation mode loralib has merged the update into the weight."""
    model, base = owner(case), base_of(case)
    expected = run(case, model)
    with torch.no_grad():
        base.norm.bias.add_(1.0)
    model.train(mode == "train")
    file = write(tmp_path / "a.safetensors", model.state_dict())
    hints = {"base": base} if with_base else {}
    adapter = load_adapter(file, alpha=model.body[0].lora_alpha, **hints)
    bias = set() if "high rank" in case or case == "embedding" else {"body.0.bias"}
    others = {"norm.weight", "head.weight", "head.bias"} | bias
    assert set(adapter.replacements) == {"norm.bias"} | (set() if with_base else others)
    gm = lora_fx.trace(base, (CASES[case][-2],))
    assert relative(run(case, lora_fx.inject(gm, adapter)), expected) <= 1e-6
    assert relative(run(case, gm), expected) > 1e-2


@pytest.mark.parametrize("case", ["conv2d", "conv1d of a point", "embedding"])
def test_biases_of_all_layers_are_replaced(tmp_path: Path, case: str) -> None:
    model = owner(case)
    file = write(tmp_path / "a.safetensors", loralib.lora_state_dict(model, bias="all"))
    adapter = load_adapter(file, alpha=3, base=base_of(case))
    own = {"body.0.bias"} if "conv" in case else set()
    assert set(adapter.replacements) == {"norm.bias", "head.bias"} | own


@pytest.mark.parametrize("case", CASES)
def test_load_save_load_keeps_every_bit(tmp_path: Path, case: str) -> None:
    model, base = owner(case), base_of(case)
    state = loralib.lora_state_dict(model)
    file, alpha = write(tmp_path / "a.safetensors", state), model.body[0].lora_alpha
    adapter = load_adapter(file, alpha=alpha, base=base)
    save_adapter(adapter, tmp_path / "b.safetensors", format="loralib")
    same_tensors(load_file(tmp_path / "b.safetensors"), state)
    again = load_adapter(tmp_path / "b.safetensors", base=base).updates["body.0"]
    weight = torch.zeros(again.shape, dtype=torch.float64)  # type: ignore[arg-type]
    assert torch.equal(again.weight(weight), adapter.updates["body.0"].weight(weight))
    save_adapter(adapter, tmp_path / "b.pt", format="loralib")
    assert torch.load(tmp_path / "b.pt", weights_only=True).keys() == state.keys()


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (1,)])
def test_any_square_convolution_of_two_factors_can_be_written(
    tmp_path: Path, kernel: tuple[int, ...]
) -> None:
    make = torch.Generator().manual_seed(0)
    shape = (2, 6, *kernel)
    update = Update(torch.randn(shape, generator=make), torch.randn(4, 2, generator=make), 1.5)
    adapter = Adapter("a", {"body.0": update})
    save_adapter(adapter, tmp_path / "a.safetensors", format="loralib")
    size = len(kernel)
    base = nn.ModuleDict({"body": nn.ModuleList([(nn.Conv1d, nn.Conv2d)[size - 1](6, 4, kernel)])})
    same_adapter(load_adapter(tmp_path / "a.safetensors", base=base), adapter)
    layer = (loralib.Conv1d, loralib.Conv2d)[size - 1](6, 4, kernel[0], r=2, lora_alpha=3)
    state = {k.removeprefix("body.0."): v for k, v in load_file(tmp_path / "a.safetensors").items()}
    assert not layer.load_state_dict(state, strict=False).unexpected_keys
    x = torch.randn(4, 6, *[5] * size, generator=make)
    expected = copy.deepcopy(layer.conv)
    with torch.no_grad():
        expected.weight.copy_(update.weight(expected.weight))
        assert relative(layer(x), expected(x)) <= 1e-6
        assert relative(layer.conv(x), expected(x)) > 1e-2


def test_what_a_point_says_is_said_of_every_row() -> None:
    up = torch.arange(6.0).reshape(3, 2)
    whole = as_points(up, 2)
    assert whole.shape == (6, 4)
    assert torch.equal(whole[::2, ::2], up)
    assert not whole[::2, 1::2].any()


def test_a_base_that_is_another_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", owner("conv2d").state_dict())
    base = base_of("conv2d")
    with torch.no_grad():
        base.get_parameter("body.0.weight").mul_(1.1)
    message = r"body\.0\.weight is neither the base's nor that with this update merged into it"
    with pytest.raises(AdapterError, match=message):
        load_adapter(file, alpha=3, base=base)
    with pytest.warns(AdapterWarning, match=message):
        load_adapter(file, alpha=3, base=base, strict=False)


A, B = torch.ones(6, 18), torch.ones(12, 6)
REFUSED: dict[str, tuple[torch.Tensor, torch.Tensor, nn.Module, dict[str, Any], str]] = {
    "rank": (A, B, nn.Conv2d(6, 4, 3), {"r": 6}, r"\(12, 6\): of rank 2, the hint r is 6"),
    "no multiple": (torch.ones(4, 18), torch.ones(12, 4), nn.Conv2d(6, 4, 3), {}, "expected r . 3"),
    "other sizes": (A, B, nn.Conv2d(5, 4, 3), {}, r"no pair of a convolution \(4, 5, 3, 3\)"),
    "no square": (A, B, nn.Conv2d(6, 4, (3, 1)), {}, r"no pair of a convolution \(4, 6, 3, 1\)"),
    "a line": (A, B, nn.Conv1d(6, 4, 3), {}, r"no pair of a convolution \(4, 6, 3\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_pair_that_is_not_of_the_convolution_is_refused(tmp_path: Path, case: str) -> None:
    down, up, layer, hints, message = REFUSED[case]
    save_file({"x.lora_A": down, "x.lora_B": up}, tmp_path / "a.safetensors")
    base = nn.ModuleDict({"x": layer})
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path / "a.safetensors", alpha=3, base=base, **hints)
