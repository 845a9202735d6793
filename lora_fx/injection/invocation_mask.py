"""aLoRA's mask in a graph: ones from the last invocation tokens of a row of ids on."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx

from lora_fx.errors import AdapterError, shorten, within
from lora_fx.graph.editor import Editor
from lora_fx.graph.example import example_of
from lora_fx.graph.graph_module import attribute
from lora_fx.graph.ops import aten, module_path
from lora_fx.layers.adapter_tensors import part_of
from lora_fx.layers.matrix_products import rank_of
from lora_fx.layers.sites import Site

IDS = "input_ids"
HOLDER = "lora_invocation"
Masks = dict[tuple[tuple[int, ...], torch.dtype], fx.Node]  # by tokens and dtype
_MOST = 40  # nodes that a mask is made of, at most


def active(ids: Any, tokens: Any, dtype: torch.dtype) -> Any:
    """A mask of tokens, in aten calls: (batch, length, 1), ones from the last invocation on.

    Args:
        ids: (batch, length).
        tokens: (n,), the invocation; of none, all tokens are active.
        dtype: of the mask.
    """
    row, each = _ones(aten.select.int(ids, 0, 0)), _ones(tokens)
    # Counted, so that nothing asks for a size: places (length, 1) from 1, and steps (n,) from 0.
    place = aten.unsqueeze.default(aten.cumsum.default(row, 0), 1)
    at = aten.add.Tensor(place, aten.sub.Tensor(aten.cumsum.default(each, 0), 1))
    last = aten.sum.default(row)
    inside = aten.sub.Tensor(aten.minimum.default(at, last), 1)
    windows = aten.index.Tensor(ids, [None, inside])  # (batch, length, n)
    differs = aten.logical_or.default(aten.ne.Tensor(windows, tokens), aten.gt.Tensor(at, last))
    missing = aten.sum.dim_IntList(aten._to_copy.default(differs, dtype=torch.int64), [2])
    starts = aten._to_copy.default(aten.eq.Scalar(missing, 0), dtype=torch.int64)
    so_far = aten.cumsum.default(starts, 1)
    whole = aten.sum.dim_IntList(starts, [1], True)
    begun = aten.logical_and.default(aten.eq.Tensor(so_far, whole), aten.gt.Scalar(so_far, 0))
    everywhere = aten.eq.Scalar(aten.sum.default(each), 0)
    mask = aten.logical_or.default(begun, everywhere)
    return aten.unsqueeze.default(aten._to_copy.default(mask, dtype=dtype), 2)


def _ones(like: Any) -> Any:
    """Of another size whenever what it is made like is, which a slot's tokens are."""
    return aten._to_copy.default(aten.eq.Tensor(like, like), dtype=torch.int64)


def mask_of(
    editor: Editor, site: Site, tokens: tuple[int, ...], adapter: str, known: Masks
) -> fx.Node:
    """The mask of a layer's calls: one for all layers of an adapter, if they are of one dtype.

    Args:
        editor: of the graph.
        site: the layer.
        tokens: the invocation.
        adapter: its name.
        known: the masks of the adapter so far, which gets this one.

    Raises:
        AdapterError: the graph reads no ids, or the past of a cache besides; or the layer has no
            row for each token.
    """
    with within(f"adapter {adapter}"):
        ids = _ids(editor.gm)
        _check_rows(site, ids)
    key = tokens, site.dtype
    if key not in known:
        nodes = editor.gm.graph.nodes
        first = next(node for node in nodes if node.op != "placeholder")
        held = editor.constant(f"{HOLDER}.{part_of(adapter)}", torch.tensor(tokens), before=first)
        stacked = (n for n in nodes if n.meta.get("nn_module_stack"))
        outer = min(stacked, key=lambda node: len(module_path(node)), default=ids)
        known[key], _ = editor.inline(partial(active, dtype=site.dtype), [ids, held], first, outer)
    return known[key]


def tokens_of(mask: object) -> fx.Node | None:
    """The node of the tokens that a mask was made of; None if it is no such mask."""
    nodes = [mask] if isinstance(mask, fx.Node) else []
    for node in nodes:  # grows
        if node.op == "get_attr" and str(node.target).startswith(f"{HOLDER}."):
            return node
        nodes += [source for source in node.all_input_nodes if source not in nodes]
        if len(nodes) > _MOST:
            break
    return None


def invocations_in(gm: fx.GraphModule) -> list[tuple[int, ...]]:
    """The invocation tokens of the adapters in a graph."""
    names = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    own = sorted(name for name in names if name.startswith(f"{HOLDER}."))
    return [tuple(attribute(gm, name).tolist()) for name in own]


def reads_flat(site: Site) -> bool:
    """Whether a layer reads (batch * length, in), as a product of matrices does."""
    return rank_of(site.input) == 2


def _ids(gm: fx.GraphModule) -> fx.Node:
    inputs: list[fx.Node] = list(gm.graph.find_nodes(op="placeholder"))
    names = {node.name: node for node in inputs}
    example = example_of(gm)
    if (example is not None and example.generates) or any(n.startswith("past") for n in names):
        raise AdapterError(
            "it acts from its invocation tokens on, and a decoder with a cache is not told which "
            "tokens its past holds; trace the model without a cache (--task text-generation on "
            "the command line)"
        )
    if IDS not in names:
        raise AdapterError(
            f"it acts from its invocation tokens on, and the graph has no input {IDS} to find "
            f"them in, but {shorten(list(names)) or 'none'}; trace the model that reads ids"
        )
    return names[IDS]


def _check_rows(site: Site, ids: fx.Node) -> None:
    """Refuses a layer that does not read one row for each token."""
    value, known = site.input.meta.get("val"), ids.meta.get("val")
    if value is None or known is None:
        raise AdapterError(
            "it acts from its invocation tokens on, and a graph without shapes does not tell which "
            'layers read one row for each; trace the model with its inputs and frontend="export"'
        )
    # Compared as text: to ask whether sizes are equal would make a rule of it.
    wanted = str([*known.shape]), str([prod(known.shape)])
    has_rows = str([*value.shape[:-1]]) in wanted
    if site.is_linear and site.labels is None and site.part.rows is None and has_rows:
        return
    raise AdapterError(
        f"{site.path}: it acts from its invocation tokens on, and the layer "
        f"({site.kind}) does not read one row for each token of {IDS}; leave it out"
    )
