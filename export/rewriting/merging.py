"""Adapter values put into the weights of a swappable graph, whose slots go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnx_ir.tensor_adapters import TorchTensor

from lora_fx.export.onnx_model.identities import DropIdentities
from lora_fx.export.onnx_model.tensors import add_constant
from lora_fx.export.rewriting.file_layers import DTYPES
from lora_fx.export.rewriting.merged_tensor import Change, MergedTensor, Part
from lora_fx.export.rewriting.neutral import ONE, ZERO, Join, Neutral, read_neutral, take_out
from lora_fx.export.rewriting.slot_change import acts, axes_of, changes_of, shift_of
from lora_fx.export.rewriting.weight_reads import Read, read_another, readers, reads_behind
from lora_fx.export.slots.manifest import KEY, Manifest
from lora_fx.export.slots.slot import AnySlot, TensorSlot

Values = Mapping[str, torch.Tensor]
_NO_LAYER = "no weight of plain numbers is found that its branch is beside"


def merged_model(
    load: Callable[[], ir.Model], manifest: Manifest, values: Values
) -> tuple[ir.Model, dict[str, str]]:
    """A graph whose slots went, with what an adapter puts into them in its weights.

    Args:
        load: gives the swappable model, which is changed; asked again where a slot has to stay.
        manifest: of the model.
        values: by the names of the slots' inputs, held until the model is written.

    Returns:
        The model, and the slots whose values are constants beside their layer: path -> why.
    """
    beside: dict[str, str] = {}
    while True:
        model = load()
        more = _Merging(model, manifest, values, beside).run()
        if not more:
            return model, beside
        beside |= more


class _Merging:
    """One attempt to merge, which fails if a slot turns out to have to stay."""

    def __init__(
        self, model: ir.Model, manifest: Manifest, values: Values, beside: Mapping[str, str]
    ) -> None:
        self._model, self._values, self._beside = model, values, beside
        self._inputs = {str(value.name): value for value in model.graph.inputs}
        factors = [slot for slot in manifest.slots if not isinstance(slot, TensorSlot)]
        self._whole = [slot for slot in manifest.slots if isinstance(slot, TensorSlot)]
        self._stay = [slot for slot in factors if slot.path in beside]
        self._go = [slot for slot in factors if slot.path not in beside]

    def run(self) -> dict[str, str]:
        """Rewrites the model; gives what has to stay, or nothing when it is done."""
        for slot in (*self._whole, *self._stay):
            self._fix(slot)
        reading = read_neutral(self._model, self._neutral())
        if reading.stuck:
            return {p: f"what it adds goes into {what}" for p, what in reading.stuck.items()}
        take_out(reading.joins)
        common.RemoveUnusedNodesPass()(self._model)  # a gain's branch reads the bias
        for slot in self._go:
            if acts(slot, self._values):
                joins = [j for j in reading.joins if j.is_sum and slot.path in j.slots]
                if why := self._merge(slot, joins):
                    return {slot.path: why}
        self._finish()
        return {}

    def _neutral(self) -> dict[ir.Value, Neutral]:
        return {
            self._inputs[given.name]: Neutral(
                ONE if part == "col" else ZERO, frozenset({slot.path})
            )
            for slot in self._go
            for part, given in slot.inputs.items()
            if part != "down"
        }

    def _fix(self, slot: AnySlot) -> None:
        """Makes constants of a slot's inputs, which keep the base's if the adapter has none."""
        for name in slot.names:
            value = self._inputs[name]
            self._model.graph.inputs.remove(value)
            if name in self._values:
                value.const_value = _tensor(self._values[name], name)
                value.shape = ir.Shape(self._values[name].shape)
            self._model.graph.initializers[name] = value

    def _merge(self, slot: AnySlot, joins: Sequence[Join]) -> str:
        """Puts what one slot is given into the weight of its layer; says why if it cannot."""
        calls = [reads_behind(join.kept, join.node.outputs[0]) for join in joins]
        reads = [read for call in calls for read in call]
        if not calls or not all(calls):
            return _NO_LAYER
        changes = changes_of(slot, self._values)
        shift = shift_of(slot, self._values)
        if changes is None:
            return "it mixes the groups of a convolution, whose weight has no place for that"
        if shift is not None and any(read.in_parts for read in reads):
            return "it adds a bias to a weight that is read in parts"
        if whole := next((r.weight for r in reads if r.weight.dtype not in DTYPES), None):
            return f"its weight {whole.name} is stored as {whole.dtype}, which rounds what is added"
        axes = {read.weight: axes_of(slot, read) for read in reads}
        if unfit := next((w for w, found in axes.items() if found is None), None):
            return f"its weight {unfit.name} is stored in a way that is not told"
        for weight, found in axes.items():
            assert found is not None
            self._put(slot, weight, [r for r in reads if r.weight is weight], found, changes)
        if shift is not None:
            self._shift(slot, joins, reads, shift)
        return ""

    def _put(
        self,
        slot: AnySlot,
        weight: ir.Value,
        reads: Sequence[Read],
        axes: tuple[str, ...],
        changes: Sequence[Change],
    ) -> None:
        """W' in place of W, or beside it for these readers, if W has others."""
        assert weight.const_value is not None
        mine = {(read.node, read.place) for read in reads}
        is_own = mine >= set(readers(weight)) and not weight.is_graph_output()
        name = str(weight.name) if is_own else f"{slot.path}.weight"
        made = MergedTensor(weight.const_value, axes, changes, name)
        if is_own:
            weight.const_value = made
            return
        other = add_constant(self._model.graph, name, made)
        for read in reads:
            read_another(read, other)

    def _shift(
        self, slot: AnySlot, joins: Sequence[Join], reads: Sequence[Read], shift: torch.Tensor
    ) -> None:
        """Adds to the layer's bias; where it has none of its own, the sum stays."""
        spots = {read.bias for read in reads}
        found = {spot[0] for spot in spots if spot is not None}
        bias = next(iter(found), None)
        mine = {spot[1:] for spot in spots if spot is not None}
        if (
            len(found) == 1
            and None not in spots
            and bias is not None
            and mine >= set(readers(bias))
        ):
            change = Change(added=Part(("out",), shift.flatten()))
            assert bias.const_value is not None
            if bias.const_value.size == shift.numel():
                bias.const_value = MergedTensor(bias.const_value, ("out",), [change], bias.name)
                return
        name = f"{slot.path}.bias"
        constant = add_constant(self._model.graph, name, _tensor(shift, name))
        for join in joins:
            join.node.op_type = "Add"
            join.node.resize_inputs(2)
            join.node.replace_input_with(1, constant)

    def _finish(self) -> None:
        for slot in self._go:
            for name in slot.names:
                self._model.graph.inputs.remove(self._inputs[name])
        self._model.metadata_props.pop(KEY, None)
        ir.passes.Sequential(DropIdentities(), common.RemoveUnusedNodesPass())(self._model)


def _tensor(values: torch.Tensor, name: str) -> ir.TensorProtocol:
    return TorchTensor(values.contiguous(), name=name)
