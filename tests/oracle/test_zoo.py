"""Networks of torchvision and timm: every ungrouped convolution and linear layer is merged.

torchvision's wheel is built for CUDA: beside a CPU build of torch its operators are missing, and it
raises when it describes them. transformers imports it wherever it finds it, so it stands in its own
folder, which only these tests look into. None of its networks needs those operators.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx, nn

import lora_fx
from lora_fx import Adapter, Update, compare
from lora_fx.explanation import unmerged
from lora_fx.injection.branches import branches
from lora_fx.layers.sites import sites

X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TORCHVISION = (
    *("resnet18", "densenet121", "mobilenet_v2", "mobilenet_v3_small"),
    *("squeezenet1_1", "mnasnet0_5", "efficientnet_b0", "regnet_x_400mf", "convnext_tiny"),
)
TIMM = (
    *("darknet17", "resnet10t", "repvgg_a0", "vovnet39a", "efficientvit_b0", "ghostnet_050"),
    *("tf_efficientnet_lite0", "dla34"),
)
ZOO = [*(f"torchvision {name}" for name in TORCHVISION), *(f"timm {name}" for name in TIMM)]
# torch.fx follows these too.
SYMBOLIC = ("torchvision resnet18", "torchvision mobilenet_v2", "timm darknet17")
FOLDER = Path(sys.prefix) / "zoo"


def network(name: str) -> nn.Module:
    library, _, model = name.partition(" ")
    register = torch.library.register_fake

    def passing(op: Any, *args: Any, **kwargs: Any) -> Any:
        is_missing = isinstance(op, str) and op.startswith("torchvision::")
        return (lambda function: function) if is_missing else register(op, *args, **kwargs)

    with (
        mock.patch.object(sys, "path", [*sys.path, str(FOLDER)]),
        mock.patch.object(torch.library, "register_fake", passing),
    ):
        loaded = importlib.import_module(library)
        if model == "densenet121":  # two layers in each of its blocks show what 58 in all do
            return loaded.models.DenseNet(block_config=(2, 2, 2, 2)).eval()
        make = loaded.create_model if library == "timm" else loaded.models.get_model
        found: nn.Module = make(model)
    return found.eval()


def adapter_of(gm: fx.GraphModule, strength: float = 1.0) -> Adapter:
    make = torch.Generator().manual_seed(1)
    updates = {}
    for site in sites(gm):
        out, into, *kernel = site.shape
        if site.groups == 1:
            down = torch.randn(2, into, *kernel, generator=make)
            up = torch.randn(out, 2, generator=make)
            updates[site.path] = Update(down / down.norm(), up / up.norm(), strength)
    return Adapter("random", updates)


@pytest.mark.parametrize(
    ("name", "frontend"), [*((n, "export") for n in ZOO), *((n, "symbolic") for n in SYMBOLIC)]
)
@torch.no_grad()
def test_a_network_is_merged_whole(name: str, frontend: str) -> None:
    torch.manual_seed(2)
    model = network(name)
    gm = lora_fx.trace(model, (X,), frontend=frontend)
    adapter = adapter_of(gm)
    tuned = lora_fx.inject(gm, adapter)
    assert {branch.path for branch in branches(tuned)} == set(adapter.updates)
    folded = lora_fx.fold(tuned)
    assert unmerged(folded) == {}
    assert branches(folded) == []
    wanted = with_weights(model, adapter)
    assert compare(folded(X), wanted).relative <= 1e-5
    assert compare(gm(X), wanted).relative > 1e-4


def with_weights(model: nn.Module, adapter: Adapter) -> Any:
    """What the module itself computes once the products are added to its weights."""
    changed = {}
    for path, update in adapter.updates.items():
        assert isinstance(update, Update)
        weight = model.get_submodule(path).weight
        assert isinstance(weight, torch.Tensor)
        delta = torch.einsum("or,r...->o...", update.up.double(), update.down.double())
        changed[f"{path}.weight"] = (weight.double() + update.scale * delta).float()
    return torch.func.functional_call(model, changed, (X,))
