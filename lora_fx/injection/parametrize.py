"""Parametrizes a weight in a graph: its reader gets f(W, values). LoKr, OFT, full differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from lora_fx.adapters.updates import AnyUpdate
from lora_fx.algebra.evaluate import recorded
from lora_fx.algebra.matrix_expr import transposed
from lora_fx.errors import AdapterError
from lora_fx.graph.editor import Editor
from lora_fx.graph.lazy_tensor import evaluate, get_unevaluated
from lora_fx.graph.ops import aten
from lora_fx.injection.stacking import check_layer, placed
from lora_fx.layers.adapter_tensors import value_names
from lora_fx.layers.sites import Site


def base_weight(editor: Editor, site: Site) -> torch.Tensor:
    """The weight of a layer as it is stored; one that is still to be computed is not kept."""
    return evaluate(get_unevaluated(editor.gm, str(site.weight.target)))


def make_layer_anew(editor: Editor, calls: Sequence[Site], update: AnyUpdate, name: str) -> None:
    """Makes the weight of a layer anew at all of its calls.

    Raises:
        AdapterError: another adapter is there that it does not go with, or a value is not finite
            in the layer's dtype.
    """
    if not update.leaves and update.is_added:
        return  # a bias, and nothing of the weight
    first = calls[0]
    check_layer(first, update, name)
    names = value_names(first.path, name, len(update.values), first.bare)
    function = _on_stored(update, first)
    reads = list(dict.fromkeys(read for site in calls for read in site.reads))
    for reader, source in placed(editor.gm, reads, first.path, update, first.bare):
        make_anew(editor, reader, source, update.values, function, names, first.dtype)


def make_anew(
    editor: Editor,
    reader: fx.Node,
    source: fx.Node,
    values: Sequence[torch.Tensor],
    function: Callable[..., Any],
    names: Sequence[str],
    dtype: torch.dtype,
) -> None:
    """Makes one reader of a tensor read a function of it and some values instead.

    Raises:
        AdapterError: a value is not finite in the dtype.
    """
    nodes = []
    for target, value in zip(names, values, strict=True):
        kept = value.to(dtype) if value.is_floating_point() else value
        if not kept.isfinite().all():
            raise AdapterError(f"{target}: NaN or infinity in {dtype}; save the adapter again")
        held = nn.Parameter(kept, requires_grad=False) if kept.is_floating_point() else kept
        nodes.append(editor.constant(target, held, before=reader))
    made, _ = editor.inline(function, [source, *nodes], before=reader, like=reader)
    end = editor.call(aten.alias.default, (made,), before=reader, like=reader)
    editor.rebind(reader, source, end)


def _on_stored(update: AnyUpdate, site: Site) -> Callable[..., Any]:
    """From a weight as it is stored, perhaps with its inputs first, and the values, to W'."""
    leaves, (out, into, *kernel) = update.leaves, site.own_shape
    if site.transposed and not kernel:
        return recorded(lambda w: transposed(update.of(transposed(w))), site.stored_shape, leaves)
    function = recorded(update.of, site.own_shape, leaves)
    if not site.transposed:
        return function

    def turned(weight: Any, first: int, second: int, shape: list[int]) -> Any:
        """Each group of (first, second, *kernel) turned around."""
        if site.groups == 1:
            return aten.transpose.int(weight, 0, 1)
        parts = aten.reshape.default(weight, [site.groups, first, second, *kernel])
        return aten.reshape.default(aten.transpose.int(parts, 1, 2), shape)

    def on_stored(weight: Any, *values: Any) -> Any:
        made = function(turned(weight, into, out // site.groups, list(site.own_shape)), *values)
        return turned(made, out // site.groups, into, list(site.stored_shape))

    return on_stored
