"""What a graph computes beside a layer that has no form, counted as the forms are.

The calls between what the layer reads and what the rest of the graph reads are made again, on
tensors without data.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import fx

from lora_fx.branch_lowering.cost import Cost, Counter, moved, sized
from lora_fx.branch_lowering.selection import TOKENS, tokens_of
from lora_fx.graph.constants import called
from lora_fx.graph.graph_module import attribute
from lora_fx.graph.lazy_tensor import LazyTensor, get_unevaluated
from lora_fx.graph.ops import needed, sizes_of
from lora_fx.injection.branches import branches_of, col_of, input_of, last_of
from lora_fx.layers.sites import Site


def cost_beside(gm: fx.GraphModule, site: Site, slots: bool = False) -> Cost | None:
    """What a call of a layer with all that adapters put beside it costs more than the merged layer.

    Args:
        gm: the graph.
        site: the call.
        slots: whether what the adapters hold is given at each call.

    Returns:
        At the sizes of the example, but for the rows of linear layers and tables: these are
        `TOKENS` where they are not known. None where sizes are needed and nothing tells them.
    """
    x = _input(site)
    if x is None:
        return None
    try:
        return _beside(gm, site, x, slots)
    except (RuntimeError, IndexError, TypeError):  # it takes x of other axes than are assumed
        return None


def _beside(gm: fx.GraphModule, site: Site, x: torch.Tensor, slots: bool) -> Cost:
    masks = [branch.mask for branch in branches_of(site) if branch.mask is not None]
    values = {input_of(site, col_of(site)): x} | dict.fromkeys(masks, sized(*x.shape[:-1], 1))
    calls = needed(last_of(site), values.keys())
    tensors = {n: get_unevaluated(gm, str(n.target)) for n in calls if n.op == "get_attr"}
    values |= {node: _without_data(tensor) for node, tensor in tensors.items()}
    own = [values[node] for node in (site.weight, site.bias) if node in values]
    constants = own if slots else [values[node] for node in tensors]
    whole = _counted(gm, [n for n in calls if n not in values], values, constants, site)
    operands = [values[node] for node in (site.operand, site.bias) if node in values]
    return whole - _counted(gm, [site.node], values | {site.input: x}, operands, site)


def cost_of_slot(site: Site) -> Cost:
    """What a layer costs more where its whole weight is given at each call: to lay it out anew."""
    is_table = site.kind == "embedding"
    return Cost() if is_table else moved(2 * prod(site.own_shape), site.dtype.itemsize)


def _input(site: Site) -> torch.Tensor | None:
    """What a layer reads, without its data."""
    sizes, is_table = sizes_of(site.input), site.kind == "embedding"
    if is_table or (site.is_linear and site.labels is None):
        rows = tokens_of(site.input, TOKENS, features=0 if is_table else 1)
        features = [] if is_table else [site.in_features]
        free = [at for at, size in enumerate(sizes or ()) if not isinstance(size, int)]
        known = [1 if at in free else size for at, size in enumerate(sizes or (rows, *features))]
        if free:
            known[free[-1]] = rows * prod(features) // prod(known)
        return torch.empty(known, dtype=torch.long if is_table else torch.float32, device="meta")
    hints = [size if isinstance(size, int) else size.node.hint for size in sizes or ()]
    return sized(*hints) if hints and None not in hints else None


def _counted(
    gm: fx.GraphModule,
    calls: Sequence[fx.Node],
    values: dict[fx.Node, torch.Tensor],
    constants: Sequence[torch.Tensor],
    site: Site,
) -> Cost:
    """Makes calls on what is known, adds what they give to it, and counts."""
    counter = Counter(constants, site.dtype.itemsize)
    with counter:
        for node in calls:
            if node.op == "call_module":
                given = fx.node.map_arg(node.args, values.__getitem__)
                values[node] = attribute(gm, str(node.target))(*given)
            else:
                values[node] = called(node, values)
    return counter.total


def _without_data(tensor: torch.Tensor | LazyTensor) -> torch.Tensor:
    """A tensor's sizes, all real numbers of one dtype: what is cast is cast to that of x."""
    dtype = torch.float32 if tensor.dtype.is_floating_point else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="meta")
