"""Where a fresh adapter starts, PEFT's own initial values being the oracle."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

from lora_fx.adapters.initialization import Initial, checked_init, initial
from lora_fx.errors import AdapterError

SHAPES: dict[str, tuple[int, ...]] = {
    "linear": (5, 3),
    "embedding": (5, 13),
    "conv1d": (5, 3, 4),
    "conv2d": (5, 3, 2, 4),
    "conv3d": (5, 3, 2, 1, 3),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(how: str, layer: str = "linear", seed: int = 0, **options: Any) -> Initial:
    shape = options.pop("shape", SHAPES.get(layer, (5, 3)))
    rank, scale = options.pop("rank", 2), options.pop("scale", 1.5)
    return initial(how, shape, rank, scale, layer, generator=seeded(seed), **options)


def by_peft(base: nn.Module, how: Any, rank: int, seed: int = 1) -> Any:
    """PEFT's layer around a base, which PEFT may change."""
    config = peft.LoraConfig(r=rank, lora_alpha=3, target_modules=["fc"], init_lora_weights=how)
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(nn.ModuleDict({"fc": base}), config)
    return wrapped.get_base_model().get_submodule("fc")


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("layer", SHAPES)
@pytest.mark.parametrize("how", ["kaiming", "gaussian", "orthogonal"])
def test_factors_have_the_shape_of_the_layer_and_no_effect(how: str, layer: str) -> None:
    if how == "orthogonal" and layer.startswith("conv"):
        with pytest.raises(AdapterError, match=f"is for linear layers, found a {layer}"):
            make(how, layer)
        return
    made = make(how, layer)
    out, into, *kernel = SHAPES[layer]
    assert made.down.shape == (2, into, *kernel)
    assert made.up.shape == (out, 2)
    assert made.residual is None
    assert (made.up @ made.down.flatten(1)).abs().max() <= 1e-7
    assert max(made.up.abs().max(), made.down.abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("layer", "base", "factors"),
    [
        ("linear", nn.Linear(400, 5), ("lora_A", "lora_B")),
        ("embedding", nn.Embedding(9, 400), ("lora_embedding_A", "lora_embedding_B")),
        ("conv1d", nn.Conv1d(100, 5, 4), ("lora_A", "lora_B")),
        ("conv2d", nn.Conv2d(50, 5, (2, 4)), ("lora_A", "lora_B")),
        ("conv3d", nn.Conv3d(20, 5, (2, 2, 5)), ("lora_A", "lora_B")),
    ],
)
@pytest.mark.parametrize(("how", "peft_s"), [("kaiming", True), ("gaussian", "gaussian")])
def test_the_spread_is_that_of_peft(
    how: str, peft_s: Any, layer: str, base: Any, factors: tuple[str, str]
) -> None:
    theirs = by_peft(base, peft_s, 64)
    weight = base.weight.T if layer == "embedding" else base.weight
    made = make(how, layer, shape=tuple(weight.shape), rank=64)
    for found, name in ((made.down, factors[0]), (made.up, factors[1])):
        expected = getattr(theirs, name)["default"]
        expected = getattr(expected, "weight", expected)
        assert found.numel() == expected.numel()
        for value in ("std", "mean"):
            one, two = (getattr(t.detach(), value)().item() for t in (found, expected))
            assert one == pytest.approx(two, rel=0.02, abs=0.02 * expected.std().item())
        bounded = how == "kaiming" and found is made.down and layer != "embedding"
        if bounded:
            assert 0.99 / 20 < found.abs().max() <= 1 / 20
        elif found.any():
            assert found.abs().max() > 3 * found.std()


def test_orthogonal_is_peft_s_value_for_value() -> None:
    torch.manual_seed(0)
    base = nn.Linear(9, 7)
    theirs = by_peft(base, "orthogonal", 4)
    torch.manual_seed(1)
    nn.Linear(9, 4, bias=False), nn.Linear(4, 7, bias=False)  # what PEFT draws first
    made = initial("orthogonal", (7, 9), 4, 1.0, "linear")
    assert distance(made.down, theirs.lora_A["default"].weight) <= 1e-6
    assert distance(made.up, theirs.lora_B["default"].weight) <= 1e-6
    assert distance(make("orthogonal", shape=(7, 9), rank=4).down, made.down) > 1e-2


