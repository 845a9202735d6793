"""Parameters that no layer alone reads: the weights of many experts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import fx, nn
from torch.nn import functional as F

import lora_fx
from lora_fx import (
    Adapter,
    AdapterError,
    LoraConfig,
    adapter_from,
    explain,
    export_adapter,
    fold,
    inject,
    load_adapter,
    text,
    to_onnx,
    trace,
    unfold,
)
from lora_fx.adapters.adapter import Scaling, Update, WeightUpdate
from lora_fx.adapters.other_updates import Function, added
from lora_fx.adapters.row_blocks import Block, joined
from lora_fx.adapters.updates import AnyUpdate, Stacks
from lora_fx.algebra.matrix_expr import constant, product, scaled
from lora_fx.export.program.example_inputs import example_inputs
from lora_fx.export.program.without_retracing import program_of
from lora_fx.injection.branches import adapters_at
from lora_fx.injection.injected_adapters import remember
from lora_fx.layers.sites import by_path
from lora_fx.passes import FoldLora, StripLora
from lora_fx.reference.reference_run import weight_form
from lora_fx.testing import Between, relative

SIZES: dict[str, Any] = {
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 31,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "use_cache": False,
    "pad_token_id": 0,
}
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def mixtral() -> tuple[Any, fx.GraphModule]:
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES)).eval()
    model.set_experts_implementation("batched_mm")
    ids = torch.randint(1, 31, (2, 5))
    axes = {"input_ids": {0: "batch", 1: "length"}}
    return model, trace(model, (), {"input_ids": ids}, dynamic_shapes=axes)


def saved(model: Any, path: Path, targets: list[str]) -> Any:
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=targets
    )
    owner = peft.get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in owner.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.4)
    owner.save_pretrained(path)
    return owner.eval()


@pytest.mark.parametrize("targets", [TARGETS, TARGETS[:1], TARGETS[1:]])
def test_experts_equal_peft_injected_folded_and_in_onnx(
    mixtral: Any, targets: list[str], tmp_path: Path
) -> None:
    model, gm = mixtral
    owner = saved(model, tmp_path / "french", targets)
    adapter = load_adapter(tmp_path / "french", base=model)
    injected = inject(gm, adapter)
    folded = fold(injected)
    ids = torch.randint(1, 31, (3, 7))
    with torch.no_grad():
        wanted = owner(ids).logits
        assert relative(injected(input_ids=ids).logits, wanted) <= 1e-6
        assert relative(folded(input_ids=ids).logits, wanted) <= 1e-5
        assert relative(gm(input_ids=ids).logits, wanted) > 1e-2
    assert "lora_" not in text(folded)
    assert FoldLora()(folded).modified is False
    assert text(unfold(folded)) == text(injected)
    assert text(StripLora()(injected).graph_module) == text(gm)
    assert program_of(folded, example_inputs(folded, None, None, None)) is not None  # as traced
    path = tmp_path / "m.onnx"
    lora_fx.to_onnx(folded, path)
    (logits,) = lora_fx.Session(path).run({"input_ids": ids}).values()
    assert relative(torch.from_numpy(logits), wanted) <= 1e-5


class Experts(nn.Module):
    """Square weights of three experts, called ``weight``, which the model itself transposes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x.unsqueeze(1), self.weight.transpose(1, 2)).sum(1)


@pytest.mark.parametrize("path", ["layer", "layer.weight"])
def test_calls_of_the_model_on_a_parameter_stay_its_own(path: str) -> None:
    torch.manual_seed(0)
    model, x, delta = Between(Experts()).eval(), torch.randn(4, 7, 5), torch.randn(3, 5, 5)
    gm = trace(model, (x,))
    injected = inject(gm, Adapter("a", {path: WeightUpdate("full", added(delta), (3, 5, 5))}))
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.layer.weight += delta
        assert relative(injected(x), tuned(x)) <= 1e-6
        assert relative(fold(injected)(x), tuned(x)) <= 1e-6
        assert relative(gm(x), tuned(x)) > 1e-2
    stripped = StripLora()(injected).graph_module
    assert text(stripped) == text(gm)
    assert relative(stripped(x), model(x)) == 0


