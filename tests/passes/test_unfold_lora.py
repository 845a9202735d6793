from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx import PassError, fold, inject, text, trace, unfold
from lora_fx.graph.editor import Editor
from lora_fx.layers.sites import sites
from lora_fx.passes import StripLora, UnfoldLora
from lora_fx.testing import Ragged, check_pass, make_adapter

SHAPES = {"wide": (5, 3), "again": (5, 5), "narrow": (7, 5)}


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_unfold_gives_back_what_fold_was_given(frontend: str, ragged: Any, x: Any) -> None:
    injected = inject(trace(ragged, (x,), frontend=frontend), make_adapter(SHAPES))
    folded = fold(injected)
    seen = check_pass(UnfoldLora(), folded, x, expected=injected(x), control=ragged(x))
    assert seen.after == text(injected)
    assert str(seen.gm.graph) == str(injected.graph)
    state, wanted = seen.gm.state_dict(), injected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert not check_pass(UnfoldLora(), seen.gm, x).result.modified


class One(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.act = nn.Linear(3, 5), nn.Tanh()


@pytest.mark.parametrize(
    ("make", "shapes", "cycles"), [(One, {"wide": (5, 3)}, 1000), (Ragged, SHAPES, 100)]
)
def test_a_thousand_cycles_change_nothing(
    make: type[nn.Module], x: Any, shapes: Mapping[str, tuple[int, int]], cycles: int
) -> None:
    gm = first = inject(trace(make().eval(), (x,)), make_adapter(shapes))
    for _ in range(cycles):
        gm = unfold(fold(gm))
    assert str(gm.graph) == str(first.graph)
    wanted = first.state_dict()
    assert all(torch.equal(gm.state_dict()[name], wanted[name]) for name in wanted)


def test_only_the_latest_fold_is_undone(ragged: Any, x: Any) -> None:
    once = fold(inject(trace(ragged, (x,)), make_adapter(SHAPES)))
    again = inject(once, make_adapter({"wide": (5, 3)}, rank=3, name="german"))
    assert text(unfold(fold(again))) == text(again)


def test_edits_beside_a_folded_layer_survive(ragged: Any, x: Any) -> None:
    folded = fold(inject(trace(ragged, (x,)), make_adapter({"wide": (5, 3)})))
    more = inject(folded, make_adapter({"narrow": (7, 5)}, name="german"))
    both = unfold(more)
    assert torch.equal(StripLora("german")(both).graph_module(x), unfold(folded)(x))
    assert "wide.lora_A.french" in text(both)
    assert "narrow.lora_A.german" in text(both)


def test_a_plain_graph_has_nothing_to_unfold(ragged: Any, x: Any) -> None:
    assert not check_pass(UnfoldLora(), trace(ragged, (x,)), x, expected=ragged(x)).result.modified


def test_a_region_whose_source_is_gone_is_refused(ragged: Any, x: Any) -> None:
    folded = fold(inject(trace(ragged, (x,)), make_adapter({"again": (5, 5)})))
    editor = Editor(folded)
    second = sites(editor.gm)[1]
    source = second.input
    editor.rebind(second.node, source, next(iter(editor.gm.graph.nodes)))
    with pytest.raises(PassError, match=r"cannot unfold .*tanh.* was removed"):
        unfold(editor.finish())
