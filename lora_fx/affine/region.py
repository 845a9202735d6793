"""One affine region of a graph: what is between a source and a node, and what may stand for it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lora_fx.affine.affine_map import AffineMap, Link
from lora_fx.affine.analysis import Analysis, Opaque, Splat
from lora_fx.affine.region_boundary import (
    ViewChain,
    input_views,
    is_stored,
    output_views,
    reads_more,
    stored_in,
    weight_of,
)
from lora_fx.algebra.matrix_expr import BlockDiag
from lora_fx.graph.ops import module_path, op_name
from lora_fx.layers.layer_types import OPERATORS
from lora_fx.layers.weight_parts import picked_from

_LIKE = {"view_as", "reshape_as", "type_as", "to"}  # read another tensor for its shape or dtype


@dataclass(frozen=True)
class Region:
    """Everything between a source and one node that is an affine function of it.

    Attributes:
        value: the AffineMap of that node.
        source: the AffineMap that it is a function of.
        nodes: the calls in between, the last node included.
        layer: the base layer among them, whose operator, path and dtype are kept.
        before: how the source comes to what the layer reads.
        behind: how the layer's result comes to where the region's is.
        place: the node in front of which the layer goes: its last one, or an earlier call that
            writes into what it reads.
        blocked: why the region stays as it is, or ``""``.
    """

    value: AffineMap
    source: AffineMap
    nodes: frozenset[fx.Node]
    layer: fx.Node
    before: ViewChain
    behind: ViewChain
    place: fx.Node
    blocked: str = ""


def region_between(
    value: AffineMap, source: AffineMap, analysis: Analysis, gone: set[fx.Node]
) -> Region | None:
    """The region from a source to a value, or None if there is nothing in it to gain.

    What is ``gone`` are calls that are known to go: what only they read, nobody reads.
    """
    nodes = calls_between(source, value.node, analysis)
    layers = candidates(nodes, value, source, analysis)
    if not layers or _ends_late(value, nodes, analysis):
        return None
    if not _is_worth_it(nodes, layers[0], analysis, gone):
        return None
    staying = _staying(nodes, value.node, gone)
    reason = f"{layers[0].name} is also read outside the region"
    for layer in layers:
        if layer in staying:
            continue
        before, behind = (
            input_views(layer, source, analysis),
            output_views(layer, value, nodes, analysis),
        )
        if before is None or behind is None:
            reason = f"no reshape of the graph brings what {layer.name} reads or gives to the "
            reason += "others"
            continue
        place = _place(before, behind, value.node, analysis)
        if place is not None:
            return Region(value, source, frozenset(nodes), layer, before, behind, place)
        reason = f"what {layer.name} reads or gives is written in place meanwhile"
    if value.last is Link.VIEW:
        return None  # the region that ends before the move says why
    stays = ViewChain(layers[0])
    return Region(value, source, frozenset(nodes), layers[0], stays, stays, value.node, reason)


def _place(
    before: ViewChain, behind: ViewChain, end: fx.Node, analysis: Analysis
) -> fx.Node | None:
    """Where a layer can stand for a region that ends in a node, or None.

    It reads its source before anything is written into that, and what is written into its result
    must have no other name: the new result shares memory with nobody.
    """
    if analysis.written.is_shared(end):
        return None
    first = analysis.written.between(before.start, end)
    if first is None:
        return end
    needed = {n for move in (*before.moves, *behind.moves) for n in move.all_input_nodes[1:]}
    product = analysis.product(behind.start)
    for call in product.batches if product else ():
        needed |= set(call.all_input_nodes) - analysis.constants.nodes
    return first if all(n < first for n in needed) else None


def calls_between(source: AffineMap, node: fx.Node, analysis: Analysis) -> set[fx.Node]:
    """The calls from a source to a node that carry features: no sizes, no constants."""
    found, pending = {node}, [node]
    while pending:
        here = pending.pop()
        for n in _read_for_features(here, analysis):
            known = analysis.values.get(n)
            if n is source.node or n in found or known is None or isinstance(known, Opaque):
                continue
            found.add(n)
            pending.append(n)
    return found


def _read_for_features(node: fx.Node, analysis: Analysis) -> list[fx.Node]:
    """What a call reads, but for who only says the shape or dtype of its result."""
    if isinstance(analysis.values[node], Splat):
        return []
    nodes = node.all_input_nodes
    return nodes[:1] if op_name(node) in _LIKE else nodes


def candidates(
    nodes: set[fx.Node], value: AffineMap, source: AffineMap, analysis: Analysis
) -> list[fx.Node]:
    """The layers between a source and a value of the shape of the whole, the likeliest first.

    A layer's own operator is likelier than a product that is written out, and one that no other
    follows or precedes is likelier than a factor; then those that are stored.
    """
    shape = (value.size, source.size)
    called = (n for n in sorted(nodes) if not n.kwargs)
    layers = [n for n in called if n.target in OPERATORS or analysis.product(n)]
    fitting = [n for n in layers if _fits(n, shape, source, analysis)]
    fitting += [n for n in layers if n not in fitting and _is_wider(n, value, source, analysis)]
    if len(fitting) < 2:
        return fitting
    products = {n for n in layers if n.target not in OPERATORS}
    before = {n for n in products if _goes_through(n, set(layers) - {n}, nodes)}
    behind = {n for n in products if any(_goes_through(m, {n}, nodes) for m in products - {n})}
    computed = {n for n in fitting if stored_in(n, analysis.gm) is None}
    order = (products, before, behind, computed)
    return sorted(fitting, key=lambda n: [n in found for found in order])


def _goes_through(node: fx.Node, others: set[fx.Node], nodes: set[fx.Node]) -> bool:
    """Whether a call's result is multiplied again before it leaves a region."""
    seen, pending = {node}, [node]
    while pending:
        fresh = {user for user in pending.pop().users if user in nodes} - seen
        if fresh & others:
            return True
        seen |= fresh
        pending += fresh
    return False