OUT, IN = 5, 3


def difference(*shape: int) -> WeightUpdate:
    return WeightUpdate("full", added(torch.randn(shape)), shape)


def turned(stacks: Stacks = "on any", out: int = OUT, into: int = IN) -> WeightUpdate:
    """W R, of any R."""
    return WeightUpdate("oft", right(torch.randn(into, into)), (out, into), stacks=stacks)


def right(matrix: torch.Tensor) -> Function:
    return lambda weight: product(weight, constant(matrix))


def lora(out: int = OUT, into: int = IN) -> Update:
    return Update(torch.randn(2, into), torch.randn(out, 2), 0.5)


def dora() -> WeightUpdate:
    return difference(OUT, IN).with_magnitude(torch.rand(OUT) + 0.5)


def model_of(layer: nn.Module) -> tuple[nn.Module, Any]:
    model = Between(layer).eval()
    return model, trace(model, (torch.randn(4, 7, IN),))


@pytest.fixture
def base() -> tuple[nn.Module, Any, torch.Tensor]:
    torch.manual_seed(0)
    return *model_of(nn.Linear(IN, OUT)), torch.randn(4, 7, IN)


def with_weight(model: nn.Module, weight: torch.Tensor) -> nn.Module:
    model = copy.deepcopy(model)
    layer: Any = model.layer
    layer.weight.data.copy_(weight)
    return model


def adapters(*updates: AnyUpdate, path: str = "layer") -> list[Adapter]:
    return [Adapter(name, {path: one}) for name, one in zip("abcd", updates, strict=False)]


@torch.no_grad()
def agrees(gm: Any, several: list[Adapter], x: torch.Tensor, wanted: torch.Tensor) -> Any:
    """Injected, by weights and folded; with one of them dropped, none; each stripped by name."""
    injected = inject(gm, several)
    form: Any = weight_form(injected)
    folded = fold(injected)
    for found in (injected(x), form(x), folded(x)):
        assert relative(found, wanted) <= 1e-5
    assert "lora_" not in text(folded)
    for adapter in several:
        rest = [other for other in several if other is not adapter]
        left = StripLora(adapter.name)(injected).graph_module
        assert text(left) == text(inject(gm, rest))
        assert relative(left(x), wanted) > 1e-2
        assert torch.equal(left(x), inject(gm, rest)(x))
    assert text(StripLora()(injected).graph_module) == text(gm)
    return injected


ORDERS: dict[str, tuple[list[Stacks], list[int]]] = {
    "the later acts on the earlier": (["on any"] * 3, [0, 1, 2]),
    "of the inputs, the later comes first": (["inputs first"] * 3, [2, 1, 0]),
    "such a run starts where another ends": (["on any", "inputs first", "inputs first"], [0, 2, 1]),
}


@pytest.mark.parametrize("case", ORDERS)
def test_each_acts_on_what_the_one_before_it_made(case: str, base: Any) -> None:
    model, gm, x = base
    kinds, order = ORDERS[case]
    several = adapters(*map(turned, kinds))
    weights = [model.layer.weight, model.layer.weight]
    for at in order:
        weights[0] = several[at].updates["layer"].weight(weights[0])
    for at in reversed(order):
        weights[1] = several[at].updates["layer"].weight(weights[1])
    wanted, other = (with_weight(model, weight)(x) for weight in weights)
    agrees(gm, several, x, wanted)
    assert relative(other, wanted) > 1e-2


