"""loralib's state dicts, loralib being writer, reader and oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.errors import AdapterError
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.formats.loralib import ALPHAS, sort_loralib
from lora_fx.layers.base_layers import layers_of
from lora_fx.testing import fits, relative, same_adapter, same_tensors

X = torch.linspace(-1, 1, 84).reshape(4, 7, 3)


class Net(nn.Module):
    """3 -> 15 (three outputs of 5), 15 -> 6, 6 -> 4: plain, or with loralib's layers."""

    def __init__(self, make: Callable[..., nn.Module], **fused: Any) -> None:
        super().__init__()
        layers = {"qkv": make(3, 15, **fused), "out": make(15, 6)}
        self.block = nn.ModuleDict(layers)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.block["qkv"](x))
        result: torch.Tensor = self.head(torch.tanh(self.block["out"](x)))
        return result


def owner(enabled: list[bool] | None = None, alpha: int = 3, r: int = 2, **options: Any) -> Net:
    """A model of loralib's layers; the first is fused if `enabled` is given."""

    def make(into: int, out: int, enable_lora: list[bool] | None = None) -> nn.Module:
        fields = {"r": r, "lora_alpha": alpha, "merge_weights": False, **options}
        if enable_lora is None:
            layer: nn.Module = loralib.Linear(into, out, **fields)
            return layer
        return loralib.MergedLinear(into, out, enable_lora=enable_lora, **fields)

    torch.manual_seed(0)
    model = Net(make) if enabled is None else Net(make, enable_lora=enabled)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5)
    return model.eval()


def base_of(model: Net, turned: bool = False) -> Net:
    """The plain model that an owner adapts."""
    base = Net(nn.Linear)
    state = {
        key: value.T if turned and key.startswith("block") and value.ndim == 2 else value
        for key, value in model.state_dict().items()
        if "lora_" not in key
    }
    base.load_state_dict(state)
    return base.eval()


def write(path: Path, model: nn.Module, bias: str = "none") -> Path:
    state = loralib.lora_state_dict(model, bias=bias)
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


FUSED: list[list[bool] | None] = [
    None,
    [True, False, True],
    [True, True, True],
    [False, True, False],
    [False, True, True],
]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("enabled", FUSED, ids=str)
def test_outputs_are_those_of_loralib(
    tmp_path: Path, enabled: Any, name: str, turned: bool
) -> None:
    model = owner(enabled, fan_in_fan_out=turned)
    base = base_of(model, turned)
    hints = {"alpha": 3, "r": 2, "base": base, "allow_pickle": True}
    hints |= {} if enabled is None else {"enable_lora": {"qkv": enabled}}
    adapter = load_adapter(write(tmp_path / name, model), **hints)
    assert set(adapter.updates) == {"block.qkv", "block.out"}
    with torch.no_grad():
        expected = model(X)
    fits(adapter, base, X, expected)


