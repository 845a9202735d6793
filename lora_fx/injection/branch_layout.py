"""The layout of a branch: said once, to write it beside a layer's call and to find it there."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any, Protocol

from torch import fx

from lora_fx.graph.lazy_tensor import get_unevaluated
from lora_fx.graph.ops import aten
from lora_fx.injection.invocation_mask import reads_flat
from lora_fx.layers.sites import Site
from lora_fx.layers.weight_parts import Places


class Builder(Protocol):
    """Makes the calls of a branch, or finds those that a graph has."""

    def call(self, target: Any, arguments: tuple[Any, ...], axis: str | None = "out") -> fx.Node:
        """A call; its result is the layer's but for this axis, or nothing of the kind if None."""

    def index(self, tensor: fx.Node, places: tuple[int, ...]) -> fx.Node:
        """The constant of the places at which a part of a stored tensor is taken."""


def branch_sum(
    builder: Builder,
    site: Site,
    base: fx.Node,
    tensors: Mapping[str, fx.Node],
    x: fx.Node,
    scale: float | None = None,
    mask: fx.Node | None = None,
) -> fx.Node:
    """``base + ([scale * (x @ down) @ up] + [(layer - b) * gain] + [bias]) [* mask]``.

    Args:
        builder: what makes each call, or finds it.
        site: the layer's call.
        base: what is added to: the call, or the sum with an earlier branch.
        tensors: the ``get_attr`` nodes of those that there are, by their names above.
        x: what the low-rank part reads.
        scale: a factor of the low-rank part that is not folded into ``up``.
        mask: (batch, length, 1), of the tokens that the branch is added at; all by default.

    Returns:
        The sum, or base itself if nothing is added.
    """

    def part(name: str) -> fx.Node:
        return _part(builder, site, tensors[name], name)

    terms: list[fx.Node] = []
    if "down" in tensors:
        narrow = builder.call(*site.type.shrink(site, x, part("down")), axis="r")
        is_grouped = site.groups > 1
        groups = rank_of(site, "down", tensors) // rank_of(site, "up", tensors) if is_grouped else 1
        low = builder.call(*site.type.expand(site, narrow, part("up"), groups))
        terms.append(low if scale is None else builder.call(aten.mul.Tensor, (low, scale)))
    if "gain" in tensors:
        layer = _without_bias(builder, site)
        terms.append(builder.call(aten.mul.Tensor, (layer, part("gain"))))
    if "bias" in tensors and (site.inputs is None or 0 in site.inputs):
        terms.append(part("bias"))  # once, where several calls sum up parts of the inputs
    if not terms:
        return base
    delta = reduce(lambda one, two: builder.call(aten.add.Tensor, (one, two)), terms)
    if mask is not None:
        if reads_flat(site):
            mask = builder.call(aten.view.default, (mask, [-1, 1]), axis=None)
        delta = builder.call(aten.mul.Tensor, (delta, mask))
    return builder.call(aten.add.Tensor, (base, delta))


def rank_of(site: Site, factor: str, tensors: Mapping[str, fx.Node]) -> int:
    """The size of the inner axis of a factor: that of ``up`` is less beside groups."""
    return int(held(tensors[factor]).shape[site.type.axis(factor, "r")])


def held(node: fx.Node) -> Any:
    """The tensor that a ``get_attr`` node fetches."""
    assert node.graph.owning_module is not None
    return get_unevaluated(node.graph.owning_module, str(node.target))


def scaled_input(builder: Builder, site: Site, x: fx.Node, col: fx.Node) -> fx.Node:
    """``x * col``, which the layer reads in place of x."""
    return builder.call(aten.mul.Tensor, (x, _part(builder, site, col, "col")), axis=None)


def _without_bias(builder: Builder, site: Site) -> fx.Node:
    if site.bias is None:
        return site.node
    bias, sizes = site.bias, site.type.shape("vector", {"n": -1}, site.shape[2:])
    if len(sizes) > 1:
        bias = builder.call(aten.view.default, (bias, list(sizes)), axis=None)
    return builder.call(aten.sub.Tensor, (site.node, bias))


def _part(builder: Builder, site: Site, tensor: fx.Node, name: str) -> fx.Node:
    """What a call reads of a tensor of its layer: of all places, unless it reads a part of W."""
    is_factor, is_of_x = name in ("down", "up"), name in ("down", "col")
    places = site.inputs if is_of_x else site.outputs
    if places is not None:
        axis = site.type.axis(name, "in" if is_of_x else "out") if is_factor else 0
        tensor = _taken(builder, tensor, axis, places)
    behind = 0
    if site.labels is not None and not is_factor:
        behind = site.labels.before if is_of_x else site.labels.behind
    if not behind:
        return tensor
    return builder.call(aten.view.default, (tensor, [-1, *[1] * behind]), axis=None)


def _taken(builder: Builder, tensor: fx.Node, axis: int, places: Places) -> fx.Node:
    if isinstance(places, range):
        steps = () if places.step == 1 else (places.step,)
        arguments = (tensor, axis, places.start, places.stop, *steps)
        return builder.call(aten.slice.Tensor, arguments, axis=None)
    index = builder.index(tensor, places)
    return builder.call(aten.index_select.default, (tensor, axis, index), axis=None)
