"""What one of PEFT's layers computes, as an update of the layer that it is around."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call

from lora_fx.adapters.other_updates import Function, WeightUpdate
from lora_fx.adapters.updates import AnyUpdate, Stacks, Update
from lora_fx.affine.affine_map import AffineMap
from lora_fx.affine.analysis import Analysis, Opaque
from lora_fx.affine.transfer import analyse
from lora_fx.algebra.evaluate import dense
from lora_fx.algebra.low_rank import NotLowRankError, factors_beside
from lora_fx.algebra.matrix_expr import Leaf, Matrix, Sum, exchanged, leaves, transposed
from lora_fx.errors import AdapterError
from lora_fx.graph.graph_module import attribute
from lora_fx.layers.layer import Layer
from lora_fx.numerics import compare
from lora_fx.traced_adapters.traces import Traces

Own = Mapping[str, torch.Tensor]

# Of which PEFT adds up what several adapters of one layer change, each of the base's own W; and of
# which each acts on what the one before it made. All others mean neither.
_SUMMED = frozenset({
    "adamss", "beft", "c3a", "delora", "fourierft", "frod", "gralora", "hira", "peanut", "randlora",
    "shira", "supertuning", "waveft",
})  # fmt: skip
_ONE_BY_ONE = frozenset({"boft", "hra"})
WEIGHT, BIAS = "base_layer.weight", "base_layer.bias"
_ROWS = (3, 5)  # of the example: nobody's number of features


@torch.no_grad()
def update_of(layer: nn.Module, base: Layer, own: Own, kind: str, traces: Traces) -> AnyUpdate:
    """Reads the weight and the bias that a layer of PEFT's applies, off its graph.

    Args:
        layer: of PEFT, around the base's own, the adapter's values in it.
        base: what the base's layer is.
        own: its weight and bias as they are without PEFT.
        kind: of the update.
        traces: of the adapter's layers.

    Returns:
        A product of two factors where the layer's own factors show one; else W' as an expression
        in W. What the layer computes of its values alone is evaluated, when it is first read.

    Raises:
        AdapterError: what it computes is no affine function of its input.
    """
    if not hasattr(layer, "base_layer"):
        raise AdapterError(
            f"PEFT wraps no {type(layer).__name__} for {kind}, so this adapter changes nothing "
            "here: train one on layers of another type, or with another type of adapter"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT advises those who train
        gm = traces.of(layer, example(base, layer))
        read = _Reading(analyse(gm), base, own)
        update = read.update(_value(read.analysis, gm), kind)
        _check(layer, base, own, update)
    return update


def example(base: Layer, layer: nn.Module) -> torch.Tensor:
    """An input of a layer."""
    make = torch.Generator().manual_seed(0)
    if base.type.reads_ids:
        return torch.randint(0, base.in_features, _ROWS, generator=make)
    own: Any = layer.base_layer
    sizes = [
        3 + (size - 1) * step for size, step in zip(base.shape[2:], _dilation(own), strict=True)
    ]
    shape = (_ROWS[0], base.in_features, *sizes) if base.is_conv else (*_ROWS, base.in_features)
    return torch.randn(shape, generator=make).to(base.dtype)


def _dilation(module: Any) -> tuple[int, ...]:
    given = getattr(module, "dilation", ())
    return given if isinstance(given, tuple) else (given,)


def _value(analysis: Analysis, gm: fx.GraphModule) -> AffineMap:
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    (result,) = output.all_input_nodes[:1]
    value = analysis.map_of(result)
    if value is None or value.source.node.op != "placeholder":
        known = analysis.values
        opaque = (v.reason for node, v in known.items() if isinstance(v, Opaque) and node.args)
        why = next((reason for reason in opaque if not reason.startswith("guardsfn")), "")
        raise AdapterError(f"what it computes is no affine function of its input: {why}")
    return value


@dataclass(frozen=True)
class _Reading:
    """One layer of PEFT's, traced: its weight and its bias as expressions."""

    analysis: Analysis
    base: Layer
    own: Own

    def update(self, value: AffineMap, kind: str) -> AnyUpdate:
        whole, column = value.relative_to(value.source)
        out, *rest = self.base.own_shape
        if whole.shape != (out, prod(rest)):
            raise AdapterError(f"it gives {whole.shape}, the base's layer {(out, prod(rest))}")
        shift = self._shift(column)
        weight = self._weight()
        try:
            down, up = factors_beside(weight, whole)
        except NotLowRankError:
            function, stacks = self._function(weight, whole), self._stacks(kind, weight, whole)
            return WeightUpdate(kind, function, (out, *rest), None, shift, stacks)
        return Update(down.reshape(-1, *rest), up, 1.0, kind, shift)

    def _stacks(self, kind: str, weight: Matrix, whole: Matrix) -> Stacks:
        if kind in _SUMMED:
            return "if added"
        is_of_any = next(leaves(weight)) in leaves(whole)
        return "on any" if kind in _ONE_BY_ONE and is_of_any else "never"

    def _weight(self) -> Matrix:
        """W of (out, in * kernel), as the analysis writes it."""
        out, *rest = self.base.own_shape
        shape = (rest[0], out) if self.base.transposed else (out, prod(rest))
        held = Leaf(shape, self._key(WEIGHT), torch.Tensor)
        return transposed(held) if self.base.transposed else held

    def _key(self, name: str) -> object:
        """How the analysis calls a tensor of the base's layer; None if PEFT put another there."""
        nodes = self.analysis.gm.graph.find_nodes(op="get_attr", target=name)
        own = self.own.get(name.rpartition(".")[2])
        if not nodes or own is None:
            return None
        held = attribute(self.analysis.gm, name)
        return self.analysis.constants.key(nodes[0]) if held.data_ptr() == own.data_ptr() else None

    def _function(self, weight: Matrix, whole: Matrix) -> Function:
        """W' of any W; what is not said in terms of W is a difference from the base's."""
        held = next(leaves(weight))
        if held not in leaves(whole):
            return self._difference(whole)
        turned = self.base.transposed

        def function(other: Matrix) -> Matrix:
            new = transposed(other) if turned else other
            made: Matrix = exchanged(whole, lambda leaf: new if leaf == held else leaf)
            return made

        return function

    def _difference(self, whole: Matrix) -> Function:
        def fetch() -> torch.Tensor:
            own = self.base.type.canonical("weight", self.own["weight"], self.base.groups)
            return dense(whole, torch.float32) - own.reshape(whole.shape)

        return lambda weight: Sum(weight, Leaf(whole.shape, "difference", fetch))

    def _shift(self, column: Matrix | None) -> torch.Tensor | None:
        """What is added to the bias of the base's layer."""
        own, key = self.own.get("bias"), self._key(BIAS)
        known = isinstance(column, Leaf) and column.key == ("column", self.base.own_shape[:1], key)
        if (column is None and own is None) or (known and key is not None):
            return None
        out = self.base.own_shape[0]
        made = torch.zeros(out) if column is None else dense(column, torch.float32).reshape(-1)
        shift = made if own is None else made - own
        return shift if bool(shift.any()) else None


def _check(layer: Any, base: Layer, own: Own, update: AnyUpdate) -> None:
    """Runs PEFT's layer, and the base's with the weight and bias that were read.

    Raises:
        AdapterError: they differ.
    """
    x = example(base, layer)
    weight = base.type.canonical("weight", own["weight"], base.groups)
    given = base.type.store("weight", update.weight(weight), base.groups).to(base.dtype)
    bias, shift = own.get("bias"), update.shift(lambda: own.get("bias"))
    tensors = {"weight": given}
    if bias is not None:
        tensors["bias"] = bias if shift is None else (bias + shift).to(base.dtype)
    made = functional_call(layer.base_layer, tensors, (x,))
    if bias is None and shift is not None:
        made = made + shift.reshape(-1, *[1] * base.type.kernel)
    found = compare(made, layer(x), base.dtype)
    if not found.ok:
        raise AdapterError(f"the weight that was read of it computes something else: {found}")
