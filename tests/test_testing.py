"""The harness itself: `check_pass` and its like fail when they should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from lora_fx import Adapter, PassError, inject, text, trace
from lora_fx.graph.editor import Editor
from lora_fx.graph.graph_module import attribute
from lora_fx.graph.ops import aten
from lora_fx.graph.pass_base import Pass, PassResult
from lora_fx.passes import FoldLora, InjectLora
from lora_fx.testing import (
    UPDATES,
    Between,
    Computes,
    LayerShape,
    Ragged,
    check_pass,
    computes,
    fits,
    folds_to,
    make_adapter,
    means,
    reason,
    relative,
    same_adapter,
    update_of,
    zoo,
)

SHAPES = {"wide": (5, 3), "again": (5, 5)}


@dataclass(frozen=True)
class Swap(Pass):
    """``tanh(x)  ->  sigmoid(2 x) * 2 - 1``, which is the same function."""

    slope: float = 2.0

    def rewrite(self, editor: Editor) -> None:
        for node in list(editor.gm.graph.nodes):
            if node.target is aten.tanh.default:
                value: Any = node.args[0]
                for call, number in ((aten.mul.Tensor, self.slope), (aten.sigmoid.default, None)):
                    args = (value,) if number is None else (value, number)
                    value = editor.call(call, args, before=node, like=node)
                for call, number in ((aten.mul.Tensor, 2.0), (aten.sub.Tensor, 1.0)):
                    value = editor.call(call, (value, number), before=node, like=node)
                editor.replace(node, value)
                editor.record("swap", "", node.name)


@pytest.fixture
def gm(ragged: Ragged, x: torch.Tensor) -> fx.GraphModule:
    return trace(ragged, (x,))


def test_a_pass_that_keeps_all_rules_passes_on_the_inputs_of_the_trace(
    gm: fx.GraphModule, ragged: Ragged, x: torch.Tensor
) -> None:
    seen = check_pass(Swap(), gm)
    assert (seen.before, seen.after) == (text(gm), text(seen.gm))
    assert seen.result.modified
    assert relative(seen.outputs, ragged(x)) <= 1e-5
    other = check_pass(Swap(), gm, 2 * x, expected=ragged(2 * x), control=ragged(x))
    assert relative(other.outputs, ragged(2 * x)) <= 1e-5


def writes(gm: fx.GraphModule) -> PassResult:
    with torch.no_grad():
        attribute(gm, "wide.weight").mul_(1 + 1e-6)
    return Swap()(gm)


def replaces(gm: fx.GraphModule) -> PassResult:
    gm.wide.weight = nn.Parameter(gm.wide.weight.detach().clone())
    return Swap()(gm)


def trains(gm: fx.GraphModule) -> PassResult:
    gm.wide.weight.requires_grad_(False)
    return Swap()(gm)


def drops(gm: fx.GraphModule) -> PassResult:
    result = Swap()(gm)
    del gm.wide.weight
    return result


def renames(gm: fx.GraphModule) -> PassResult:
    result = Swap()(gm)
    next(n for n in gm.graph.nodes if n.op == "call_function").name = "another"
    return result


def rewrites(gm: fx.GraphModule) -> PassResult:
    result = Swap()(gm)
    node = next(n for n in gm.graph.nodes if n.target is aten.tanh.default)
    node.target = aten.sigmoid.default
    return result


def changes_mode(gm: fx.GraphModule) -> PassResult:
    result = Swap()(gm)
    gm.training = not gm.training
    return result


def boasts(gm: fx.GraphModule) -> PassResult:
    return PassResult(FoldLora()(gm).graph_module, True)


def denies(gm: fx.GraphModule) -> PassResult:
    return PassResult(Swap()(gm).graph_module, False)


def goes_on(gm: fx.GraphModule) -> PassResult:
    """Adds a call whenever it runs, with no effect on the numbers."""
    editor = Editor(gm)
    (output,) = (n for n in editor.gm.graph.nodes if n.op == "output")
    (last,) = output.all_input_nodes
    editor.replace(last, editor.call(aten.mul.Tensor, (last, 1.0), before=output, like=last))
    editor.record("go on", "")
    return PassResult(editor.finish(), editor.modified, editor.edits)


def writes_later(gm: fx.GraphModule) -> PassResult:
    """Keeps all rules once, and writes to what it made itself when it runs again."""
    if "sigmoid" in text(gm).replace("sigmoid_", "") and "tanh" not in text(gm):
        with torch.no_grad():
            attribute(gm, "wide.weight").mul_(2)
    return Swap()(gm)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (writes, "the pass wrote to wide.weight"),
        (replaces, "another tensor in place of wide.weight"),
        (trains, "the pass changed wide.weight"),
        (drops, "which tensors .* holds: .'wide.weight'."),
        (renames, "changed node names"),
        (rewrites, "changed the graph that went in"),
        (changes_mode, "changed the mode"),
        (boasts, "modified is True, and the text did not change"),
        (denies, "modified is False, and the text changed"),
        (Swap(slope=1.9), "output 0 is not what is expected"),
        (goes_on, "a second run of the pass edits"),
        (writes_later, "the pass wrote to wide.weight"),
    ],
)
def test_a_pass_that_breaks_one_rule_is_told_which(
    gm: fx.GraphModule, step: Callable[[fx.GraphModule], PassResult], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        check_pass(step, gm)


def test_wrong_numbers_are_seen_beside_what_is_expected(
    gm: fx.GraphModule, ragged: Ragged, x: torch.Tensor
) -> None:
    adapter, other = make_adapter(SHAPES), make_adapter(SHAPES, scale=1.65)
    wanted, off = inject(gm, adapter)(x), inject(gm, other)(x)
    check_pass(InjectLora(adapter), gm, x, expected=wanted, control=ragged(x))
    with pytest.raises(AssertionError, match="output 0 is not what is expected"):
        check_pass(InjectLora(adapter), gm, x, expected=off)
    with pytest.raises(AssertionError, match="it has what the pass is about"):
        check_pass(InjectLora(adapter), gm, x, expected=wanted, control=wanted)
    with pytest.raises(AssertionError, match="output 0 is not what is expected"):
        check_pass(InjectLora(adapter), gm)  # an adapter changes numbers: they must be given
    with pytest.raises(AssertionError, match="1 outputs, expected 2"):
        check_pass(InjectLora(adapter), gm, x, expected=(wanted, wanted))


def test_outputs_that_say_nothing_are_no_evidence() -> None:
    gm = trace(Computes(lambda m, x: m.fc(x) * 0.0, fc=nn.Linear(3, 5)), (torch.randn(4, 3),))
    with pytest.raises(AssertionError, match="say nothing"):
        check_pass(FoldLora(), gm)


def test_a_graph_that_writes_and_draws_is_run_without_a_trace() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.count.add_(1)
        x.mul_(2)
        return torch.tanh(m.fc(x) + m.count + torch.rand_like(x))

    model = Computes(forward, fc=nn.Linear(3, 3), count=nn.Buffer(torch.zeros(())))
    gm, x = trace(model.eval(), (torch.randn(4, 3),)), torch.ones(4, 3)
    state = torch.random.get_rng_state()
    check_pass(Swap(), gm, x)
    assert model.count == 0
    assert x.equal(torch.ones(4, 3))
    assert torch.random.get_rng_state().equal(state)


def test_a_second_run_may_refuse_but_not_by_any_error(gm: fx.GraphModule) -> None:
    def once(error: Exception) -> Callable[[fx.GraphModule], PassResult]:
        def step(gm: fx.GraphModule) -> PassResult:
            if "tanh" not in text(gm):
                raise error
            return Swap()(gm)

        return step

    check_pass(once(PassError("done already")), gm)
    with pytest.raises(KeyError):
        check_pass(once(KeyError("wide")), gm)


def test_a_graph_without_inputs_is_not_run(ragged: Ragged) -> None:
    assert check_pass(FoldLora(), trace(ragged)).outputs is None


def test_folding_to_another_base_is_seen(gm: fx.GraphModule) -> None:
    folds_to(inject(gm, make_adapter(SHAPES)), gm)
    with pytest.raises(AssertionError, match=r"extra .*'linear': 4.*lost"):
        folds_to(gm, trace(nn.ReLU(), (torch.randn(4, 3),)))


@pytest.mark.parametrize("kind", UPDATES)
def test_an_adapter_of_any_kind_has_an_effect_and_folds(kind: str) -> None:
    is_table, (out, into) = kind == "tokens", (6, 4)
    layer = nn.Embedding(10, out) if is_table else nn.Linear(into, out)
    x = torch.randint(10, (4, 7)) if is_table else torch.randn(4, 7, into)
    gm = trace(Between(layer).eval(), (x,))
    shape = LayerShape((out, 10 if is_table else into), is_table=is_table)
    adapter = Adapter("french", {"layer": update_of(kind, shape)})
    if not is_table:
        adapter = make_adapter({"layer": (out, into)}, kind=kind)
    injected = inject(gm, adapter)
    assert relative(injected(x), gm(x)) > 1e-2
    folds_to(injected, gm)


def test_the_judge_of_adapters_and_updates_sees_a_wrong_scale() -> None:
    adapter = make_adapter({"layer": (5, 3)})
    update: Any = adapter.updates["layer"]
    louder = Adapter("french", {"layer": replace(update, scale=1.65)})
    base, x = Between(nn.Linear(3, 5)), torch.randn(4, 7, 3)
    wanted = inject(trace(base, (x,)), adapter)(x)
    fits(adapter, base, x, wanted)
    with pytest.raises(AssertionError):
        fits(louder, base, x, wanted)
    weight = base.layer.weight.detach()
    means(update, weight, update.weight(weight))
    with pytest.raises(AssertionError):
        means(update, weight, louder.updates["layer"].weight(weight))
    same_adapter(adapter, make_adapter({"layer": (5, 3)}))
    with pytest.raises(AssertionError, match="layer"):
        same_adapter(adapter, louder)


def test_the_judge_of_the_analysis_sees_what_is_not_affine(x: torch.Tensor) -> None:
    x = x.double()
    computes(lambda m, x: 2 * m.low(x), x, "export")
    assert reason(lambda m, x: torch.tanh(m.low(x)), x, "export")
    with pytest.raises(AssertionError):
        computes(lambda m, x: torch.tanh(m.low(x)), x, "export")
    with pytest.raises(AssertionError):
        reason(lambda m, x: m.low(x), x, "export")


def test_a_case_of_the_zoo_is_traced_once_and_its_model_is_fresh() -> None:
    (one, first), (other, second) = zoo("mlp"), zoo("mlp")
    assert first is second
    assert one.model is not other.model
    assert torch.equal(one.model.wide.weight, other.model.wide.weight)  # type: ignore[union-attr, arg-type]
