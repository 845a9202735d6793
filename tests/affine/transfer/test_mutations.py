"""Breaks each transfer function in turn: a named case must see it."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fx import trace
from lora_fx.affine.affine_map import AffineMap, Patches
from lora_fx.affine.analysis import Analysis, Opaque, Splat, TupleValue
from lora_fx.affine.transfer import TRANSFER, overwrites, spectra
from lora_fx.affine.transfer import concat as joins
from lora_fx.affine.transfer import convolution as convs
from lora_fx.affine.transfer import einsum as einsums
from lora_fx.affine.transfer import elementwise as sums
from lora_fx.affine.transfer import linear as layers
from lora_fx.affine.transfer import reductions as sums_up
from lora_fx.affine.transfer import slicing as features
from lora_fx.affine.transfer import views as moves
from lora_fx.algebra import matrix_expr as algebra
from lora_fx.algebra.evaluate import dense
from lora_fx.algebra.index_expr import Index, listed, slice_of
from lora_fx.algebra.matrix_expr import BlockDiag, Leaf
from lora_fx.testing import affine, check_case, check_reason


def doubled(value: Any) -> Any:
    """A result whose weight is twice what it should be."""
    if isinstance(value, TupleValue):
        return TupleValue(tuple(map(doubled, value.values)))
    if not isinstance(value, AffineMap):
        return value
    return replace(value, weight=algebra.scaled(algebra.number(2.0), value.weight))


def without_bias(value: Any) -> Any:
    return replace(value, bias=None) if isinstance(value, AffineMap) else value


def bias_twice(value: Any) -> Any:
    return replace(value, bias=value.bias and algebra.signed(value.bias, 2))


def turned(value: Any) -> Any:
    """A layout with the features one axis further in front."""
    return replace(value, layout=replace(value.layout, after=value.layout.after + 1))


def narrow(value: Any) -> Any:
    return replace(value, dtype=torch.float16) if isinstance(value, AffineMap) else value


def passes_on(analysis: Analysis, node: Any) -> Any:
    """The first input, as if the operator did nothing."""
    value = analysis.map_of(node.args[0])
    return value.moved(node, value.layout, value.dtype) if value else Opaque("")


def one_off(size: int, cut: slice) -> Index:
    """The places next to those that a slice picks."""
    index = slice_of(size, cut)
    return Index(("off", index.key), index.count, lambda: (index.places() + 1) % size)


def next_to(places: torch.Tensor) -> Index | None:
    """The places behind those that were picked, the last one's being the first."""
    index = listed(places)
    return index and Index(("off", index.key), index.count, lambda: (places + 1) % 5)


def one_more_axis(value: Any) -> Any:
    return replace(value, layout=replace(value.layout, split=(*value.layout.split, 1)))


def backwards(value: Any) -> Any:
    return TupleValue(value.values[::-1])


def another_axis(real: Any) -> Any:
    return lambda analysis, node, dim, place: real(analysis, node, dim + 1, place)


def first_alone(real: Any) -> Any:
    return lambda given: real(given)[:1]


def as_split(real: Any) -> Any:
    """Whatever cuts, cuts pieces of a given size."""

    def again(analysis: Analysis, node: Any, place: int) -> Any:
        return lambda numbers: numbers.split(node.args[1])

    return again


def reversed_places(size: int, cut: slice) -> Index:
    index = slice_of(size, cut)
    return Index(("back", index.key), index.count, lambda: index.places().flip(0))


def in_order(axis: int, split: tuple[int, ...], index: Index) -> Index:
    """The first features, whichever were asked for."""
    count = index.count * prod(split) // split[axis]
    return Index(("in order", count), count, lambda: torch.arange(count))


def same_order(split: tuple[int, ...], order: tuple[int, ...]) -> Index:
    return slice_of(prod(split), slice(None))


def unmerged(blocks: tuple[int, int, int], key: Any, fetch: Any) -> BlockDiag:
    """The blocks in the wrong order."""
    return BlockDiag(blocks, key, lambda: fetch().flip(0))


def dense_kernel(constants: Any, node: Any) -> Leaf:
    """A kernel read in the wrong order."""
    first, *rest = constants.shape(node)
    back, shape = (prod(rest), first), (first, prod(rest))
    return Leaf(shape, "turned", lambda: constants.value(node).reshape(back).T.contiguous())


