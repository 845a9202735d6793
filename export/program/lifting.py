"""From a graph that fetches its tensors to a program that is given them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export import graph_signature as signature
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.utils import _pytree as pytree

from lora_fx.export.program.decompose import LoweredProgram
from lora_fx.export.program.example_inputs import Inputs
from lora_fx.graph.graph_module import attribute


def lifted(
    gm: fx.GraphModule, graph: fx.Graph, inputs: Inputs, ranges: Mapping[Any, Any]
) -> LoweredProgram:
    """Turns the tensors that a graph fetches into inputs, as a program has them, in place.

    Args:
        gm: what the graph fetches them from, made by torch.export.
        graph: operators with their shapes noted.
        inputs: what the program is good for.
        ranges: the sizes that each symbol can take.
    """
    info = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]  # not of every codegen
    user = [_input_spec(node) for node in graph.find_nodes(op="placeholder")]
    state, held = _lift(gm, graph)
    returned = pytree.tree_leaves(graph.output_node().args[0])
    outputs = [_output_spec(value) for value in returned]
    call = ModuleCallSignature([], [], info.in_spec, info.out_spec)
    return LoweredProgram(
        root={},
        graph=graph,
        graph_signature=signature.ExportGraphSignature([*held, *user], outputs),
        state_dict=state,
        range_constraints=dict(ranges),
        module_call_graph=[ModuleCallEntry("", call)],
        example_inputs=(inputs.args, dict(inputs.kwargs)),
    )


def _lift(
    gm: fx.GraphModule, graph: fx.Graph
) -> tuple[dict[str, torch.Tensor], list[signature.InputSpec]]:
    """One input for each tensor, in the module's order, however many names it has."""
    readers: dict[int, list[fx.Node]] = {}
    for node in graph.find_nodes(op="get_attr"):
        readers.setdefault(id(attribute(gm, str(node.target))), []).append(node)
    first = next(iter(graph.nodes))
    state: dict[str, torch.Tensor] = {}
    specs = []
    for name, tensor in (*gm.named_parameters(), *gm.named_buffers()):
        nodes = readers.get(id(tensor), [])
        if not nodes:
            continue
        with graph.inserting_before(first):
            held = graph.placeholder("p_" + name.replace(".", "_"))
        held.meta["val"] = nodes[0].meta["val"]
        for node in nodes:
            node.replace_all_uses_with(held)
            graph.erase_node(node)
        state[name] = tensor
        specs.append(_state_spec(held, name, tensor))
    return state, specs


def _state_spec(node: fx.Node, name: str, tensor: torch.Tensor) -> signature.InputSpec:
    argument, kinds = signature.TensorArgument(node.name), signature.InputKind
    if isinstance(tensor, torch.nn.Parameter):
        return signature.InputSpec(kinds.PARAMETER, argument, name)
    return signature.InputSpec(kinds.BUFFER, argument, name, persistent=True)


def _input_spec(node: fx.Node) -> signature.InputSpec:
    value = node.meta.get("val")
    argument: Any = signature.ConstantArgument(node.name, value)
    if isinstance(value, torch.Tensor):
        argument = signature.TensorArgument(node.name)
    return signature.InputSpec(signature.InputKind.USER_INPUT, argument, None)


def _output_spec(value: Any) -> signature.OutputSpec:
    argument: Any = signature.ConstantArgument("", value)
    if isinstance(value, fx.Node):
        is_tensor = isinstance(value.meta["val"], torch.Tensor)
        kind = signature.TensorArgument if is_tensor else signature.SymIntArgument
        argument = kind(value.name)
    return signature.OutputSpec(signature.OutputKind.USER_OUTPUT, argument, None)
