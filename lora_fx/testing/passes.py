"""The one harness that every pass test goes through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
from torch import fx

from lora_fx.errors import LoraFxError
from lora_fx.frontend.isolated_run import own_inputs, preserved, random_kept, seed
from lora_fx.graph.example import example_of
from lora_fx.graph.graph_module import targets
from lora_fx.graph.ops import op_name
from lora_fx.graph.pass_base import PassResult
from lora_fx.graph.printer import text
from lora_fx.numerics import compare
from lora_fx.testing.judge import relative, tensors

Step = Callable[[fx.GraphModule], PassResult]


@dataclass(frozen=True)
class Checked:
    """What `check_pass` saw, for further assertions.

    Attributes:
        result: what the pass returned.
        before: the text of the graph that went in.
        after: the text of the new graph.
        outputs: what the new graph computes; None without inputs.
    """

    result: PassResult
    before: str
    after: str
    outputs: Any

    @property
    def gm(self) -> fx.GraphModule:
        """The new graph."""
        return self.result.graph_module


def check_pass(
    step: Step,
    gm: fx.GraphModule,
    *inputs: Any,
    expected: Any = None,
    control: Any = None,
    dtype: torch.dtype | None = None,
) -> Checked:
    """Runs a pass and asserts what holds for every pass.

    - The graph that goes in stays as it is, and so does every tensor of it: its bits, its address,
      whether it is trained.
    - ``modified`` is true exactly when the text of the graph changed.
    - The new graph computes what is expected, by the table of `lora_fx.compare`; the same numbers
      10 % off do not pass, nor does the control.
    - A second run edits nothing, or refuses with an error of lora_fx.

    Args:
        step: the pass, or any callable from graph to `PassResult`.
        gm: the graph; it may be run in inference only.
        inputs: by position; the inputs that the graph was traced with by default. If there are
            none either, nothing is run.
        expected: the outputs, any structure of tensors; by default what ``gm`` computes, so a pass
            that changes numbers says here what they become.
        control: outputs that lack what the pass is about; more than 1e-2 off.
        dtype: the precision that the graph computes in, if its outputs do not tell.

    Returns:
        The result, the texts and the outputs.

    Raises:
        AssertionError: one of these does not hold; says which.
    """
    wanted = _run(gm, inputs) if expected is None else expected
    result, before, after = _one_run(step, gm)
    outputs = _run(result.graph_module, inputs)
    if wanted is not None:
        _judge(outputs, wanted, dtype)
    if control is not None:
        found = relative(outputs, control)
        assert found > 1e-2, f"the control is {found:.1e} off: it has what the pass is about"
    _check_again(step, result.graph_module)
    return Checked(result, before, after, outputs)


def folds_to(gm: fx.GraphModule, base: fx.GraphModule) -> fx.GraphModule:
    """Asserts that a graph folds to the base's operators, for good, and comes back.

    Returns:
        The folded graph.

    Raises:
        AssertionError: an operator is left or lost, a second fold edits something, or unfolding
            gives another text.
    """
    from lora_fx.passes import FoldLora, UnfoldLora

    folded = FoldLora()(gm).graph_module
    found, wanted = operators(folded), operators(base)
    extra, lost = found - wanted, wanted - found
    assert (extra, lost) == (Counter(), Counter()), f"extra {dict(extra)}, lost {dict(lost)}"
    assert FoldLora()(folded).modified is False, "a second fold edits something"
    assert text(UnfoldLora()(folded).graph_module) == text(gm)
    return folded


def operators(gm: fx.GraphModule) -> Counter[str]:
    """How often a graph calls each operator."""
    return Counter(op_name(n) for n in gm.graph.nodes if n.op == "call_function")


def _one_run(step: Step, gm: fx.GraphModule) -> tuple[PassResult, str, str]:
    """The result, and the texts before and after; the graph that goes in stays as it is."""
    before, names, training = text(gm), str(gm.graph), gm.training
    tensors_before = {name: (t, _facts(t), _bits(t).clone()) for name, t in _held(gm).items()}
    result = step(gm)
    assert text(gm) == before, "the pass changed the graph that went in"
    assert str(gm.graph) == names, "the pass changed node names of the graph that went in"
    assert gm.training == training, "the pass changed the mode of the graph that went in"
    now = _held(gm)
    other = sorted(now.keys() ^ tensors_before)
    assert not other, f"the pass changed which tensors the graph that went in holds: {other}"
    for name, (tensor, facts, bits) in tensors_before.items():
        assert now[name] is tensor, f"the pass put another tensor in place of {name}"
        assert _facts(tensor) == facts, f"the pass changed {name}: was {facts}, is {_facts(tensor)}"
        assert _bits(tensor).equal(bits), f"the pass wrote to {name}"
    after = text(result.graph_module)
    assert result.modified == (after != before), f"modified is {result.modified}, and the text " + (
        "changed" if after != before else "did not change"
    )
    return result, before, after


def _held(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Every tensor by name: parameters, buffers, and what the graph reads besides."""
    read = {name: reduce(_attribute, name.split("."), cast(Any, gm)) for name in targets(gm.graph)}
    named = {**dict(gm.named_parameters()), **dict(gm.named_buffers()), **read}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


def _attribute(holder: Any, name: str) -> Any:
    return getattr(holder, name, None)


def _facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr(), tensor.requires_grad


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _run(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> Any:
    """What a graph computes, from one random state; None if nobody knows inputs for it."""
    example = example_of(gm) if not inputs else None
    args, kwargs = (example.args, dict(example.kwargs)) if example else (inputs, {})
    if not args and not kwargs:
        return None
    args, kwargs = own_inputs((args, kwargs))
    with preserved(gm, ()), random_kept(), torch.no_grad():
        seed()
        return gm(*args, **kwargs)


def _judge(outputs: Any, wanted: Any, dtype: torch.dtype | None) -> None:
    found, expected = tensors(outputs), tensors(wanted)
    assert len(found) == len(expected), f"{len(found)} outputs, expected {len(expected)}"
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        comparison = compare(one, other, dtype)
        assert comparison.ok, f"output {place} is not what is expected: {comparison}"
    blind = all(compare(t * 1.1, t, dtype).ok for t in expected if t.is_floating_point())
    assert not blind, "the expected outputs say nothing: 10 % off they still agree"


def _check_again(step: Step, gm: fx.GraphModule) -> None:
    try:
        again, _, _ = _one_run(step, gm)
    except LoraFxError:
        return
    assert not again.modified, "a second run of the pass edits what the first one made"
