from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_fx import PassError, fold, inject, text, trace, unfold
from lora_fx.graph.editor import FOLDED, Edit, Editor, origins
from lora_fx.graph.ops import aten
from lora_fx.layers.sites import sites
from lora_fx.passes import call_argument, module_path, op_name
from lora_fx.testing import make_adapter


def test_an_edit_reads_as_a_line() -> None:
    assert str(Edit("fold", "fc", "4 calls")) == "fold fc: 4 calls"
    assert str(Edit("fold", "fc")) == "fold fc"


def test_an_untouched_copy_is_the_same_text_and_tensors(ragged: Any, x: Any) -> None:
    gm = trace(ragged, (x,))
    editor = Editor(gm)
    copy = editor.finish()
    assert not editor.modified
    assert str(copy.graph) == str(gm.graph)
    assert all(copy.get_parameter(n) is p for n, p in gm.named_parameters())
    assert torch.equal(copy(x), gm(x))


def test_what_loses_its_last_reader_is_swept_with_its_tensor(ragged: Any, x: Any) -> None:
    gm = trace(ragged, (x,))
    editor = Editor(gm)
    last = sites(editor.gm)[-1]
    editor.replace(last.node, last.input)
    after = editor.finish()
    assert "narrow" not in text(after)
    assert "narrow.weight" not in after.state_dict()
    assert "narrow.weight" in gm.state_dict()


def test_a_tensor_with_another_reader_stays(ragged: Any, x: Any) -> None:
    editor = Editor(trace(ragged, (x,)))
    second = sites(editor.gm)[2]
    editor.replace(second.node, second.input)
    assert "again.weight" in editor.finish().state_dict()


def test_a_name_is_granted_once_it_comes_free(ragged: Any, x: Any) -> None:
    editor = Editor(trace(ragged, (x,)))
    first, second, *_ = sites(editor.gm)
    new = editor.constant("wide.weight", torch.ones(5, 3), before=first.node)
    editor.rebind(first.node, first.weight, new)
    other = editor.constant("again.weight", torch.ones(5, 5), before=second.node)
    editor.rebind(second.node, second.weight, other)
    after = editor.finish()
    assert torch.equal(after.get_buffer("wide.weight"), torch.ones(5, 3))
    # The other call still reads again.weight, so the new tensor keeps its second name.
    assert torch.equal(after.get_buffer("again.weight_1"), torch.ones(5, 5))


def test_new_calls_carry_the_module_path(ragged: Any, x: Any) -> None:
    editor = Editor(trace(ragged, (x,)))
    site = sites(editor.gm)[0]
    call = editor.call(aten.neg.default, (site.node,), before=site.node.next, like=site.node)
    editor.replace(site.node, call)
    after = editor.finish()
    assert "neg = neg(linear)\ntanh = tanh(neg)" in text(after)
    assert call.meta["nn_module_stack"] == site.node.meta["nn_module_stack"]


def test_freezing_leaves_the_models_own_flags(ragged: Any, x: Any) -> None:
    gm = trace(ragged, (x,))
    editor = Editor(gm)
    editor.freeze()
    after = editor.finish()
    assert not any(p.requires_grad for p in after.parameters())
    assert all(p.requires_grad for p in gm.parameters())
    assert after.get_parameter("wide.weight").data_ptr() == ragged.wide.weight.data_ptr()


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


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda editor, node: op_name(None), "node is None: expected Node"),
        (lambda editor, node: module_path("fc"), "node is 'fc': expected Node"),
        (lambda editor, node: call_argument(node, "0", "x"), "index is '0': expected int"),
        (lambda editor, node: Editor(None), "gm is None: expected GraphModule: trace the model"),
    ],
)
def test_what_is_no_node_is_refused_by_the_name_of_the_argument(
    wrong: Any, said: str, ragged: Any, x: Any
) -> None:
    editor = Editor(trace(ragged, (x,)))
    with pytest.raises(PassError, match=said):
        wrong(editor, next(iter(editor.gm.graph.nodes)))


def test_what_belongs_to_another_graph_is_refused_and_stays(ragged: Any, x: Any) -> None:
    gm = trace(ragged, (x,))
    before = text(gm)
    editor = Editor(gm)
    theirs, mine = sites(gm)[-1], sites(editor.gm)[-1]
    refused = [
        lambda: editor.replace(theirs.node, mine.input),
        lambda: editor.rebind(theirs.node, theirs.input, mine.input),
        lambda: editor.constant("a", torch.ones(5), before=theirs.node),
        lambda: editor.call(aten.relu.default, (mine.input,), theirs.node, mine.node),
        lambda: editor.constant("a", torch.ones(5), before=None),  # type: ignore[arg-type]
    ]
    for edit in refused:
        with pytest.raises(PassError, match=r"no node of editor\.gm\.graph: give"):
            edit()
    assert text(gm) == before == text(editor.finish())
    editor.replace(mine.node, mine.input)  # the control
    assert text(editor.finish()) != before


def test_a_constant_is_a_tensor(ragged: Any, x: Any) -> None:
    editor = Editor(trace(ragged, (x,)))
    with pytest.raises(PassError, match="'a' is 3: give a tensor"):
        editor.constant("a", 3, sites(editor.gm)[0].node)  # type: ignore[arg-type]


def test_an_edit_that_cannot_run_is_told(ragged: Any, x: Any) -> None:
    editor = Editor(trace(ragged, (x,)))
    first, *_, last = sites(editor.gm)
    editor.rebind(first.node, first.input, last.node)
    with pytest.raises(PassError, match=r"cannot run; correct the edit: .*before it has been"):
        editor.finish()
