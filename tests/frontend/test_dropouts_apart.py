"""Dropout in eval mode, beside those who read what it reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx import TraceError, trace
from lora_fx.frontend.dropouts_apart import dropouts_apart
from lora_fx.testing import Computes

DROPS = {f.__name__: f for f in (F.dropout, F.alpha_dropout, F.dropout1d, F.feature_alpha_dropout)}


@pytest.mark.parametrize("name", DROPS)
def test_those_who_read_what_dropout_reads_are_no_readers_of_it(name: str) -> None:
    drop: Callable[..., torch.Tensor] = DROPS[name]
    model = Computes(lambda m, x: drop(x, 0.5, m.training) * 2 + x).eval()
    x = torch.randn(4, 7, 3)
    call, _, add = (n for n in trace(model, (x,)).graph.nodes if n.op == "call_function")
    assert [node.op for node in call.all_input_nodes] == ["placeholder"]
    assert add.args[1] is call.args[0]
    assert len(call.users) == 1


def test_what_is_written_to_its_result_is_written_to_what_it_read() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        whole = x * 3
        F.dropout(whole, 0.5, m.training)[..., 1:].add_(1)
        return whole

    model, x = Computes(forward).eval(), torch.randn(4, 7, 3)
    gm = trace(model, (x,))
    assert torch.equal(gm(x), model(x))
    assert not torch.equal(gm(x), x * 3)  # control: it was written to
    with pytest.raises(TraceError, match="computes something else there"):
        gm.train()  # where it is another's memory


def test_operators_are_as_before() -> None:
    operator = torch.ops.aten.feature_dropout.default
    before = dict(operator.py_kernels)
    with dropouts_apart():
        assert operator.py_kernels != before
    assert operator.py_kernels == before
