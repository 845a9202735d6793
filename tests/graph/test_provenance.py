from __future__ import annotations

from typing import Any

from lora_fx import fold, inject, text, trace, unfold
from lora_fx.graph.provenance import FOLDED, origins
from lora_fx.testing import make_adapter

SHAPES = {"wide": (5, 3), "again": (5, 5)}


def test_a_folded_node_knows_the_graph_before(ragged: Any, x: Any) -> None:
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


def test_the_memory_is_private(ragged: Any, x: Any) -> None:
    injected = inject(trace(ragged, (x,)), make_adapter(SHAPES))
    before, folded = text(injected), fold(injected)
    out = next(n for n in injected.graph.nodes if n.op == "output")
    out.args = (next(iter(injected.graph.nodes)),)
    injected.graph.eliminate_dead_code()
    assert text(unfold(folded)) == before
