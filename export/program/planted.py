"""Example inputs that an activated adapter acts at: with its invocation tokens among the ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lora_fx.errors import ExportError
from lora_fx.export.program.example_inputs import Inputs
from lora_fx.injection.invocation_mask import IDS


def planted(inputs: Inputs, gm: fx.GraphModule, invocations: Iterable[Sequence[int]]) -> Inputs:
    """The inputs, with each invocation in some row of the ids: a file is tried where it acts.

    Each is written behind the first token of the first row, the next behind it, so that there are
    tokens before them.

    Args:
        inputs: of a graph.
        gm: the graph.
        invocations: that the ids shall hold, unless they do.

    Raises:
        ExportError: the ids are too short.
    """
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    flat, spec = pytree.tree_flatten((inputs.args, dict(inputs.kwargs)))
    wanted = [tokens for tokens in dict.fromkeys(map(tuple, invocations)) if tokens]
    if not wanted:
        return inputs
    place = names.index(IDS)
    ids, at = flat[place].clone(), 1
    for tokens in wanted:
        if _holds(ids, tokens):
            continue
        if at + len(tokens) > ids.shape[1]:
            raise ExportError(
                f"the example {IDS} have {ids.shape[1]} tokens, which have no room for the "
                f"invocation {list(tokens)} behind others: trace with longer ones"
            )
        ids[0, at : at + len(tokens)] = torch.tensor(tokens).to(ids)
        at += len(tokens)
    flat[place] = ids
    args, kwargs = pytree.tree_unflatten(flat, spec)
    return replace(inputs, args=args, kwargs=kwargs)


def _holds(ids: torch.Tensor, tokens: Sequence[int]) -> bool:
    if len(tokens) > ids.shape[1]:
        return False
    return bool((ids.unfold(1, len(tokens), 1) == torch.tensor(tokens).to(ids)).all(-1).any())