def _fits(node: fx.Node, shape: tuple[int, int], source: AffineMap, analysis: Analysis) -> bool:
    """Whether a layer has the shape of the whole, and reads ids or patches if that does."""
    own = analysis.values[node]
    return (
        isinstance(own, AffineMap)
        and own.weight.shape == shape
        and not isinstance(own.weight, BlockDiag)
        and (source.reading is None or own.parent is source)
    )


def _is_wider(node: fx.Node, value: AffineMap, source: AffineMap, analysis: Analysis) -> bool:
    """Whether a layer reads the source and more: the whole weight is a part of its own."""
    own = analysis.values[node]
    is_whole = isinstance(own, AffineMap) and own.size == value.size
    return is_whole and reads_more(node, source, analysis)


def _is_worth_it(
    nodes: set[fx.Node], layer: fx.Node, analysis: Analysis, gone: set[fx.Node]
) -> bool:
    """Whether there is more here than one stored layer and what merely moves its features.

    A number that scales a layer is not worth a copy of a weight that others read.
    """
    values = (analysis.values[n] for n in nodes - {layer})
    lasts = {v.last for v in values if isinstance(v, AffineMap)} - {Link.VIEW}
    if not lasts:  # a product with what is computed is one call already
        return stored_in(layer, analysis.gm) is None and is_stored(layer, analysis)
    if layer.target not in OPERATORS and _is_bias_alone(nodes - {layer}, layer, analysis):
        return False
    if lasts != {Link.GLUE} or any(map(analysis.reads_constant, nodes - {layer})):
        return True
    return not _is_read(stored_in(layer, analysis.gm) or weight_of(layer), layer, gone, analysis)


def _is_bias_alone(others: set[fx.Node], layer: fx.Node, analysis: Analysis) -> bool:
    """Whether a product is followed by a stored bias alone: it has none of its own."""
    moving = {
        n for n in others if isinstance(v := analysis.values[n], AffineMap) and v.last is Link.VIEW
    }
    last, *more = sorted(others - moving, reverse=True)
    bias = last.args[1] if op_name(last) == "add" and len(last.args) == 2 else None
    if more or last.kwargs or not isinstance(bias, fx.Node):
        return False
    is_bias = bias.op == "get_attr" or picked_from(analysis.gm, bias) is not None
    return is_bias and stored_in(layer, analysis.gm) is not None


def _is_read(constant: fx.Node, layer: fx.Node, gone: set[fx.Node], analysis: Analysis) -> bool:
    """Whether any call that stays, but the layer, needs a constant or what is computed from it."""
    return any(
        user not in analysis.constants.nodes or _is_read(user, layer, gone, analysis)
        for user in constant.users
        if user is not layer and user not in gone
    )


def _ends_late(value: AffineMap, nodes: set[fx.Node], analysis: Analysis) -> bool:
    """Whether a region ends in moves of somebody who has no other part in it."""
    moves: set[fx.Node] = set()
    node = value.node
    while (
        (here := analysis.values.get(node))
        and isinstance(here, AffineMap)
        and here.last is Link.VIEW
    ):
        moves.add(node)
        node = node.all_input_nodes[0]
    paths = {module_path(n) for n in nodes - moves}
    return module_path(value.node) not in paths


def _staying(nodes: set[fx.Node], end: fx.Node, gone: set[fx.Node]) -> set[fx.Node]:
    """The calls of a region that its replacement would not save: somebody else needs them."""
    staying: set[fx.Node] = set()
    for node in sorted(nodes - {end}, reverse=True):
        outside = (user for user in node.users if user not in nodes and user not in gone)
        if any(outside) or any(user in staying for user in node.users):
            staying.add(node)
    return staying
