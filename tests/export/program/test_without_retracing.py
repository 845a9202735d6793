from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx.errors import ExportError
from lora_fx.export.onnx_model.convert import convert
from lora_fx.export.program.decompose import LoweredProgram
from lora_fx.export.program.example_inputs import Inputs, example_inputs
from lora_fx.export.program.export_unit import export_unit
from lora_fx.export.program.lazy_weights import with_stand_ins
from lora_fx.export.program.without_retracing import program_of
from lora_fx.export.verification.eager import evaluating
from lora_fx.frontend.torch_export import export_program
from lora_fx.frontend.trace import trace
from lora_fx.passes import FoldLora, InjectLora
from lora_fx.testing import traced


def program(gm: fx.GraphModule) -> torch.export.ExportedProgram:
    found = program_of(gm, example_inputs(gm, None, None, None))
    assert isinstance(found, LoweredProgram)
    return found


def test_it_says_what_another_trace_would_and_its_onnx_form_has_the_same_weights(
    sample: Any,
) -> None:
    gm = evaluating(sample.gm)
    inputs = example_inputs(gm, None, None, None)
    here = program(gm)
    again = export_program(gm, inputs.args, inputs.kwargs, inputs.dynamic_shapes)
    assert again.range_constraints.items() <= here.range_constraints.items()
    assert here.call_spec == again.call_spec
    names = ["parameters", "buffers", "user_inputs"]
    for name in names:
        found = getattr(here.graph_signature, name)
        assert list(found) == list(getattr(again.graph_signature, name)), name
    outputs = [(node.meta["val"].dtype, node.meta["val"].shape) for node in returned(here)]
    assert [str(value) for value in outputs] == [
        str((node.meta["val"].dtype, node.meta["val"].shape)) for node in returned(again)
    ]
    ours, theirs = convert(here, None), convert(again, None)
    assert list(ours.graph.initializers) == list(theirs.graph.initializers)


def returned(program: torch.export.ExportedProgram) -> list[fx.Node]:
    return program.graph.output_node().all_input_nodes


def test_what_passes_added_is_known_too(mlp: Any) -> None:
    gm = InjectLora(mlp.adapter(2))(mlp.gm).graph_module
    for form in (gm, FoldLora()(gm).graph_module):
        assert any("val" not in node.meta for node in form.graph.nodes)
        nodes = list(program(with_stand_ins(form)[0]).graph.nodes)
        assert all("val" in n.meta for n in nodes if n.op in ("placeholder", "call_function"))


def test_shapes_behind_a_change_are_found_anew(mlp: Any) -> None:
    gm = evaluating(mlp.gm)
    relu = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.relu.default)
    with gm.graph.inserting_before(relu):
        doubled = gm.graph.call_function(torch.ops.aten.to.dtype, (relu.args[0], torch.float64))
    relu.replace_input_with(relu.args[0], doubled)
    before = relu.meta["val"]
    found = program(without_tail(gm, relu)).graph
    changed = next(n for n in found.nodes if n.target is torch.ops.aten.relu.default)
    assert (before.dtype, changed.meta["val"].dtype) == (torch.float32, torch.float64)


def without_tail(gm: fx.GraphModule, last: fx.Node) -> fx.GraphModule:
    """Returns ``last`` in the place of what is computed of it: its dtype fits nobody."""
    score = gm.graph.output_node().args[0][1]
    score.replace_all_uses_with(last)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return x + self.count


def test_what_it_cannot_tell_is_traced_again(mlp: Any) -> None:
    x = torch.randn(4, 7, 3)
    symbolic = trace(nn.Linear(3, 5), (x,), frontend="symbolic")
    given = Inputs((), {"x": x}, None)
    asked = [
        (mlp.gm, given),
        (symbolic, example_inputs(symbolic, None, None, None)),
        (writes := traced(Writes(), x), example_inputs(writes, None, None, None)),
    ]
    for gm, inputs in asked:
        assert program_of(gm, inputs) is None
        assert not isinstance(export_unit(gm, inputs).program, LoweredProgram)


@pytest.mark.parametrize(
    ("change", "is_known"),
    [
        (lambda x: x + 1, True),
        (lambda x: x[:1], False),
        (lambda x: x.double(), False),
        (lambda x: x.tolist(), False),
    ],
)
def test_inputs_of_the_form_that_was_traced_need_no_trace(
    mlp: Any, change: Any, is_known: bool
) -> None:
    inputs = example_inputs(mlp.gm, None, None, None)
    args, kwargs = pytree.tree_map(change, (inputs.args, dict(inputs.kwargs)))
    found = program_of(mlp.gm, replace(inputs, args=args, kwargs=kwargs))
    assert (found is not None) == is_known


@pytest.mark.parametrize("retrace", [False, True])
def test_a_trial_traces_again_when_told_to(mlp: Any, retrace: bool) -> None:
    inputs = example_inputs(mlp.gm, None, None, None)
    found = export_unit(evaluating(mlp.gm), inputs, retrace=retrace).program
    assert isinstance(found, LoweredProgram) != retrace


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.fft.irfft(torch.fft.rfft(self.into(x), dim=1), n=6, dim=1)
        found: torch.Tensor = self.out(mixed)
        return found


def test_a_size_that_an_export_of_the_same_trace_settled_is_free_in_the_next() -> None:
    gm = traced(Mixer(), torch.randn(2, 6, 3), dynamic_shapes=({0: "batch"},))
    inputs = example_inputs(gm, None, None, None)
    with pytest.raises(ExportError, match="no ONNX form"):
        convert(program(gm), None)
    assert program_of(gm, inputs) is None
    unit = export_unit(gm, inputs)
    assert [leaf.axes[0] for leaf in unit.leaves] == ["batch"]
    assert {tuple(case.args[0].shape) for case in unit.cases} > {(2, 6, 3)}