def test_a_fused_layer_keeps_the_scale_of_one_output(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", owner([True, False, True], alpha=5))
    update = load_adapter(file, alpha=5, enable_lora=[True, False, True]).updates["block.qkv"]
    assert (update.rank, update.scale, update.shape) == (4, 2.5, (15, 3))
    assert not update.up[5:10].any()


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_are_replaced(tmp_path: Path, bias: str) -> None:
    model = owner()
    base = base_of(model)
    with torch.no_grad():
        for key, parameter in base.named_parameters():
            parameter.add_(1.0 if key == "block.qkv.bias" else 0.0)
        expected = model(X)
    adapter = load_adapter(write(tmp_path / "a.safetensors", model, bias), alpha=3)
    kept = {"block.qkv.bias", "block.out.bias"} | ({"head.bias"} if bias == "all" else set())
    assert set(adapter.replacements) == kept
    fits(adapter, base, X, expected)


def test_each_layer_may_have_its_own_alpha(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", owner())
    found = load_adapter(file, alpha={"block.qkv": 3, "out": 5}).updates
    assert {path: u.scale for path, u in found.items()} == {"block.qkv": 1.5, "block.out": 2.5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("enabled", FUSED, ids=str)
def test_load_save_load_keeps_every_bit(tmp_path: Path, enabled: Any, dtype: torch.dtype) -> None:
    model = owner(enabled, alpha=7, r=3).to(dtype)
    hint = {} if enabled is None else {"enable_lora": {"qkv": enabled}}
    first = load_adapter(write(tmp_path / "a.safetensors", model, "all"), alpha=7, **hint)
    save_adapter(first, tmp_path / "b.safetensors", format="loralib")
    same_adapter(load_adapter(tmp_path / "b.safetensors"), first)
    same_tensors(*(load_file(tmp_path / f"{name}.safetensors") for name in "ba"))
    if enabled is not None:
        with pytest.raises(AdapterError, match="says what is fused; leave the hint enable_lora"):
            load_adapter(tmp_path / "b.safetensors", **hint)


def test_a_pickle_needs_the_alpha_again(tmp_path: Path) -> None:
    first = load_adapter(write(tmp_path / "a.safetensors", owner()), alpha=3)
    save_adapter(first, tmp_path / "b.pt", format="loralib")
    same_adapter(load_adapter(tmp_path / "b.pt", alpha=3, allow_pickle=True), first)
    with pytest.raises(AdapterError, match="loralib stores no alpha"):
        load_adapter(tmp_path / "b.pt", allow_pickle=True)


@pytest.mark.parametrize("name", ["b.pt", "b.safetensors"])
def test_loralib_computes_the_same_from_what_is_written(tmp_path: Path, name: str) -> None:
    model = owner()
    save_adapter(
        load_adapter(write(tmp_path / "a.safetensors", model), alpha=3),
        tmp_path / name,
        format="loralib",
    )
    file = tmp_path / name
    state = torch.load(file, weights_only=True) if name == "b.pt" else load_file(file)
    again, other = owner(), owner(alpha=4)
    again.load_state_dict({k: torch.zeros_like(v) for k, v in state.items()}, strict=False)
    with torch.no_grad():
        assert relative(again(X), model(X)) > 1e-2
        assert not again.load_state_dict(state, strict=False).unexpected_keys
        assert torch.equal(again(X), model(X))
        assert relative(other(X), model(X)) > 1e-3


def test_rslora_is_written_as_the_alpha_of_its_scale(tmp_path: Path) -> None:
    make = torch.Generator().manual_seed(0)
    down, up = (torch.randn(s, generator=make) for s in ((3, 4), (5, 3)))
    adapter = Adapter("a", {"fc": Update(down, up, 16 / 3**0.5, "rslora")})
    save_adapter(adapter, tmp_path / "a.safetensors", format="loralib")
    same_adapter(load_adapter(tmp_path / "a.safetensors"), adapter)


A, B = torch.ones(2, 3), torch.ones(5, 2)
PAIR = {"fc.lora_A": A, "fc.lora_B": B}
REFUSED: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "no alpha": (PAIR, {}, "loralib stores no alpha, so the scale is unknown; pass alpha="),
    "bad alpha": (PAIR, {"alpha": True}, "alpha is True, expected a finite number"),
    "bad alpha by path": (PAIR, {"alpha": {"fc": "3"}}, r"alpha\['fc'\] is '3'"),
    "alpha of nothing": (PAIR, {"alpha": {"cf": 3}}, "alpha names what is no layer .*: cf"),
    "no alpha of one": (
        {**PAIR, "up.lora_A": A + 1, "up.lora_B": B + 1},
        {"alpha": {"fc": 3}},
        "up: no alpha is given for this layer",
    ),
    "enable_lora of nothing": (
        PAIR,
        {"alpha": 3, "enable_lora": {"qkv": [True, False]}},
        "enable_lora names what is no layer .*: qkv",
    ),
    "another rank": (PAIR, {"alpha": 3, "r": 1}, "of rank 2, the hint r is 1; a convolution"),
    "bad rank": (PAIR, {"alpha": 3, "r": 2.0}, "r is 2.0, expected a positive integer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    tensors, hints, message = REFUSED[case]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=rf"{message}"):
        load_adapter(tmp_path / "a.safetensors", **hints)


@pytest.mark.parametrize("layer", [nn.LayerNorm(5), nn.ConvTranspose1d(3, 5, 1)])
def test_another_layer_is_refused_by_name(tmp_path: Path, layer: nn.Module) -> None:
    save_file(PAIR, tmp_path / "a.safetensors")
    name = type(layer).__name__
    with pytest.raises(AdapterError, match=f"fc is of a {name}; linear, embedding and conv"):
        load_adapter(tmp_path / "a.safetensors", alpha=3, base=nn.ModuleDict({"fc": layer}))


def test_an_alpha_in_the_file_is_not_said_twice(tmp_path: Path) -> None:
    save_file(PAIR, tmp_path / "a.safetensors", metadata={ALPHAS: '{"fc": 3}'})
    assert load_adapter(tmp_path / "a.safetensors").updates["fc"].scale == 1.5
    with pytest.raises(AdapterError, match="says what alpha is; leave the hint alpha out"):
        load_adapter(tmp_path / "a.safetensors", alpha=3)


def test_a_pickle_holds_one_alpha(tmp_path: Path) -> None:
    several = {"fc": Update(A, B, 1.5), "up": Update(A, B, 2.0)}
    with pytest.raises(AdapterError, match=r"several alphas \(fc: 3, up: 4\): write .safetensors"):
        save_adapter(Adapter("a", several), tmp_path / "a.pt", format="loralib")
    save_adapter(Adapter("a", several), tmp_path / "a.safetensors", format="loralib")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


WEIGHT = {"fc.weight": torch.ones(5, 3)}
NORM = {"norm.weight": torch.ones(5), "norm.bias": torch.zeros(5)}


def test_an_adapter_has_pairs_and_biases() -> None:
    found = sort_loralib(PAIR | {"fc.bias": torch.ones(5)}, layers_of(None))
    assert list(found.layers) == ["fc"]
    assert found.weights == {}
    assert list(found.replacements) == ["fc.bias"]


def test_a_whole_model_has_weights_and_everything_else() -> None:
    found = sort_loralib(PAIR | WEIGHT | NORM, layers_of(None))
    assert list(found.weights) == ["fc"]
    assert set(found.replacements) == set(NORM)


def test_what_the_base_has_is_left_out() -> None:
    base = nn.ModuleDict({"fc": nn.Linear(3, 5), "norm": nn.LayerNorm(5)})
    assert sort_loralib(PAIR | WEIGHT | NORM, layers_of(base)).replacements == {}
    trained = NORM | {"norm.bias": torch.full((5,), 0.5)}
    for dtype in (torch.float32, torch.float16):
        state = {key: value.to(dtype) for key, value in (PAIR | WEIGHT | trained).items()}
        assert list(sort_loralib(state, layers_of(base)).replacements) == ["norm.bias"]
    alone = sort_loralib(PAIR | {"norm.bias": NORM["norm.bias"]}, layers_of(base))
    assert list(alone.replacements) == ["norm.bias"]


def test_a_convolution_s_own_parameters_are_those_of_its_child() -> None:
    state = {"fc.conv.weight": torch.ones(5, 3, 1), "fc.conv.bias": torch.ones(5)}
    found = sort_loralib(PAIR | state | {"other.conv.bias": torch.ones(5)}, layers_of(None))
    assert list(found.weights) == ["fc"]
    assert list(found.replacements) == ["fc.bias", "other.conv.bias"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"head.weight": torch.ones(5)}, r"no known use: head\.weight; .*the whole model"),
        ({"fc.lora_alpha": torch.ones(1)}, r"no known use: fc\.lora_alpha"),
        ({**WEIGHT, "fc.lora_alpha": torch.ones(1)}, r"no known use: fc\.lora_alpha"),
        ({"up.lora_A": torch.ones(2, 3)}, r"half of a pair.*: up\.lora_A"),
        (
            {**WEIGHT, "up.lora_A": torch.ones(2, 3), "up.lora_B": torch.ones(5, 2)},
            r"1 tensors have names of no known use: fc\.weight",
        ),
    ],
)
def test_a_key_without_a_use_is_named(more: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        sort_loralib(PAIR | more, layers_of(None))
