"""Emits a low-rank branch beside its layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import fx, nn

from lora_fx.adapters.updates import AnyUpdate
from lora_fx.errors import AdapterError
from lora_fx.graph.editor import Editor
from lora_fx.graph.ops import aten
from lora_fx.injection.branch_tensors import terms_of
from lora_fx.injection.finite_values import check_finite
from lora_fx.injection.match_branch import branches_of, col_of, last_of, parameter_names
from lora_fx.injection.parametrize import base_weight, make_layer_anew
from lora_fx.layers.branch_calls import axes_behind, pick
from lora_fx.layers.layer_bias import bias_of
from lora_fx.layers.parametrized_weights import adapter_of
from lora_fx.layers.sites import Site


def put(editor: Editor, calls: Sequence[Site], update: AnyUpdate, name: str) -> None:
    """Puts a fitted update at every call of a layer, with one set of constants for all.

    Raises:
        AdapterError: values that the layer's dtype cannot hold, or a second scaling of what the
            layer reads.
    """
    first = calls[0]
    if update.makes_anew:
        make_layer_anew(editor, calls, update, name)
    own = partial(_own_bias, editor, calls)
    terms = terms_of(update, first, lambda: base_weight(editor, first), own)
    check_finite(first, name, update, terms, lambda: base_weight(editor, first))
    names = parameter_names(first.path, name, first.bare)
    nodes = {
        part: editor.constant(getattr(names, part), _frozen(value), before=first.node)
        for part, value in terms.each().items()
    }
    for site in calls:
        beside(editor, site, nodes, groups=update.groups)


def beside(
    editor: Editor,
    site: Site,
    nodes: dict[str, fx.Node],
    x: fx.Node | None = None,
    scale: float | None = None,
    groups: int = 1,
) -> None:
    """Adds the terms of one call.

    Args:
        editor: of the graph.
        site: the call.
        nodes: the ``get_attr`` nodes of `Terms`, by name.
        x: what the low-rank part reads; what the layer reads by default.
        scale: a factor of the low-rank part that is not folded into ``up``.
        groups: of the up-projection beside a grouped convolution.
    """
    base = last_of(site)
    behind = base.next
    if "col" in nodes:
        _scale_input(editor, site, nodes["col"])

    def call(target: object, *arguments: object) -> fx.Node:
        node = editor.call(target, arguments, before=behind, like=site.node)
        _describe(site, node)
        return node

    def part(factor: str) -> fx.Node:
        return _picked(editor, site, nodes[factor], factor, behind)

    def vector(name: str) -> fx.Node:
        return _along(editor, site, part(name), axes_behind(site), before=behind)

    terms: list[fx.Node] = []
    if "down" in nodes:
        target, arguments = site.type.shrink(site, x or _read(site, nodes), part("down"))
        narrow = call(target, *arguments)
        target, arguments = site.type.expand(site, narrow, part("up"), groups)
        low = call(target, *arguments)
        rank = editor.tensor(nodes["down"]).shape[site.type.axis("down", "r")]
        _describe(site, narrow, channels=rank)
        terms.append(low if scale is None else call(aten.mul.Tensor, low, scale))
    without: list[fx.Node] = []
    if "gain" in nodes:
        _refuse_scaled(site, mine=nodes)
        layer = site.node
        if site.bias is not None:
            layer = call(aten.sub.Tensor, layer, _broadcast(call, site, site.bias))
        gained = call(aten.mul.Tensor, layer, vector("gain"))
        without = [layer, gained]  # they read the layer, not the sum
        terms.append(gained)
    if "bias" in nodes and (site.inputs is None or 0 in site.inputs):
        terms.append(vector("bias"))  # once, where several calls sum up parts of the inputs
    if not terms:
        return
    delta = terms[0]
    for term in terms[1:]:
        delta = call(aten.add.Tensor, delta, term)
    total = call(aten.add.Tensor, base, delta)
    editor.replace(base, total, keep=without)


def _own_bias(editor: Editor, calls: Sequence[Site]) -> torch.Tensor | None:
    bias = bias_of(editor.gm, calls)
    if bias is None and any(site.bias is not None for site in calls):
        raise AdapterError(
            f"{calls[0].path}: an adapter scales what it gives, and its bias is computed from the "
            "inputs; leave the layer out"
        )
    return bias


def _picked(editor: Editor, site: Site, node: fx.Node, factor: str, before: fx.Node) -> fx.Node:
    """The part of a factor or vector that belongs to what the call reads of its weight."""
    found = pick(site, factor)
    if found is None:
        return node
    axis, places = found
    if isinstance(places, range):
        steps = () if places.step == 1 else (places.step,)
        arguments: tuple[object, ...] = (node, axis, places.start, places.stop, *steps)
        return editor.call(aten.slice.Tensor, arguments, before=before, like=site.node)
    held = editor.constant(f"{node.target}_places", torch.tensor(places), before=before)
    arguments = (node, axis, held)
    return editor.call(aten.index_select.default, arguments, before=before, like=site.node)


def _describe(site: Site, node: fx.Node, channels: int | None = None) -> None:
    """Notes what torch.export notes of a convolution's results: how many places there are."""
    value = site.node.meta.get("val")
    if not site.is_conv or value is None:
        return
    sizes = list(value.shape)
    sizes[1 - len(site.shape)] = channels or sizes[1 - len(site.shape)]
    node.meta["val"] = value.new_empty(sizes)


def _broadcast(call: Callable[..., fx.Node], site: Site, vector: fx.Node) -> fx.Node:
    sizes = site.type.shape("vector", {"n": -1}, site.shape[2:])
    if len(sizes) == 1:
        return vector
    viewed = call(aten.view.default, vector, list(sizes))
    viewed.meta.pop("val", None)
    return viewed


def _along(editor: Editor, site: Site, vector: fx.Node, behind: int, before: fx.Node) -> fx.Node:
    """A vector of features that have axes behind them."""
    if not behind:
        return vector
    sizes = [-1, *[1] * behind]
    return editor.call(aten.view.default, (vector, sizes), before=before, like=site.node)


def _read(site: Site, nodes: dict[str, fx.Node]) -> fx.Node:
    """What the low-rank part reads: what came in, unless its own adapter scales that."""
    if "col" in nodes or col_of(site) is None:
        return site.input
    x = site.input.args[0]
    assert isinstance(x, fx.Node)
    return x


def _scale_input(editor: Editor, site: Site, col: fx.Node) -> None:
    gained = any(branch.gain is not None for branch in branches_of(site))
    if gained or col_of(site) is not None:
        raise AdapterError(
            f"{site.path}: a second adapter scales what the layer reads or gives, which has no "
            "sum with the first; fold the first, then inject the second"
        )
    x, col = site.input, _picked(editor, site, col, "col", site.node)
    col = _along(editor, site, col, axes_behind(site, outputs=False), before=site.node)
    scaled = editor.call(aten.mul.Tensor, (x, col), before=site.node, like=site.node)
    if "val" in x.meta:
        scaled.meta["val"] = x.meta["val"]
    editor.rebind(site.node, x, scaled)


def _refuse_scaled(site: Site, mine: dict[str, fx.Node]) -> None:
    """A gain is relative to what the base gives, which another adapter may have changed."""
    if ("col" not in mine and col_of(site) is not None) or adapter_of(site.operand):
        raise AdapterError(
            f"{site.path}: a second adapter scales what the layer gives, and the first changed "
            "that; fold the first, then inject the second"
        )


def _frozen(value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
