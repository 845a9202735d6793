"""Parameters that one module holds and another one multiplies with."""

from __future__ import annotations

from torch import fx

from lora_fx.graph.ops import HOLDER, module_path
from lora_fx.graph.traced_module import TracedModule
from lora_fx.layers.layer import layer_of
from lora_fx.layers.sites import Site, sites


def note_holders(gm: fx.GraphModule, model: TracedModule) -> None:
    """Notes on each call that was handed a bare parameter which module holds it.

    So all calls that read the parameter are of one layer: there is one weight to change. What a
    layer's own module holds stays that module's, whoever reads it besides.
    """
    for site in sites(gm):
        holder = _holder(site, model)
        for node in (site.node, *site.part.calls) if holder is not None else ():
            node.meta[HOLDER] = holder


def _holder(site: Site, model: TracedModule) -> str | None:
    """The path of the module that holds a weight, if the one that calls was handed it."""
    caller, (holder, _, leaf) = module_path(site.node), str(site.weight.target).rpartition(".")
    calls, holds = model.modules.get(caller), model.modules.get(holder)
    if calls is None or holds is None or f"{holder}.".startswith(f"{caller}.") or not caller:
        return None
    own, held = model.parameters(calls), model.parameters(holds).get(leaf)
    is_own = any(value is held for value in own.values())  # tied
    return None if held is None or is_own or layer_of(holds) else holder