@pytest.mark.parametrize("shape", [(7, 9), (9, 7)])
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_part_of_the_weight_is_taken_as_peft_does(how: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    base = nn.Linear(shape[1], shape[0])
    weight = base.weight.detach().clone()
    made = make(how, shape=shape, rank=2, weight=lambda: weight)
    theirs = by_peft(base, how, 2)
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    residual = made.residual
    assert residual is not None
    assert distance(made.up @ made.down, product) <= 1e-5
    assert distance(residual, base.weight.detach()) <= 1e-5
    assert distance(residual, weight) > 1e-2
    assert distance(residual + 1.5 * made.up @ made.down, weight) <= 1e-6
    assert distance(residual + 1.35 * made.up @ made.down, weight) > 1e-2


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_iterations_come_near_the_full_decomposition(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    base = nn.Linear(shape[1], shape[0])
    weight = base.weight.detach().clone()

    def product(how: str) -> torch.Tensor:
        made = make(how, shape=shape, rank=3, weight=lambda: weight)
        return made.up @ made.down

    full = product("pissa")
    assert distance(product("pissa_niter_100"), full) <= 1e-4
    assert distance(product("pissa_niter_1"), full) > 1e-2


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_iterations_are_peft_s_for_one_random_start(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    base = nn.Linear(shape[1], shape[0])
    weight = base.weight.detach().clone()
    theirs = by_peft(base, "pissa_niter_2", 3)
    torch.manual_seed(1)
    nn.Linear(shape[1], 3, bias=False), nn.Linear(3, shape[0], bias=False)
    made = initial("pissa_niter_2", shape, 3, 1.0, "linear", lambda: weight)
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    assert distance(made.up @ made.down, product) <= 1e-5
    assert made.residual is not None
    assert distance(made.residual, base.weight.detach()) <= 1e-5
    other = make("pissa_niter_2", shape=shape, rank=3, scale=1.0, weight=lambda: weight)
    assert distance(other.up @ other.down, product) > 1e-2


@pytest.mark.parametrize("how", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_what_rounding_takes_from_the_factors_the_residual_has(
    how: str, dtype: torch.dtype
) -> None:
    weight = torch.randn(30, 20, generator=seeded(), dtype=torch.float64)
    made = make(how, shape=(30, 20), rank=3, weight=lambda: weight, dtype=dtype)
    assert made.down.dtype == made.up.dtype == dtype
    assert made.residual is not None
    assert made.residual.dtype == torch.float64
    product = 1.5 * made.up.double() @ made.down.double()
    assert distance(made.residual + product, weight) <= 1e-14
    half = make(how, shape=(30, 20), rank=3, weight=weight.to(dtype).clone)
    assert half.residual is not None
    assert half.residual.dtype == dtype


@pytest.mark.parametrize("how", ["kaiming", "gaussian", "orthogonal", "pissa_niter_0"])
def test_a_generator_makes_it_reproducible(how: str) -> None:
    weight = torch.randn(5, 3, generator=seeded())

    def draw(seed: int) -> torch.Tensor:
        return make(how, seed=seed, weight=lambda: weight).down

    state = torch.random.get_rng_state()
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("how", ["kaiming", "gaussian", "orthogonal", "pissa", "olora"])
def test_an_embedding_starts_the_same_way_whatever_is_asked_for(how: str) -> None:
    made = make(how, "embedding")
    assert not made.down.any()
    assert torch.equal(made.up, torch.randn(5, 2, generator=seeded()))
    assert made.residual is None


def test_a_grouped_convolution_has_a_grouped_up() -> None:
    made = make("kaiming", "conv2d", shape=(6, 4, 3, 2), rank=4, groups=2)
    assert (made.down.shape, made.up.shape) == ((4, 4, 3, 2), (6, 2))
    with pytest.raises(AdapterError, match="rank 3 is no multiple of the convolution's 2 groups"):
        make("kaiming", "conv2d", shape=(6, 4, 3, 2), rank=3, groups=2)


WEIGHT = torch.ones(5, 3)


@pytest.mark.parametrize(
    ("how", "options", "message"),
    [
        ("kaiming", {"layer": "lstm"}, "layer is 'lstm', expected one of linear"),
        ("pissa", {"layer": "conv1d"}, "init='pissa' is for linear layers, found a conv1d"),
        ("orthogonal", {"rank": 3}, "needs an even rank, found 3"),
        ("pissa", {"rank": 4}, r"of a weight \(5, 3\): the rank is 4, too high"),
        ("olora", {}, "is made of the base weight, which is not given"),
        ("pissa", {"scale": 0.0, "weight": lambda: WEIGHT}, "a scale above 0, found 0"),
        ("pissa", {"weight": lambda: WEIGHT / 0}, "needs finite floating-point weights"),
        ("olora", {"weight": lambda: WEIGHT.char()}, "needs finite floating-point weights"),
    ],
)
def test_what_cannot_start_so_is_refused(how: str, options: dict[str, Any], message: str) -> None:
    layer = options.pop("layer", "linear")
    with pytest.raises(AdapterError, match=message):
        make(how, layer, **options)


def test_names_are_checked() -> None:
    for how in ("kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora"):
        assert checked_init(how) == how
    for wrong in (True, None, "eva", "pissa_niter_", "pissa_niter_-1", "pissa_niter_9999", "PiSSA"):
        with pytest.raises(AdapterError, match=r"^init is .*, expected one of kaiming, gaussian"):
            checked_init(wrong)


@pytest.mark.parametrize("how", ["kaiming", "gaussian", "orthogonal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_seed_gives_one_start_whatever_the_default_dtype(how: str, dtype: torch.dtype) -> None:
    usual, other = make(how), make(how, seed=1)
    torch.set_default_dtype(dtype)
    try:
        found = make(how)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.down, usual.down)
    assert not torch.equal(found.down, other.down)
    assert found.down.dtype == found.up.dtype == torch.float32
