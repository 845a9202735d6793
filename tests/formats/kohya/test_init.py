"""kohya's files; the oracle is the rule of sd-scripts, made again from its definition.

There a network walks the model, calls each layer ``lora_<part>_`` and its path with every dot an
underscore, and adds ``up(down(x)) * alpha / rank`` to what the layer gives, where the rank is the
first size of down, and an alpha that is missing or 0 is the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.testing import fits, same_adapter

X = torch.linspace(-1, 1, 84).reshape(4, 7, 3)
Tensors = dict[str, torch.Tensor]


class Block(nn.Module):
    """Names with underscores of their own, a numbered layer, a layer that is not adapted."""

    def __init__(self, into: int = 3, out: int = 4) -> None:
        super().__init__()
        self.proj_in = nn.Linear(into, 5)
        self.attn1 = nn.ModuleDict(
            {"to_q": nn.Linear(5, 7, bias=False), "to_out": nn.ModuleList([nn.Linear(7, 6)])}
        )
        self.norm = nn.LayerNorm(6)
        self.proj_out = nn.Linear(6, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.attn1["to_q"](torch.tanh(self.proj_in(x))))
        x = self.norm(self.get_submodule("attn1.to_out.0")(x))
        result: torch.Tensor = self.proj_out(x)
        return result


class Pipeline(nn.Module):
    """Two text encoders of one shape and a model behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = Block(3, 3), Block(3, 3)
        self.unet = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.unet(self.text_encoder(x) + self.text_encoder_2(x))
        return result


PARTS = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "unet": "lora_unet"}


