"""kohya's files; the oracle is the rule of sd-scripts, made again from its definition.

There a network walks the model, calls each layer ``lora_<part>_`` and its path with every dot an
underscore, and adds ``up(down(x)) * alpha / rank`` to what the layer gives, where the rank is the
first size of down, and an alpha that is missing or 0 is the rank. A convolution's down has the
layer's kernel, stride and padding, its up is of single points; LoCon in its Tucker form has the
kernel in a third convolution between two of single points.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import fx, nn

import lora_fx
from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.errors import AdapterError
from lora_fx.formats import save_adapter
from lora_fx.formats.kohya import (
    ALGORITHMS,
    algorithm_of,
    as_tensor,
    module_of,
    problem_with,
    rank_of_algorithm,
    updates_of,
)
from lora_fx.kinds import KINDS
from lora_fx.layers.base_layers import layers_of
from lora_fx.testing import fits, means, relative, same_adapter, same_tensors

X = torch.linspace(-1, 1, 84).reshape(4, 7, 3)
Tensors = dict[str, torch.Tensor]


def block(into: int = 3, out: int = 4) -> nn.Module:
    """Names with underscores of their own, a numbered layer, a layer that is not adapted."""
    attention = OrderedDict(to_q=nn.Linear(5, 7, bias=False), to_out=nn.Sequential(nn.Linear(7, 6)))
    return nn.Sequential(
        OrderedDict(
            proj_in=nn.Linear(into, 5), first=nn.Tanh(), attn1=nn.Sequential(attention),
            norm=nn.LayerNorm(6), proj_out=nn.Linear(6, out),
        )
    )  # fmt: skip


class Pipeline(nn.Module):
    """Two text encoders of one shape and a model behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = block(3, 3), block(3, 3)
        self.unet = block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.unet(self.text_encoder(x) + self.text_encoder_2(x))
        return result


PARTS = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "unet": "lora_unet"}
# Models, and how the names of each of their parts begin.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    **{part: (block, {"": f"lora_{part}"}) for part in ("unet", "te", "te1", "te2", "te3")},
    "pipeline": (Pipeline, PARTS),
}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


@functools.cache
def graph_of(make: Callable[[], nn.Module]) -> fx.GraphModule:
    """The graph of such a model: only read."""
    return lora_fx.trace(seeded(make), (X,))


def layers(model: nn.Module, parts: dict[str, str]) -> dict[str, nn.Linear]:
    """kohya's name of each linear layer."""
    return {
        f"{prefix}.{path}".replace(".", "_"): module
        for holder, prefix in parts.items()
        for path, module in model.get_submodule(holder).named_modules()
        if isinstance(module, nn.Linear)
    }


def trained(model: nn.Module, parts: dict[str, str], alpha: float | None = 3.0) -> Tensors:
    """A file's tensors: ranks 1 to 4 from layer to layer, as if trained."""
    make, state = torch.Generator().manual_seed(0), {}
    for place, (name, layer) in enumerate(layers(model, parts).items()):
        rank = 1 + place % 4
        size = (rank, layer.in_features), (layer.out_features, rank)
        state[f"{name}.lora_down.weight"] = torch.randn(size[0], generator=make)
        state[f"{name}.lora_up.weight"] = torch.randn(size[1], generator=make)
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha + place / 8 if alpha > 0 else alpha)
    return state


