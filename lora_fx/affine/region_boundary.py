"""What a region has of its layer: its input, its stored weight, and views and casts around it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx

from lora_fx.affine.affine_map import AffineMap, Link, Patches
from lora_fx.affine.analysis import Alias, Analysis, dtype_of
from lora_fx.algebra.matrix_expr import Identity, Leaf, Matrix, Sum, Transposed, parts
from lora_fx.graph.ops import CASTS, needed, op_name
from lora_fx.layers.layer_types import OPERATORS, operands_of
from lora_fx.layers.matrix_products import product_of
from lora_fx.layers.weight_parts import part_of


@dataclass(frozen=True)
class ViewChain:
    """From a node through moves, which are said again behind it.

    Attributes:
        start: where it begins.
        moves: reshapes, permutations and casts, in order.
    """

    start: fx.Node
    moves: tuple[fx.Node, ...] = ()


def is_layer(node: fx.Node) -> bool:
    """Whether a call may stand for a region: a layer, or a product that is written out."""
    return node.target in OPERATORS or product_of(node) is not None


def input_of(layer: fx.Node) -> fx.Node:
    """What a layer reads."""
    product = None if layer.target in OPERATORS else product_of(layer)
    x = product.x if product else layer.args[operands_of(layer.target).x]
    assert isinstance(x, fx.Node)
    return x


def weight_of(layer: fx.Node) -> fx.Node:
    """The constant that a layer multiplies with."""
    product = None if layer.target in OPERATORS else product_of(layer)
    weight = product.matrix if product else layer.args[operands_of(layer.target).weight]
    assert isinstance(weight, fx.Node)
    return weight


def stored_in(layer: fx.Node, gm: fx.GraphModule) -> fx.Node | None:
    """The ``get_attr`` node of the weight that a layer reads, or reads a part of; or None."""
    part = part_of(gm, weight_of(layer))
    return part and part.source


class BaseWeight(NamedTuple):
    """The stored weight that a layer multiplies with, by itself or as a term of a sum.

    Attributes:
        weight: (out, in * kernel), as the analysis composes what is added to it.
        stored: its ``get_attr`` node.
        calls: what picks the layer's operand of it.
        in_sum: whether it is a term of the operand, and not all of it.
        is_turned: whether that has it on its side.
    """

    weight: Matrix
    stored: fx.Node
    calls: tuple[fx.Node, ...] = ()
    in_sum: bool = False
    is_turned: bool = False


def stored_term(layer: fx.Node, analysis: Analysis) -> BaseWeight | None:
    """The one stored weight of ``x @ (W + A @ B)``, or None."""
    own, operand, constants = analysis.values[layer], weight_of(layer), analysis.constants
    if not isinstance(own, AffineMap) or operand not in layer.all_input_nodes:
        return None
    shape = constants.shape(operand) or ()
    fetched = [node for node in needed(operand) if node.op == "get_attr"]
    nodes: dict[Hashable, fx.Node] = {constants.key(node): node for node in fetched}
    found = []
    matrix = analysis.matrix(operand) or own.weight  # a kernel's, if it is not turned
    for term, weight in zip(parts(matrix, Sum), parts(own.weight, Sum), strict=True):
        leaf = term.of if isinstance(term, Transposed) else term
        stored = nodes.get(leaf.key) if isinstance(leaf, Leaf) else None
        if stored is None or constants.dtype(stored) != constants.dtype(operand):
            continue
        is_turned = leaf is not term
        if constants.shape(stored) == (shape[::-1] if is_turned else shape):
            found.append(BaseWeight(weight, stored, (), True, is_turned))
    return found[0] if len(found) == 1 else None


def is_stored(layer: fx.Node, analysis: Analysis) -> bool:
    """Whether a call is a layer of its own: a product with what is computed may be an adapter's."""
    if layer.target in OPERATORS or stored_in(layer, analysis.gm) is not None:
        return True
    return stored_term(layer, analysis) is not None


