"""The module with W' in place of W, beside the graph with the same adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from lora_fx import Adapter, LoraConfig, Update, VerificationError, fold, inject, trace
from lora_fx.adapters.adapter import AnyUpdate, Scaling
from lora_fx.passes import ChooseForm, StripLora
from lora_fx.reference.reference_run import WeightForm, weight_form
from lora_fx.testing import Attention, relative, update_of

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[1, 5, 2], [7, 0, 3]])
Y = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))
IMAGE = torch.randn(2, 4, 5, 4, generator=torch.Generator().manual_seed(3))


def update(into: int, out: int, **more: Any) -> Update:
    make = torch.Generator().manual_seed(10 * into + out)
    down, up = (torch.randn(*size, generator=make) * 0.5 for size in ((2, into), (out, 2)))
    return Update(down, up, 1.5, **more)


def vector(size: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(size)) + 0.5


class Two(nn.Module):
    """One module under two names, both of them called."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return y


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(torch.tanh(self.embed(ids)))
        return y


class Lent(nn.Module):
    """A table that is called, and whose weight somebody else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(self.embed(ids)), self.embed.weight)


class Read(nn.Module):
    """A layer that is never called: its parent reads what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(F.linear(x, self.fc.weight, self.fc.bias))


class Patched(nn.Module):
    """Reaches its layer by a bound method and by a list, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5)
        self.act, self.layers, self.calls, self.seen = self._act, [self.fc], 0, [0]

    def _act(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.fc(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        y: torch.Tensor = self.act(x) + self.layers[0](x)
        return y


class Bare(nn.Module):
    """A square weight of its own, whose class does not tell that it is stored as (in, out)."""

    def __init__(self, *kernel: int) -> None:
        super().__init__()
        self.kernel, self.w = kernel, nn.Parameter(torch.randn(4, 4, *kernel))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(x, self.w) if self.kernel else x @ self.w


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3)
    return nn.Sequential(*layers)


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Tanh())


CASES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, dict[str, AnyUpdate], Any]] = {
    "one name of two": (Two, X, {"a": update(4, 4)}, {}),
    "the other name": (Two, X, {"b": update(4, 4)}, {}),
    "both names, one update": (Two, X, {"a": update(4, 4), "b": update(4, 4)}, {}),
    "tied head": (Tied, IDS, {"head": update(5, 11)}, {}),
    "tied table": (Tied, IDS, {"embed": update(11, 5)}, {}),
    "both of the tied": (Tied, IDS, {"embed": update(11, 5), "head": update(5, 11)}, {}),
    "a table that is lent": (Lent, IDS, {"embed": update(11, 5)}, {}),
    "a layer that is read": (Read, X, {"fc": update(4, 5, bias=vector(5))}, {}),
    "its parameter": (Read, X, {"fc.weight": update(4, 5)}, {}),
    "bound methods": (Patched, X, {"fc": update(4, 5)}, {}),
    "a bias where there is none": (
        lambda: nn.Sequential(nn.Linear(4, 5, bias=False)),
        X,
        {"0": update(4, 5, bias=vector(5))},
        {},
    ),
    "a bias of a table": (Tied, IDS, {"embed": update(11, 5, bias=vector(5))}, {}),
    "dora on a replaced weight": (
        net,
        X,
        {"3": update(6, 3, magnitude=vector(3))},
        {"3.weight": vector(18).reshape(3, 6), "3.bias": vector(3)},
    ),
    "outputs scaled": (net, X, {"0": Scaling(row=vector(6))}, {}),
    "inputs scaled": (net, X, {"3": Scaling(col=vector(6))}, {}),
    "a bare square made anew": (Bare, X, {"w": update_of("glora", (4, 4))}, {}),
    "a bare kernel made anew": (
        lambda: Bare(3, 2),
        IMAGE,
        {"w": update_of("glora", (4, 4, 3, 2))},
        {},
    ),
    "groups mixed": (
        grouped,
        IMAGE,
        {"0": Update(torch.ones(2, 4, 3, 3) / 3, vector(6)[:, None], 1.5)},
        {},
    ),
    "groups kept": (
        grouped,
        IMAGE,
        {"0": Update(torch.ones(2, 2, 3, 3) / 3, vector(12).reshape(6, 2), 1.5)},
        {},
    ),
}


def form_of(gm: fx.GraphModule) -> WeightForm:
    form = weight_form(gm)
    assert isinstance(form, WeightForm), form
    return form


def agree(gm: fx.GraphModule, base: Any, *inputs: torch.Tensor) -> None:
    found = form_of(gm)(*inputs)
    with torch.no_grad():
        assert relative(found, gm(*inputs)) <= 1e-6
        assert relative(base(*inputs), found) > 1e-3


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
@pytest.mark.parametrize("name", CASES)
def test_the_module_with_w_prime_is_what_the_graph_computes(name: str, frontend: str) -> None:
    torch.manual_seed(0)
    make, x, updates, replaced = CASES[name]
    model = make().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gm = trace(model, (x,), frontend=frontend)
    injected = inject(gm, Adapter("n", updates, replaced))
    held = {module: dict(module.__dict__) for module in model.modules()}
    agree(injected, gm, x)
    agree(fold(injected), gm, x)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    for module, values in held.items():
        assert module.__dict__.keys() == values.keys()
        assert all(module.__dict__[key] is value for key, value in values.items())


@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_attention(crossed: bool, bias: bool) -> None:
    torch.manual_seed(0)
    attention = nn.Sequential(Attention(8, crossed, bias), nn.Tanh())
    gm = trace(attention.eval(), (Y,))
    updates = {"0.layer": update(8, 24, bias=vector(24)), "0.layer.out_proj": update(8, 8)}
    agree(inject(gm, Adapter("n", updates)), gm, Y)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("frontend", ["export", "symbolic"])
def test_what_was_trained_is_what_is_meant(init: str, frontend: str) -> None:
    gm = trace(net().eval(), (X,), frontend=frontend)
    tuned = inject(gm, LoraConfig(r=2, name="french", init=init))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.rand_like(parameter))  # leaves no trace on the parameter
    agree(tuned, gm, X)
    folded = fold(tuned)
    other = copy.deepcopy(tuned)
    for graph in (tuned, other):
        for parameter in graph.parameters():
            parameter.data.mul_(1.5 if parameter.requires_grad else 1.0)
    agree(folded, gm, X)
    agree(other, gm, X)
    agree(ChooseForm()(tuned).graph_module, gm, X)


def test_statistics_that_training_moved_are_the_graphs() -> None:
    gm = trace(net().eval(), (X,), frontend="symbolic")
    tuned = inject(gm, LoraConfig(r=2)).train()
    tuned(X * 3 + 1)
    agree(tuned.eval(), gm, X)


def test_adapters_are_summed_unless_the_first_was_folded() -> None:
    gm = trace(net().eval(), (X,))
    one = Adapter("a", {"0": update(4, 6, magnitude=vector(6))})
    two = Adapter("b", {"0": update(4, 6, magnitude=vector(6) + 1)})
    agree(inject(gm, [one, Adapter("b", {"0": update(4, 6)})]), inject(gm, one), X)
    agree(inject(fold(inject(gm, one)), two), inject(gm, one), X)
    agree(inject(fold(inject(gm, one)), replace_name(two, "a")), inject(gm, one), X)


def replace_name(adapter: Adapter, name: str) -> Adapter:
    return Adapter(name, adapter.updates)


def test_two_kinds_beside_one_layer_have_one_form() -> None:
    gm = trace(net().eval(), (X,))
    one, two = Adapter("a", {"0": update(4, 6)}), Adapter("b", {"0": update_of("lokr", (6, 4))})
    for alone in (one, two):
        agree(inject(gm, [one, two]), inject(gm, alone), X)


def test_a_new_bias_is_of_the_type_of_its_layer() -> None:
    gm = trace(nn.Linear(4, 5, bias=False).half().eval(), (X.half(),))
    tuned = inject(gm, Adapter("a", {"": update(4, 5, bias=vector(5))}))
    found = form_of(tuned)(X.half())
    assert found.dtype is torch.float16
    assert relative(found.float(), tuned(X.half()).float()) <= 1e-3
    assert relative(found.float(), gm(X.half()).float()) > 1e-2


def test_what_is_stripped_on_purpose_is_forgotten() -> None:
    gm = trace(net().eval(), (X,))
    replaced = {"3.weight": vector(18).reshape(3, 6)}
    injected = inject(gm, Adapter("a", {"0": update(4, 6)}, replaced))
    stripped = StripLora()(injected).graph_module
    assert torch.equal(stripped(X), gm(X))
    assert relative(form_of(stripped)(X), gm(X)) <= 1e-6
    assert relative(form_of(stripped)(X), injected(X)) > 1e-2
    again = trace(injected, (X,))  # the graph is the model now, its branches are no record's
    assert relative(form_of(again)(X), injected(X)) <= 1e-6
    assert "does not remember" in str(weight_form(StripLora()(again).graph_module))


def test_a_branch_that_is_lost_is_missed() -> None:
    gm = trace(net().eval(), (X,))
    injected = inject(gm, Adapter("a", {"0": update(4, 6), "3": update(6, 3)}))
    kept = form_of(injected)(X)
    add = next(n for n in injected.graph.nodes if n.target is torch.ops.aten.add.Tensor)
    add.replace_all_uses_with(add.args[0])
    injected.graph.eliminate_dead_code()
    injected.recompile()
    assert torch.equal(form_of(injected)(X), kept)
    assert relative(injected(X), kept) > 1e-2


def test_a_branch_that_trained_and_is_lost_is_named() -> None:
    tuned = inject(trace(net().eval(), (X,)), LoraConfig(r=2, name="french"))
    for part in ("A", "B"):
        del getattr(tuned, "0")._modules[f"lora_{part}"]
    with pytest.raises(VerificationError, match=r"adapter french: its branches at 0 are no longer"):
        weight_form(tuned)


def test_the_tree_is_kept_as_it_was_traced() -> None:
    model = net().eval()
    gm = trace(model, (X,))
    model[0] = nn.Linear(4, 6)
    agree(inject(gm, Adapter("a", {"0": update(4, 6)})), gm, X)


def test_a_program_is_held_against_its_own_module() -> None:
    gm = trace(torch.export.export(net().eval(), (X,)))
    agree(inject(gm, Adapter("a", {"0": update(4, 6), "3": update(6, 3)})), gm, X)