def with_kohya(model: nn.Module, parts: dict[str, str], state: Tensors) -> torch.Tensor:
    """What a model gives where each layer has added what the definition says."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in layers(tuned, parts).items():
            down, up = state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"]
            alpha = state.get(f"{name}.alpha", torch.tensor(0.0)).item() or len(down)
            layer.weight += alpha / len(down) * up @ down
        result: torch.Tensor = tuned(X)
    return result


@pytest.mark.parametrize("alpha", [3.0, 0.5, -2.0, 0.0, None], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_rule(reads: Any, name: str, alpha: float | None) -> None:
    make, parts = MODELS[name]
    base = seeded(make)
    state = trained(base, parts, alpha)
    adapter = reads(state, base=base)
    own = {"proj_in", "attn1.to_q", "attn1.to_out.0", "proj_out"}
    assert set(adapter.updates) == {
        f"{holder}.{path}".strip(".") for holder in parts for path in own
    }
    fits(adapter, graph_of(make), X, with_kohya(base, parts, state))
    same_adapter(reads(state, base=graph_of(make)), adapter)


@pytest.mark.parametrize("holder", PARTS)
def test_one_part_of_a_pipeline(reads: Any, holder: str) -> None:
    base = seeded(Pipeline)
    state, component = trained(base, PARTS), PARTS[holder].removeprefix("lora_")
    whole = reads(state, base=base)
    part = reads(state, base=base.get_submodule(holder), component=component)
    assert len(part.updates) == 4
    same_adapter(part, Adapter("a", {p: whole.updates[f"{holder}.{p}"] for p in part.updates}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_load_save_load_keeps_every_bit(
    reads: Any, rewritten: Any, name: str, dtype: torch.dtype
) -> None:
    make, parts = MODELS[name]
    base = seeded(make)
    state = {key: value.to(dtype) for key, value in trained(base, parts).items()}
    first = reads(state, base=base)
    hints: dict[str, Any] = {} if name == "pipeline" else {"component": name}
    written, again = rewritten(first, "kohya", base, **hints)
    same_adapter(again, first)
    same_tensors({key: value.to(dtype) for key, value in written.items()}, state)


@pytest.mark.parametrize(("scale", "dtype"), [(1.5, torch.float32), (16 / 3**0.5, torch.float64)])
def test_rslora_and_odd_scales_survive(rewritten: Any, scale: float, dtype: torch.dtype) -> None:
    adapter = Adapter("a", {"fc": Update(torch.ones(3, 2), torch.ones(5, 3), scale, "rslora")})
    base = nn.ModuleDict({"fc": nn.Linear(2, 5)})
    written, again = rewritten(adapter, "kohya", base, component="unet")
    assert written["lora_unet_fc.alpha"].dtype == dtype
    same_adapter(again, adapter)


def test_a_magnitude_is_a_column_beside_a_kernel_too(rewritten: Any) -> None:
    """As LyCORIS has it; PEFT's is (1, out, 1, 1) there, which it would take for the inputs."""
    shapes = {"fc": (), "conv": (1, 1)}
    updates = {
        path: Update(torch.ones(3, 2, *kernel), torch.ones(5, 3), 1.5, magnitude=torch.rand(5) + 1)
        for path, kernel in shapes.items()
    }
    base = nn.ModuleDict({"fc": nn.Linear(2, 5), "conv": nn.Conv2d(2, 5, 1)})
    written, again = rewritten(Adapter("a", updates), "kohya", base, component="unet")
    for path, kernel in shapes.items():
        assert written[f"lora_unet_{path}.dora_scale"].shape == (5, 1, *kernel)
    same_adapter(again, Adapter("a", updates))


def test_an_encoder_alone_in_a_pipeline_is_kohya_s_te(tmp_path: Path) -> None:
    pair, file = Update(torch.ones(3, 2), torch.ones(5, 3), 1.5), tmp_path / "a.safetensors"
    for others, names in (([], ["te"]), (["text_encoder_2.fc"], ["te1", "te2"])):
        adapter = Adapter("a", dict.fromkeys(["text_encoder.fc", *others], pair))
        save_adapter(adapter, file, format="kohya", force=True)
        assert {f"lora_{name}_fc.alpha" for name in names} <= load_file(file).keys()


@pytest.mark.parametrize(("name", "alpha"), [("a.safetensors", 1), ("a.pt", [1])])
def test_an_alpha_may_be_a_whole_number(reads: Any, name: str, alpha: Any) -> None:
    """sd-scripts' own default alpha is the integer 1, which it saves as one."""
    pair = {"lora_down.weight": torch.ones(2, 3), "lora_up.weight": torch.ones(5, 2)}
    pair["alpha"] = torch.tensor(alpha)
    file = {f"lora_unet_fc.{leaf}": tensor for leaf, tensor in pair.items()}
    adapter = reads(file, name, base=nn.ModuleDict({"fc": nn.Linear(3, 5)}), allow_pickle=True)
    assert adapter.updates["fc"].scale == 0.5


MAKE = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=MAKE)