def test_a_run_of_rotations_ends_where_another_acts(base: Any) -> None:
    model, gm, x = base
    several = adapters(turned("inputs first"), turned(), turned("inputs first"))
    weight = model.layer.weight
    for adapter in several:
        weight = adapter.updates["layer"].weight(weight)
    injected = inject(gm, several)
    form: Any = weight_form(injected)
    with torch.no_grad():
        wanted = with_weight(model, weight)(x)
        for found in (injected(x), form(x), fold(injected)(x)):
            assert relative(found, wanted) <= 1e-5
        assert relative(inject(gm, several[:2])(x), wanted) > 1e-2


def test_an_adapter_that_is_stripped_and_injected_again_is_the_last(base: Any) -> None:
    _, gm, x = base
    several = adapters(turned("inputs first"), turned("inputs first"))
    stripped = StripLora("a")(inject(gm, several)).graph_module
    with torch.no_grad():
        again, wanted = inject(stripped, several[0]), inject(gm, several[::-1])
        assert relative(again(x), wanted(x)) <= 1e-6
        form: Any = weight_form(again)
        assert relative(form(x), wanted(x)) <= 1e-6
        assert relative(inject(gm, several)(x), wanted(x)) > 1e-2


def test_what_is_added_comes_behind_whatever_acts(base: Any) -> None:
    """``W R + D + up down``: low rank stands beside, in any order but before a rotation."""
    model, gm, x = base
    turn, full, low = turned(), difference(OUT, IN), lora()
    own = model.layer.weight
    weight = turn.weight(own) + full.weight(own) - own + low.weight(own) - own
    wanted = with_weight(model, weight)(x)
    for order in ([turn, full, low], [turn, low, full]):
        injected = agrees(gm, adapters(*order), x, wanted)
        (site,) = by_path(injected)["layer"]
        assert sorted(adapters_at(site)) == ["a", "b", "c"]
    before = turn.weight(full.weight(own)) + low.weight(own) - own
    agrees(gm, adapters(full, turn, low), x, with_weight(model, before)(x))


def test_a_scale_of_none_leaves_the_other(base: Any) -> None:
    _, gm, x = base
    kept = difference(OUT, IN)
    for scale in (0.0, 1.1):
        delta = torch.randn(OUT, IN)
        one, two = adapters(WeightUpdate("full", added(scale * delta), (OUT, IN)), kept)
        loud = Adapter("a", {"layer": WeightUpdate("full", added(delta), (OUT, IN))})
        with torch.no_grad():
            found, alone = inject(gm, [one, two])(x), inject(gm, two)(x)
            assert (relative(found, alone) <= 1e-6) is (scale == 0)
            assert relative(found, inject(gm, [loud, two])(x)) > 1e-2


