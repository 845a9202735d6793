"""A graph compiles when it is first read, and nobody can tell."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import fx, nn

from lora_fx import trace
from lora_fx.errors import TraceError
from lora_fx.graph import lazy_compile
from lora_fx.graph.graph_module import build_graph_module, copy_graph
from lora_fx.graph.lazy_compile import compiled_when_read


def assembled(model: nn.Module, *args: Any) -> fx.GraphModule:
    gm = trace(model, args)
    return build_graph_module(gm, copy_graph(gm.graph), gm.training)


def test_nothing_compiles_before_the_first_call(ragged: nn.Module, x: torch.Tensor) -> None:
    gm = trace(ragged, (x,))
    lazy = build_graph_module(gm, copy_graph(gm.graph), gm.training)
    assert "_code" not in lazy.__dict__
    assert torch.equal(lazy(x), ragged(x))
    assert "_code" in lazy.__dict__


def test_it_compiles_once(ragged: nn.Module, x: torch.Tensor) -> None:
    lazy = assembled(ragged, x)
    real = fx.GraphModule.recompile
    with patch.object(lazy_compile, "_recompile", side_effect=real) as recompile:
        lazy(x)
        lazy(x)
        assert lazy.code == lazy.code
    assert recompile.call_count == 1


@pytest.mark.parametrize("args", [(), (torch.ones(2, 3),)], ids=["symbolic", "export"])
def test_signature_is_the_true_one(ragged: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    assert list(inspect.signature(assembled(ragged, *args).forward).parameters) == ["x"]


def test_specs_are_there_before_the_first_call(ragged: nn.Module, x: torch.Tensor) -> None:
    assert assembled(ragged, x)._in_spec.num_leaves == 1
    assert not hasattr(assembled(ragged), "_in_spec")


def test_pickle_holds_the_code(x: torch.Tensor) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
    assert torch.equal(pickle.loads(pickle.dumps(assembled(model)))(x), model(x))


def test_guards_are_not_pickled_and_say_so(ragged: nn.Module, x: torch.Tensor) -> None:
    with pytest.raises(TraceError, match=r"cannot be pickled: save the model and the adapter"):
        pickle.dumps(assembled(ragged, x))


def test_what_others_do_with_a_graph(ragged: nn.Module, x: torch.Tensor) -> None:
    expected = ragged(x)
    assert torch.equal(copy.deepcopy(assembled(ragged, x))(x), expected)
    assert torch.equal(trace(assembled(ragged), (x,))(x), expected)
    assert torch.equal(torch.export.export(assembled(ragged), (x,)).module()(x), expected)
    assert torch.equal(torch.compile(assembled(ragged), backend="eager")(x), expected)
    assert "self.wide" in assembled(ragged).print_readable(print_output=False)
    edited = assembled(ragged)
    edited.recompile()
    assert torch.equal(edited(x), expected)


def test_graphs_that_torch_makes_compile_when_they_are_read(
    ragged: nn.Module, x: torch.Tensor
) -> None:
    real = fx.GraphModule.recompile
    with patch.object(lazy_compile, "_recompile", side_effect=real) as recompile:
        with compiled_when_read():
            made = torch.export.export(ragged, (x,)).module()
            inside = recompile.call_count
            copies = [fx.GraphModule(made, copy_graph(made.graph)) for _ in range(3)]
            assert recompile.call_count == inside  # nobody read them
        assert fx.GraphModule.recompile is real
        assert all(torch.equal(gm(x), ragged(x)) for gm in (made, *copies))
        assert recompile.call_count > inside
    with pytest.raises(KeyError), compiled_when_read():
        raise KeyError
    assert fx.GraphModule.recompile is real