def test_a_norm_is_called_as_its_module() -> None:
    update = Update(random(2, 3), random(5, 2), 1.0)
    assert module_of("a.norm.weight", replace(update, kind="norm")) == "a.norm"
    assert module_of("a.norm", update) == "a.norm"


@pytest.mark.parametrize("value", [3.0, 0.1, 16 / 3**0.5])
def test_an_alpha_is_exact(value: float) -> None:
    assert as_tensor(value).item() == value


def lokr(scale: float, second: tuple[int, ...] = (5, 2)) -> Any:
    tensors = {"lokr_w1": random(2, 3), "lokr_w2": random(*second)}
    return KINDS["lokr"].read(tensors, {"scale": scale, "writer": "peft"})


def test_what_peft_wrote_lycoris_reads(rewritten: Any) -> None:
    update, weight, base = lokr(1.0), random(10, 6), nn.ModuleDict({"fc": nn.Linear(6, 10)})
    _, found = rewritten(Adapter("a", {"fc": update}), "kohya", base, component="lycoris")
    means(found.updates["fc"], weight, update.weight(weight))


def test_what_lycoris_would_read_otherwise_is_a_problem() -> None:
    assert problem_with(lokr(1.0)) is None
    assert problem_with(lokr(1.5)) == "a scale of 1.5 of kind 'lokr'"
    factors = {"lokr_w1": random(2, 3), "lokr_w2_a": random(5, 1), "lokr_w2_b": random(1, 2)}
    low = {scale: KINDS["lokr"].read(factors, {"scale": scale}) for scale in (0.0, 1.5)}
    assert problem_with(low[0.0]) == "a scale of 0, which it reads as 1"
    assert problem_with(low[1.5]) is None
    # PEFT aligns the last axes of the two factors of a Conv1d, LyCORIS the first
    line = problem_with(lokr(1.0, second=(5, 2, 3)))
    assert line == "updates of kind 'lokr', which are no product of two factors"


def test_an_update_that_was_made_of_more_is_written_as_it_was(reads: Any, rewritten: Any) -> None:
    shapes = {"lora_down.weight": (2, 3, 1, 1), "lora_mid.weight": (2, 2, 4, 4)}
    shapes |= {"lora_up.weight": (6, 2, 1, 1), "alpha": ()}
    state = {f"lycoris_conv.{leaf}": random(*shape).abs() for leaf, shape in shapes.items()}
    base = nn.ModuleDict({"conv": nn.Conv2d(3, 6, 4)})
    adapter = reads(state, base=base)
    found, _ = rewritten(adapter, "kohya", base, component="lycoris")
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
    again = rewritten(adapter, "diffusers", component="unet")[1].updates["conv"]
    update = adapter.updates["conv"]
    assert isinstance(again, Update)
    assert isinstance(update, Update)
    assert torch.equal(again.down, update.down)


@pytest.mark.parametrize(
    ("start", "down", "up"),
    [
        ("diffusion_model.", "lora_A.weight", "lora_B.weight"),
        ("model.diffusion_model.", "lora_down.weight", "lora_up.weight"),
        ("lora_prior_unet_", "lora_down.weight", "lora_up.weight"),
        ("lora_unet_", "lora_A.weight", "lora_B.weight"),
        ("anything.", "lora_down.weight", "lora_up.weight"),
        ("", "down.weight", "up.weight"),
        ("diffusion_model.", "lora_A.default.weight", "lora_B.default.weight"),
    ],
)
def test_any_trainer_s_spelling_is_told_and_read(
    reads: Any, start: str, down: str, up: str
) -> None:
    net = nn.ModuleDict({"block": nn.ModuleDict({"fc": nn.Linear(3, 5)})})
    path = "block_fc" if start.endswith("_") else "block.fc"
    pair = {down: torch.randn(2, 3), up: torch.ones(5, 2), "alpha": torch.tensor(1.0)}
    tensors = {f"{start}{path}.{end}": tensor for end, tensor in pair.items()}
    [(found, update)] = reads(tensors, base=net).updates.items()
    assert found == "block.fc"
    assert isinstance(update, Update)
    assert (update.shape, update.scale) == ((5, 3), 0.5)
    with pytest.raises(AdapterError, match="pass base="):
        reads(tensors)


