"""Abstract interpretation: one value for every node of a graph, which is read and not run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import fx

from lora_fx.affine.affine_map import AffineMap, OneHot, Patches, Reading
from lora_fx.affine.constant_expr import factored
from lora_fx.affine.feature_layout import Layout
from lora_fx.algebra.matrix_expr import Identity, Leaf, Matrix
from lora_fx.graph.aliasing import Written
from lora_fx.graph.constants import Constants
from lora_fx.graph.ops import Sizes, op_name, sizes_of
from lora_fx.layers.matrix_products import Product, product_of


@dataclass(frozen=True)
class Alias:
    """A node that passes on one that is no AffineMap itself."""

    node: fx.Node


@dataclass(frozen=True)
class Splat:
    """A tensor that holds one number everywhere.

    Attributes:
        number: that number.
        layout: where it would have its features, if it was made like an AffineMap; or None.
    """

    number: float
    layout: Layout | None = None


@dataclass(frozen=True)
class TupleValue:
    """Several values, of which `getitem` picks one."""

    values: tuple[AffineMap, ...]


@dataclass(frozen=True)
class Opaque:
    """Not affine, and why."""

    reason: str


Value = AffineMap | Alias | Splat | TupleValue | Opaque
Rule = Callable[["Analysis", fx.Node], Value]


class Analysis:
    """The values of every node of a graph.

    Args:
        gm: a graph in normal form.
        rules: operator name -> its transfer function.

    Attributes:
        constants: the nodes that are computable from constants.
        values: what every other node is.
        written: what calls write into, and who reads that afterwards.
    """

    def __init__(self, gm: fx.GraphModule, rules: Mapping[str, Rule]) -> None:
        self.gm = gm
        self.constants = Constants(gm)
        self.values: dict[fx.Node, Value] = {}
        self._sources: dict[tuple[fx.Node, int, Reading], AffineMap] = {}
        self._products: dict[fx.Node, Product | None] = {}
        self.written = Written(gm.graph)
        for node in gm.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node in self.written.late or self._changes(node):
                self.values[node] = Opaque("reads memory that is written in place")
            elif not self.constants.admit(node):
                self.values[node] = self._value(node, rules)

    def _changes(self, node: fx.Node) -> bool:
        """Whether a node is a tensor of the model that the graph writes to."""
        return node.op == "get_attr" and node in self.written.nodes

    def _value(self, node: fx.Node, rules: Mapping[str, Rule]) -> Value:
        name = op_name(node)
        if name not in rules:
            return Opaque(f"{name} is not known to be affine")
        if not node.args:
            return Opaque(f"{name} is called by keywords")
        return as_stored(node, rules[name](self, node))

    def product(self, node: fx.Node) -> Product | None:
        """`product_of`, asked once for each node: what is analysed does not change meanwhile."""
        if node not in self._products:
            self._products[node] = product_of(node)
        return self._products[node]

    def map_of(self, value: object) -> AffineMap | None:
        """The AffineMap of an argument, or None."""
        known = self.values.get(value) if isinstance(value, fx.Node) else None
        return known if isinstance(known, AffineMap) else None

    def whole_map_of(self, value: object) -> AffineMap | None:
        """The map of an argument whose features may be mixed: not those of a grouped kernel."""
        found = self.map_of(value)
        return None if found is None or found.grouped else found

    def source(
        self, value: object, size: int, after: int = 0, reading: Reading = None
    ) -> AffineMap | None:
        """An argument as something with ``size`` features: its own AffineMap, or a source.

        An AffineMap that keeps its features elsewhere, or is read in another way, becomes a source.
        """
        if not isinstance(value, fx.Node) or value in self.constants.nodes:
            return None
        known = self.values.get(value)
        if isinstance(known, Alias):
            return self.source(known.node, size, after, reading)
        if not _countable(value, reading):
            return None
        fits = isinstance(known, AffineMap) and reading is None and not known.grouped
        if fits and isinstance(known, AffineMap) and _at(known.layout, size, after):
            return known
        return self._source(value, size, after, reading)

    def _source(self, node: fx.Node, size: int, after: int, reading: Reading) -> AffineMap:
        key = (node, after, reading)
        found = self._sources.get(key)
        if found is None or found.size != size:
            layout = Layout((size,), after, self._batch(node, after, reading))
            found = AffineMap(
                node, None, Identity(size), layout, dtype=dtype_of(node), reading=reading
            )
            self._sources[key] = found
        return found

    def _batch(self, node: fx.Node, after: int, reading: Reading) -> Sizes | None:
        sizes = sizes_of(node) or self._derived(node)
        if sizes is None or isinstance(reading, Patches):
            return None  # where a kernel goes is said by the node that has it
        if isinstance(reading, OneHot):
            return sizes
        return (*sizes[: len(sizes) - after - 1], *sizes[len(sizes) - after :])

    def _derived(self, node: fx.Node) -> Sizes | None:
        """The sizes of a node that a pass has made."""
        known = self.values.get(node)
        return known.layout.sizes if isinstance(known, AffineMap) else None

    def matrix(self, node: object) -> Matrix | None:
        """A constant of two axes, as an expression of the constants that it is made of."""
        known = isinstance(node, fx.Node) and node in self.constants.nodes
        return factored(self.constants, node) if known else None  # type: ignore[arg-type]

    def reads_constant(self, node: fx.Node) -> bool:
        """Whether a constant tensor is among what a node reads."""
        return any(source in self.constants.nodes for source in node.all_input_nodes)

    def column(self, value: object, layout: Layout) -> Matrix | None:
        """A constant that has one value for each feature of a layout, or one for all."""
        if not isinstance(value, fx.Node) or value not in self.constants.nodes:
            return None
        shape = self.constants.shape(value)
        if shape is None or not layout.column(shape):
            return None
        front = len(shape) - layout.after
        own = shape[max(0, front - len(layout.split)) : max(0, front)]
        key = ("column", layout.split, self.constants.key(value))

        def fetch() -> torch.Tensor:
            constant: torch.Tensor = self.constants.value(value)
            return constant.reshape(own).expand(layout.split)

        return Leaf((prod(layout.split), 1), key, fetch)


def as_stored(node: fx.Node, found: Value) -> Value:
    """A value as a node's tensor holds it: one number is rounded; a map that is cut is none."""
    dtype = dtype_of(node) or node.kwargs.get("dtype")
    if not isinstance(dtype, torch.dtype):
        return found
    if isinstance(found, Splat):
        held = torch.tensor(found.number, dtype=torch.float64).to(dtype)
        return replace(found, number=float(held.real))
    is_cut = not (dtype.is_floating_point or dtype.is_complex)
    return Opaque("whole numbers") if is_cut and isinstance(found, AffineMap) else found


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """What a node was traced with, or None."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def result_dtype(node: fx.Node, derived: torch.dtype | None) -> torch.dtype | None:
    """What a node was traced with, or what its operands make it."""
    return dtype_of(node) or derived


def _countable(node: fx.Node, reading: Reading) -> bool:
    dtype = dtype_of(node)
    return dtype is None or isinstance(reading, OneHot) or dtype.is_floating_point


def _at(layout: Layout, size: int, after: int) -> bool:
    return layout.keeps((size,), after)