def layers(model: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """kohya's name of each linear layer of one model."""
    modules = model.named_modules()
    return {
        f"{prefix}.{path}".replace(".", "_"): module
        for path, module in modules
        if isinstance(module, nn.Linear)
    }


def trained(named: dict[str, nn.Linear], alpha: float | None = 3.0) -> Tensors:
    """A file's tensors: a rank that grows from layer to layer, as if trained."""
    make = torch.Generator().manual_seed(0)
    state = {}
    for rank, (name, layer) in enumerate(named.items(), 1):
        size = (rank, layer.in_features), (layer.out_features, rank)
        state[f"{name}.lora_down.weight"] = torch.randn(size[0], generator=make)
        state[f"{name}.lora_up.weight"] = torch.randn(size[1], generator=make)
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def with_kohya(named: dict[str, nn.Linear], state: Tensors) -> None:
    """Adds to each layer what the definition says."""
    for name, layer in named.items():
        down, up = state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"]
        alpha = float(state.get(f"{name}.alpha", torch.tensor(0.0)).item()) or down.shape[0]
        scale = alpha / down.shape[0]

        def add(
            module: nn.Module, args: Any, out: Any, d: Any = down, u: Any = up, s: float = scale
        ) -> torch.Tensor:
            result: torch.Tensor = out + F.linear(F.linear(args[0], d), u) * s
            return result

        layer.register_forward_hook(add)


def expected_of(make: Callable[[], nn.Module], parts: dict[str, str], state: Tensors) -> Any:
    model = seeded(make)
    for holder, prefix in parts.items():
        with_kohya(layers(model.get_submodule(holder), prefix), state)
    with torch.no_grad():
        return model(X)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def write(path: Path, state: Tensors) -> Path:
    save_file(state, path)
    return path


@pytest.mark.parametrize("alpha", [3.0, 0.5, -2.0, 0.0, None], ids=str)
@pytest.mark.parametrize("prefix", ["lora_unet", "lora_te", "lora_te1", "lora_te2", "lora_te3"])
def test_outputs_are_those_of_the_rule(tmp_path: Path, prefix: str, alpha: float | None) -> None:
    base = seeded(Block)
    state = trained(layers(base, prefix), alpha)
    adapter = load_adapter(write(tmp_path / "a.safetensors", state), base=base)
    assert set(adapter.updates) == {"proj_in", "attn1.to_q", "attn1.to_out.0", "proj_out"}
    fits(adapter, base, X, expected_of(Block, {"": prefix}, state))


def test_a_graph_resolves_the_names_too(tmp_path: Path) -> None:
    base = seeded(Block)
    file = write(tmp_path / "a.safetensors", trained(layers(base, "lora_unet")))
    gm = lora_fx.trace(base, (X,))
    same_adapter(load_adapter(file, base=gm), load_adapter(file, base=base))


def pipeline_state() -> Tensors:
    model = Pipeline()
    state: Tensors = {}
    for number, (holder, prefix) in enumerate(PARTS.items()):
        part = trained(layers(model.get_submodule(holder), prefix), 3.0)
        state |= {key: value * (1 + number / 8) for key, value in part.items()}
    return state


def test_a_whole_pipeline(tmp_path: Path) -> None:
    state = pipeline_state()
    base = seeded(Pipeline)
    adapter = load_adapter(write(tmp_path / "a.safetensors", state), base=base)
    assert len(adapter.updates) == 12
    fits(adapter, base, X, expected_of(Pipeline, PARTS, state))


@pytest.mark.parametrize("holder", PARTS)
def test_one_part_of_a_pipeline(tmp_path: Path, holder: str) -> None:
    state = pipeline_state()
    file = write(tmp_path / "a.safetensors", state)
    base = seeded(Pipeline).get_submodule(holder)
    adapter = load_adapter(file, base=base, component=PARTS[holder].removeprefix("lora_"))

    def make() -> nn.Module:
        return Pipeline().get_submodule(holder)

    fits(adapter, base, X, expected_of(make, {"": PARTS[holder]}, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("component", ["unet", "te", "te1", "te2", "te3", None], ids=str)
def test_load_save_load_keeps_every_bit(
    tmp_path: Path, component: str | None, dtype: torch.dtype
) -> None:
    base = seeded(Pipeline) if component is None else seeded(Block)
    state = pipeline_state() if component is None else trained(layers(base, f"lora_{component}"))
    state = {key: value.to(dtype) for key, value in state.items()}
    first = load_adapter(write(tmp_path / "a.safetensors", state), base=base)
    hints: dict[str, Any] = {} if component is None else {"component": component}
    save_adapter(first, tmp_path / "b.safetensors", format="kohya", **hints)
    same_adapter(load_adapter(tmp_path / "b.safetensors", base=base), first)
    written = load_file(tmp_path / "b.safetensors")
    assert written.keys() == state.keys()
    assert all(written[k].item() == v.item() for k, v in state.items() if k.endswith("alpha"))
    assert all(torch.equal(written[k], v) for k, v in state.items() if "lora_up" in k)


@pytest.mark.parametrize(("scale", "dtype"), [(1.5, torch.float32), (16 / 3**0.5, torch.float64)])
def test_rslora_and_odd_scales_survive(tmp_path: Path, scale: float, dtype: torch.dtype) -> None:
    adapter = Adapter("a", {"fc": Update(torch.ones(3, 2), torch.ones(5, 3), scale, "rslora")})
    file = tmp_path / "a.safetensors"
    save_adapter(adapter, file, format="kohya", component="unet")
    assert load_file(file)["lora_unet_fc.alpha"].dtype == dtype
    same_adapter(load_adapter(file, base=nn.ModuleDict({"fc": nn.Linear(2, 5)})), adapter)


def test_an_encoder_alone_in_a_pipeline_is_kohya_s_te(tmp_path: Path) -> None:
    pair = Update(torch.ones(3, 2), torch.ones(5, 3), 1.5)
    for number, extra in enumerate(({}, {"text_encoder_2.fc": pair})):
        file = tmp_path / f"{number}.safetensors"
        save_adapter(Adapter("a", {"text_encoder.fc": pair, **extra}), file, format="kohya")
    assert "lora_te_fc.alpha" in load_file(tmp_path / "0.safetensors")
    assert {"lora_te1_fc.alpha", "lora_te2_fc.alpha"} <= load_file(file).keys()


DOWN, UP = torch.ones(2, 3), torch.ones(5, 2)
PAIR = {"lora_unet_proj_in.lora_down.weight": DOWN, "lora_unet_proj_in.lora_up.weight": UP}
START = "lora_unet_proj_in"


def test_an_alpha_may_be_a_whole_number(tmp_path: Path) -> None:
    """sd-scripts' own default alpha is the integer 1, which it saves as one."""
    file = write(tmp_path / "a.safetensors", {**PAIR, f"{START}.alpha": torch.tensor(1)})
    assert load_adapter(file, base=Block()).updates["proj_in"].scale == 0.5
    torch.save({**PAIR, f"{START}.alpha": torch.tensor(1)}, tmp_path / "a.pt")
    found = load_adapter(tmp_path / "a.pt", base=Block(), allow_pickle=True)
    assert found.updates["proj_in"].scale == 0.5