@pytest.mark.parametrize(
    ("leaves", "algorithm"),
    [
        ("lora_down.weight lora_up.weight", "lora"),
        ("lora_down.weight lora_up.weight lora_mid.weight alpha dora_scale", "lora"),
        ("hada_w1_a hada_w1_b hada_w2_a hada_w2_b alpha", "loha"),
        ("lokr_w1 lokr_w2 dora_scale", "lokr"),
        ("diff diff_b", "full"),
        ("diff_b", "full"),
        ("oft_blocks alpha", "oft"),
        ("oft_blocks rescale", "oft"),
        ("weight on_input", "ia3"),
        ("w_norm b_norm", "norm"),
        ("alpha", None),
        ("alpha dora_scale", None),
        ("hada_w1_a lora_up.weight", None),
        ("w_norm diff", None),
        ("lora_A", None),
    ],
)
def test_leaves_are_of_one_algorithm_or_none(leaves: str, algorithm: str | None) -> None:
    assert algorithm_of(leaves.split()) == algorithm
    assert algorithm is None or algorithm in ALGORITHMS


@pytest.mark.parametrize(
    ("algorithm", "shapes", "rank"),
    [
        ("lora", {"lora_down.weight": (2, 3)}, 2),
        ("loha", {"hada_w1_a": (5, 2), "hada_w1_b": (2, 3)}, 2),
        ("lokr", {"lokr_w1": (5, 3), "lokr_w2_b": (2, 3)}, 2),
        ("lokr", {"lokr_w1_b": (2, 3), "lokr_w2": (4, 3)}, 2),
        ("lokr", {"lokr_w1": (5, 3), "lokr_w2": (4, 3)}, None),
        ("full", {"diff": (5, 3)}, None),
        ("oft", {"oft_blocks": (5, 3, 3)}, None),
    ],
)
def test_the_rank_is_what_alpha_is_divided_by(
    algorithm: str, shapes: dict[str, tuple[int, ...]], rank: int | None
) -> None:
    tensors = {leaf: torch.ones(shape) for leaf, shape in shapes.items()}
    assert rank_of_algorithm(algorithm, tensors) == rank


def test_a_module_that_is_called_like_an_adapter_is_a_part_of_its_path(reads: Any) -> None:
    net = nn.ModuleDict({"default": nn.ModuleDict({"fc": nn.Linear(3, 5)}), "fc": nn.Linear(3, 5)})
    start = "diffusion_model.default.fc.lora"
    tensors = {f"{start}_A.weight": torch.randn(2, 3), f"{start}_B.weight": torch.ones(5, 2)}
    assert set(reads(tensors, base=net).updates) == {"default.fc"}


NAME = "lora_unet_x"
CONVS: dict[int, tuple[Any, Any]] = {
    1: (nn.Conv1d, F.conv1d),
    2: (nn.Conv2d, F.conv2d),
    3: (nn.Conv3d, F.conv3d),
}
KERNELS = [(3,), (1,), (3, 3), (3, 2), (1, 1), (2, 1, 3)]


def update_of(tensors: dict[str, torch.Tensor], layer: nn.Module) -> Any:
    roles = {leaf: (f"{NAME}.{leaf}", tensor) for leaf, tensor in tensors.items()}
    base = layers_of(nn.ModuleDict({"x": layer}))["x"]
    return {f"x.{key}".rstrip("."): update for key, update in updates_of(roles, base).items()}


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_a_convolution_is_two_or_three_convolutions(kernel: tuple[int, ...], tucker: bool) -> None:
    size = len(kernel)
    points = [1] * size
    make, conv = CONVS[size]
    layer = make(3, 5, kernel, stride=2, padding=1).double()
    shapes = ((2, 3, *points), (2, 2, *kernel)) if tucker else ((2, 3, *kernel),)
    up, down, *core = (random(*shape).double() for shape in ((5, 2, *points), *shapes))
    x = torch.randn(4, 3, *[7] * size, dtype=torch.float64)
    hidden = conv(conv(x, down), core[0], stride=2, padding=1) if tucker else None
    hidden = conv(x, down, stride=2, padding=1) if hidden is None else hidden
    with torch.no_grad():
        expected = layer(x) + conv(hidden, up) * 3.0 / 2
        tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(3.0)}
        tensors |= {"lora_mid.weight": core[0]} if tucker else {}
        [update] = update_of(tensors, layer).values()
        found = conv(x, update.weight(layer.weight), layer.bias, stride=2, padding=1)
    assert relative(found, expected) <= 1e-12
    assert relative(layer(x), expected) > 1e-2
    assert (update.rank, update.shape) == (2, (5, 3, *kernel))


