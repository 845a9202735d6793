"""Fresh adapters on every kind of layer, from every start, on both frontends."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_fx import (
    AdapterError,
    LoraConfig,
    adapter_from,
    combine,
    fold,
    inject,
    save_adapter,
    trace,
)
from lora_fx.testing import relative

pytestmark = [
    # PEFT says what it does about Conv1D, and what it cannot do itself with groups.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1"),
]


class Net(nn.Module):
    """An embedding, a layer of some kind, and a head."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(11, 4), layer, nn.LazyLinear(3)
        self.by_channel = isinstance(layer, nn.Conv1d)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.table(ids))
        if self.by_channel:
            x = x.transpose(1, 2)
        y: torch.Tensor = self.head(torch.tanh(self.layer(x)).flatten(1))
        return y


LAYERS = {
    "linear": lambda: nn.Linear(4, 6),
    "transposed": lambda: Conv1D(6, 4),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, padding=1),
    "conv1d_grouped": lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2),
}
INITS = ["kaiming", "gaussian", "orthogonal", "pissa", "olora"]


def built(layer: str, frontend: str) -> tuple[nn.Module, Any, torch.Tensor]:
    torch.manual_seed(0)
    model, ids = Net(LAYERS[layer]()), torch.randint(0, 11, (5, 7))
    with torch.no_grad():
        model(ids)
    model.eval()
    given = (ids,) if frontend == "export" else ()
    return model, trace(model, given, frontend=frontend), ids


def trained(gm: Any, ids: torch.Tensor) -> None:
    parameters = [p for p in gm.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        gm(ids).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and bool(p.grad.any()) for p in parameters)


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_trains_and_the_result_loads_into_peft(
    layer: str, frontend: str, tmp_path: Path
) -> None:
    model, base, ids = built(layer, frontend)
    rank = 4  # a multiple of the groups
    config = LoraConfig(r=rank, alpha=6, target_modules=["table", "layer"], dropout=0.2, seed=0)
    gm = inject(base, config)
    assert relative(gm(ids), model(ids)) <= 1e-6
    names = {name for name, p in gm.named_parameters() if p.requires_grad}
    assert names == {f"{at}.lora_{side}.default" for at in ("table", "layer") for side in "AB"}
    torch.manual_seed(0)
    gm.train()
    trained(gm, ids)
    gm.eval()
    save_adapter(adapter_from(gm), tmp_path / "a")
    owner = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a").eval()
    with torch.no_grad():
        assert relative(gm(ids), owner(ids)) <= 1e-6
        assert relative(fold(gm)(ids), owner(ids)) <= 1e-5
        assert relative(gm(ids), model(ids)) > 1e-2


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("layer", ["linear", "transposed"])
@pytest.mark.parametrize("init", INITS)
def test_every_start_is_the_base_and_says_what_it_learned(
    init: str, layer: str, rslora: bool
) -> None:
    model, base, ids = built(layer, "export")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = LoraConfig(
        r=2, alpha=3, target_modules=["layer"], init=init, use_rslora=rslora, seed=0
    )
    gm = inject(base, config)
    started = adapter_from(gm)
    with torch.no_grad():
        assert relative(gm(ids), model(ids)) <= 1e-6
    trained(gm, ids)
    learned = adapter_from(gm)
    if init in ("pissa", "olora", "orthogonal"):  # they start with a product that is not zero
        learned = combine([(learned, 1.0), (started, -1.0)])
    with torch.no_grad():
        assert relative(inject(base, learned)(ids), gm(ids)) <= 1e-5
        assert relative(model(ids), gm(ids)) > 1e-2
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_of_several_configs_all_train() -> None:
    _, base, ids = built("linear", "export")
    configs = [LoraConfig(r=2, target_modules=["layer"], name=name, seed=0) for name in "ab"]
    both, second = inject(base, configs), inject(inject(base, configs[0]), configs[1])
    trained(both, ids)
    learned = [adapter_from(both, name).updates["layer"].has_effect() for name in "ab"]
    left = [name for name, p in second.named_parameters() if p.requires_grad]
    assert (learned, left) == ([True, True], ["layer.lora_A.b", "layer.lora_B.b"])


def test_what_cannot_start_that_way_is_refused_by_name() -> None:
    _, base, _ = built("conv1d", "export")
    with pytest.raises(AdapterError, match=r"layer: .*pissa"):
        inject(base, LoraConfig(r=2, target_modules=["layer"], init="pissa"))
    with pytest.raises(AdapterError, match=r"dora.*loaded"):
        LoraConfig(kind="dora")
