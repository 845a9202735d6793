"""loralib beside us: its layers fold to torch's own, and what it saves is what we inject."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from torch import fx, nn

from lora_fx import Session, fold, inject, load_adapter, to_onnx, trace
from lora_fx.numerics import TOLERANCE
from lora_fx.testing import Two, folds_to, relative


def linears(**options: Any) -> nn.Module:
    wide = loralib.Linear(3, 15, r=2, lora_alpha=3, merge_weights=False, **options)
    return Two(wide, loralib.Linear(15, 6, bias=False, r=2, merge_weights=False, **options))


def merged(**options: Any) -> nn.Module:
    """Three groups of which two are adapted, and two of which one is."""
    fields: dict[str, Any] = {"r": 2, "lora_alpha": 3, "merge_weights": False} | options
    wide = loralib.MergedLinear(3, 15, enable_lora=[True, False, True], **fields)
    narrow = loralib.MergedLinear(15, 6, enable_lora=[False, True], bias=False, **fields)
    return Two(wide, narrow)


def embedding() -> nn.Module:
    wide = loralib.Embedding(11, 15, r=2, lora_alpha=3, merge_weights=False)
    return Two(wide, loralib.Linear(15, 6, bias=False, r=2, merge_weights=False))


def conv(**options: Any) -> nn.Module:
    fields: dict[str, Any] = {"r": 2, "lora_alpha": 3, "merge_weights": False}
    wide = loralib.Conv2d(4, 6, 3, stride=2, padding=1, **fields, **options)
    return Two(wide, loralib.Conv2d(6, 7, 1, bias=False, **fields))


def plain_linears() -> nn.Module:
    return Two(nn.Linear(3, 15), nn.Linear(15, 6, bias=False))


def plain_conv(**options: Any) -> nn.Module:
    wide = nn.Conv2d(4, 6, 3, stride=2, padding=1, **options)
    return Two(wide, nn.Conv2d(6, 7, 1, bias=False))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "linear": (linears, plain_linears),
    "linear_dropout": (lambda: linears(lora_dropout=0.3), plain_linears),
    # The base is stored as (in, out): what is folded is stored as torch stores it.
    "linear_transposed": (lambda: linears(fan_in_fan_out=True), plain_linears),
    "merged": (merged, plain_linears),
    "merged_dropout": (lambda: merged(lora_dropout=0.3), plain_linears),
    "merged_transposed": (lambda: merged(fan_in_fan_out=True), plain_linears),
    "embedding": (
        embedding,
        lambda: Two(nn.Embedding(11, 15), nn.Linear(15, 6, bias=False)),
    ),
    "conv2d": (conv, plain_conv),
    "conv2d_dilated": (lambda: conv(dilation=2), lambda: plain_conv(dilation=2)),
    "conv2d_grouped": (lambda: conv(groups=2), lambda: plain_conv(groups=2)),
}


def example(base: nn.Module, batch: int) -> torch.Tensor:
    make = torch.Generator().manual_seed(batch)
    layer: Any = base.wide
    if isinstance(layer, nn.Embedding):
        return torch.randint(0, 11, (batch, 7), generator=make)
    sizes = (7, 3) if isinstance(layer, nn.Linear) else (4, 13, 11)
    return torch.randn(batch, *sizes, generator=make)


@functools.cache
def built(name: str) -> tuple[nn.Module, nn.Module]:
    """loralib's layers with an adapter of effect, and torch's with its base weights: only read."""
    make, plain = CASES[name]
    torch.manual_seed(0)
    model, base = make().eval(), plain().eval()
    weights = {}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.5)
            stored = parameter.T if "transposed" in name and parameter.ndim == 2 else parameter
            weights[key.replace("conv.", "")] = stored
    base.load_state_dict({k: v for k, v in weights.items() if "lora_" not in k})
    return model, base


@functools.cache
def traced(name: str, dtype: torch.dtype) -> fx.GraphModule:
    """The graph of torch's layers: only read."""
    base = copy.deepcopy(built(name)[1]).to(dtype)
    x = cast(example(base, 4), dtype)
    return trace(base, (x,), dynamic_shapes=({0: "batch"},))


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) if x.is_floating_point() else x


@pytest.mark.parametrize("name", CASES)
def test_loralib_folds_to_plain_layers(name: str) -> None:
    model, base = built(name)
    x, other = example(base, 4), example(base, 6)
    gm = trace(model, (x,), dynamic_shapes=({0: "batch"},))
    folded = folds_to(gm, traced(name, torch.float32))
    with torch.no_grad():
        wanted = model(other)
        assert relative(folded(other), wanted) <= 1e-5
        assert relative(base(other), wanted) >= 1e-2


FUSED = {"wide": [True, False, True], "narrow": [False, True]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_what_loralib_saves_is_injected_folded_and_exported(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, base = built(name)
    path, other = tmp_path / "a.pt", example(base, 6)
    torch.save(loralib.lora_state_dict(model), path)
    # The scale of what loralib was given no alpha for is that of its default, 1.
    hints: dict[str, Any] = {"alpha": {"wide": 3, "narrow": narrow_alpha(name)}}
    if name.startswith("merged"):
        hints |= {"enable_lora": FUSED}
    adapter = load_adapter(path, format="loralib", base=base, allow_pickle=True, **hints)
    with torch.no_grad():
        wanted = model(other)
    gm, tolerance = traced(name, dtype), TOLERANCE[dtype]
    injected = inject(gm, adapter)
    for form in (injected, fold(injected)):
        with torch.no_grad():
            assert relative(form(cast(other, dtype)), wanted) <= tolerance
            assert relative(gm(cast(other, dtype)), wanted) > 5 * tolerance
        if dtype is torch.float32:
            to_onnx(form, tmp_path / "m.onnx", force=True)
            (found,) = Session(tmp_path / "m.onnx", threads=1).run({"x": other}).values()
            assert relative(torch.from_numpy(found), wanted) <= tolerance


def narrow_alpha(name: str) -> float:
    """The alpha that `CASES` give the second layer."""
    return 3 if name.startswith(("merged", "conv")) else 1
