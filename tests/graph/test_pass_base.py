from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch.fx.passes.infra.pass_base import PassResult as TorchResult
from torch.fx.passes.infra.pass_manager import PassManager

from lora_fx import PassError, fold, text, trace
from lora_fx.graph.editor import Edit, Editor
from lora_fx.graph.ops import aten
from lora_fx.graph.pass_base import Pass, PassResult
from lora_fx.passes import FoldLora, InjectLora, Pipeline, UnfoldLora
from lora_fx.testing import check_pass, make_adapter


@dataclass(frozen=True)
class SwapTanh(Pass):
    """``tanh(x)  ->  sigmoid(x)``, for the tests alone."""

    def rewrite(self, editor: Editor) -> None:
        for node in list(editor.gm.graph.nodes):
            if node.target in (torch.tanh, aten.tanh.default):
                new = editor.call(aten.sigmoid.default, (node.args[0],), before=node, like=node)
                editor.replace(node, new)
                editor.record("swap", "", node.name)


def test_a_pass_reports_its_edits_and_leaves_its_input(ragged: Any, x: Any) -> None:
    gm = trace(ragged, (x,))
    hidden = torch.sigmoid(ragged.again(torch.sigmoid(ragged.wide(x))))
    expected = ragged.narrow(torch.sigmoid(ragged.again(hidden)))
    seen = check_pass(SwapTanh(), gm, x, expected=expected, control=ragged(x))
    assert seen.result.edits == (Edit("swap", "", "tanh"), Edit("swap", "", "tanh_1"))
    assert "tanh" not in seen.after
    assert seen.after.count("sigmoid(") == 3
    again = check_pass(SwapTanh(), seen.gm, x)
    assert again.result.edits == ()


def test_passes_run_inside_torchs_pass_manager(ragged: Any, x: Any) -> None:
    gm = trace(ragged, (x,))
    adapter = make_adapter({"wide": (5, 3)})
    result = PassManager(passes=[InjectLora(adapter), FoldLora()])(gm)
    assert isinstance(result, TorchResult)
    assert result.modified
    ours = Pipeline([InjectLora(adapter), FoldLora()])(gm)
    assert text(result.graph_module) == text(ours.graph_module)
    assert [edit.action for edit in ours.edits] == ["inject", "fold"]


def test_a_pipeline_is_a_pass_and_shows_its_steps(ragged: Any, x: Any) -> None:
    gm = trace(ragged, (x,))
    steps = Pipeline(
        [
            InjectLora(make_adapter({"wide": (5, 3)})),
            Pipeline([FoldLora(chains=False), UnfoldLora()]),
        ]
    )
    assert "FoldLora(chains=False), UnfoldLora()" in repr(steps)
    assert steps(gm).modified
    assert not Pipeline([])(gm).modified


def test_anything_but_a_graph_is_refused(ragged: Any) -> None:
    with pytest.raises(PassError, match=r"Ragged.*trace"):
        FoldLora()(ragged)


def test_a_pass_without_a_rewrite_says_so(ragged: Any) -> None:
    with pytest.raises(PassError, match="rewrite"):
        Pass()(trace(ragged))


def test_a_notebook_sees_the_edits_as_a_table(ragged: Any, x: Any) -> None:
    result = InjectLora(make_adapter({"wide": (5, 3)}))(trace(ragged, (x,)))
    caption, _, row = ElementTree.fromstring(result._repr_html_())
    assert caption.text == "modified, 1 edits"
    edit = result.edits[0]
    assert [cell.text for cell in row] == [edit.action, edit.path, edit.text]
    hostile = PassResult(result.graph_module, False, [Edit("skip", "<b>", "a & b")])
    assert "<td>&lt;b&gt;</td>" in hostile._repr_html_()
    assert "not modified" in hostile._repr_html_()


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


@pytest.mark.parametrize("step", [FoldLora, fold, None, "fold"])
def test_what_is_no_pass_is_refused_with_one(ragged: Any, step: Any) -> None:
    with pytest.raises(PassError, match=r"^Pipeline: .*: give passes, such as lora_fx\.passes\."):
        Pipeline([step, FoldLora()])(trace(ragged))


@pytest.mark.parametrize("steps", [[], [SwapTanh()]])
def test_a_pipeline_works_on_a_graph_alone(steps: list[Any], ragged: Any) -> None:
    for wrong in (None, ragged):
        with pytest.raises(PassError, match=r"works on a GraphModule, not on .*trace the model"):
            Pipeline(steps)(wrong)
