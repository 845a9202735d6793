"""Updates of some rows of a weight: cut out of an update of more rows, or put together to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from lora_fx.adapters.other_updates import Scaling, WeightUpdate, added_to_each
from lora_fx.adapters.updates import AnyUpdate, Shape, Stacks, Update
from lora_fx.algebra.index_expr import slice_of
from lora_fx.algebra.low_rank import NotLowRankError, beside
from lora_fx.algebra.matrix_expr import Matrix, Replaced, ScatterRows, constant, leaves, rows
from lora_fx.errors import AdapterError


class Block(NamedTuple):
    """An update of some rows of a weight, or of those of one expert."""

    update: AnyUpdate
    at: range
    expert: int | None = None


def cut(update: AnyUpdate, at: range) -> AnyUpdate:
    """The update of some rows, out of one of all of them.

    Raises:
        AdapterError: a row of W' depends on other rows of W.
    """
    if isinstance(update, Update) and update.groups == 1:
        kept = {name: getattr(update, name) for name in ("up", "bias", "magnitude", "row")}
        part = {name: t[at.start : at.stop] for name, t in kept.items() if t is not None}
        return replace(update, **part, stored=None)
    if isinstance(update, Scaling) and update.row is None:  # of what every row reads
        return replace(update, stored=None)
    size, index = update.shape[0], slice_of(at.stop, slice(at.start, at.stop))
    if size is None or not update.makes_anew or not _by_row(update):
        raise AdapterError(
            f"an update of kind {update.kind!r} is of several layers of the model at once, and "
            "cannot be cut into theirs: merge it where it was made"
        )

    def function(weight: Matrix) -> Matrix:
        return rows(update.of(ScatterRows(weight, index, size)), index)

    bias = None if update.bias is None else update.bias[at.start : at.stop]
    shape = (len(at), *update.shape[1:])
    return WeightUpdate(update.kind, function, shape, bias=bias, stacks=update.stacks)


def _by_row(update: AnyUpdate) -> bool:
    """Whether each row of W' is made of the same row of W alone, as far as the expression shows."""
    size = tuple(n or 0 for n in update.shape)
    leaf = constant(torch.empty(size, device="meta"))
    try:
        col = beside(leaf, update.of(leaf)).col
    except NotLowRankError:
        return False
    return col is None or not set(leaves(leaf)) <= set(leaves(col))  # DoRA over the inputs


def joined(blocks: Sequence[Block], shape: tuple[int, ...]) -> AnyUpdate:
    """One update of a weight, out of those of some of its rows; the others stay as they are.

    Args:
        blocks: none of whose rows overlap.
        shape: (out, in, *kernel) of the weight, or (experts, out, in).
    """
    if any(block.expert is not None for block in blocks):
        return _of_experts(blocks, shape)
    plain = [b.update for b in blocks if isinstance(b.update, Update) and b.update.is_plain]
    if len(plain) < len(blocks):
        return _replaced(blocks, shape)
    down, up, bias = _factors(blocks, shape[0])
    return Update(down, up, 1.0, plain[0].kind, bias)


def swapped(update: AnyUpdate) -> AnyUpdate:
    """The update of a weight whose second half of rows stands first."""
    if update.shape[0] is None:  # it is the same for every row
        return update
    half = update.shape[0] // 2
    first, second = cut(update, range(half)), cut(update, range(half, 2 * half))
    whole = joined(
        [Block(second, range(half)), Block(first, range(half, 2 * half))], _known(update.shape)
    )
    return whole


def in_halves(update: Update, heads: object) -> Update:
    """An update whose rows are pairs of neighbours, as Meta has them: as two halves of each head.

    Raises:
        AdapterError: it has no such rows of so many heads.
    """
    if not isinstance(heads, int) or update.shape[0] % (2 * heads):
        raise AdapterError(f"has {update.shape[0]} rows, the base {heads} heads: give its own base")
    rows = torch.arange(update.shape[0]).reshape(heads, -1, 2).transpose(1, 2).flatten()
    magnitude = None if update.magnitude is None else update.magnitude[rows]
    return replace(update, up=update.up[rows], magnitude=magnitude)


def _known(shape: Shape) -> tuple[int, ...]:
    return tuple(size or 0 for size in shape)


def _factors(
    blocks: Sequence[Block], out: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The factors of all, each with its scale in it, and a bias where one of them has one."""
    made = [(block.at, *block.update.factors(_wide(block.update))) for block in blocks]  # type: ignore[attr-defined]
    down = torch.cat([down for _, down, _, _ in made])
    up = made[0][2].new_zeros(out, len(down))
    bias = up.new_zeros(out) if any(own is not None for *_, own in made) else None
    start = 0
    for at, _, own, shift in made:
        up[at.start : at.stop, start : start + own.shape[1]] = own
        start += own.shape[1]
        if bias is not None and shift is not None:
            bias[at.start : at.stop] = shift
    return down, up, bias


def _wide(update: AnyUpdate) -> torch.dtype:
    return update.wide(torch.float32)


def _replaced(blocks: Sequence[Block], shape: tuple[int, ...]) -> WeightUpdate:
    """Each block's rows in the place of the weight's: whatever kind it is of."""
    places = [(b.update, slice_of(shape[0], slice(b.at.start, b.at.stop))) for b in blocks]

    def function(weight: Matrix) -> Matrix:
        whole = weight
        for update, index in places:
            whole = Replaced(whole, index, update.of(rows(weight, index)))
        return whole

    shifts = [(b.at, b.update.shift(lambda: None)) for b in blocks]
    if any(isinstance(b.update, Scaling) and b.update.row is not None for b in blocks):
        raise AdapterError("(IA)3 scales a bias too, and here a part of one; merge it first")
    bias = torch.zeros(shape[0]) if any(own is not None for _, own in shifts) else None
    for at, own in shifts:
        if bias is not None and own is not None:
            bias[at.start : at.stop] = own
    return WeightUpdate(blocks[0].update.kind, function, shape, bias=bias, stacks=_stacks(blocks))


def _stacks(blocks: Sequence[Block]) -> Stacks:
    """As all of them do; never, if one of them never does."""
    every = {block.update.stacks for block in blocks}
    if "never" in every:
        return "never"
    return every.pop() if len(every) == 1 else "if added"


def _of_experts(blocks: Sequence[Block], shape: tuple[int, ...]) -> WeightUpdate:
    """``W[e] + left[e] @ right[e]``: of all experts one rank, of zeros where there is less."""
    count, out, into = shape
    own: Mapping[int, list[Block]] = {e: [] for e in range(count)}
    for block in blocks:
        if (
            not isinstance(block.update, Update)
            or not block.update.is_plain
            or block.update.bias is not None
        ):
            raise AdapterError(
                f"an update of kind {block.update.kind!r} of one expert of several in one "
                "parameter: only LoRA without a bias is supported there"
            )
        own[block.expert or 0].append(block)
    made = {e: _factors(several, out) for e, several in own.items() if several}
    rank = max(len(down) for down, _, _ in made.values())
    like = next(iter(made.values()))[0]
    left, right = like.new_zeros(count, out, rank), like.new_zeros(count, rank, into)
    for expert, (down, up, _) in made.items():
        left[expert, :, : len(down)], right[expert, : len(down)] = up, down
    return WeightUpdate(blocks[0].update.kind, added_to_each(left, right), shape)
