"""What new calls make of constants alone: its name, when it is computed, what spoils it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn

from lora_fx import PassError, text, trace
from lora_fx.graph.constants import Constants
from lora_fx.graph.editor import Editor
from lora_fx.graph.fold_constants import fold_constants
from lora_fx.graph.lazy_tensor import LazyTensor, get_unevaluated
from lora_fx.graph.ops import aten

X = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(1))
NAMES = {"weight": "weight", "a": "made", "bias": "shift"}


class Reads(nn.Module):
    """``linear(x, W, b) + a.sum()``: a graph with three tensors."""

    def __init__(self, trained: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias, self.a = (
            nn.Parameter(torch.randn(*shape).to(dtype), requires_grad=trained)
            for shape in ((5, 3), (5,), (5, 3))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias) + self.a.sum()


def scaled(x: Any, weight: Any, bias: Any, a: Any) -> Any:
    """``x (3 a)' + x (W + a)' + b``: two constants of four calls."""
    one = aten.linear.default(x, aten.mul.Tensor(a, 3.0))
    other = aten.linear.default(x, aten.add.Tensor(weight, aten.clone.default(a)), bias)
    return aten.add.Tensor(one, other)


def emitted(
    gm: fx.GraphModule, function: Callable[..., Any] = scaled, own: Sequence[str] = ()
) -> fx.GraphModule:
    """The graph with its layer computed by a function instead, constants folded."""
    editor = Editor(gm)
    fetched = {str(node.target): node for node in editor.gm.graph.find_nodes(op="get_attr")}
    (x,) = editor.gm.graph.find_nodes(op="placeholder")
    (layer,) = editor.gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    operands = (x, *(fetched[name] for name in ("weight", "bias", "a")))
    with torch.no_grad():
        new, calls = editor.inline(function, operands, before=layer, like=layer)
        dtype = editor.tensor(fetched["weight"]).dtype
        fold_constants(editor, Constants(editor.gm), calls, NAMES, dtype, own)
        editor.replace(layer, new)
    return editor.finish()


def test_each_largest_part_becomes_one_constant() -> None:
    module = Reads().eval()
    made = emitted(trace(module, (X,)))
    assert "linear(x, made)" in text(made)
    assert "linear(x, weight, bias)" in text(made)
    assert "mul" not in text(made)
    assert "clone" not in text(made)
    wanted = X @ (3 * module.a + module.weight + module.a).T + module.bias + module.a.sum()
    torch.testing.assert_close(made(X), wanted)
    assert (made(X) - module(X)).abs().max() > 1e-2


@pytest.mark.parametrize("trained", [False, True])
def test_it_is_computed_when_it_is_read_unless_something_of_it_is_trained(trained: bool) -> None:
    gm = trace(Reads(trained).eval(), (X,))
    lazy = get_unevaluated(emitted(gm), "made")
    assert isinstance(lazy, LazyTensor)
    assert (lazy._cached is not None) == trained
    own = get_unevaluated(emitted(gm, own=["a", "weight"]), "made")
    assert own._cached is None


def test_what_changed_in_place_is_refused_by_name() -> None:
    gm = trace(Reads().eval(), (X,))
    made = emitted(gm)
    with torch.no_grad():
        gm.a.mul_(2)
    with pytest.raises(PassError, match=r"^a was changed in place after a weight was made of it"):
        made(X)
    torch.testing.assert_close(emitted(gm).made, 3 * gm.a)


def test_numbers_are_rounded_once() -> None:
    def thirds(x: Any, weight: Any, bias: Any, a: Any) -> Any:
        third = aten.mul.Tensor(aten.mul.Tensor(a, 1 / 3), 3.0)
        return aten.linear.default(x, third, bias)

    gm = trace(Reads(dtype=torch.float16).eval(), (X.half(),))
    assert torch.equal(emitted(gm, thirds).made, gm.a)
    assert not torch.equal(gm.a * (1 / 3) * 3, gm.a)  # the control


def test_what_the_dtype_cannot_hold_is_refused_by_name() -> None:
    def huge(x: Any, weight: Any, bias: Any, a: Any) -> Any:
        return aten.linear.default(x, aten.mul.Tensor(a, 1e6), bias)

    made = emitted(trace(Reads(dtype=torch.float16).eval(), (X.half(),)), huge)
    with pytest.raises(PassError, match=r"^made: the folded value is not finite in torch.float16"):
        made(X.half())


def test_equal_constants_of_one_edit_are_one() -> None:
    def twice(x: Any, weight: Any, bias: Any, a: Any) -> Any:
        one, same = (aten.linear.default(x, aten.mul.Tensor(a, 3.0)) for _ in range(2))
        other = aten.linear.default(x, aten.mul.Tensor(a, 2.0))
        return aten.add.Tensor(aten.add.Tensor(one, same), other)

    made = emitted(trace(Reads().eval(), (X,)), twice)
    assert text(made).count("linear(x, made)") == 2
    assert text(made).count("linear(x, made_1)") == 1
