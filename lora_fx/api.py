"""The passes as functions, for the common case."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.lora_config import LoraConfig


def inject(
    gm: fx.GraphModule,
    adapter: Adapter | LoraConfig | Sequence[Adapter | LoraConfig],
    *,
    strict: bool = True,
) -> fx.GraphModule:
    """Puts an adapter beside the layers it updates.

    Args:
        gm: a traced graph; it is not changed.
        adapter: a loaded adapter; a LoraConfig, whose parameters then are the only ones that
            train; or several of them, which are summed, or act one on what another made (OFT).
        strict: False leaves out what matches nothing, instead of refusing it.

    Returns:
        A new graph that shares its tensors with ``gm``.

    Raises:
        AdapterError: the adapter does not fit; names what does not.
    """
    from lora_fx.injection.own_forwards import tell_own_forwards
    from lora_fx.passes import InjectLora

    tuned = InjectLora(adapter, strict=strict)(gm).graph_module
    tell_own_forwards(gm, tuned)
    return tuned


def fold(gm: fx.GraphModule, *, chains: bool = False) -> fx.GraphModule:
    """Makes one layer with a new constant of every affine region that holds a layer.

    A folded weight is computed when it is first read, or when it is written to a file.

    Args:
        gm: a traced graph; it is not changed.
        chains: also makes one layer of layers that follow each other with nothing in between.

    Raises:
        PassError: a folded weight is not finite in the layer's dtype. If parameters that it is
            made of take gradients, at once; else whoever reads the weight meets the error.
    """
    from lora_fx.passes import FoldLora

    return FoldLora(chains)(gm).graph_module


def unfold(gm: fx.GraphModule) -> fx.GraphModule:
    """Gives back exactly what the latest `fold` was given; a graph without one as it is.

    The memory of a fold does not survive pickling, which drops what torch keeps beside a graph.

    Raises:
        PassError: the graph was changed since in a way that leaves no place for a region.
    """
    from lora_fx.passes import UnfoldLora

    return UnfoldLora()(gm).graph_module
