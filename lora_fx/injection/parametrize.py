"""Parametrizes a weight in a graph: its reader gets f(W, values). LoKr, OFT, full differences.

Several adapters may parametrize one weight: what the next of them acts on, or why it cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from lora_fx.adapters.updates import AnyUpdate
from lora_fx.algebra.evaluate import recorded
from lora_fx.algebra.matrix_expr import transposed
from lora_fx.errors import AdapterError, shorten
from lora_fx.graph.editor import Editor
from lora_fx.graph.lazy_tensor import evaluate, get_unevaluated
from lora_fx.graph.ops import aten
from lora_fx.injection.branches import branches_of, col_of
from lora_fx.injection.injected_adapters import injected
from lora_fx.layers.adapter_tensors import (
    adapters_of,
    makers,
    name_in,
    parametrized_weights,
    value_names,
)
from lora_fx.layers.sites import Site
from lora_fx.layers.weight_parts import Read

FOLD_FIRST = "fold the first, then inject the second"


def base_weight(editor: Editor, site: Site) -> torch.Tensor:
    """The weight of a layer as it is stored; one that is still to be computed is not kept."""
    return evaluate(get_unevaluated(editor.gm, str(site.weight.target)))


def parametrize_layer(editor: Editor, calls: Sequence[Site], update: AnyUpdate, name: str) -> None:
    """Replaces the weight of a layer by the nodes of f(W, values), at all of its calls.

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
        parametrize(editor, reader, source, update.values, function, names, first.dtype)


def parametrize(
    editor: Editor,
    reader: fx.Node,
    source: fx.Node,
    values: Sequence[torch.Tensor],
    function: Callable[..., Any],
    names: Sequence[str],
    dtype: torch.dtype,
) -> None:
    """Makes one reader of a tensor W read the nodes of f(W, values) instead.

    Args:
        editor: of the graph.
        reader: the call.
        source: W, or what another adapter made of it.
        values: of the adapter; floating ones are cast to the dtype.
        function: of W and the values, in aten overloads.
        names: of the constants that hold the values.
        dtype: of W.

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


def check_layer(site: Site, update: AnyUpdate, name: str) -> None:
    """Refuses an update whose W' another adapter at the layer leaves no meaning.

    Raises:
        AdapterError: the other scales what the layer reads or gives, has a branch that this one
            would have to act on, or makes the weight anew, and this one does not act on any weight.
    """
    branches, col = list(branches_of(site)), col_of(site)
    scaled = [b.name for b in branches if b.gain is not None or b.col is not None]
    scaled += [name_in(str(col.target))] if col is not None and not scaled else []
    if scaled:
        raise AdapterError(
            f"{site.path}: adapter {name} makes its weight anew, and {scaled[0]} scales what the "
            f"layer reads or gives; {FOLD_FIRST}"
        )
    if branches and update.stacks in ("on any", "inputs first"):
        beside = shorten([branch.name for branch in branches])
        raise AdapterError(
            f"{site.path}: adapter {name} acts on the weight, and {beside} stands beside it, out "
            f"of its reach; give {name} before {beside}; or {FOLD_FIRST}, which acts on both then"
        )
    check_stacks(site.path, adapters_of(site.operand), update, name)


def check_stacks(path: str, others: Sequence[str], update: AnyUpdate, name: str) -> None:
    """Refuses an update that does not act on what other adapters made of a weight.

    Raises:
        AdapterError: says why, and what to do.
    """
    if not others or update.stacks in ("on any", "inputs first"):
        return
    earlier = shorten(list(others))
    start = f"{path}: adapter {name} makes its weight anew, and {earlier} has made it anew"
    if update.stacks == "never":
        raise AdapterError(
            f"{start}: what PEFT computes of the two of kind {update.kind!r} is no function of "
            "what the first made; merge them with PEFT (merge_and_unload), and trace that model"
        )
    if not update.is_added:
        raise AdapterError(f"{start}, which its difference from W depends on; {FOLD_FIRST}")


def placed(
    gm: fx.GraphModule, reads: Sequence[Read], path: str, update: AnyUpdate, bare: bool
) -> Sequence[Read]:
    """Who is to read what an update makes: the layer; or the adapters that act behind it.

    PEFT's OFT rotates what a layer reads, in the order of its adapters: of a weight, the last
    comes first. Other kinds of adapters end such a run.

    Raises:
        AdapterError: the graph does not remember what an adapter is.
    """
    if update.stacks != "inputs first":
        return reads
    known = {made.operand: made for made in parametrized_weights(gm.graph)}
    found: list[Read] = []
    for reader, source in reads:
        run = None
        while source in known and _stacks(gm, path, known[source].adapter, bare) == update.stacks:
            run, source = known[source], known[source].source
        inner = makers([run.operand]) if run else set()
        found += [(user, source) for user in source.users if user in inner] or [(reader, source)]
    return found


def _stacks(gm: fx.GraphModule, path: str, adapter: str, bare: bool) -> str:
    """How an adapter in the graph stacks at a layer.

    Raises:
        AdapterError: the graph does not remember it, as one that was pickled does not.
    """
    value, *_ = value_names(path, adapter, 1, bare)
    for record in injected(gm):
        for given, several in record.bound.items():
            if any(value in bound.names.values() for bound in several):
                return record.adapter.updates[given].stacks
    raise AdapterError(
        f"{path}: whether {adapter} rotates what the layer reads is not known in a graph that was "
        f"saved, and the order depends on it; {FOLD_FIRST}, or inject both where it was traced"
    )
