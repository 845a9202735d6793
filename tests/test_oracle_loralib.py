"""Models built from loralib's layers fold to torch's own, without a word about loralib."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import loralib
import pytest
import torch
from torch import nn

from lora_fx import trace


class Two(nn.Module):
    """Two layers with something between them that is not affine."""

    def __init__(self, wide: nn.Module, narrow: nn.Module) -> None:
        super().__init__()
        self.wide, self.narrow = wide, narrow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.narrow(torch.tanh(self.wide(x)))
        return result


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


def built(name: str) -> tuple[nn.Module, nn.Module]:
    """torch's layers with loralib's base weights, and loralib's with an adapter of effect."""
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


@pytest.mark.parametrize("name", CASES)
def test_loralib_folds_to_plain_layers(name: str, relative: Any, folds_to: Any) -> None:
    model, base = built(name)
    x, other = example(base, 4), example(base, 6)
    gm, plain = (trace(m, (x,), dynamic_shapes=({0: "batch"},)) for m in (model, base))
    folded = folds_to(gm, plain)
    with torch.no_grad():
        wanted = model(other)
        assert relative(folded(other), wanted) <= 1e-5
        assert relative(base(other), wanted) >= 1e-2
