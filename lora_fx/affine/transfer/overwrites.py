"""Transfer functions of index_put, scatter, copy, fill and their like: features overwritten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx

from lora_fx.affine.affine_map import AffineMap, Link, common_ancestor
from lora_fx.affine.analysis import (
    Alias,
    Analysis,
    Opaque,
    Splat,
    Value,
    as_stored,
    dtype_of,
    result_dtype,
)
from lora_fx.affine.feature_layout import Layout
from lora_fx.affine.transfer.slicing import SLICE, constant_index, is_all
from lora_fx.algebra.index_expr import Index, all_but, along, listed, slice_of
from lora_fx.algebra.matrix_expr import (
    Identity,
    Matrix,
    number,
    placed,
    repeated,
    rows,
    signed,
    total,
)
from lora_fx.graph.ops import call_argument, op_name, same_sizes, sizes_of

_FILLED = {"zeros", "ones", "full"}
Places = Callable[[int], Index | None]  # what an index picks of an axis of some size


def index_put(analysis: Analysis, node: fx.Node) -> Value:
    """Constant places of one axis overwritten: ``y[:, mask] = values``."""
    into, indices = node.args[0], call_argument(node, 1, "indices")
    values, sizes = call_argument(node, 2, "values"), sizes_of(node)
    if call_argument(node, 3, "accumulate", False) or sizes is None:
        return Opaque("an assignment that accumulates, or into unknown sizes")
    given = list(indices) if isinstance(indices, list | tuple) else [indices]
    dims = [dim for dim, index in enumerate(given) if index is not None]
    if len(dims) != 1:
        return Opaque("an assignment to something else than whole features")
    index = given[dims[0]]

    def places(size: int) -> Index | None:
        return constant_index(analysis, index, size)

    found = _overwritten(analysis, node, into, values, dims[0] - len(sizes), places)
    return found or Opaque("an assignment to something else than whole features")


def slice_scatter(analysis: Analysis, node: fx.Node) -> Value:
    """A slice of one axis overwritten: ``y[..., 2:5] = values``."""
    into, values = node.args[0], call_argument(node, 1, "src")
    dim = call_argument(node, 2, "dim", 0)
    start, stop, step = (call_argument(node, 3 + i, n) for i, n in enumerate(SLICE))
    if is_all(start, stop, step):
        return _all_of_it(analysis, node, values)
    if not all(n is None or type(n) is int for n in (start, stop, step)):
        return Opaque("an assignment to a slice that the input moves")
    cut = slice(start, stop, step)
    found = _overwritten(analysis, node, into, values, dim, lambda size: slice_of(size, cut))
    return found or Opaque("an assignment to something else than features")


def select_scatter(analysis: Analysis, node: fx.Node) -> Value:
    """One place of an axis overwritten: ``y[..., 2] = values``."""
    into, values = node.args[0], call_argument(node, 1, "src")
    dim, place = call_argument(node, 2, "dim"), call_argument(node, 3, "index")
    if type(place) is not int:
        return Opaque("an assignment to a place that the input moves")

    def only(size: int) -> Index:
        return slice_of(size, slice(place % size, place % size + 1))

    found = _overwritten(analysis, node, into, values, dim, only, gone=True)
    return found or Opaque("an assignment to something else than features")


def scatter(analysis: Analysis, node: fx.Node) -> Value:
    """Features sent to constant places of one axis, the same at every place of the batch."""
    into, dim = node.args[0], call_argument(node, 1, "dim", 0)
    given, values = call_argument(node, 2, "index"), call_argument(node, 3, "src")
    if not isinstance(values, fx.Node) or call_argument(node, 4, "reduce") is not None:
        return Opaque("a scatter of one number, or one that accumulates")
    while op_name(given) in ("expand", "expand_as", "broadcast_to"):
        given = given.args[0]
    shape = analysis.constants.shape(given) if given in analysis.constants.nodes else None
    sizes = sizes_of(node)
    if shape is None or sizes is None or type(dim) is not int or not shape:
        return Opaque("a scatter to places that are no constant")
    at = dim % len(sizes) - len(sizes)

    def places(size: int) -> Index | None:
        rows = analysis.constants.value(given).movedim(at, -1).reshape(-1, shape[at])
        return listed(rows[0]) if bool((rows == rows[0]).all()) else None

    if -at > len(shape):
        return Opaque("a scatter to places that are no constant")
    found = _overwritten(analysis, node, into, values, at, places)
    return found or Opaque("a scatter to something else than features")


def copy(analysis: Analysis, node: fx.Node) -> Value:
    """All of a tensor overwritten, in its own dtype: ``y[...] = values``."""
    into, values = node.args[:2]
    kept, new = analysis.map_of(into), analysis.map_of(values)
    dtype = dtype_of(node) or (kept.dtype if kept else None)
    if isinstance(values, fx.Node) and _alike(node, values, kept, new):
        if new is not None:
            return new.moved(node, new.layout, dtype)
        if isinstance(known := analysis.values.get(values), Splat):
            return known
        same = dtype is not None and dtype_of(values) == dtype
        return Alias(values) if same else Opaque("a copy into another type")
    column = analysis.column(values, kept.layout) if kept else None
    if kept is None or column is None:
        return Opaque("a copy that broadcasts, or of no map")
    return kept.scaled(node, number(0.0), kept.dtype).shifted(node, column, kept.dtype)


def masked_fill(analysis: Analysis, node: fx.Node) -> Value:
    """One number where a constant mask of the features says so."""
    value, given = analysis.map_of(node.args[0]), call_argument(node, 2, "value")
    mask = analysis.column(call_argument(node, 1, "mask"), value.layout) if value else None
    if value is None or mask is None or type(given) not in (int, float):
        return Opaque("a mask of something else than the features of a map")
    dtype = result_dtype(node, value.dtype)
    stays = total(repeated(1.0, value.size), signed(mask, -1.0))
    assert stays is not None
    kept = value.scaled(node, stays, dtype)
    return kept.shifted(node, signed(mask, float(given)), dtype) if given else kept


def fill(analysis: Analysis, node: fx.Node) -> Value:
    """All of a tensor overwritten with one number."""
    known = analysis.map_of(node.args[0])
    given = 0 if op_name(node) == "zero" else call_argument(node, 1, "value")
    if type(given) not in (int, float):
        return Opaque("filled with something else than a number")
    return Splat(float(given), known.layout if known else None)


def uniform(analysis: Analysis, node: fx.Node) -> Value:
    """A tensor of one number, in a shape that may hang on the input."""
    name = op_name(node)
    like = analysis.map_of(node.args[0]) if name.endswith("_like") else None
    given: Any = 1.0 if "ones" in name else 0.0
    if "full" in name:
        given = call_argument(node, 2 if name == "new_full" else 1, "fill_value")
    if type(given) not in (int, float):
        return Opaque("filled with something else than a number")
    return Splat(float(given), like.layout if like else None)


def uniform_at(analysis: Analysis, node: Any) -> Value | None:
    """The value of an argument; of a constant that was made of one number, that number."""
    name = op_name(node) if isinstance(node, fx.Node) else ""
    if node in analysis.constants.nodes and name in _FILLED:
        return as_stored(node, uniform(analysis, node))
    return analysis.values.get(node)


def _alike(node: fx.Node, values: fx.Node, kept: AffineMap | None, new: AffineMap | None) -> bool:
    """Whether what is copied has the shape of what it is copied to."""
    if sizes_of(node) is not None and sizes_of(values) is not None:
        return same_sizes(sizes_of(node), sizes_of(values))
    return kept is not None and new is not None and kept.layout.same(new.layout)


def _all_of_it(analysis: Analysis, node: fx.Node, values: Any) -> Value:
    new, known = analysis.map_of(values), analysis.values.get(values)
    if new is not None:
        return new.moved(node, new.layout, new.dtype)
    return known if isinstance(known, Splat) else Opaque("all of it overwritten")


def _overwritten(
    analysis: Analysis,
    node: fx.Node,
    into: Any,
    values: Any,
    dim: Any,
    places: Places,
    gone: bool = False,
) -> Value | None:
    """Places of one feature axis hold other values; None if it is no axis of features."""
    kept, new = analysis.whole_map_of(into), analysis.whole_map_of(values)
    under, over = uniform_at(analysis, into), uniform_at(analysis, values)
    layout = kept.layout if kept else _layout_beside(node, new, gone)
    axis = layout.feature(dim) if layout else None
    if layout is None or axis is None:
        return None
    index = places(layout.split[axis])
    if index is None:
        return Opaque("an assignment to places that are no constant")
    part = layout.resized(axis, index.count)
    if gone:
        part = replace(part, split=(*part.split[:axis], *part.split[axis + 1 :]))
    picked, size = along(axis, layout.split, index), _size(layout)
    if new is not None and new.size != picked.count:
        return Opaque("an assignment of something else than features")
    if new is not None and not new.layout.same(part):
        return Opaque("an assignment that broadcasts")
    column = _column(analysis, values, over, part, picked.count)
    if new is None and column is None:
        return Opaque("an assignment of something else than features")
    others = all_but(size, picked)

    def spread(matrix: Matrix | None, at: Index) -> Matrix | None:
        return matrix and placed(matrix, at, size)

    if kept is None:
        if new is None or not isinstance(under, Splat):
            return Opaque("an assignment into something else than zeros or a map of one source")
        rest = repeated(under.number, others.count) if under.number else None
        weight = placed(Identity(new.size), picked, size)
        dtype = result_dtype(node, new.dtype)
        return new.then(node, weight, spread(rest, others), layout, dtype, Link.PRODUCT)
    dtype = result_dtype(node, kept.dtype)
    if new is None:
        weight = placed(rows(Identity(size), others), others, size)
        return kept.then(node, weight, spread(column, picked), layout, dtype, Link.PRODUCT)
    root = common_ancestor(kept, new)
    if root is None:
        return Opaque("an assignment into something else than zeros or a map of one source")
    (own, shift), (fresh, new_shift) = kept.relative_to(root), new.relative_to(root)
    whole = total(spread(rows(own, others), others), spread(fresh, picked))
    bias = total(spread(shift and rows(shift, others), others), spread(new_shift, picked))
    assert whole is not None
    return root.then(node, whole, bias, layout, dtype, Link.JOIN)


def _layout_beside(node: fx.Node, new: AffineMap | None, gone: bool) -> Layout | None:
    """The layout of a whole whose part is laid out like a map."""
    sizes = sizes_of(node)
    if sizes is None or new is None:
        return None
    end = len(sizes) - new.layout.after
    start = end - len(new.layout.split) - gone
    split = sizes[max(0, start) : end]
    if start < 0 or not all(type(n) is int for n in split):
        return None
    batch = (*sizes[:start], *sizes[end:])
    return replace(new.layout, split=split, batch=batch, joined=False)


def _column(
    analysis: Analysis, values: Any, known: Value | None, part: Layout, count: int
) -> Matrix | None:
    """A constant that is assigned, one value for each place."""
    if isinstance(known, Splat):
        return repeated(known.number, count)
    return analysis.column(values, part)


def _size(layout: Layout) -> int:
    size = 1
    for n in layout.split:
        size *= n
    return size