def as_stored(analysis: Any, node: Any, shape: tuple[int, int], groups: int) -> Leaf:
    """A transposed convolution's kernel that is not turned around."""
    return convs.leaf(analysis.constants, node.args[1], shape)


def swapped_geometry(real: Any) -> Any:
    def patches(node: Any, kernel: tuple[int, ...]) -> Patches | None:
        found: Patches | None = real(node, kernel)
        return found and replace(found, stride=found.dilation, dilation=found.stride)

    return patches


def no_padding(real: Any) -> Any:
    def patches(node: Any, kernel: tuple[int, ...]) -> Patches | None:
        found: Patches | None = real(node, kernel)
        return found and replace(found, padding=(0,) * len(kernel))

    return patches


def unsigned(matrix: Any, sign: float) -> Any:
    return algebra.signed(matrix, abs(sign))


def put_in_front(matrix: Any, index: Index, size: int) -> Any:
    return algebra.placed(matrix, slice_of(size, slice(0, index.count)), size)


def kept_too(size: int, index: Index) -> Index:
    """Forgets that what is overwritten is gone."""
    return slice_of(size, slice(None))


def straight(matrix: Any) -> Any:
    """A transpose that is none, where shapes allow it."""
    shape = matrix.shape[::-1]
    return Leaf(shape, "straight", lambda: dense(matrix, torch.float64).reshape(shape))


def another_sum(real: Any) -> Any:
    """The features added up are neighbours, whatever the axis."""
    return lambda layout, axis: real(layout, len(layout.split) - 1 - axis)


def as_sum(analysis: Analysis, node: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums_up, "op_name", lambda node: "sum")
        return sums_up.summed(analysis, node)


def turned_leaf(shape: tuple[int, int], key: Any, fetch: Any) -> Leaf:
    return Leaf(shape, key, lambda: fetch().T.reshape(shape))


def first_call(real: Any) -> Any:
    """Forgets what lies between the spectrum and the way back."""
    return lambda analysis, chain, x: real(
        analysis, [chain[0], *chain[2:]] if chain[1:] else chain, x
    )


def parted(value: Any) -> Any:
    """A layout that forgets that the batch is on the first axis of features."""
    known = isinstance(value, AffineMap)
    return replace(value, layout=replace(value.layout, joined=False)) if known else value


def rule(change: Callable[[Any], Any], name: str) -> tuple[str, str, Any]:
    """Changes what the function of an operator in the table returns."""
    real = TRANSFER[name]
    return "TRANSFER", name, lambda analysis, node: change(real(analysis, node))


