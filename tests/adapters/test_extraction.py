"""The difference of two models as an adapter, against what made the difference."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn

from lora_fx import AdapterError, extract, fold, inject, load_adapter, save_adapter, text, trace
from lora_fx.adapters.source_record import is_embedding
from lora_fx.graph.lazy_tensor import LazyTensor, get_unevaluated
from lora_fx.layers.sites import sites
from lora_fx.testing import Computes, make_adapter, relative, zoo

ARCHITECTURES = ["bert", "gpt2", "llama", "mlp", "qwen2", "t5", "vit"]
# qwen2's case has no bias of its own to train beside its tied head, and T5 has no biases.
WITHOUT_BIAS = ["qwen2", "t5"]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def moved(model: Any, seed: int = 3, **ranks: int) -> Any:
    """A copy whose layers are moved: by so many products of rank 1, or wholly if 0."""
    tuned = copy.deepcopy(model)
    make = torch.Generator().manual_seed(seed)
    for path, rank in ranks.items():
        weight = tuned.get_parameter(f"{path}.weight")
        (out, into), dtype = weight.shape, weight.dtype
        up = torch.randn(out, rank or into, generator=make, dtype=torch.float64)
        down = torch.randn(rank or into, into, generator=make, dtype=torch.float64)
        with torch.no_grad():
            weight.copy_((weight.double() + 0.3 * up @ down).to(dtype))
    return tuned


def merged_by_peft(case: Any, architecture: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model that PEFT trained (randomised) and merged, and what it added to each layer."""
    bias = "none" if architecture in WITHOUT_BIAS else "all"
    config = PeftConfig(r=3, lora_alpha=6, target_modules=case.targets, bias=bias)
    peft = get_peft_model(copy.deepcopy(case.model), config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.15 if "lora_" in name else 1.0)
    added = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in peft.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    return peft.merge_and_unload(), added


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")  # PEFT, about Conv1D
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_peft_merged_is_found_again(architecture: str) -> None:
    case, gm = zoo(architecture)
    merged, added = merged_by_peft(case, architecture)
    adapter, errors, left_out = extract(case.model, merged, rank=3)
    assert adapter.updates.keys() == added.keys() == errors.keys()
    assert left_out == {}
    is_conv1d = architecture == "gpt2"
    for path, delta in added.items():
        found = adapter.updates[path].delta()
        assert distance(found, delta.T if is_conv1d else delta) <= 1e-6
        assert distance(0.9 * found, delta.T if is_conv1d else delta) > 5e-2
        assert errors[path] <= 1e-6
    with torch.no_grad():
        wanted = merged(**case.others)
        assert relative(inject(gm, adapter)(**case.others), wanted) <= 1e-6
        assert relative(fold(inject(gm, adapter))(**case.others), wanted) <= 1e-5
        assert relative(gm(**case.others), wanted) > 1e-2


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")  # PEFT, about Conv1D
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_graphs_tell_what_their_modules_tell(architecture: str) -> None:
    case, gm = zoo(architecture)
    merged, _ = merged_by_peft(case, architecture)
    tuned = trace(merged, (), case.inputs)  # a sixth of the time that free axes take
    before = text(gm), text(tuned)
    by_module, by_graph = extract(case.model, merged, rank=3), extract(gm, tuned, rank=3)
    assert (text(gm), text(tuned)) == before
    assert by_graph.adapter.updates.keys() == by_module.adapter.updates.keys()
    for path, update in by_graph.adapter.updates.items():
        assert torch.equal(update.delta(), by_module.adapter.updates[path].delta())
    replaced = by_module.adapter.replacements
    assert by_graph.adapter.replacements.keys() == replaced.keys()
    assert all(torch.equal(t, replaced[n]) for n, t in by_graph.adapter.replacements.items())


