from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_fx import (
    Adapter,
    AdapterError,
    LoraConfig,
    Update,
    adapter_from,
    fold,
    inject,
    text,
    trace,
)
from lora_fx.adapters.adapter import Scaling
from lora_fx.injection.match_branch import branches, last_of
from lora_fx.layers.sites import by_path
from lora_fx.passes import StripLora
from lora_fx.testing import Between, make_adapter, relative


def test_branches_are_read_back_from_structure(ragged: Any) -> None:
    gm = inject(trace(ragged), make_adapter({"wide": (5, 3), "again": (5, 5)}))
    found = branches(gm)
    assert [(b.path, b.name, b.scale) for b in found] == [
        ("wide", "french", 1.0),
        ("again", "french", 1.0),
        ("again", "french", 1.0),
    ]
    assert found[0].down.target == "wide.lora_A.french"
    assert found[0].up.target == "wide.lora_B.french"
    assert found[0].base is found[0].site


def test_a_chain_of_branches_ends_in_the_last_sum(ragged: Any) -> None:
    names = ["french", "german", "latin"]
    adapters = [make_adapter({"wide": (5, 3)}, name=name) for name in names]
    gm = inject(trace(ragged), adapters)
    assert [b.name for b in branches(gm)] == names
    site = by_path(gm)["wide"][0]
    assert last_of(site) is branches(gm)[-1].out
    assert last_of(by_path(gm)["narrow"][0]) is by_path(gm)["narrow"][0].node


def test_the_users_own_sums_are_no_branches() -> None:
    class Skip(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(5, 5)
            self.a = torch.nn.Parameter(torch.randn(5, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.add.Tensor(self.fc(x), x @ self.a @ self.a.T)

    assert branches(trace(Skip())) == []


def test_an_adapter_comes_back_as_it_went_in(ragged: Any) -> None:
    update = Update(torch.randn(2, 3), torch.randn(5, 2), 0.5, bias=torch.randn(5))
    back = adapter_from(inject(trace(ragged), Adapter("a", {"wide": update}))).updates["wide"]
    torch.testing.assert_close(back.delta(), update.delta())
    torch.testing.assert_close(back.scale * back.bias, update.scale * update.bias)
    gm = inject(trace(ragged), LoraConfig(r=2, alpha=6, target_modules=["wide"], name="b"))
    assert adapter_from(gm, "b").updates["wide"].scale == 3.0


def test_an_adapter_that_is_not_there_is_refused(ragged: Any) -> None:
    with pytest.raises(AdapterError, match="none"):
        adapter_from(trace(ragged))
    gm = inject(trace(ragged), make_adapter({"wide": (5, 3)}))
    with pytest.raises(AdapterError, match="'german': the graph holds french"):
        adapter_from(gm, "german")


def grouped(x: torch.Tensor) -> tuple[torch.fx.GraphModule, Callable[..., Update]]:
    """A layer that no branch over all inputs can be merged into, and its updates."""
    torch.manual_seed(0)

    def update(**vectors: torch.Tensor) -> Update:
        return Update(torch.randn(2, 4, 3, 3), torch.randn(6, 2), 0.5, **vectors)

    layer = torch.nn.Conv2d(4, 6, 3, groups=2)
    return trace(Between(layer).eval(), (x,), frontend="export"), update


@pytest.mark.parametrize("vector", ["bias", "col"])
def test_what_fold_cannot_merge_is_read_back_and_stripped(vector: str) -> None:
    x = torch.randn(2, 4, 7, 5)
    base, update = grouped(x)
    one = Adapter("a", {"layer": update(**{vector: torch.randn(6 if vector == "bias" else 4)})})
    two = Adapter("b", {"layer": update()})
    injected = inject(base, [one, two])
    folded = fold(injected)
    assert [b.name for b in branches(folded)] == ["a", "b"]
    again = inject(base, [adapter_from(folded, "a"), two])
    assert relative(again(x), injected(x)) <= 1e-6
    assert relative(inject(base, two)(x), injected(x)) > 1e-2
    assert torch.equal(StripLora()(folded).graph_module(x), base(x))


@pytest.mark.parametrize("kind", ["bias", "row", "col"])
def test_a_branch_that_is_traced_again_is_found(kind: str) -> None:
    x = torch.randn(2, 4, 7)
    base = trace(Between(torch.nn.Conv1d(4, 6, 3)).eval(), (x,), frontend="export")
    size = 4 if kind == "col" else 6
    update = Update(torch.randn(2, 4, 3), torch.randn(6, 2), 0.5, **{kind: torch.randn(size)})
    injected = inject(base, Adapter("a", {"layer": update}))
    again = trace(injected, (x,), frontend="export")
    assert [call.args for call in again.graph.nodes] != [c.args for c in injected.graph.nodes]
    (found,), (before,) = branches(again), branches(injected)
    for part in ("down", "up", "bias", "gain", "col"):
        nodes = getattr(before, part), getattr(found, part)
        assert len({node and node.target for node in nodes}) == 1


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_fresh_adapter_reads_what_no_other_scales(ragged: Any, x: Any, dropout: float) -> None:
    base = trace(ragged, (x,))
    scaled = inject(base, Adapter("ia", {"wide": Scaling(col=torch.randn(3))}))
    config = LoraConfig(r=2, alpha=6, dropout=dropout, target_modules=["wide"], name="b", seed=0)
    both, alone = inject(scaled, config), inject(base, config)
    for gm in (both, alone):
        with torch.no_grad():
            dict(gm.named_parameters())["wide.lora_B.b"].fill_(0.5)
        gm.eval()
    assert [b.name for b in branches(both)] == ["b", "ia"]
    stripped = StripLora("ia")(both).graph_module
    assert text(stripped) == text(alone)
    assert torch.equal(stripped(x), alone(x))
    assert not torch.equal(both(x), alone(x))
