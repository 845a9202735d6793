"""loralib's ``MergedLinear``: one matrix of several outputs, of which some are adapted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lora_fx.errors import AdapterError
from lora_fx.formats.hints import Hints, value_for

Groups = tuple[bool, ...]


def groups_of(
    path: str,
    down: torch.Tensor,
    up: torch.Tensor,
    hints: Hints,
    out: int | None,
) -> Groups | None:
    """Which outputs of a layer are adapted, or None for a layer of one output.

    Args:
        path: of the layer.
        down: ``lora_A``, (r, in), or (r * adapted, in).
        up: ``lora_B``, (out, r), or (size * adapted, r).
        hints: ``enable_lora`` is heeded.
        out: how many outputs the base's layer has, if it is known.

    Raises:
        AdapterError: the hint is missing, or contradicts the shapes.
    """
    count, rest = divmod(len(down), up.shape[1])
    if rest or not count or len(up) % count:
        raise AdapterError("the ranks differ, expected (r, in) and (out, r)")
    groups = _hinted(path, hints, count, len(up), out)
    if groups is None and count > 1:
        raise AdapterError(
            f"a fused layer (MergedLinear) with {count} adapted outputs; pass "
            "enable_lora=, such as [True, False, True], as its model has it"
        )
    if groups is not None and sum(groups) != count:
        raise AdapterError(
            f"{count} outputs are adapted, enable_lora={list(groups)} says {sum(groups)}"
        )
    size = len(up) // count * len(groups or (True,))
    if out is not None and out != size:
        said = "no enable_lora" if groups is None else f"enable_lora={list(groups)}"
        raise AdapterError(
            f"with {said} of an output of {size}, the base's is of {out}; "
            "pass enable_lora= as its model has it"
        )
    return groups


def block_diagonal(up: torch.Tensor, groups: Groups) -> torch.Tensor:
    """The up-projection of all outputs at once, for a down-projection that stacks their ranks.

    Output g is ``up[g] @ down[g]``, so each block meets its own ranks alone, and an output that is
    not adapted is zero. Source: ``MergedLinear.merge_AB`` of loralib 0.1.2.

    Args:
        up: (size * adapted, r).
        groups: which outputs are adapted.

    Returns:
        (size * outputs, r * adapted): the same values, and zeros.
    """
    rank = up.shape[1]
    blocks = up.chunk(sum(groups))
    size = len(blocks[0])
    whole = up.new_zeros(size * len(groups), rank * len(blocks))
    rows = [place for place, adapted in enumerate(groups) if adapted]
    for column, (row, block) in enumerate(zip(rows, blocks, strict=True)):
        whole[row * size : (row + 1) * size, column * rank : (column + 1) * rank] = block
    return whole


def _hinted(path: str, hints: Hints, count: int, rows: int, out: int | None) -> Groups | None:
    """What the hint says of a layer; a hint for all layers is of those that can be fused."""
    given = hints.enable_lora
    if given is None:
        return None
    if isinstance(given, Mapping):
        found = value_for(given, path)
        return None if found is None else checked_groups(found)
    groups = checked_groups(given)
    if count > 1:
        return groups
    if sum(groups) > 1 or groups == (True,):
        return None
    if out is None:
        raise AdapterError(
            f"enable_lora={list(groups)} adapts one output, so {path} may be fused or not; pass "
            "base=, or enable_lora={name: [...]} for the layers that are"
        )
    return groups if out == rows * len(groups) else None


def checked_groups(value: object) -> Groups:
    """Returns an ``enable_lora``, or refuses what is not a list of bools, one of them True."""
    is_list = isinstance(value, Sequence) and all(type(item) is bool for item in value)
    if not isinstance(value, Sequence) or not is_list or not any(value):
        raise AdapterError(f"enable_lora is {value!r:.80}, expected a list of bools, one True")
    return tuple(value)