@pytest.mark.parametrize("architecture", ["gpt2", "mlp", "qwen2"])
def test_a_folded_graph_is_read_one_weight_at_a_time(architecture: str) -> None:
    case, gm = zoo(architecture)
    targets = {s.path: s.shape for s in sites(gm) if s.path.endswith(tuple(case.targets))}
    folded = fold(inject(gm, make_adapter(targets, scale=0.1)))
    reads = sorted({str(node.target) for node in folded.graph.nodes if node.op == "get_attr"})
    lazy = [p for p in reads if isinstance(get_unevaluated(folded, p), LazyTensor)]
    assert len([p for p in lazy if p.endswith(".weight")]) == len(targets)
    adapter, errors, _ = extract(gm, folded, rank=2)
    assert adapter.updates.keys() == targets.keys() == errors.keys()
    kept = [p for p in lazy if get_unevaluated(folded, p)._cached is not None]
    assert kept == []
    with torch.no_grad():
        wanted = folded(**case.others)
        assert relative(inject(gm, adapter)(**case.others), wanted) <= 1e-5
        assert relative(gm(**case.others), wanted) > 1e-3


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_a_fixed_rank_is_the_nearest_there_is(
    shape: tuple[int, int], true: int, rank: int, seed: int
) -> None:
    base = nn.Sequential(nn.Linear(shape[1], shape[0])).double()
    tuned = moved(base, seed, **{"0": true})
    adapter, errors, _ = extract(base, tuned, rank=rank)
    delta = (tuned[0].weight - base[0].weight).detach()
    values = torch.linalg.svdvals(delta)
    update = adapter.updates["0"]
    assert (update.scale, update.shape) == (1.0, shape)
    assert update.rank <= min(rank, *shape)
    expected = float(values[rank:].norm() / values.norm())
    assert errors["0"] == pytest.approx(expected, abs=1e-13)
    assert distance(update.delta(), delta) == pytest.approx(errors["0"], abs=1e-13)


@settings(deadline=None, max_examples=60)
@given(st.floats(0.05, 1.0), st.integers(0, 99))
def test_energy_is_the_least_rank_that_holds_it(energy: float, seed: int) -> None:
    base = nn.Sequential(nn.Linear(8, 9)).double()
    tuned = moved(base, seed, **{"0": 0})
    adapter, errors, _ = extract(base, tuned, energy=energy)
    values = torch.linalg.svdvals((tuned[0].weight - base[0].weight).detach()).square()
    rank = adapter.updates["0"].rank
    assert values[:rank].sum() >= (energy - 1e-12) * values.sum()
    assert rank == 1 or values[: rank - 1].sum() < energy * values.sum()
    assert errors["0"] ** 2 <= 1 - energy + 1e-12


def test_the_rank_is_that_of_the_difference_where_less_is_asked_for(ragged: Any) -> None:
    tuned = moved(ragged.double(), wide=2, again=1)
    for options in ({"rank": 4}, {"energy": 1.0}):
        adapter, errors, _ = extract(ragged, tuned, **options)
        assert {path: u.rank for path, u in adapter.updates.items()} == {"wide": 2, "again": 1}
        assert max(errors.values()) <= 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_models_are_compared_in_float32(dtype: torch.dtype, ragged: Any) -> None:
    base = ragged.to(dtype)
    tuned = moved(base, wide=0)
    adapter, errors, _ = extract(base, tuned, rank=3)
    update = adapter.updates["wide"]
    assert (update.up.dtype, update.down.dtype) == (torch.float32, torch.float32)
    delta = tuned.wide.weight.double() - base.wide.weight.double()
    assert distance(update.delta(), delta) <= 1e-6
    assert distance(tuned.wide.weight - base.wide.weight, delta) > 1e-5
    assert errors["wide"] <= 1e-6


def test_models_of_two_dtypes(ragged: Any) -> None:
    tuned = moved(copy.deepcopy(ragged).double(), wide=1)
    adapter, errors, _ = extract(ragged, tuned, rank=1)
    assert adapter.updates.keys() == {"wide"}
    assert (adapter.updates["wide"].up.dtype, errors["wide"] < 1e-14) == (torch.float64, True)
    assert not adapter.replacements


def itself(model: nn.Module) -> nn.Module:
    return model


