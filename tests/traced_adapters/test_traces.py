"""Layers alike in all but their tensors are traced once, and no other is taken for one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lora_fx.adapters.adapter import Adapter
from lora_fx.formats import load_adapter
from lora_fx.testing import relative
from lora_fx.traced_adapters import traces
from lora_fx.traced_adapters.traces import Traces


class Scaled(nn.Module):
    """A layer with numbers that are no state of it."""

    def __init__(self, scale: float = 2.0, mask: float = 1.0, out: int = 5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, 3))
        self.register_buffer("shift", torch.randn(out))
        self.scale, self.mask = scale, torch.full((out,), mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight) * self.scale * self.mask + self.shift


class Wide(Scaled):
    """The same in twice as many bits."""

    def __init__(self) -> None:
        super().__init__()
        self.double().mask = self.mask.double()


class Asks(Scaled):
    """It goes another way where its weight is large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (3 if bool(self.weight.norm() > 100) else 1)


class Table(nn.Embedding):
    """A table with a number that is no state of it."""

    def __init__(self, scale: float) -> None:
        super().__init__(7, 3)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that are traced."""
    modules: list[nn.Module] = []
    own = traces.trace

    def trace(module: nn.Module, args: Any) -> Any:
        modules.append(module)
        return own(module, args)

    monkeypatch.setattr(traces, "trace", trace)
    return modules


def large(made: Asks) -> Asks:
    made.weight.data.mul_(1000)
    return made


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: [Scaled(), Scaled(), Scaled()], 1),
        (lambda: [Scaled(), Scaled(2.001), Scaled(2.001)], 2),
        (lambda: [Scaled(), Scaled(mask=0.5)], 2),
        (lambda: [Scaled(), Scaled(out=4), Scaled()], 2),
        (lambda: [Asks(), large(Asks()), large(Asks())], 2),
        (lambda: [Wide(), Wide(), Scaled()], 2),
    ],
)
def test_one_graph_serves_layers_that_differ_in_their_tensors_alone(
    make: Callable[[], list[Scaled]], count: int, traced: list[nn.Module]
) -> None:
    layers, known = make(), Traces()
    for layer in layers:
        x = torch.randn(3, 4, 3, dtype=layer.shift.dtype)
        found = known.of(layer.eval(), x)(x)
        assert torch.equal(found, layer(x))
        alike = [other for other in layers if other.shift.dtype == x.dtype and other is not layer]
        assert not any(torch.equal(found, other(x)) for other in alike)
    assert len(traced) == count


def test_a_row_that_no_id_picks_tells_nothing_so_tables_are_each_traced(
    traced: list[nn.Module],
) -> None:
    known, ids = Traces(), torch.tensor([[1, 2]])
    for layer in (Table(2.0), Table(2.0)):
        assert torch.equal(known.of(layer.eval(), ids)(ids), layer(ids))
    assert len(traced) == 2


def test_layers_of_an_adapter_are_traced_once_and_are_what_peft_computes(
    tmp_path: Any, traced: list[nn.Module]
) -> None:
    base = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)), nn.Linear(6, 4)).eval()
    config = peft.HiraConfig(r=2, target_modules=[*map(str, range(5))])
    model: Any = peft.get_peft_model(nn.Sequential(*base), config).eval()
    for name, parameter in model.named_parameters():
        if "hira" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "a")
    plain = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)), nn.Linear(6, 4)).eval()
    kept = {key.replace("base_layer.", ""): v for key, v in base.state_dict().items()}
    plain.load_state_dict({key: v for key, v in kept.items() if "hira" not in key})
    adapter: Adapter = load_adapter(tmp_path / "a", base=plain)
    assert len(traced) == 2
    x = torch.randn(3, 6)
    for place, update in adapter.updates.items():
        layer: Any = model.base_model.model[int(place)]
        weight = update.weight(plain[int(place)].weight.detach())
        found = nn.functional.linear(x, weight, plain[int(place)].bias)
        assert relative(found, layer(x)) <= 1e-6
        assert relative(plain[int(place)](x), layer(x)) > 1e-2
