"""Adapters read back from the graphs that they were injected into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import fx

from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.adapters.parameter_updates import of_parameter
from lora_fx.adapters.updates import activated
from lora_fx.choices import takes
from lora_fx.errors import AdapterError, shorten
from lora_fx.graph.example import first_names
from lora_fx.graph.graph_module import attribute
from lora_fx.injection.branch_tensors import BranchTensors, update_of
from lora_fx.injection.branches import Branch, branches_of
from lora_fx.injection.injected_adapters import folded_paths
from lora_fx.injection.invocation_mask import tokens_of
from lora_fx.layers.adapter_tensors import parametrized_weights
from lora_fx.layers.sites import Site, sites


@takes(AdapterError)
def adapter_from(gm: fx.GraphModule, name: str | None = None) -> Adapter:
    """Reads an injected adapter back, with the values it has now.

    What DoRA or (IA)3 became beside its layer is read as the rows and columns that it scales. A
    module that has several names is one layer, by the first of them.

    Args:
        gm: a graph with branches, such as one that was trained after `inject`.
        name: which adapter; may be left out when there is one.

    Raises:
        AdapterError: there is no such adapter, several and no name, one that made weights anew, or
            one of which some branches are folded.
    """
    found = [(site, branch) for site in sites(gm) for branch in branches_of(site)]
    made = [(each.adapter, str(each.stored.target)) for each in parametrized_weights(gm.graph)]
    names = list(dict.fromkeys([b.name for _, b in found] + [adapter for adapter, _ in made]))
    if not names or (name or names[0]) not in names or (name is None and len(names) > 1):
        if not names:
            raise AdapterError("the graph holds no adapter: inject one first, or read it unfolded")
        raise AdapterError(f"name={name!r}: the graph holds {shorten(names)}; name one of those")
    chosen = name or names[0]
    dense = [weight for adapter, weight in made if adapter == chosen]
    if dense:
        raise AdapterError(
            f"adapter {chosen!r} made {shorten(dense)} anew, by a function that a graph does not "
            "name; keep the Adapter that was injected"
        )
    if hidden := folded_paths(gm, chosen):
        raise AdapterError(
            f"adapter {chosen!r}: its branches at {shorten(hidden)} are folded, or in another "
            "form, and would be missing: unfold the graph, or read it before that"
        )
    mine = [(site, branch) for site, branch in found if branch.name == chosen]
    paths = first_names(gm, [site.path for site, _ in mine])
    mine = [(site, branch) for site, branch in mine if site.path in paths]
    biased = {branch.path for _, branch in mine if branch.bias is not None}  # not at every call
    full = [(site, b) for site, b in mine if b.bias is not None or site.path not in biased]
    updates = {site.path: update_from(gm, site, branch) for site, branch in full}
    return Adapter(chosen, updates | _of_parameters(mine, updates))


def _of_parameters(
    found: list[tuple[Site, Branch]], updates: Mapping[str, Update]
) -> dict[str, Update]:
    """The updates that PEFT would keep as those of a parameter, by path.

    Of several of one module the order counts, which a graph does not tell.
    """
    bare = {site.path: site for site, _ in found if site.bare and site.is_linear}
    owners = Counter(path.rpartition(".")[0] for path in bare)
    return {
        path: of_parameter(updates[path], path.rpartition(".")[2], site.transposed)
        for path, site in bare.items()
        if owners[path.rpartition(".")[0]] == 1 and "." in path
        if updates[path].is_plain and updates[path].bias is None
    }


def update_from(gm: fx.GraphModule, site: Site, branch: Branch) -> Update:
    """What a branch computes, with the values that it has now."""

    def read(node: fx.Node | None) -> torch.Tensor | None:
        return None if node is None else attribute(gm, str(node.target)).detach().clone()

    nodes = (branch.down, branch.up, branch.gain, branch.bias, branch.col)
    update = update_of(BranchTensors(*map(read, nodes)), site, branch.scale)
    tokens = read(tokens_of(branch.mask))
    return update if tokens is None else activated(update, tokens.tolist())