class Mixed(nn.Module):
    """An embedding, a linear layer, a norm, and convolutions with groups and without."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc, self.norm = nn.Embedding(11, 6), nn.Linear(6, 5), nn.LayerNorm(5)
        self.conv = nn.Conv1d(5, 4, 3, stride=2)
        self.grouped = nn.Conv1d(4, 6, 2, groups=2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.tanh(self.fc(self.table(ids))))
        return self.grouped(torch.relu(self.conv(x.transpose(1, 2))))


CHANGED = {"table.weight", "fc.bias", "norm.weight", "conv.weight", "grouped.weight"}


def mixed() -> tuple[Mixed, Mixed, torch.Tensor]:
    """A model, one whose tensors are changed, by rank 1 where that can be said, and an input."""
    torch.manual_seed(0)
    base = Mixed().eval()
    tuned = moved(base, fc=1)
    with torch.no_grad():
        for name in sorted(CHANGED):
            tuned.get_parameter(name).add_(0.5)
    ids = torch.randint(0, 11, (4, 7), generator=torch.Generator().manual_seed(1))
    return base, tuned, ids


@pytest.mark.parametrize("by_graph", [False, True])
def test_tables_and_kernels_are_updated_and_what_is_no_matrix_is_replaced(by_graph: bool) -> None:
    base, tuned, ids = mixed()
    form = (lambda model: trace(model, (ids,))) if by_graph else itself
    adapter, errors, left_out = extract(form(base), form(tuned), rank=1)
    assert set(adapter.updates) == {"table", "fc", "conv"}
    assert set(adapter.replacements) == {"fc.bias", "norm.weight", "grouped.weight"}
    assert left_out == {}
    assert max(errors.values()) <= 1e-6
    table, conv = adapter.updates["table"], adapter.updates["conv"]
    assert (table.shape, conv.shape) == ((6, 11), (4, 5, 3))
    assert table.stored is not None
    assert dict(table.stored.settings) == {"layer": "embedding"}
    for update, path, turn in ((table, "table", True), (conv, "conv", False)):
        before, after = (m.get_parameter(f"{path}.weight").detach() for m in (base, tuned))
        found = update.weight(before.T if turn else before)
        assert distance(found, after.T if turn else after) <= 1e-6
        assert distance(before, after) > 1e-2
    found = inject(trace(base, (ids,)), adapter)(ids)
    assert distance(found, tuned(ids)) <= 1e-6
    assert distance(base(ids), tuned(ids)) > 1e-2


def test_a_kernel_is_cut_as_a_matrix() -> None:
    torch.manual_seed(0)
    base, tuned = nn.Conv2d(3, 5, (2, 4)), nn.Conv2d(3, 5, (2, 4))
    adapter, errors, _ = extract(nn.Sequential(base), nn.Sequential(tuned), rank=2)
    gap = (tuned.weight - base.weight).detach()
    values = torch.linalg.svdvals(gap.flatten(1))
    assert adapter.updates["0"].shape == (5, 3, 2, 4)
    assert errors["0"] == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-5)
    assert distance(adapter.updates["0"].delta(), gap) == pytest.approx(errors["0"], rel=1e-5)


def test_replacements_are_copies() -> None:
    base, tuned, _ = mixed()
    adapter, _, _ = extract(base, tuned, rank=1)
    kept = adapter.replacements["grouped.weight"].clone()
    with torch.no_grad():
        tuned.grouped.weight.zero_()
    assert torch.equal(adapter.replacements["grouped.weight"], kept)


def test_counters_are_left_out_by_name() -> None:
    base = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    tuned = moved(base, **{"0": 1})
    tuned[1](torch.randn(4, 5))
    adapter, _, left_out = extract(base, tuned, rank=1)
    assert set(adapter.replacements) == {"1.running_mean", "1.running_var"}
    assert left_out == {
        "1.num_batches_tracked": "an adapter holds no tensor of torch.int64",
    }


def test_equal_models_have_an_empty_difference(ragged: Any) -> None:
    for other in (ragged, copy.deepcopy(ragged)):
        adapter, errors, left_out = extract(ragged, other, energy=0.9)
        assert (dict(adapter.updates), dict(adapter.replacements)) == ({}, {})
        assert (errors, left_out, adapter.name) == ({}, {}, "extracted")


class Tied(nn.Module):
    """Two linear layers of one weight, one module of two names, a head tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.one = nn.Linear(6, 6)
        self.two = nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.other = self.last = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.two(torch.tanh(self.one(self.embed(ids)))))
        return self.head(self.last(torch.tanh(self.other(x))))


