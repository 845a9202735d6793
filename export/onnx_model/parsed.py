"""A model as onnx_ir has it, or what is wrong with its graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from lora_fx.errors import ExportError, advised, shorten, within
from lora_fx.export.onnx_model.tensor_protos import ASIDE
from lora_fx.export.onnx_model.tensors import add_constant

_AGAIN = "give the file as it was exported, or export it again"


@advised(_AGAIN)
def parsed_file(path: Path) -> ir.Model:
    """Reads a file; its external data is read when it is asked for.

    Nodes stand behind what they read, weights are initializers, and what functions of the file
    compute stands where they are called: some tools leave it otherwise, which onnxruntime takes.
    Weights are inputs where a file says so, and not because its version of the format has no
    others.

    Raises:
        ExportError: its graph contradicts itself.
    """
    with within(path), _contradictions_told():
        model = ir.load(path)
        if "ai.onnx" in model.opset_imports:  # which is the domain without a name
            model.opset_imports[""] = model.opset_imports.pop("ai.onnx")
        _check_read(model)
        common.InlinePass()(model)
        model.graph.sort()
        if model.ir_version < ASIDE:
            for value in model.graph.initializers.values():
                if value.is_graph_input():
                    model.graph.inputs.remove(value)
            model.ir_version = ASIDE
        common.LiftConstantsToInitializersPass(lift_all_constants=True)(model)
        _lift_small_weights(model)
        _named_once(model)
        if any(value.shape is None for value in model.graph.outputs):  # which onnx refuses
            common.ShapeInferencePass()(model)
        return model


def _check_read(model: ir.Model) -> None:
    """Refuses what onnx_ir leaves out where it reads a file."""
    read = {value for node in model.graph.all_nodes() for value in node.inputs if value is not None}
    if unmade := [
        str(value.name)
        for value in read
        if value.producer() is None and not value.is_graph_input() and not value.is_initializer()
    ]:
        raise ExportError(
            f"reads {shorten(sorted(unmade))}, which no node, input or initializer gives; one that "
            "is stored sparse is not read: store it as a plain one"
        )


def _lift_small_weights(model: ir.Model) -> None:
    """Matrices of fewer numbers than the pass lifts, which leaves shapes where they are."""
    for node in [node for node in model.graph.all_nodes() if node.op_type == "Constant"]:
        held = node.outputs[0]
        tensor = ir.convenience.get_const_tensor(held)
        if tensor is None or len(tensor.shape) < 2 or held.is_graph_output() or node.graph is None:
            continue
        assert isinstance(node.graph, ir.Graph)
        value = add_constant(node.graph, str(held.name), tensor)
        held.replace_all_uses_with(value)
        node.graph.remove(node, safe=True)


def _named_once(model: ir.Model) -> None:
    """Branches may each have a weight of one name, which a file beside the model cannot tell."""
    taken = {value.name for node in model.graph.all_nodes() for value in node.outputs}
    for graph in model.graphs():
        for value in list(graph.initializers.values()):
            name, number = value.name, 1
            while value.name in taken:
                value.name, number = f"{name}_{number}", number + 1
            taken.add(value.name)


@advised(_AGAIN)
def parsed(model: onnx.ModelProto) -> ir.Model:
    """The same of a model that was read.

    Raises:
        ExportError: its graph contradicts itself.
    """
    with _contradictions_told():
        return ir.from_proto(model)


@contextmanager
def _contradictions_told() -> Iterator[None]:
    try:
        yield
    except (ir.serde.SerdeError, ValueError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, NotImplementedError):
            raise ExportError(
                f"what it holds is not read: {str(cause).partition('.')[0]}: ZipMap, which "
                "skl2onnx puts behind a classifier, it leaves out where its option zipmap is off"
            ) from error
        raise ExportError(f"not a valid ONNX graph: {cause}") from error
