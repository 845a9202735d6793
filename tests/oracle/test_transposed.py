"""LoRA of transposed convolutions: torch and onnxruntime with W' against the branch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Adapter, AdapterError, ExportError, Update, fold, inject, load_adapter, text
from lora_fx.testing import relative

MAKE: Any = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SIZES, KERNEL = (7, 5, 4), (3, 2, 3)
# Options of the module, by what they try; the kernel has as many axes as the first number says.
OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "1d": (1, {}),
    "1d, strided and padded at the end": (1, {"stride": 3, "padding": 1, "output_padding": 2}),
    "2d, uneven": (2, {"stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)}),
    "2d, padded at the end by dilation": (2, {"dilation": 3, "output_padding": (2, 1)}),
    "2d without bias": (2, {"stride": 2, "bias": False}),
    "2d of one point": (2, {"kernel_size": 1}),
    "2d of one point, strided": (2, {"kernel_size": 1, "stride": 2}),
    "2d as many out as in": (2, {"out_channels": 4}),
    "2d in groups": (2, {"stride": 2, "padding": 1, "groups": 2}),
    "1d in groups": (1, {"stride": 2, "groups": 2, "dilation": 2}),
    "3d": (3, {"stride": 2, "padding": 1, "output_padding": 1}),
}


class Net(nn.Module):
    def __init__(self, dims: int, options: dict[str, Any]) -> None:
        super().__init__()
        given = {"out_channels": 6, "kernel_size": KERNEL[:dims], **options}
        self.layer = MAKE[dims](4, **given)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(torch.sin(x)))


def model_of(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    dims, options = OPTIONS[name]
    return Net(dims, options).eval().requires_grad_(False), torch.randn(3, 4, *SIZES[:dims])


def update_of(layer: Any, rank: int = 2) -> Update:
    make = torch.Generator().manual_seed(1)
    down = torch.randn(rank, layer.in_channels, *layer.kernel_size, generator=make)
    up = torch.randn(layer.out_channels, rank // layer.groups, generator=make)
    return Update(down, up, 0.4)


def merged(model: Any, update: Update, factor: float = 1.0) -> nn.Module:
    """The weight form, all of it by hand: groups are blocks of zeros and the whole up."""
    tuned = copy.deepcopy(model)
    layer, groups = tuned.layer, model.layer.groups
    inputs = layer.weight.chunk(groups)  # (in / groups, out / groups, *kernel) each
    rows = [
        torch.cat([w if a == b else torch.zeros_like(w) for b in range(groups)], 1)
        for a, w in enumerate(inputs)
    ]
    up = torch.block_diag(*update.up.chunk(groups))
    delta = torch.einsum("or,ri...->io...", factor * update.scale * up, update.down)
    layer.weight = nn.Parameter(torch.cat(rows) + delta, requires_grad=False)
    layer.groups = 1
    return tuned


def run(path: Path, x: torch.Tensor, adapter: Path | None = None) -> torch.Tensor:
    (found,) = lora_fx.Session(path, threads=1).run({"x": x}, adapter=adapter).values()
    return torch.from_numpy(found)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("name", OPTIONS)
def test_injected_and_folded_it_is_the_weight_form(name: str, frontend: str) -> None:
    model, x = model_of(name)
    update = update_of(model.layer)
    gm = inject(lora_fx.trace(model, (x,), frontend=frontend), Adapter("a", {"layer": update}))
    wanted = merged(model, update)(x)
    assert relative(gm(x), wanted) <= 1e-6
    assert relative(gm(x), merged(model, update, 1.1)(x)) > 1e-3
    assert relative(model(x), wanted) > 1e-2
    folded = fold(gm)
    assert relative(folded(x), wanted) <= 1e-6
    assert ("lora_A" in text(folded)) is (model.layer.groups > 1)  # as beside any grouped kernel


# torch takes an output_padding below the stride or the dilation, onnxruntime one below the stride.
RUN = [name for name in OPTIONS if "by dilation" not in name]


def test_what_onnxruntime_does_not_run_is_refused_with_its_words(tmp_path: Path) -> None:
    model, x = model_of("2d, padded at the end by dilation")
    with pytest.raises(ExportError, match=r"output_padding .* may be too large for stride"):
        lora_fx.to_onnx(lora_fx.trace(model, (x,)), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", RUN)
def test_exported_as_a_constant_onnxruntime_agrees(name: str, tmp_path: Path) -> None:
    model, x = model_of(name)
    update = update_of(model.layer)
    gm = lora_fx.trace(model, (x,), dynamic_shapes=({0: "batch"},))
    report = lora_fx.to_onnx(inject(gm, Adapter("a", {"layer": update})), tmp_path / "m.onnx")
    assert report.verified
    wanted = merged(model, update)(x)
    assert relative(run(tmp_path / "m.onnx", x), wanted) <= 1e-5
    assert relative(run(tmp_path / "m.onnx", x), merged(model, update, 1.1)(x)) > 1e-3


def swapped(
    model: Any, path: Path, x: torch.Tensor, rank: int
) -> tuple[Update, Path, torch.Tensor]:
    """An adapter of a rank, its file, which is right in the slot, and what it computes."""
    update = update_of(model.layer, rank)
    file = path.with_name(f"r{rank}.onnx_adapter")
    lora_fx.export_adapter(Adapter("a", {"layer": update}), path, file)
    wanted = merged(model, update)(x)
    assert relative(run(path, x, file), wanted) <= 1e-5
    assert relative(model(x), wanted) > 1e-2
    return update, file, wanted


@pytest.mark.parametrize("name", [name for name in RUN if "groups" not in name])
def test_as_a_slot_it_takes_adapters_of_any_rank(name: str, tmp_path: Path) -> None:
    model, x = model_of(name)
    gm = lora_fx.trace(model, (x,), dynamic_shapes=({0: "batch"},))
    path = tmp_path / "m.onnx"
    lora_fx.to_onnx(gm, path, adapters="input", slots=["layer"])
    assert relative(run(path, x), model(x)) <= 1e-5
    for rank in (1, 4):
        update, file, wanted = swapped(model, path, x, rank)
        back = load_adapter(file).updates["layer"]
        assert isinstance(back, Update)
        # 4 in and rank 4: nothing but its name says which axis of A is the rank.
        assert torch.allclose(back.delta(), update.delta(), rtol=1e-6, atol=1e-6)
        again = inject(gm, Adapter("b", {"layer": back}))
        assert relative(again(x), wanted) <= 1e-6


@pytest.mark.parametrize("name", ["2d in groups", "1d in groups"])
def test_a_slot_in_groups_takes_an_up_projection_in_groups(name: str, tmp_path: Path) -> None:
    model, x = model_of(name)
    path = tmp_path / "m.onnx"
    lora_fx.to_onnx(lora_fx.trace(model, (x,)), path, adapters="input", slots=["layer"])
    assert relative(run(path, x), model(x)) <= 1e-5
    for rank in (2, 4):
        swapped(model, path, x, rank)


def test_an_adapter_of_a_convolution_the_other_way_round_does_not_fit() -> None:
    model, x = model_of("2d, uneven")
    wrong = Update(torch.randn(2, 6, 3, 2), torch.randn(4, 2), 1.0)
    with pytest.raises(AdapterError, match=r"layer: made for a layer 6 -> 4, kernel \(3, 2\)"):
        inject(lora_fx.trace(model, (x,)), Adapter("a", {"layer": wrong}))


def test_what_was_trained_is_cut_out_of_two_models() -> None:
    model, _ = model_of("2d, uneven")
    update = update_of(model.layer)
    found = lora_fx.extract(model, merged(model, update), rank=2).adapter.updates["layer"]
    delta = update.delta()
    assert relative(found.delta(), delta) <= 1e-5
    assert relative(found.delta(), 1.1 * delta) > 1e-2


def test_two_adapters_beside_one_layer_are_summed_and_fold_once() -> None:
    model, x = model_of("2d, uneven")
    first, second = update_of(model.layer), update_of(model.layer, 4)
    both = [Adapter("a", {"layer": first}), Adapter("b", {"layer": second})]
    gm = inject(lora_fx.trace(model, (x,)), both)
    wanted = merged(merged(model, first), second)(x)
    assert relative(gm(x), wanted) <= 1e-6
    folded = fold(gm)
    assert relative(folded(x), wanted) <= 1e-6
    assert "lora_" not in text(folded)


def test_a_hand_written_one_is_called_and_told_alike() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 6, 3), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.conv_transpose1d(x.sin(), weight=self.kernel, stride=2, padding=1)
            return torch.tanh(y)

    own, x = Own(), torch.randn(3, 4, 7)
    gm = lora_fx.trace(own, (x,))
    down, up = torch.randn(2, 4, 3), torch.randn(6, 2)
    path = lora_fx.layers.sites.sites(gm)[0].path
    injected = inject(gm, Adapter("a", {path: Update(down, up, 0.5)}))
    tuned = copy.deepcopy(own)
    tuned.kernel.data += 0.5 * torch.einsum("or,rik->iok", up, down)
    assert relative(injected(x), tuned(x)) <= 1e-6
    assert relative(fold(injected)(x), tuned(x)) <= 1e-6
    assert relative(own(x), tuned(x)) > 1e-2