class Packed(nn.Module):
    """One weight of two layers, each of which reads its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(OUT, IN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.weight.split([2, 3])
        return torch.cat([torch.tanh(F.linear(x, one)), F.linear(x, two)], -1)


PARTS: dict[str, AnyUpdate] = {
    "all": difference(OUT, IN),
    "all, turned": turned(),
    "rows": joined([Block(difference(2, IN), range(2))], (OUT, IN)),
    "rows, turned": joined([Block(turned(out=3), range(2, 5))], (OUT, IN)),
    "rows of both": joined(
        [Block(difference(2, IN), range(2)), Block(lora(3), range(2, 5))], (OUT, IN)
    ),
}


@pytest.mark.parametrize("second", PARTS)
@pytest.mark.parametrize("first", PARTS)
def test_a_packed_weight_is_made_anew_twice(first: str, second: str) -> None:
    torch.manual_seed(0)
    model, gm = model_of(Packed())
    x, one, two = torch.randn(4, 7, IN), PARTS[first], PARTS[second]
    own: Any = model.layer
    wanted = with_weight(model, two.weight(one.weight(own.weight)))(x)
    agrees(gm, adapters(one, two), x, wanted)


OTHERS: dict[str, tuple[nn.Module, tuple[int, ...], torch.Tensor]] = {
    "embedding": (nn.Embedding(11, 5), (5, 11), torch.randint(11, (4, 7))),
    "conv1d": (nn.Conv1d(4, 6, 3), (6, 4, 3), torch.randn(2, 4, 9)),
    "conv2d grouped": (nn.Conv2d(4, 6, (3, 2), groups=2), (6, 2, 3, 2), torch.randn(2, 4, 9, 8)),
    "transposed grouped": (
        nn.ConvTranspose1d(4, 6, 3, groups=2), (6, 2, 3), torch.randn(2, 4, 9),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_are_made_anew_twice(name: str) -> None:
    torch.manual_seed(0)
    layer, shape, x = OTHERS[name]
    model = nn.Sequential(layer).eval()
    gm = trace(model, (x,))
    factor = constant(torch.rand(shape[0], 1) + 0.5)
    acts = WeightUpdate("rows", lambda weight: scaled(factor, weight), shape, stacks="on any")
    several = adapters(difference(*shape), acts, difference(*shape), path="0")
    (site,) = by_path(gm)["0"]
    with torch.no_grad():
        weight = site.type.canonical("weight", next(layer.parameters()), site.groups)
        for adapter in several:
            weight = adapter.updates["0"].weight(weight)
        tuned = copy.deepcopy(model)
        next(tuned.parameters()).copy_(site.type.store("weight", weight, site.groups))
        agrees(gm, several, x, tuned(x))


class Uncalled(nn.Module):
    """Square weights of three experts, which no layer alone reads."""

    def __init__(self) -> None:
        super().__init__()
        self.many = nn.Parameter(torch.randn(3, 5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...i,eoi->...o", x, self.many.tanh())


def test_a_parameter_is_made_anew_twice_the_later_acting_on_the_earlier() -> None:
    torch.manual_seed(0)
    model, gm = model_of(Uncalled())
    factor, x = constant(torch.rand(3, 1) + 0.5), torch.randn(4, 7, IN)
    acts = WeightUpdate("rows", lambda w: scaled(factor, w), (3, 5, 3), stacks="on any")
    several = adapters(difference(3, 5, 3), acts, path="layer.many")
    own: Any = model.layer
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        made = several[0].updates["layer.many"].weight(own.many)
        tuned.layer.many.copy_(several[1].updates["layer.many"].weight(made))
        agrees(gm, several, x, tuned(x))
    never = WeightUpdate("rows", lambda w: scaled(factor, w), (3, 5, 3))
    inject(gm, adapters(never, path="layer.many"))  # alone it acts on the base's
    with pytest.raises(AdapterError, match=r"^layer\.many: .* its difference from W depends on; f"):
        inject(gm, adapters(difference(3, 5, 3), never, path="layer.many"))


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "norm of what the first made": (turned, dora, "its difference from W depends on; fold the"),
    "no expression says": (
        turned, lambda: WeightUpdate("mine", right(torch.eye(3)), (OUT, IN)), "depends on; fold",
    ),
    "scaled outputs": (
        lambda: Scaling(row=torch.rand(OUT)), turned, "a scales what the layer reads or gives; f",
    ),
    "scaled inputs": (
        lambda: Scaling(col=torch.rand(IN)), turned, "a scales what the layer reads or gives; f",
    ),
    "scaling of inputs": (
        lambda: difference(OUT, IN), lambda: Scaling(col=torch.rand(IN)), "which has no sum with",
    ),
    "scaling of outputs": (
        lambda: difference(OUT, IN), lambda: Scaling(row=torch.rand(OUT)), "first changed that; f",
    ),
    "acting on a branch": (
        lora, turned, "stands beside it, out of its reach; give b before a; or fold",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused_and_folding_the_first_works(case: str, base: Any) -> None:
    model, gm, x = base
    first, second, message = REFUSED[case]
    one, two = adapters(first(), second())
    with pytest.raises(AdapterError, match=message) as refused:
        inject(gm, [one, two])
    assert "layer" in str(refused.value)
    own = model.layer.weight
    update = two.updates["layer"]
    weight = update.weight(one.updates["layer"].weight(own))
    shift = one.updates["layer"].shift(lambda: model.layer.bias)
    tuned = with_weight(model, weight)
    with torch.no_grad():
        layer: Any = tuned.layer
        layer.bias += 0 if shift is None else shift
        bias = update.shift(lambda: layer.bias)
        layer.bias += 0 if bias is None else bias
        assert relative(inject(fold(inject(gm, one)), two)(x), tuned(x)) <= 1e-6
        assert relative(gm(x), tuned(x)) > 1e-2


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_starts_out_of_a_weight_does_not_lose_an_adapter_in_it(start: str, base: Any) -> None:
    _, gm, x = base
    one = Adapter("a", {"layer": difference(OUT, IN)})
    fresh = LoraConfig(r=2, alpha=4, target_modules=["layer"], init=start, name="b")
    with pytest.raises(AdapterError, match=r"layer: .* out of the weight, and a has made that"):
        inject(gm, [one, fresh])
    with torch.no_grad():
        folded = inject(fold(inject(gm, one)), fresh)
        assert relative(folded(x), inject(gm, one)(x)) <= 1e-5
        assert relative(folded(x), gm(x)) > 1e-2


def test_a_name_is_taken_by_an_adapter_in_the_weight(base: Any) -> None:
    _, gm, _ = base
    one = Adapter("a", {"layer": difference(OUT, IN)})
    with pytest.raises(AdapterError, match=r"already has an adapter of that name at layer; load"):
        inject(inject(gm, one), Adapter("a", {"layer": lora()}))


def test_a_graph_that_forgot_its_adapters_does_not_say_what_rotates(base: Any) -> None:
    _, gm, x = base
    one, two = adapters(turned("inputs first"), turned("inputs first"))
    saved = inject(gm, one)
    remember(saved, [])  # as a pickle does
    with pytest.raises(AdapterError, match="is not known in a graph that was saved"):
        inject(saved, two)
    summed = Adapter("b", {"layer": difference(OUT, IN)})
    with torch.no_grad():
        assert torch.equal(inject(saved, summed)(x), inject(gm, [one, summed])(x))


def test_both_are_named_when_one_is_read_back(base: Any) -> None:
    _, gm, _ = base
    both = inject(gm, adapters(difference(OUT, IN), difference(OUT, IN), lora()))
    for name in "ab":
        with pytest.raises(AdapterError, match=rf"'{name}' made layer\.weight anew, by a function"):
            adapter_from(both, name)
    assert adapter_from(both, "c").updates.keys() == {"layer"}
    with pytest.raises(AdapterError, match="the graph holds c, a, b; name one"):
        adapter_from(both)
    assert len(explain(both)) == len(explain(gm))


def test_an_export_is_both_and_each_goes_into_the_slot(base: Any, tmp_path: Path) -> None:
    _, gm, x = base
    several = adapters(difference(OUT, IN), turned())
    both = inject(gm, several)
    with torch.no_grad():
        wanted, alone = both(x), [inject(gm, adapter)(x) for adapter in several]

    def run(path: Path, adapter: Path | None = None) -> torch.Tensor:
        (found,) = lora_fx.Session(path).run({"x": x}, adapter).values()
        return torch.from_numpy(found)

    for number, graph in enumerate((both, fold(both))):
        path = tmp_path / f"{number}.onnx"
        assert to_onnx(graph, path).verified
        assert relative(run(path), wanted) <= 1e-5
        assert all(relative(run(path), one) > 1e-2 for one in alone)
    path = tmp_path / "swappable.onnx"
    assert to_onnx(both, path, adapters="input", slots={"layer": "weight"}).verified
    for adapter, one in zip(several, alone, strict=True):
        export_adapter(adapter, path, tmp_path / adapter.name)
        assert relative(run(path, tmp_path / adapter.name), one) <= 1e-5