MODULES = (features.__name__, joins.__name__)
# what is broken -> (module or table, name, what stands there instead), file and case that see it
MUTANTS: dict[str, tuple[Any, str, str]] = {
    "linear: weight doubled": (rule(doubled, "linear"), "linear", "linear"),
    "linear: bias dropped": (rule(without_bias, "linear"), "linear", "linear"),
    "linear: dtype lost": (rule(narrow, "linear"), "linear", "linear"),
    "addmm: transpose dropped": ((layers, "transposed", straight), "linear", "addmm"),
    "addmm: factors dropped": (
        (layers, "_times", lambda value, factor: value),
        "linear",
        "addmm to a map, with factors",
    ),
    "addmm: bias twice": (rule(bias_twice, "addmm"), "linear", "addmm"),
    "matmul: transpose dropped": ((layers, "transposed", straight), "linear", "matmul"),
    "matmul: features elsewhere": (rule(turned, "matmul"), "linear", "matmul from the left"),
    "matmul: bmm's weight doubled": (rule(doubled, "bmm"), "linear", "bmm"),
    "matmul: tensordot's weight doubled": (rule(doubled, "tensordot"), "linear", "tensordot"),
    "embedding: transpose dropped": ((layers, "transposed", straight), "linear", "embedding"),
    "conv: kernel read in another order": (
        (convs, "in_rows", dense_kernel),
        "convolution",
        "conv2d",
    ),
    "conv: stride for dilation": (
        (convs, "_patches", swapped_geometry(convs._patches)),
        "convolution",
        "conv2d",
    ),
    "conv: padding dropped": (
        (convs, "_patches", no_padding(convs._patches)),
        "convolution",
        "conv1d",
    ),
    "conv: bias dropped": (rule(without_bias, "conv3d"), "convolution", "conv3d"),
    "conv: groups in another order": (
        (convs, "BlockDiag", unmerged),
        "convolution",
        "conv1d of kernel one, in groups",
    ),
    "conv: features elsewhere": (rule(turned, "conv2d"), "convolution", "conv2d"),
    "conv_transpose: weight doubled": (
        rule(doubled, "conv_transpose1d"),
        "convolution",
        "conv_transpose1d",
    ),
    "conv_transpose: kernel as it is stored": (
        (convs, "_kernel", as_stored),
        "convolution",
        "conv_transpose2d of a square kernel",
    ),
    "conv_transpose: stride for padding": (
        (convs, "_TRANSPOSED", ((4, 1), (3, 0), (5, 0), (7, 1))),
        "convolution",
        "conv_transpose2d",
    ),
    "conv_transpose: output_padding dropped": (
        (convs, "_TRANSPOSED", ((3, 1), (4, 0), (8, 0), (7, 1))),
        "convolution",
        "conv_transpose1d padded at the end",
    ),
    "conv_transpose: dilation dropped": (
        (convs, "_TRANSPOSED", ((3, 1), (4, 0), (5, 0), (8, 1))),
        "convolution",
        "conv_transpose2d",
    ),
    "conv_transpose: groups in another order": (
        (convs, "BlockDiag", unmerged),
        "convolution",
        "conv_transpose1d of kernel one, in groups",
    ),
    "einsum: blocks in another order": (
        (einsums, "BlockDiag", unmerged),
        "einsum",
        "block diagonal",
    ),
    "einsum: matrices of a chain in another order": (
        (einsums, "product", lambda left, right: algebra.product(right, left)),
        "einsum",
        "two square matrices",
    ),
    "einsum: matrices of a chain not turned": (
        (einsums, "transposed", lambda matrix: matrix),
        "einsum",
        "two square matrices",
    ),
    "einsum: weight doubled": (rule(doubled, "einsum"), "einsum", "dense"),
    "einsum: features elsewhere": (
        rule(turned, "einsum"),
        "einsum",
        "features in front of the last axis",
    ),
    "add: second weight's factor dropped": (
        (sums, "signed", lambda matrix, sign: matrix),
        "elementwise",
        "add with alpha",
    ),
    "add: bias dropped": (rule(without_bias, "add"), "elementwise", "add"),
    "add: shift ignored": (rule(without_bias, "add"), "elementwise", "add a vector"),
    "add: number ignored": (
        (sums, "repeated", lambda value, size: algebra.repeated(0.0, size)),
        "elementwise",
        "add a number",
    ),
    "sub: sign flipped": ((sums, "signed", unsigned), "elementwise", "sub"),
    "sub: sign of a vector flipped": ((sums, "signed", unsigned), "elementwise", "sub a vector"),
    "sub: sign of the map dropped": (
        (sums, "number", lambda value: algebra.number(abs(value))),
        "elementwise",
        "sub from a vector",
    ),
    "rsub: operands not swapped": (("TRANSFER", "rsub", sums.sub), "elementwise", "rsub"),
    "mul: scale dropped": (("TRANSFER", "mul", passes_on), "elementwise", "mul by a number"),
    "mul: bias scaled twice": (rule(bias_twice, "mul"), "elementwise", "mul by a vector"),
    "div: not inverted": (
        (sums, "_reciprocal", lambda matrix: matrix),
        "elementwise",
        "div by a vector",
    ),
    "div: bias dropped": (rule(without_bias, "div"), "elementwise", "truediv"),
    "neg: does nothing": (("TRANSFER", "neg", passes_on), "elementwise", "neg"),
    "dropout: in training taken for eval": (
        ("TRANSFER", "dropout", moves.identity),
        "views",
        "dropout in training",
    ),
    "identity: weight doubled": (rule(doubled, "clone"), "views", "clone"),
    "cast: dtype ignored": (("TRANSFER", "to", moves.identity), "views", "to"),
    "cast: to integers taken for nothing": (
        ("TRANSFER", "to", moves.identity),
        "views",
        "to integers",
    ),
    "reshape: layout kept": (("TRANSFER", "reshape", passes_on), "views", "reshape"),
    "reshape: mixes taken for nothing": (
        ("TRANSFER", "reshape", passes_on),
        "views",
        "batch and features mixed",
    ),
    "transpose: layout kept": (("TRANSFER", "transpose", passes_on), "views", "transpose"),
    "transpose: features in the old order": (
        (moves, "reordered", same_order),
        "views",
        "feature axes swapped",
    ),
    "permute: features elsewhere": (rule(turned, "permute"), "views", "permute, negative"),
    "turn: does nothing": (("TRANSFER", "t", passes_on), "views", "t"),
    "slice: off by one": ((features, "listed", next_to), "slicing", "slice"),
    "slice: along all features": ((features, "along", in_order), "slicing", "slice split"),
    "pick: narrow off by one": ((features, "listed", next_to), "slicing", "narrow"),
    "pick: narrow taken for nothing": (("TRANSFER", "narrow", passes_on), "slicing", "narrow"),
    "pick: select off by one": ((features, "listed", next_to), "slicing", "select"),
    "pick: select keeps its axis": (
        rule(one_more_axis, "select"),
        "slicing",
        "select split, inner",
    ),
    "pick: index_select in order": ((features, "along", in_order), "slicing", "index_select"),
    "index: in order": ((features, "along", in_order), "slicing", "index"),
    "index: of the first axis": (
        (features, "_bracket", another_axis(features._bracket)),
        "slicing",
        "index split",
    ),
    "flip: does nothing": (("TRANSFER", "flip", passes_on), "slicing", "flip"),
    "flip: the first axis alone": (
        (features, "_numbers_of", first_alone(features._numbers_of)),
        "slicing",
        "flip both",
    ),
    "roll: does nothing": (("TRANSFER", "roll", passes_on), "slicing", "roll"),
    "roll: the second step dropped": (
        (features, "then", lambda first, second: first),
        "slicing",
        "roll both",
    ),
    "pieces: split off by one": ((features, "listed", next_to), "slicing", "split"),
    "pieces: chunks cut as pieces are": (
        (features, "_again", as_split(features._again)),
        "slicing",
        "chunk",
    ),
    "pieces: split_with_sizes doubled": (
        rule(doubled, "split_with_sizes"),
        "slicing",
        "aten's split with sizes",
    ),
    "pieces: unsafe_split doubled": (rule(doubled, "unsafe_split"), "slicing", "unsafe_split"),
    "pieces: unsafe_split_with_sizes doubled": (
        rule(doubled, "unsafe_split_with_sizes"),
        "slicing",
        "unsafe_split_with_sizes",
    ),
    "pieces: unsafe_chunk doubled": (rule(doubled, "unsafe_chunk"), "slicing", "unsafe_chunk"),
    "pieces: tensor_split doubled": (rule(doubled, "tensor_split"), "slicing", "tensor_split"),
    "pieces: unbind in another order": (rule(backwards, "unbind"), "slicing", "unbind split"),
    "getitem: pieces doubled": (rule(doubled, "getitem"), "slicing", "split, the rest"),
    "cat: all in front": ((joins, "placed", put_in_front), "concat", "cat"),
    "cat: in reverse": ((joins, "slice_of", reversed_places), "concat", "cat"),
    "cat: along another axis": (
        (joins, "along", in_order),
        "concat",
        "cat of split features",
    ),
    "cat: concatenate doubled": (
        rule(doubled, "concatenate"),
        "concat",
        "cat of split features, the outer axis",
    ),
    "stack: off by one": ((joins, "slice_of", one_off), "concat", "stack"),
    "stack: taken for a concatenation": (("TRANSFER", "stack", joins.cat), "concat", "stack"),
    "stack: features elsewhere": (rule(turned, "stack"), "concat", "stack in front"),
    "pad: constant_pad_nd doubled": (rule(doubled, "constant_pad_nd"), "concat", "aten's pad"),
    "pad: on the wrong side": ((joins, "placed", put_in_front), "concat", "pad"),
    "index_put: to the front": (
        (overwrites, "placed", put_in_front),
        "concat",
        "assignment of places",
    ),
    "index_put: what was there stays": (
        (overwrites, "all_but", kept_too),
        "concat",
        "assignment into a map",
    ),
    "slice_scatter: off by one": (
        (overwrites, "slice_of", one_off),
        "concat",
        "assignment of a slice",
    ),
    "slice_scatter: along all features": (
        (overwrites, "along", in_order),
        "concat",
        "assignment to split features",
    ),
    "select_scatter: off by one": (
        (overwrites, "slice_of", one_off),
        "concat",
        "assignment of one place",
    ),
    "cat: numbers are zeros": (
        (joins, "repeated", lambda value, size: algebra.repeated(0.0, size)),
        "concat",
        "cat with ones",
    ),
    "scatter: to the front": ((overwrites, "placed", put_in_front), "concat", "scatter"),
    "scatter: off by one": ((overwrites, "listed", next_to), "concat", "scatter into a map"),
    "summed: along another axis": (
        (sums_up, "_ones_along", another_sum(sums_up._ones_along)),
        "reductions",
        "sum of blocks",
    ),
    "summed: not divided": (("TRANSFER", "mean", as_sum), "reductions", "mean"),
    "summed: keeps its axis": (rule(one_more_axis, "sum"), "reductions", "sum in blocks"),
    "real: turned": ((spectra, "Leaf", turned_leaf), "spectra", "one circulant"),
    "real: weight doubled": (rule(doubled, "real"), "spectra", "blocks of circulants"),
    "real: not scaled": ((spectra, "_run", first_call(spectra._run)), "spectra", "one circulant"),
    "reshape: batch and features on two axes": (
        rule(parted, "reshape"),
        "views",
        "batch and features on one axis",
    ),
    "copy: nothing is copied": (("TRANSFER", "copy", passes_on), "concat", "copied"),
    "copy: no constant": (("TRANSFER", "copy", passes_on), "concat", "copied constant"),
    "fill: with zeros": (
        ("TRANSFER", "fill", lambda analysis, node: Splat(0.0)),
        "concat",
        "assignment of what is filled",
    ),
    "masked_fill: nothing is": (("TRANSFER", "masked_fill", passes_on), "concat", "masked"),
    "masked_fill: with zeros": (rule(without_bias, "masked_fill"), "concat", "masked"),
    "uniform: ones are zeros": (
        ("TRANSFER", "ones_like", lambda analysis, node: Splat(0.0)),
        "elementwise",
        "add zeros of data",
    ),
}