def graph_of(model: nn.Module) -> Any:
    return trace(model, (torch.zeros(4, 7, dtype=torch.long),))


@pytest.mark.parametrize("form", [itself, graph_of])
def test_a_shared_weight_is_compared_once(
    form: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    base = Tied().eval()
    tuned = moved(base, one=1, last=2)
    with torch.no_grad():
        tuned.embed.weight.add_(0.1)
    compared = spy(monkeypatch)
    adapter, _, _ = extract(form(base), form(tuned), rank=2)
    assert len(compared) == 2
    assert set(adapter.updates) == {"one", "two", "other", "last"}
    assert adapter.updates["one"] is adapter.updates["two"]
    assert set(adapter.replacements) == {"embed.weight", "head.weight"}
    ids = torch.randint(0, 11, (4, 7), generator=torch.Generator().manual_seed(1))
    found = inject(graph_of(base), adapter)(ids)
    assert distance(found, tuned(ids)) <= 1e-6
    assert distance(base(ids), tuned(ids)) > 1e-2


def spy(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[torch.Tensor]]:
    """Watches the differences that are made: when one is, no other may be alive."""
    # `lora_fx.extract` is the function; the module is only found here.
    module = sys.modules[extract.__module__]
    made: list[weakref.ref[torch.Tensor]] = []
    original = module._difference

    def watched(*arguments: Any) -> torch.Tensor:
        assert all(ref() is None for ref in made)
        gap: torch.Tensor = original(*arguments)
        made.append(weakref.ref(gap))
        return gap

    monkeypatch.setattr(module, "_difference", watched)
    return made


def test_one_difference_is_in_memory_at_a_time(
    ragged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = spy(monkeypatch)
    adapter, _, _ = extract(ragged, moved(ragged, wide=0, again=0, narrow=0), rank=1)
    assert len(compared) == len(adapter.updates) == 3
    tensors = [t for u in adapter.updates.values() for t in (u.up, u.down)]
    assert all(t.untyped_storage().nbytes() == t.numel() * 4 for t in tensors)


def test_a_linear_layer_at_the_root(x: torch.Tensor) -> None:
    torch.manual_seed(0)
    base, tuned = nn.Linear(3, 5), nn.Linear(3, 5)
    adapter, _, _ = extract(base, tuned, rank=3)
    by_graph, _, _ = extract(trace(base), trace(tuned), rank=3)
    assert set(adapter.updates) == set(by_graph.updates)
    assert set(adapter.replacements) == set(by_graph.replacements) == {"bias"}
    found = inject(trace(base), adapter)(x)
    assert distance(found, tuned(x)) <= 1e-6
    assert distance(base(x), tuned(x)) > 1e-2


def test_it_is_saved_and_loaded_as_any_adapter(ragged: Any, tmp_path: Any) -> None:
    tuned = moved(ragged, wide=2, narrow=1)
    with torch.no_grad():
        tuned.wide.bias.add_(1.0)
    adapter = extract(ragged, tuned, rank=2, name="mine").adapter
    assert not any(is_embedding(update.stored) for update in adapter.updates.values())
    save_adapter(adapter, tmp_path / "mine")
    again = load_adapter(tmp_path / "mine")
    assert sorted(str(again).splitlines()) == sorted(str(adapter).splitlines())
    x = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(1))
    assert distance(inject(trace(ragged), again)(x), tuned(x)) <= 1e-6
    assert distance(ragged(x), tuned(x)) > 1e-2


def sequence(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("base", "tuned", "message"),
    [
        (sequence(nn.Linear(3, 5)), sequence(nn.Linear(3, 5), nn.Linear(5, 2)),
         r"the base alone has nothing, the tuned one alone 1\.weight, 1\.bias\. Merge or fold"),
        (sequence(nn.Linear(3, 5)), sequence(nn.Linear(3, 5, bias=False)),
         r"the base alone has 0\.bias, the tuned one alone nothing"),
        (sequence(nn.Linear(3, 5)), sequence(nn.Linear(4, 5)),
         r"0\.weight: shape \(5, 3\) in the base, \(5, 4\) in the tuned model"),
        (trace(sequence(nn.Linear(3, 5))), sequence(nn.Linear(3, 5)), "trace both, or neither"),
        (trace(sequence(nn.Linear(3, 5))), trace(sequence(nn.Linear(3, 5), nn.ReLU())), None),
        (trace(sequence(nn.Linear(3, 5))), trace(sequence(nn.Linear(3, 5), nn.Linear(5, 2))),
         r"the tuned one alone 1 linear \(call 1, tensor 1\)"),
        ({}, sequence(nn.Linear(3, 5)), "found a dict, expected a module or a graph"),
        (nn.Linear(3, 5, device="meta"), nn.Linear(3, 5), "weight: the tensor has no data"),
    ],
)  # fmt: skip
def test_models_of_other_layers_are_refused(base: Any, tuned: Any, message: str | None) -> None:
    if message is None:
        assert extract(base, tuned, rank=1).adapter.updates
        return
    with pytest.raises(AdapterError, match=message):
        extract(base, tuned, rank=1)


def test_a_square_conv1d_is_not_taken_for_a_linear_layer() -> None:
    from transformers.pytorch_utils import Conv1D

    with pytest.raises(AdapterError, match=r"the base alone has 0\.weight \(in, out\)"):
        extract(sequence(Conv1D(5, 5)), sequence(nn.Linear(5, 5)), rank=1)


@pytest.mark.parametrize("behind", [torch.tanh, lambda y: y * 2, lambda y: y + 1])
def test_calls_of_one_layer_that_a_fold_made_of_two_weights_are_refused(behind: Any) -> None:
    fc = nn.Linear(3, 3)
    gm = trace(Computes(lambda m, x: behind(m.fc(torch.sin(m.fc(x)))), fc=fc), (torch.randn(4, 3),))
    tuned = fold(inject(gm, make_adapter({"fc": (3, 3)})))
    if behind is torch.tanh:
        assert list(extract(gm, tuned, rank=2).adapter.updates) == ["fc"]
        return
    with pytest.raises(AdapterError, match=r"^fc\S*: of its calls not all read the same tensor"):
        extract(gm, tuned, rank=2)


def test_a_graph_with_branches_is_to_be_folded_first(ragged: Any) -> None:
    gm = trace(ragged)
    with pytest.raises(AdapterError, match=r"differ in structure.*fold adapters first"):
        extract(gm, inject(gm, make_adapter({"wide": (5, 3)})), rank=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_difference_that_is_not_finite_is_refused(value: float, ragged: Any) -> None:
    tuned = copy.deepcopy(ragged)
    with torch.no_grad():
        tuned.again.weight[2, 1] = value
    with pytest.raises(AdapterError, match=r"again\.weight: the difference holds NaN or infinity"):
        extract(ragged, tuned, rank=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "rank is None and energy None: give one of the two"),
        ({"rank": 2, "energy": 0.9}, "rank is 2 and energy 0.9: give one of the two"),
        ({"rank": 0}, "rank is 0, expected a positive integer"),
        ({"energy": 0.0}, "energy is 0.0, expected a fraction"),
        ({"energy": 1.5}, "energy is 1.5, expected a fraction"),
        ({"energy": float("nan")}, "energy is nan, expected a fraction"),
        ({"energy": "0.9"}, "energy is '0.9', expected a fraction"),
        ({"rank": 2, "name": "a.b"}, "letters, digits and underscores"),
    ],
)
def test_options_that_say_nothing_are_refused(
    options: dict[str, Any], message: str, ragged: Any
) -> None:
    with pytest.raises(AdapterError, match=message):
        extract(ragged, ragged, **options)
