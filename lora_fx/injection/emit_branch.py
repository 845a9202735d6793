"""Emits a low-rank branch beside its layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from lora_fx.adapters.updates import AnyUpdate
from lora_fx.errors import AdapterError
from lora_fx.graph.editor import Editor
from lora_fx.injection.branch_tensors import branch_tensors, check_finite
from lora_fx.injection.branches import (
    branch_sum,
    branches_of,
    col_of,
    input_of,
    last_of,
    rank_of,
    scaled_input,
)
from lora_fx.injection.invocation_mask import Masks, mask_of
from lora_fx.injection.parametrize import FOLD_FIRST, base_weight, parametrize_layer
from lora_fx.layers.adapter_tensors import adapters_of, parameter_names
from lora_fx.layers.sites import Site, bias_of


def inject_update(
    editor: Editor, calls: Sequence[Site], update: AnyUpdate, name: str, masks: Masks
) -> None:
    """Puts a fitted update at every call of a layer, with one set of constants for all.

    Args:
        editor: of the graph.
        calls: of the layer.
        update: fits it.
        name: of the adapter.
        masks: of the adapter, made so far.

    Raises:
        AdapterError: values that the layer's dtype cannot hold, or a second scaling of what the
            layer reads.
    """
    first = calls[0]
    if update.makes_anew:
        parametrize_layer(editor, calls, update, name)
    own = partial(_own_bias, editor, calls)
    tokens = update.invocation
    at = [mask_of(editor, site, tokens, name, masks) if tokens else None for site in calls]
    terms = branch_tensors(update, first, lambda: base_weight(editor, first), own)
    check_finite(first, name, update, terms, lambda: base_weight(editor, first))
    names = parameter_names(first.path, name, first.bare)
    nodes = {
        part: editor.constant(getattr(names, part), nn.Parameter(value, False), before=first.node)
        for part, value in terms.each().items()
    }
    for site, mask in zip(calls, at, strict=True):
        own_nodes = {p: n for p, n in nodes.items() if p != "bias" or _takes_bias(site, calls)}
        add_branch(editor, site, own_nodes, mask=mask)


def _takes_bias(site: Site, calls: Sequence[Site]) -> bool:
    """Whether a call adds the layer's bias: not one that leaves out what another call adds."""
    others = (other.bias for other in calls if other.part[1:3] == site.part[1:3])
    return site.bias is not None or all(bias is None for bias in others)


def add_branch(
    editor: Editor,
    site: Site,
    nodes: dict[str, fx.Node],
    x: fx.Node | None = None,
    scale: float | None = None,
    mask: fx.Node | None = None,
) -> None:
    """Adds a branch beside one call.

    Args:
        editor: of the graph.
        site: the call.
        nodes: the ``get_attr`` nodes of `BranchTensors`, by name.
        x: what the low-rank part reads; what the layer reads by default.
        scale: a factor of the low-rank part that is not folded into ``up``.
        mask: of the tokens that it is added at.
    """
    base = last_of(site)
    behind = base.next
    if "col" in nodes:
        _scale_input(editor, site, nodes["col"])
    if "gain" in nodes:
        _refuse_scaled(site, mine=nodes)
    writer = _Writer(editor, site, behind, rank_of(site, "down", nodes) if "down" in nodes else 0)
    x = x or input_of(site, None if "col" in nodes else col_of(site))
    total = branch_sum(writer, site, base, nodes, x, scale, mask)
    if total is not base:
        editor.replace(base, total, keep=writer.made)  # a gain reads the layer, not the sum


class _Writer:
    """A `Builder` that makes the calls.

    Attributes:
        made: so far.
    """

    def __init__(self, editor: Editor, site: Site, before: fx.Node, rank: int = 0) -> None:
        self.made: list[fx.Node] = []
        self._editor, self._site, self._before, self._rank = editor, site, before, rank
        self._traced = site.node.meta.get("val") if site.is_conv else None

    def call(self, target: Any, arguments: tuple[Any, ...], axis: str | None = "out") -> fx.Node:
        node = self._editor.call(target, arguments, before=self._before, like=self._site.node)
        self.made.append(node)
        if axis and self._traced is not None:
            # What torch.export notes of a convolution's results: how many places there are.
            sizes, at = list(self._traced.shape), 1 - len(self._site.shape)
            sizes[at] = sizes[at] if axis == "out" else self._rank
            node.meta["val"] = self._traced.new_empty(sizes)
        return node

    def index(self, tensor: fx.Node, places: tuple[int, ...]) -> fx.Node:
        name, value = f"{tensor.target}_places", torch.tensor(places)
        return self._editor.constant(name, value, before=self._before)


def _own_bias(editor: Editor, calls: Sequence[Site]) -> torch.Tensor | None:
    bias = bias_of(editor.gm, calls)
    if bias is None and any(site.bias is not None for site in calls):
        raise AdapterError(
            f"{calls[0].path}: an adapter scales what it gives, and its bias is computed from the "
            "inputs; leave the layer out"
        )
    return bias


def _scale_input(editor: Editor, site: Site, col: fx.Node) -> None:
    gained = any(branch.gain is not None for branch in branches_of(site))
    if gained or col_of(site) is not None or adapters_of(site.operand):
        raise AdapterError(
            f"{site.path}: a second adapter scales what the layer reads or gives, which has no "
            f"sum with the first; {FOLD_FIRST}"
        )
    x = site.input
    scaled = scaled_input(_Writer(editor, site, site.node), site, x, col)
    if "val" in x.meta:
        scaled.meta["val"] = x.meta["val"]
    editor.rebind(site.node, x, scaled)


def _refuse_scaled(site: Site, mine: dict[str, fx.Node]) -> None:
    """A gain is relative to what the base gives, which another adapter may have changed."""
    if ("col" not in mine and col_of(site) is not None) or adapters_of(site.operand):
        raise AdapterError(
            f"{site.path}: a second adapter scales what the layer gives, and the first changed "
            f"that; {FOLD_FIRST}"
        )
