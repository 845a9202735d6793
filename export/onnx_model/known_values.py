"""Constant evaluation of an exported program: what neither inputs nor weights have a say in."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.export import graph_signature as signature

from lora_fx.graph.ops import aten, mutates

# Operators that ONNX lacks; torch.onnx has no others for them.
_LACKING = {
    *(aten.erfinv.default, aten.lgamma.default, aten.digamma.default, aten.polygamma.default),
    *(aten.special_ndtri.default, aten.special_zeta.default, aten.i0.default),
    *(aten.special_i0e.default, aten.linalg_matrix_exp.default, aten.searchsorted.Tensor),
    *(aten.kaiser_window.default, aten.kaiser_window.periodic, aten.kaiser_window.beta),
}


def without_known_calls(program: torch.export.ExportedProgram) -> None:
    """Computes what ONNX has no operator for, where constants alone are read, in place.

    Before -> after: ``erfinv(sub(2 * 0.95, 1))`` -> ``1.163``. Where an input or a weight has a say
    it stays, and is refused by whoever translates it.
    """
    lacking = [node for node in program.graph.nodes if node.target in _LACKING]
    if not lacking:
        return
    state = KnownValues(program)
    for node in lacking:
        value = state.value(node)
        if value is not None:
            node.replace_all_uses_with(state.constant(value))
            program.graph.erase_node(node)
    program.graph_module.recompile()


class KnownValues:
    """What a program holds that no call changes, and what is computed from it."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self._program = program
        held = {**program.state_dict, **program.constants}
        specs = program.graph_signature.input_specs
        targets = {spec.arg.name: spec.target for spec in specs if spec.target is not None}
        self._held = {name: held[t] for name, t in targets.items() if t in held}

    def value(self, node: fx.Node) -> Tensor | None:
        """A constant, or None for what a call, or a weight, has a say in."""
        if node.op == "placeholder":
            held = self._held.get(node.name)
            is_known = isinstance(held, Tensor) and not isinstance(held, torch.nn.Parameter)
            return held if is_known else None
        is_call = isinstance(node.target, torch._ops.OpOverload) and not mutates(node)
        if not is_call or torch.Tag.nondeterministic_seeded in node.target.tags:  # type: ignore[union-attr]
            return None
        values = {n: self.value(n) for n in node.all_input_nodes}
        if any(value is None for value in values.values()):
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        found = node.target(*args, **kwargs)  # type: ignore[operator]
        return found if isinstance(found, Tensor) else None

    def constant(self, value: Tensor) -> fx.Node:
        """A new input that a program holds the value of."""
        program = self._program
        first = next(iter(program.graph.nodes))
        with program.graph.inserting_before(first):
            node: fx.Node = program.graph.placeholder(f"known_{len(self._held)}")
        mode = first.meta["val"].fake_mode
        node.meta["val"] = mode.from_tensor(value)
        argument = signature.TensorArgument(node.name)
        spec = signature.InputSpec(signature.InputKind.CONSTANT_TENSOR, argument, node.name)
        program.graph_signature.input_specs.insert(0, spec)
        program.constants[node.name] = self._held[node.name] = value
        return node