def reads_more(layer: fx.Node, source: AffineMap, analysis: Analysis) -> bool:
    """Whether a layer reads the source with functions of it behind: ``concat(x, x A)``."""
    x = input_of(layer)
    return op_name(x) == "cat" and _only_moves(x.args[0][0], source, analysis)  # type: ignore[index, arg-type]


def input_views(layer: fx.Node, source: AffineMap, analysis: Analysis) -> ViewChain | None:
    """How the source comes to a layer without what the region does to it on the way."""
    x = input_of(layer)
    if isinstance(source.reading, Patches):
        return ViewChain(source.node)
    if source.reading is not None or _only_moves(x, source, analysis):
        return ViewChain(_before_idle_casts(x))
    if reads_more(layer, source, analysis):
        return ViewChain(_before_idle_casts(x.args[0][0]))  # type: ignore[index, arg-type]
    moves: list[fx.Node] = []
    node = x
    while node is not source.node:
        value = analysis.values.get(node)
        if isinstance(value, AffineMap) and _alike(value, source):
            break
        if _casts(node) or (isinstance(value, AffineMap) and value.last is Link.VIEW):
            moves.insert(0, node)
        elif not isinstance(value, Alias) and _computes(value):
            return None
        node = _before(node, analysis)
    arriving = analysis.map_of(moves[-1]) if moves else source
    wanted = analysis.constants.dtype(weight_of(layer))
    fits = arriving is None or arriving.dtype in (None, wanted)
    return ViewChain(source.node, tuple(moves)) if fits else None


def output_views(
    layer: fx.Node, value: AffineMap, nodes: set[fx.Node], analysis: Analysis
) -> ViewChain | None:
    """How a layer's result comes to the layout and dtype of a region's.

    Moves that act on anything laid out like the layer's result could act on that as well.
    """
    own = analysis.values[layer]
    if not isinstance(own, AffineMap) or _alike(own, value):
        return ViewChain(layer) if isinstance(own, AffineMap) else None
    starts = [
        n
        for n in sorted(nodes)
        if isinstance(v := analysis.values[n], AffineMap) and _alike(v, own)
    ]
    ways: list[tuple[fx.Node, ...]] = [(start,) for start in starts]
    for way in ways:
        for user in way[-1].users:
            if user not in nodes or not _moves(user, analysis):
                continue
            here = analysis.values[user]
            if isinstance(here, AffineMap) and _alike(here, value):
                return ViewChain(layer, (*way[1:], user))
            ways.append((*way, user))
    return None


def _alike(one: AffineMap, other: AffineMap) -> bool:
    return one.layout.same(other.layout) and one.dtype == other.dtype


def _before_idle_casts(node: fx.Node) -> fx.Node:
    while op_name(node) in CASTS and not _casts(node):
        node = node.all_input_nodes[0]
    return node


def _casts(node: fx.Node) -> bool:
    """Whether a node changes a dtype, or may."""
    if op_name(node) not in CASTS:
        return False
    before, after = dtype_of(node.all_input_nodes[0]), dtype_of(node)
    return before is None or before != after


def _computes(value: object) -> bool:
    """Whether a value is more than a scaled or shifted one."""
    return not isinstance(value, AffineMap) or value.last is not Link.GLUE


def _moves(node: fx.Node, analysis: Analysis) -> bool:
    value = analysis.values.get(node)
    return isinstance(value, AffineMap) and value.last is Link.VIEW


def _only_moves(node: fx.Node, source: AffineMap, analysis: Analysis) -> bool:
    if node is source.node:
        return True
    value = analysis.values.get(node)
    if isinstance(value, Alias):
        return _only_moves(value.node, source, analysis)
    if not isinstance(value, AffineMap):
        return False
    weight, bias = value.relative_to(source)
    return isinstance(weight, Identity) and bias is None


def _before(node: fx.Node, analysis: Analysis) -> fx.Node:
    """What a node moves or scales: the one input that is no constant and no size."""
    return next(n for n in node.all_input_nodes if n not in analysis.constants.nodes)
