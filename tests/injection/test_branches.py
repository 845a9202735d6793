from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

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
from lora_fx.adapters.adapter import AnyUpdate, Scaling
from lora_fx.injection.branches import Branch, branches, col_of, last_of
from lora_fx.layers.sites import by_path, sites
from lora_fx.passes import StripLora
from lora_fx.testing import Attention, Between, make_adapter, relative


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
    with pytest.raises(AdapterError, match="holds no adapter: inject one first"):
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


aten = torch.ops.aten
Miss = Callable[[fx.Graph, Any], Any]


class Pair(nn.Module):
    """Two layers of one kind, one behind the other."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.one, self.two = make(), make()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.two(torch.tanh(self.one(x)))
        return y


class Ids(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.tanh(self.one(x)) * self.two(x + 1)
        return y


class Written(nn.Module):
    """A product with features that are not last, of rows of a weight."""

    def __init__(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(9, 4))
        self.pick = pick

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bin,oi->bon", x, self.pick(self.w))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def lora(out: int, into: int, *kernel: int, **vectors: torch.Tensor) -> Update:
    return Update(random(2, into, *kernel), random(out, 2), 0.5, **vectors)


def full(out: int, into: int, *kernel: int) -> Update:
    return lora(out, into, *kernel, bias=random(out), row=random(out), col=random(into))


def conv(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(4, 4, 3, padding=1, **options)


def written(pick: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], nn.Module]:
    return lambda: Pair(lambda: Written(pick))


BATCH = random(3, 5, 4)
PICTURES, ROWS = random(3, 4, 6, 6), random(3, 4, 6)
CASES: dict[str, tuple[Callable[[], nn.Module], AnyUpdate, torch.Tensor]] = {
    "linear": (lambda: Pair(lambda: nn.Linear(4, 4)), full(4, 4), BATCH),
    "plain": (lambda: Pair(lambda: nn.Linear(4, 4)), lora(4, 4), BATCH),
    "ia3": (lambda: Pair(lambda: nn.Linear(4, 4)), Scaling(row=random(4)), BATCH),
    "ia3 in": (lambda: Pair(lambda: nn.Linear(4, 4)), Scaling(col=random(4)), BATCH),
    "ids": (lambda: Ids(lambda: nn.Embedding(9, 4)), lora(4, 9), torch.tensor([[1, 2, 5]])),
    "conv": (lambda: Pair(conv()), full(4, 4, 3, 3), PICTURES),
    "grouped": (lambda: Pair(conv(groups=2)), lora(4, 4, 3, 3, bias=random(4)), PICTURES),
    "rows": (written(lambda w: w[2:6]), full(9, 4), ROWS),
    "places": (written(lambda w: w[[5, 0, 7, 2]]), full(9, 4), ROWS),
}


@functools.cache
def base_of(case: str) -> fx.GraphModule:
    """The graph without an adapter: only read."""
    torch.manual_seed(0)
    make, _, x = CASES[case]
    return trace(make().eval(), (x,))


def built(case: str) -> fx.GraphModule:
    base, update = base_of(case), CASES[case][1]
    names = dict.fromkeys(site.path for site in sites(base))
    assert len(names) == 2
    return inject(base, Adapter("a", dict.fromkeys(names, update)))


def turned(node: Any) -> None:
    node.args = (node.args[1], node.args[0], *node.args[2:])


def put(node: Any, place: int, value: Any) -> None:
    node.args = (*node.args[:place], value, *node.args[place + 1 :])


def with_more(node: Any, args: Any = None, **more: Any) -> None:
    node.args, node.kwargs = node.args if args is None else args, more


def reader(node: Any, target: Any = None) -> Any:
    """Who reads a node; of several the one of a target."""
    return next(user for user in node.users if target in (None, user.target))


def wrapped(node: Any, who: Any, target: Any, *arguments: Any) -> None:
    """Makes a reader read a function of what it read."""
    with node.graph.inserting_before(who):
        who.replace_input_with(node, node.graph.call_function(target, (node, *arguments)))


def fetched(branch: Branch, part: str, of: str = "two.") -> Any:
    """The tensor of the other layer that has the name of one of this layer's."""
    mine = str(getattr(branch, part).target)
    other = of + mine.split(".", 1)[1]
    with branch.out.graph.inserting_before(branch.site):
        return branch.out.graph.get_attr(other)


def end(branch: Branch) -> Any:
    """The last call of the low-rank part."""
    return reader(whole(branch.up))


def whole(node: Any) -> Any:
    """What is taken of a factor or vector, as it is read."""
    while reader(node).target in (aten.slice.Tensor, aten.index_select.default, aten.view.default):
        node = reader(node)
    return node


def start(branch: Branch) -> Any:
    return reader(whole(branch.down))


def gained(branch: Branch) -> Any:
    return reader(whole(branch.gain))


