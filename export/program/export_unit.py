"""The unit that is exported: program, I/O signature, test inputs of several shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from torch import fx

from lora_fx.errors import ExportError
from lora_fx.export.program.example_inputs import Inputs
from lora_fx.export.program.io_signature import (
    TensorInput,
    check_apart,
    checked_names,
    free_names,
    input_leaves,
    output_names,
)
from lora_fx.export.program.lazy_weights import StandIn, with_stand_ins
from lora_fx.export.program.shape_variants import Case, allowed_by, beyond, cases, resized
from lora_fx.export.program.without_retracing import program_of
from lora_fx.export.runtime.in_place import axes_in_place
from lora_fx.export.runtime.ort import to_array
from lora_fx.frontend.torch_export import export_program, outputs_of
from lora_fx.graph.lazy_compile import compiled_when_read


@dataclass(frozen=True)
class ExportUnit:
    """A graph as torch.export sees it, and what to call and feed its ONNX form.

    Attributes:
        program: what is translated to ONNX.
        leaves: the tensor inputs, in order.
        example: what it was traced with.
        cases: inputs of several shapes, the traced one first.
        beyond: others, for which it was not traced, as `shape_variants.beyond` gives them.
        outputs: names of the graph outputs.
        notes: outputs that could not have the name that the model gives them.
        stand_ins: for weights that are computed when the file is written.
        generates: whether it is one step of a decoder with a cache.
    """

    program: torch.export.ExportedProgram
    leaves: Sequence[TensorInput]
    example: Case
    cases: Sequence[Case]
    beyond: Sequence[Sequence[Case]]
    outputs: list[str]
    notes: list[str]
    stand_ins: list[StandIn]
    generates: bool = False

    @property
    def inputs(self) -> list[str]:
        """Names of the graph inputs."""
        return [leaf.name for leaf in self.leaves]

    def feeds(self, case: Case) -> dict[str, np.ndarray[Any, Any]]:
        """The inputs of a case by name."""
        named = zip(self.inputs, case.tensors(), strict=True)
        return {name: to_array(name, value) for name, value in named}

    def taken_by(self, model: onnx.ModelProto) -> ExportUnit:
        """The same on what a file takes: where it writes into its cache, one row, or one token."""
        wanted = [{axis: 1} for axis in axes_in_place(model)]
        if not wanted:
            return self
        every = [resized(self.program, self.leaves, c, each) for c in self.cases for each in wanted]
        return replace(self, cases=[*{case.label: case for case in every}.values()], beyond=[])


@compiled_when_read()
def export_unit(gm: fx.GraphModule, inputs: Inputs, *, retrace: bool = False) -> ExportUnit:
    """Makes a program of a graph on example inputs, and finds the other shapes that it takes.

    Args:
        gm: the graph.
        inputs: what to call it with.
        retrace: trace it again even if torch.export made it.

    Raises:
        TraceError: torch.export cannot follow the graph.
        ExportError: an output is no tensor.
    """
    hollow, stand_ins = with_stand_ins(gm)
    program = None if retrace else program_of(hollow, inputs)
    if program is None:
        program = export_program(hollow, inputs.args, inputs.kwargs, inputs.dynamic_shapes)
    leaves = input_leaves(gm, program, inputs.dynamic_shapes)
    called = checked_names("input_names", inputs.input_names, [leaf.name for leaf in leaves])
    leaves = [replace(leaf, name=name) for leaf, name in zip(leaves, called, strict=True)]
    own = output_names(outputs_of(program))
    wanted = checked_names("output_names", inputs.output_names, own)
    if inputs.output_names is not None:
        check_apart(wanted, called)
    if inputs.generates and [*wanted] != own:
        raise ExportError(
            "output_names: a decoder with a cache is run by the names of its outputs, logits and "
            "present.*: expected none; leave it out"
        )
    outputs = free_names(wanted, taken=[leaf.name for leaf in leaves])
    changed = [(old, new) for old, new in zip(wanted, outputs, strict=True) if old != new]
    notes = [f"output {old!r} is called {new!r}: the name was taken" for old, new in changed]
    allowed = allowed_by(gm)
    tried, others = cases(program, leaves, allowed), beyond(program, leaves, allowed)
    return ExportUnit(
        program, leaves, tried[0], tried, others, outputs, notes, stand_ins, inputs.generates
    )
