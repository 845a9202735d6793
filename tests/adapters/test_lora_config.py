"""Options of a fresh adapter, PEFT's initial values being the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import Linear

from lora_fx.adapters.lora_config import LoraConfig
from lora_fx.errors import AdapterError


def test_the_defaults_are_those_of_the_contract() -> None:
    config = LoraConfig()
    assert (config.r, config.alpha, config.target_modules) == (8, 16, "all-linear")
    assert (config.dropout, config.use_rslora, config.seed) == (0.0, False, None)
    assert (config.init, config.kind) == ("kaiming", "lora")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_fresh_update_starts_as_in_peft(use_rslora: bool) -> None:
    torch.manual_seed(0)
    base = torch.nn.Linear(3, 5)
    options: dict[str, Any] = {
        "rank_pattern": {"fc": 4},
        "alpha_pattern": {"fc": 7},
        "use_rslora": use_rslora,
    }
    model = torch.nn.ModuleDict({"fc": base})
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["fc"], **options))
    layer = wrapped.get_base_model().get_submodule("fc")
    assert isinstance(layer, Linear)
    update = LoraConfig(**options).fresh("fc", (5, 3))[0]
    expected = layer.lora_A["default"].weight
    assert update.down.shape == expected.shape == (4, 3)
    assert update.up.shape == layer.lora_B["default"].weight.shape == (5, 4)
    assert not update.up.any()
    assert update.scale == layer.scaling["default"]
    assert update.kind == ("rslora" if use_rslora else "lora")


def test_the_initial_values_have_the_spread_of_peft() -> None:
    down = LoraConfig(r=64, seed=0).fresh("fc", (5, 400))[0].down
    bound = 400**-0.5
    assert down.abs().max() <= bound
    assert down.abs().max() > 0.99 * bound
    torch.testing.assert_close(down.std(), torch.tensor(bound / 3**0.5), rtol=0.02, atol=0)


def test_a_seed_makes_the_values_reproducible() -> None:
    def draw(config: LoraConfig) -> list[torch.Tensor]:
        generator = config.make_generator()
        paths = ("a", "b")
        return [config.fresh(path, (5, 3), generator=generator)[0].down for path in paths]

    first, second = draw(LoraConfig(seed=3)), draw(LoraConfig(seed=3))
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], draw(LoraConfig(seed=4))[0])
    assert LoraConfig().make_generator() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_update_has_the_dtype_asked_for(dtype: torch.dtype) -> None:
    update = LoraConfig(r=2).fresh("fc", (5, 3), dtype=dtype)[0]
    assert update.down.dtype == update.up.dtype == dtype
    assert update.rank == 2


@pytest.mark.parametrize("layer", ["linear", "embedding", "conv2d"])
def test_a_fresh_update_fits_its_layer(layer: str) -> None:
    shape = (5, 3, 2, 4) if layer == "conv2d" else (5, 3)
    update, residual = LoraConfig(r=2, alpha=3).fresh("fc", shape, layer)
    assert (update.shape, update.rank, update.scale, residual) == (shape, 2, 1.5, None)
    settings = None if update.stored is None else dict(update.stored.settings)
    assert settings == ({"layer": "embedding"} if layer == "embedding" else None)
    grouped, _ = LoraConfig(r=4).fresh("fc", (6, 4, 3), "conv1d", groups=2)
    assert (grouped.shape, grouped.groups) == ((6, 4, 3), 2)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_changes_the_base_gives_its_new_weight(init: str) -> None:
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    config = LoraConfig(r=1, alpha=3, rank_pattern={"fc": 2}, init=init)
    update, residual = config.fresh("fc", (5, 3), weight=weight.clone)
    assert (update.rank, update.scale) == (2, 1.5)
    assert residual is not None
    torch.testing.assert_close(update.weight(residual), weight)
    assert (update.weight(weight) - weight).norm() > 1e-2 * weight.norm()
    with pytest.raises(AdapterError, match=f"^fc: init='{init}' is made of the base weight"):
        config.fresh("fc", (5, 3))


def test_the_rule_is_made_of_the_fields() -> None:
    rule = LoraConfig(
        target_modules=["q"], exclude_modules=["x.q"], layers_to_transform=[1], layers_pattern="h"
    ).rule
    assert [path for path in ("h.1.q", "h.0.q", "h.1.x.q") if rule.matches(path)] == ["h.1.q"]


def test_peft_s_spellings_mean_the_same() -> None:
    ours = LoraConfig(alpha=32, dropout=0.1, init="gaussian")
    theirs = LoraConfig(lora_alpha=32, lora_dropout=0.1, init_lora_weights="gaussian")
    assert theirs == ours != LoraConfig()
    assert LoraConfig(init_lora_weights=True) == LoraConfig()
    assert replace(theirs, r=4).alpha == 32
    assert LoraConfig(alpha=32, lora_alpha=32).alpha == 32
    with pytest.raises(AdapterError, match="alpha and lora_alpha are one option: give one"):
        LoraConfig(alpha=8, lora_alpha=32)
    with pytest.raises(AdapterError, match="init is False, expected one of kaiming"):
        LoraConfig(init_lora_weights=False)


def test_a_config_is_closed() -> None:
    ranks = {"fc": 2}
    config = LoraConfig(rank_pattern=ranks)
    ranks["fc"] = 3
    assert config.rank_pattern["fc"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({"r": value}, "r is ") for value in (0, -1, 2.0, True, "8", None)],
        *[
            ({"alpha": value}, "alpha is ")
            for value in (True, "16", None, float("nan"), float("inf"), 10**400)
        ],
        *[({"dropout": v}, "dropout is ") for v in (-0.1, 1.0, True, "0", float("nan"))],
        ({"use_rslora": 1}, "use_rslora is 1"),
        ({"rank_pattern": {"fc": 0}}, r"rank_pattern\['fc'\] is 0"),
        ({"rank_pattern": {"(a+)+)": 2}}, r"rank_pattern: .* is not a regex"),
        ({"alpha_pattern": {"fc": "x"}}, r"alpha_pattern\['fc'\] is 'x'"),
        ({"alpha_pattern": {"(a+)+)": 2}}, r"alpha_pattern: .* is not a regex"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ""}, "target_modules is empty"),
        ({"target_modules": "(.*)**X"}, r"target_modules: .* is not a regex"),
        ({"exclude_modules": 3}, "exclude_modules is 3"),
        ({"layers_to_transform": [1]}, "layers_to_transform and layers_pattern need"),
        ({"name": "a.b"}, "the adapter's name is 'a.b'"),
        ({"name": ""}, "the adapter's name is ''"),
        ({"init": "eva"}, "init is 'eva', expected one of kaiming"),
        ({"init": True}, "init is True, expected one of kaiming"),
        (
            {"kind": "dora"},
            "kind is 'dora', expected 'lora': adapters of other kinds can",
        ),
        ({"seed": "x"}, "seed is 'x'"),
        ({"seed": True}, "seed is True"),
        ({"seed": 1 << 64}, "seed is 18446744073709551616, expected an integer of 64 bits"),
        ({"r": 1 << 63}, "r or rank_pattern asks for more than 2147483647: give"),
        ({"rank_pattern": {"fc": 1 << 31}}, "r or rank_pattern asks for more than 2147483647"),
    ],
)
def test_a_bad_option_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=f"^{message}"):
        LoraConfig(**options)
