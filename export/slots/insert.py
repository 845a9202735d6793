"""Slots in a graph and its ONNX form: a probe's constants become inputs with a default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import fx, nn

from lora_fx.errors import ExportError
from lora_fx.export.slots.probe import PROBE
from lora_fx.export.slots.slot import AnySlot, ExpertSlot, InvocationSlot, TensorSlot
from lora_fx.graph.editor import Editor
from lora_fx.graph.example import aliases_of
from lora_fx.graph.lazy_tensor import get_unevaluated
from lora_fx.graph.pass_base import Pass
from lora_fx.injection.invocation_mask import HOLDER
from lora_fx.layers.adapter_tensors import parameter_names, value_names
from lora_fx.layers.parameter_readers import readers


@dataclass(frozen=True)
class OwnTensors(Pass):
    """Gives each of some parameters a constant of its own, which no other module reads.

    Attributes:
        names: of the parameters.
    """

    names: Sequence[str]

    def rewrite(self, editor: Editor) -> None:
        """Copies what another module reads too, such as a table that is also the head."""
        for name in self.names:
            found = _readers(editor.gm, name)
            first, source = found[0]
            value = get_unevaluated(editor.gm, str(source.target))
            if isinstance(value, torch.Tensor):
                value = nn.Parameter(value.detach(), requires_grad=False)
            module, _, leaf = name.rpartition(".")  # by which its readers are found again
            free = f"{module}.own.{leaf}" if str(source.target) == name else name
            node = editor.constant(free, value, before=first)
            for reader, old in found:
                editor.rebind(reader, old, node)


def shared(gm: fx.GraphModule, slots: Sequence[AnySlot]) -> list[str]:
    """The parameters among slots that have another name in the graph, or other readers."""
    found = []
    for slot in slots:
        if isinstance(slot, TensorSlot):
            sources = {source for _, source in _readers(gm, slot.path)}
            users = {user for source in sources for user in source.users}
            same = {str(source.target) for source in sources} == {slot.path}
            if not same or users != {reader for reader, _ in _readers(gm, slot.path)}:
                found.append(slot.path)
    return found


def _readers(gm: fx.GraphModule, name: str) -> list[tuple[fx.Node, fx.Node]]:
    """Who reads a parameter, under any name of its module."""
    module, dot, leaf = name.rpartition(".")
    paths = (module, *aliases_of(gm).get(module, ()))
    return list(dict.fromkeys(r for path in paths for r in readers(gm, f"{path}{dot}{leaf}")))


def open_slots(model: ir.Model, gm: fx.GraphModule, slots: Sequence[AnySlot]) -> None:
    """Makes graph inputs of what the slots take, in place.

    Factors get no default yet: an optimiser may evaluate what has one. A whole tensor keeps the
    base's, which it evaluates no more than any weight.

    Args:
        model: what was exported.
        gm: the graph that it was exported from, with a probe in the slots of factors.
        slots: of the model.
    """
    others = aliases_of(gm)
    for slot in slots:
        if isinstance(slot, TensorSlot):
            _open_tensor(model, slot, str(_readers(gm, slot.path)[0][1].target))
        elif isinstance(slot, ExpertSlot):
            up, down = value_names(slot.path, PROBE, 2, bare=True)
            _open_factors(model, slot, {"up": up, "down": down})
        elif isinstance(slot, InvocationSlot):
            _open_tokens(model, slot)
        else:
            names = parameter_names(slot.path, PROBE)
            if names.down not in model.graph.initializers:
                names = parameter_names(slot.path, PROBE, bare=True)
            twins = [parameter_names(other, PROBE) for other in others.get(slot.path, ())]
            _open_factors(model, slot, names._asdict(), [twin._asdict() for twin in twins])


def _open_tensor(model: ir.Model, slot: TensorSlot, target: str) -> None:
    """Lets an initializer be overridden, under the name of the slot."""
    value = model.graph.initializers.get(target)
    if value is None:
        raise ExportError(f"slot {slot.path}: the exported graph lost it; please report the model")
    namesake = model.graph.initializers.get(slot.path)
    if namesake is not None and namesake is not value:  # what others read of a tied weight
        namesake.name = f"{slot.path}_tied"
    value.name = slot.path
    model.graph.inputs.append(value)


def _open_tokens(model: ir.Model, slot: InvocationSlot) -> None:
    """The tokens of an invocation; until they are counted, shapes hold how many the probe had."""
    (name,) = slot.names
    shape = ir.Shape([ir.SymbolicDim(f"length:{slot.path}")])
    open_values = [_as_input(model, f"{HOLDER}.{PROBE}", name, shape)]
    for value in open_values:  # grows
        counted = [n for n in value.consumers() if not n.op_type.startswith("Reduce")]
        for output in (output for node in counted for output in node.outputs):
            open_values += [output] if output.shape is not None else []
            output.shape = None


def _open_factors(
    model: ir.Model,
    slot: AnySlot,
    names: Mapping[str, str],
    twins: Sequence[Mapping[str, str]] = (),
) -> None:
    rank = ir.SymbolicDim(f"rank:{slot.path}")
    opened = {}
    for part, (name, sizes) in slot.inputs.items():
        shape = ir.Shape([rank if size is None else size for size in sizes])
        opened[part] = _as_input(model, names[part], name, shape)
        for twin in twins:
            _read_instead(model, twin[part], opened[part])
    _forget_rank(opened["down"], until=opened["up"])


def _as_input(model: ir.Model, old: str, new: str, shape: ir.Shape) -> ir.Value:
    value = model.graph.initializers.pop(old, None)
    if value is None:
        raise ExportError(f"slot {new}: the exported graph lost it; please report the model")
    value.const_value, value.name, value.shape = None, new, shape
    model.graph.inputs.append(value)
    return value


def _read_instead(model: ir.Model, old: str, new: ir.Value) -> None:
    value = model.graph.initializers.pop(old, None)
    if value is not None:
        ir.convenience.replace_all_uses_with(value, new)


def _forget_rank(start: ir.Value, until: ir.Value) -> None:
    """Clears the shapes between A and B: they were recorded with the probe's rank.

    Of a packed projection that is read in parts, each call expands with a part of B.
    """
    picks = [node for node in until.consumers() if node.op_type in ("Slice", "Gather")]
    parts = [out for node in picks for out in node.outputs]
    for part in parts:
        part.shape = None
    ends = {until, *parts}
    open_values, seen = [start], {start}
    while open_values:
        for node in open_values.pop().consumers():
            if not ends.isdisjoint(node.inputs):
                continue
            for value in set(node.outputs) - seen:
                value.shape = None
                seen.add(value)
                open_values.append(value)


def set_defaults(model: ir.Model, slots: Sequence[AnySlot], required: bool = False) -> None:
    """Gives factors a default without effect: a file run without an adapter is the base.

    Args:
        model: the model, changed in place.
        slots: that were opened.
        required: none gets one. The base's whole tensors stay in the file beside their inputs, for
            whoever makes an adapter that leaves them alone.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    if required:
        for slot in slots:
            if isinstance(slot, TensorSlot):
                _close_default(model, inputs[slot.path])
        return
    for slot in slots:
        for name, tensor in slot.neutral().items():
            value = inputs[name]
            assert value.dtype is not None
            empty = tensor.float().numpy().astype(value.dtype.numpy())
            value.const_value = ir.Tensor(empty, dtype=value.dtype, name=name)
            model.graph.initializers[name] = value


def _close_default(model: ir.Model, value: ir.Value) -> None:
    tensor = model.graph.initializers.pop(str(value.name)).const_value
    value.const_value = None
    kept = ir.Value(
        name=f"{value.name}_base", shape=value.shape, type=value.type, const_value=tensor
    )
    model.graph.register_initializer(kept)
