"""Transfer functions of FFTs there and back: circulant matrices.

Whatever happens in between is run on the columns of the identity, and not listed as matrices of
complex numbers: what comes out is the real matrix that all of it multiplies with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx

from lora_fx.affine.affine_map import AffineMap, Link
from lora_fx.affine.analysis import Analysis, Opaque, Value, result_dtype
from lora_fx.affine.feature_layout import Layout
from lora_fx.algebra.matrix_expr import Leaf
from lora_fx.graph.ops import call_argument, op_name

_FFTS = {"fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft"}
_SCALES = {"mul", "div"}  # by a number, or by a constant along the features
_NO_MATRIX = Opaque("a spectrum of something else than features of a map")


class _Step(NamedTuple):
    """A call as it is now: erasing a node empties it.

    Attributes:
        before: what it reads that is no constant.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    before: fx.Node | None

    @classmethod
    def of(cls, node: fx.Node) -> _Step:
        return cls(node.target, node.args, dict(node.kwargs), _before(node))


def real(analysis: Analysis, node: fx.Node) -> Value:
    """``fft``, products with constants, ``fft`` back, and the real part: a real matrix."""
    chain = [node]
    while (value := analysis.whole_map_of(before := _before(chain[0]))) is None:
        if before is None or not _is_linear(analysis, before):
            return _NO_MATRIX
        chain.insert(0, before)
    own = value.layout
    if own.after or own.joined or value.dtype is None or not _is_linear(analysis, node):
        return _NO_MATRIX
    for split in (own.split, (1, *own.split), own.split[1:]):  # what an axis of one may belong to
        layout = own.seen_as(split)
        if layout is None:
            continue
        result = _split_behind(analysis, chain, torch.zeros(1, *split, dtype=_wide(value)))
        if result is not None:
            return _multiplied(analysis, value, chain, layout, result)
    return _NO_MATRIX


def _split_behind(
    analysis: Analysis, chain: list[fx.Node], x: torch.Tensor
) -> tuple[int, ...] | None:
    """The axes of features behind the calls, if these leave what is in front of them alone."""
    for call in chain:
        if not _keeps_batch(call, x.ndim - 1):
            return None
        x = _run(analysis, [_Step.of(call)], x)
    return tuple(x.shape[1:])


def _multiplied(
    analysis: Analysis,
    value: AffineMap,
    chain: list[fx.Node],
    seen: Layout,
    split: tuple[int, ...],
) -> Value:
    layout, size = replace(seen, split=split), value.size
    named = tuple(analysis.constants.key(n) for n in _read(chain))
    steps = [_Step.of(call) for call in chain]
    key = ("spectrum", tuple(_written(n) for n in chain), named, seen.split)

    def fetch() -> torch.Tensor:
        columns = torch.eye(size, dtype=_wide(value)).reshape(size, *seen.split)
        return _run(analysis, steps, columns).reshape(size, -1).T

    weight = Leaf((layout.count, size), key, fetch)
    dtype = result_dtype(chain[-1], value.dtype)
    return value.then(chain[-1], weight, None, layout, dtype, Link.PRODUCT)


def _before(node: fx.Node) -> fx.Node | None:
    """What a call reads that is no constant of it."""
    given = node.args[1] if op_name(node) == "einsum" and len(node.args) > 1 else node.args[:1]
    first = given[0] if isinstance(given, list | tuple) and given else None
    return first if isinstance(first, fx.Node) else None


def _is_linear(analysis: Analysis, node: fx.Node) -> bool:
    """Whether a call is linear in what it reads, with nothing else than constants beside."""
    name, others = op_name(node), node.all_input_nodes[1:]
    if any(other not in analysis.constants.nodes for other in others):
        return False
    return name in _FFTS or name in _SCALES or name in ("real", "einsum")


def _wide(value: AffineMap) -> torch.dtype:
    return torch.promote_types(value.dtype or torch.float32, torch.float32)


def _keeps_batch(node: fx.Node, count: int) -> bool:
    """Whether a call acts on so many axes at the end, whatever is in front of them."""
    if op_name(node) in _FFTS:
        dim = call_argument(node, 2, "dim", -1)
        return isinstance(dim, int) and -count <= dim < 0
    if op_name(node) == "einsum":
        of_x, _, rest = str(node.args[0]).replace(" ", "").partition(",")
        others, _, output = rest.partition("->")
        fits = len(of_x) - 3 == count
        return of_x[:3] == output[:3] == "..." and fits and "," not in others and "." not in others
    return op_name(node) == "real" or not any(isinstance(other, fx.Node) for other in node.args[1:])


def _run(analysis: Analysis, steps: list[_Step], x: torch.Tensor) -> torch.Tensor:
    """The calls again, on another tensor than the graph's."""

    def of(before: fx.Node | None) -> Any:
        return lambda node: x if node is before else analysis.constants.value(node)

    for step in steps:
        x = step.target(*fx.node.map_arg(step.args, of(step.before)), **step.kwargs)
    return x


def _read(chain: list[fx.Node]) -> list[fx.Node]:
    return [other for node in chain for other in node.all_input_nodes[1:]]


def _written(node: fx.Node) -> str:
    return f"{node.target}{[a for a in node.args if not isinstance(a, fx.Node)]!r:.200}"