def test_dora_beside_groups_is_a_function_of_the_weight_and_written_as_it_was(
    rewritten: Any,
) -> None:
    layer, scale = nn.Conv2d(6, 4, 3, groups=2), torch.rand(4, 1, 1, 1) + 1
    down, up = random(2, 3, 3, 3), random(4, 2, 1, 1)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(3.0)}
    tensors["dora_scale"] = scale
    [update] = update_of(tensors, layer).values()
    own = layer.weight.detach()
    tuned = own + 1.5 * (up.flatten(1) @ down.flatten(1)).reshape(own.shape)
    wanted = scale * tuned / tuned.flatten(1).norm(dim=1).reshape(4, 1, 1, 1)
    assert relative(update.weight(own), wanted) <= 1e-6
    assert relative(tuned, wanted) > 1e-2
    base = nn.ModuleDict({"conv": layer})
    written, _ = rewritten(Adapter("a", {"conv": update}), "kohya", base, component="unet")
    assert all(torch.equal(written[f"lora_unet_conv.{leaf}"], t) for leaf, t in tensors.items())


@pytest.mark.parametrize(
    ("layer", "down", "up"),
    [
        (nn.Conv2d(3, 5, 1), (2, 3), (5, 2)),
        (nn.Linear(3, 5), (2, 3, 1, 1), (5, 2, 1, 1)),
        (nn.Embedding(3, 5), (2, 3), (5, 2)),
        (nn.Conv2d(6, 4, 3, groups=2), (2, 3, 3, 3), (4, 2, 1, 1)),
    ],
    ids=["a matrix of points", "points of a matrix", "a table", "groups"],
)
def test_a_layer_may_be_stored_in_another_shape(
    layer: nn.Module, down: tuple[int, ...], up: tuple[int, ...]
) -> None:
    one, other = random(*down), random(*up)
    [update] = update_of({"lora_down.weight": one, "lora_up.weight": other}, layer).values()
    assert isinstance(update, Update)
    assert (update.scale, update.kind) == (1, "lora")
    assert torch.equal(update.down, one)


def test_a_norm_has_updates_of_its_parameters() -> None:
    weight, bias = random(5), random(5)
    found = update_of({"w_norm": weight, "b_norm": bias}, nn.LayerNorm(5))
    assert list(found) == ["x.weight", "x.bias"]
    assert torch.equal(found["x.weight"].weight(bias), bias + weight)
    assert found["x.bias"].shape == (5,)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.ones(5)}, "expected weight, and on_input of one number"),
        ({"weight": torch.ones(5), "on_input": torch.ones(2)}, "on_input of one number"),
        ({"weight": torch.ones(4), "on_input": torch.ones(())},
         r"weight is \(4,\), expected \(3,\)"),
        ({"diff": torch.ones(5, 4)}, r"diff is \(5, 4\), the layer is \(5, 3\)"),
        ({"oft_blocks": torch.ones(2, 2, 2)}, r"the layer is \(5, 3\)"),
        ({"b_norm": torch.ones(5)}, "^.'b_norm'. do not fit x, a Linear"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_of_the_layer_are_refused(
    tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        update_of(tensors, nn.Linear(3, 5))


def test_a_number_in_place_of_a_matrix_is_refused(reads: Any) -> None:
    state = {"x.lora_down.weight": torch.ones(2, 3), "x.lora_up.weight": torch.tensor(1.0)}
    with pytest.raises(AdapterError, match=r"x\.lora_up\.weight is \(\), expected"):
        reads(state, format="kohya", base=nn.ModuleDict({"x": nn.Linear(3, 5)}))


def test_a_layer_that_no_adapter_acts_on_is_not_asked_for() -> None:
    assert layers_of(nn.ModuleDict({"x": nn.ConvTranspose1d(3, 5, 1)}))["x"].in_files is False
