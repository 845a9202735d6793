from __future__ import annotations

from typing import Any

from lora_fx import text, trace
from lora_fx.passes import FoldLora, InjectLora, Pipeline, UnfoldLora
from lora_fx.testing import make_adapter

SHAPES = {"wide": (5, 3)}


def test_edits_come_in_order_and_modified_is_any(ragged: Any, x: Any) -> None:
    gm = trace(ragged, (x,))
    steps = [InjectLora(make_adapter(SHAPES)), FoldLora(chains=False), UnfoldLora()]
    result = Pipeline(steps)(gm)
    assert [edit.action for edit in result.edits] == ["inject", "fold", "unfold"]
    assert result.modified
    assert text(result.graph_module) == text(steps[0](gm).graph_module)


def test_an_empty_pipeline_gives_the_graph_back(ragged: Any) -> None:
    gm = trace(ragged)
    result = Pipeline([])(gm)
    assert result.graph_module is gm
    assert not result.modified
    assert result.edits == ()


def test_a_pipeline_nests_and_shows_its_passes(ragged: Any, x: Any) -> None:
    inner = Pipeline([FoldLora(chains=False), UnfoldLora()])
    outer = Pipeline([InjectLora(make_adapter(SHAPES)), inner])
    assert repr(inner) == "Pipeline([FoldLora(chains=False), UnfoldLora()])"
    assert [edit.action for edit in outer(trace(ragged)).edits] == ["inject", "fold", "unfold"]
