from __future__ import annotations

from typing import Any

import pytest

from lora_fx import PassError, fold, inject, text, trace, unfold
from lora_fx.editor import Editor
from lora_fx.origin import FOLDED, origins
from lora_fx.sites import sites

SHAPES = {"wide": (5, 3), "again": (5, 5)}


def test_a_folded_node_knows_the_graph_before(ragged: Any, x: Any, make_adapter: Any) -> None:
    injected = inject(trace(ragged, (x,)), make_adapter(SHAPES))
    folded = fold(injected)
    first, *others = origins(folded)
    assert all(origin is first for origin in others)
    assert str(first.gm.graph) == str(injected.graph)
    assert first.generation == 1
    assert "add_tensor" in first.swept
    assert [n.meta[FOLDED][1] for n in folded.graph.nodes if FOLDED in n.meta] == [
        "add_tensor",
        "add_tensor_1",
        "add_tensor_2",
    ]


def test_the_memory_is_private(ragged: Any, x: Any, make_adapter: Any) -> None:
    injected = inject(trace(ragged, (x,)), make_adapter(SHAPES))
    before, folded = text(injected), fold(injected)
    out = next(n for n in injected.graph.nodes if n.op == "output")
    out.args = (next(iter(injected.graph.nodes)),)
    injected.graph.eliminate_dead_code()
    assert text(unfold(folded)) == before


def test_a_region_whose_source_is_gone_is_refused(ragged: Any, x: Any, make_adapter: Any) -> None:
    folded = fold(inject(trace(ragged, (x,)), make_adapter({"again": (5, 5)})))
    editor = Editor(folded)
    second = sites(editor.gm)[1]
    source = second.input
    editor.rebind(second.node, source, next(iter(editor.gm.graph.nodes)))
    with pytest.raises(PassError, match=r"cannot unfold .*tanh.* was removed"):
        unfold(editor.finish())
