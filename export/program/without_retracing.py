"""The program of a graph that torch.export made: what it found out is still on the nodes.

To trace again takes as long as to trace. Only what passes have added is not known yet.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import graph_signature as signature
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.utils import _pytree as pytree

from lora_fx.export.program.decompose import LoweredProgram, inline_grad_modes
from lora_fx.export.program.example_inputs import Inputs
from lora_fx.graph.example import example_of
from lora_fx.graph.graph_module import attribute, copy_graph
from lora_fx.graph.ops import GUARDS, written_arguments


def program_of(gm: fx.GraphModule, inputs: Inputs) -> torch.export.ExportedProgram | None:
    """The program of a graph, or None where it has to be traced again.

    That is a graph of another frontend, inputs of another form than it was traced with, a write
    into memory, a call that is no operator, or a free size that an earlier export has settled.
    """
    graph = copy_graph(gm.graph)
    modes = {value.fake_mode for value in _inputs(graph) if isinstance(value, FakeTensor)}
    if len(modes) != 1 or not _was_traced_with(gm, inputs) or _is_settled(graph):
        return None
    for guard in graph.find_nodes(op="call_module", target=GUARDS):
        graph.erase_node(guard)
    inline_grad_modes(gm, graph)
    if not all(map(_is_plain, graph.nodes)):
        return None
    mode = modes.pop()
    _propagate(gm, graph, mode)
    ranges = mode.shape_env.var_to_range if mode.shape_env is not None else {}
    return lifted(gm, graph, inputs, ranges)


def _inputs(graph: fx.Graph) -> Iterator[Any]:
    return (node.meta.get("val") for node in graph.find_nodes(op="placeholder"))


def _is_settled(graph: fx.Graph) -> bool:
    """Whether a size that was free is a number by now: some meta kernels of torch (FFT) say so."""
    values = [value for value in _inputs(graph) if isinstance(value, torch.Tensor)]
    every: list[Any] = [size for value in values for size in value.shape]
    sizes = [size for size in every if isinstance(size, torch.SymInt)]
    return any(size.node.expr.is_number for size in sizes)


def _was_traced_with(gm: fx.GraphModule, inputs: Inputs) -> bool:
    example = example_of(gm)
    if example is None or not isinstance(gm.graph._codegen, fx.graph._PyTreeCodeGen):
        return False
    given, spec = pytree.tree_flatten((inputs.args, dict(inputs.kwargs)))
    known, known_spec = pytree.tree_flatten((example.args, dict(example.kwargs)))
    same = spec == known_spec and all(map(_is_alike, given, known))
    return same and inputs.dynamic_shapes is example.dynamic_shapes


def _is_alike(value: Any, traced: Any) -> bool:
    """Whether a graph that was traced with the one is good for the other."""
    if isinstance(value, torch.Tensor) and isinstance(traced, torch.Tensor):
        return (value.shape, value.dtype) == (traced.shape, traced.dtype)
    return value is traced


def _is_plain(node: fx.Node) -> bool:
    if node.op == "placeholder":
        return isinstance(node.meta.get("val"), torch.Tensor | int | float | str | None)
    if node.op == "call_function":
        is_size = isinstance(node.meta.get("val"), int | torch.SymInt)
        known = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        return (known or is_size) and not written_arguments(node)
    return node.op in ("get_attr", "output")


def _propagate(gm: fx.GraphModule, graph: fx.Graph, mode: FakeTensorMode) -> None:
    """Finds shapes of what passes have added, and of what follows as far as that differs."""
    changed: set[fx.Node] = set()
    with torch.no_grad(), mode, enable_python_dispatcher():
        for node in graph.nodes:
            known = node.meta.get("val")
            if node.op == "get_attr" and known is None:
                node.meta["val"] = _without_values(attribute(gm, str(node.target)))
            if node.op != "call_function":
                continue
            if known is None or not changed.isdisjoint(node.all_input_nodes):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)
                if _form(known) != _form(node.meta["val"]):
                    changed.add(node)


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _form(value: Any) -> Any:
    leaves = pytree.tree_leaves(value)
    return [(v.dtype, str(v.shape)) if isinstance(v, torch.Tensor) else str(v) for v in leaves]


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