MISSES: dict[str, tuple[str, Miss]] = {
    "the sum turned": ("plain", lambda g, b: turned(b.out)),
    "the sum weighted": ("plain", lambda g, b: with_more(b.out, alpha=2)),
    "the sum by keyword": (
        "plain", lambda g, b: with_more(b.out, args=(), self=b.out.args[0], other=b.out.args[1]),
    ),
    "a scale by keyword": (
        "plain",
        lambda g, b: [
            wrapped(end(b), b.out, aten.mul.Tensor, 2.0),
            with_more(b.out.args[1], args=(), self=end(b), other=2.0),
        ],
    ),
    "the layer taken from it": ("plain", lambda g, b: setattr(b.out, "target", aten.sub.Tensor)),
    "the shrink turned": ("plain", lambda g, b: turned(start(b))),
    "the expand turned": ("plain", lambda g, b: turned(end(b))),
    "another x": ("plain", lambda g, b: put(start(b), 0, b.out.args[0])),
    "a function of x": (
        "plain", lambda g, b: wrapped(start(b).args[0], start(b), aten.relu.default),
    ),
    "down of another layer": ("plain", lambda g, b: put(start(b), 1, fetched(b, "down"))),
    "up of another layer": ("plain", lambda g, b: put(end(b), 1, fetched(b, "up"))),
    "up in place of down": ("plain", lambda g, b: put(start(b), 1, b.up)),
    "down used again": ("plain", lambda g, b: put(end(b), 1, b.down)),
    "a function of down": ("plain", lambda g, b: wrapped(b.down, start(b), aten.abs.default)),
    "a function between": ("plain", lambda g, b: wrapped(start(b), end(b), aten.relu.default)),
    "half of it": ("plain", lambda g, b: put(b.out, 1, start(b))),
    "twice the scale": (
        "plain",
        lambda g, b: [wrapped(end(b), b.out, aten.mul.Tensor, 2.0) for _ in range(2)]
        and wrapped(b.out.args[1], b.out, aten.mul.Tensor, 3.0),
    ),
    "a scale that is a tensor": (
        "plain",
        lambda g, b: wrapped(end(b), b.out, aten.mul.Tensor, fetched(b, "down")),
    ),
    "a scale of another function": (
        "plain", lambda g, b: wrapped(end(b), b.out, aten.div.Tensor, 2.0),
    ),
    "terms turned": ("linear", lambda g, b: turned(b.out.args[1])),
    "a term weighted": ("linear", lambda g, b: with_more(b.out.args[1], alpha=3)),
    "bias of another layer": ("linear", lambda g, b: put(b.out.args[1], 1, fetched(b, "bias"))),
    "a gain turned": ("linear", lambda g, b: turned(gained(b))),
    "a gain of the sum": ("linear", lambda g, b: put(gained(b), 0, end(b))),
    "a gain of layer and bias": ("linear", lambda g, b: put(gained(b), 0, b.site)),
    "a gain less another bias": ("linear", lambda g, b: put(gained(b).args[0], 1, b.bias)),
    "a gain less twice the bias": ("linear", lambda g, b: with_more(gained(b).args[0], alpha=2)),
    "a gain of another layer": ("ia3", lambda g, b: put(gained(b), 1, fetched(b, "gain"))),
    "another padding index": ("ids", lambda g, b: put(start(b), 2, 3)),
    "other ids": ("ids", lambda g, b: wrapped(start(b).args[1], start(b), aten.add.Tensor, 1)),
    "another stride": ("conv", lambda g, b: put(start(b), 3, [2, 2])),
    "another padding": ("conv", lambda g, b: put(start(b), 4, [0, 0])),
    "a bias in the shrink": ("conv", lambda g, b: put(start(b), 2, b.bias)),
    "a stride in the expand": (
        "conv", lambda g, b: setattr(end(b), "args", (*end(b).args, [2, 2])),
    ),
    "another view of the bias": (
        "conv", lambda g, b: put(gained(b).args[0].args[1], 1, [1, -1, 1]),
    ),
    "groups in the shrink": ("grouped", lambda g, b: put(start(b), 6, 2)),
    "other groups in the expand": ("grouped", lambda g, b: put(end(b), 6, 1)),
    "another equation": ("rows", lambda g, b: put(start(b), 0, "abc,bd->adc")),
    "another equation behind": ("rows", lambda g, b: put(end(b), 0, "abc,bd->adc")),
    "another slice of up": ("rows", lambda g, b: put(whole(b.up), 2, 1)),
    "all of up": ("rows", lambda g, b: end(b).replace_input_with(whole(b.up), b.up)),
    "another slice of gain": ("rows", lambda g, b: put(reader(b.gain), 2, 1)),
    "another view of gain": ("rows", lambda g, b: put(whole(b.gain), 1, [1, -1])),
    "another slice of bias": ("rows", lambda g, b: put(reader(b.bias), 2, 1)),
    "places of another": (
        "places",
        lambda g, b: g.owning_module.get_buffer(whole(b.up).args[2].target).add_(1),
    ),
    "places along another axis": ("places", lambda g, b: put(whole(b.up), 1, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSES)
def test_a_near_miss_is_no_branch(name: str) -> None:
    case, change = MISSES[name]
    gm = built(case)
    one, two = branches(gm)
    assert (one.path[:3], two.path[:3]) == ("one", "two")
    change(gm.graph, one)
    assert one not in branches(gm)
    left = [b for b in branches(gm) if b.out is not b.base]  # the col may stay, alone
    assert left == [two]


COLS: dict[str, Miss] = {
    "turned": lambda g, b: turned(reader(b.col)),
    "of another layer": lambda g, b: put(reader(b.col), 1, fetched(b, "col")),
    "a function of it": lambda g, b: wrapped(b.col, reader(b.col), aten.abs.default),
    "by keyword": lambda g, b: with_more(
        reader(b.col), args=(), self=reader(b.col).args[0], other=b.col
    ),
    "added": lambda g, b: setattr(reader(b.col), "target", aten.add.Tensor),
}


@pytest.mark.parametrize("name", COLS)
def test_a_near_miss_scales_no_input(name: str) -> None:
    gm = built("ia3 in")
    one, two = branches(gm)
    COLS[name](gm.graph, one)
    assert branches(gm) == [two]


@pytest.mark.parametrize("part", ["down", "up", "bias"])
def test_a_part_of_another_adapter_is_none_of_this_one(part: str) -> None:
    gm = inject(built("linear"), Adapter("b", {"two": lora(4, 4, bias=random(4))}))
    one, two, also = branches(gm)
    assert [b.name for b in (one, two, also)] == ["a", "a", "b"]
    assert two.col is not None  # it scales what the layer reads, and is none of b
    assert also.col is None
    whose = {"down": start, "up": end, "bias": lambda b: b.out.args[1]}[part]
    put(whose(also), 1, getattr(two, part))
    assert branches(gm) == [one, two]


@pytest.mark.parametrize("case", CASES)
def test_every_part_is_found_and_named(case: str) -> None:
    found = branches(built(case))
    update = CASES[case][1]
    given = {name for name in ("bias", "row", "col") if getattr(update, name, None) is not None}
    # (IA)3 scales the layer's own bias too, by a bias of the branch.
    given |= {"down", "up"} if isinstance(update, Update) else set()
    given |= {"bias"} if isinstance(update, Scaling) and update.row is not None else set()
    for branch in found:
        parts = {"gain" if n == "row" else n for n in given}
        for part in ("down", "up", "bias", "gain", "col"):
            node = getattr(branch, part)
            assert (node is not None) == (part in parts)
            kind = {"down": "lora_A", "up": "lora_B"}.get(part, f"lora_{part}")
            assert node is None or str(node.target).endswith(f"{kind}.a")


def test_a_factor_that_is_read_elsewhere_too_is_still_a_factor() -> None:
    gm = built("plain")
    found = branches(gm)
    with gm.graph.inserting_after(found[0].out):
        gm.graph.call_function(aten.sum.default, (found[0].down,))
    assert branches(gm) == found


def test_calls_of_one_layer_on_one_x_have_a_branch_each() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.fc(x)) + torch.sin(self.fc(x))

    update = full(4, 4)
    gm = inject(trace(Twice().eval(), (BATCH,), frontend="symbolic"), Adapter("a", {"fc": update}))
    first, second = branches(gm)
    assert first.site is not second.site
    assert first.out is not second.out
    assert branches(StripLora()(gm).graph_module) == []


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_scale_and_dropout_are_read_as_they_stand(dropout: float, frontend: str) -> None:
    gm = trace(Pair(lambda: nn.Linear(4, 4)).eval(), (BATCH,), frontend=frontend)
    config = LoraConfig(r=2, alpha=3, dropout=dropout, target_modules=["one", "two"], seed=0)
    injected = inject(gm, config)
    one, two = branches(injected)
    assert one.scale == two.scale == 1.5
    (scaled,) = (n for n in end(one).users)
    put(scaled, 1, 2)  # no number of ours is whole
    assert branches(injected) == [two]


def test_a_dropout_of_something_else_is_none() -> None:
    gm = trace(Pair(lambda: nn.Linear(4, 4)).eval())
    config = LoraConfig(r=2, alpha=3, dropout=0.4, target_modules=["one", "two"], seed=0)
    injected = inject(gm, config)
    one, two = branches(injected)
    dropped = start(two).args[0]
    assert dropped.op == "call_module"
    put(dropped, 0, one.site)
    assert branches(injected) == [one]


def test_a_packed_projection_has_a_branch_at_each_of_its_calls() -> None:
    x = torch.randn(2, 5, 12)
    model = Attention(12, crossed=True).eval()
    gm = inject(trace(model, (x,), frontend="export"), Adapter("a", {"layer": full(36, 12)}))
    found = branches(gm)
    assert [b.path for b in found] == ["layer", "layer"]
    assert {str(b.up.target) for b in found if b.up} == {"layer.lora_B.a"}
    taken = [whole(found[0].up), whole(found[1].up)]
    assert relative(gm(x), model(x)) > 1e-2
    assert all(col_of(site) is not None for site in sites(gm) if site.path == "layer")
    assert len(taken) == 2