GRAPHS: dict[Any, Any] = {}


def traced_once(model: Any, inputs: tuple[torch.Tensor], **options: Any) -> Any:
    """One graph for all that is said of a function, sound or broken: what says it only reads it."""
    key = model.function, id(inputs[0])
    if key not in GRAPHS:
        GRAPHS[key] = trace(model, inputs, **options)
    return GRAPHS[key]


@pytest.fixture(scope="module")
def tables() -> dict[str, dict[str, Any]]:
    files = {file for _, file, _ in MUTANTS.values()}
    return {f: runpy.run_path(str(Path(__file__).with_name(f"test_{f}.py"))) for f in files}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_function_is_seen_by_a_case(name: str, tables: Any, monkeypatch: Any) -> None:
    (target, attribute, broken), file, case = MUTANTS[name]
    table = tables[file]
    cases = table["CASES"] | table.get("CASTS", {})
    entry, check = (
        (cases[case], check_case) if case in cases else (table["OPAQUE"][case], check_reason)
    )
    tolerance = (1e-6,) if case in table.get("CASTS", {}) else ()
    monkeypatch.setattr(affine, "trace", traced_once)
    check(entry, "export", *tolerance)
    if target == "TRANSFER":
        monkeypatch.setitem(TRANSFER, attribute, broken)
    else:
        monkeypatch.setattr(target, attribute, broken)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check(entry, "export", *tolerance)


def test_every_function_of_the_table_is_broken_by_some_mutant() -> None:
    broken = {name.partition(":")[0] for name in MUTANTS}
    assert {rule.__name__.rstrip("_") for rule in TRANSFER.values()} <= broken


def test_every_operator_that_picks_or_joins_features_is_broken_by_some_mutant() -> None:
    """One function stands for many of them, so a mutant of the function says too little."""
    names = {name for name, rule in TRANSFER.items() if rule.__module__ in MODULES}
    words = {word for name in MUTANTS for word in re.findall(r"\w+", name)}
    words |= {case for (_, file, case) in MUTANTS.values() if file in ("slicing", "concat")}
    words |= {"concat"}  # torch's other name of cat
    assert {name for name in names if name not in words} == set()
