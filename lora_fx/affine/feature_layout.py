"""Where a tensor keeps its features, and what reshapes and permutations do to that.

Features are some neighbouring axes; all others are the batch, whose rows are those of the source,
in its order or turned. A reshape may put the first axis of features and the batch in front of them
on one axis, until another takes them apart again: no call in between can tell the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from lora_fx.graph.ops import Sizes, same_sizes

Order = tuple[int, ...]


@dataclass(frozen=True)
class Turn:
    """A permutation of the batch.

    Attributes:
        sizes: of the axes before it, but for those of one; None if they are not known.
        order: of the last axes; those in front, which stay, are left out.
    """

    sizes: Sizes | None
    order: Order

    @property
    def result(self) -> Sizes | None:
        """The sizes of the axes behind it."""
        if self.sizes is None:
            return None
        return tuple(self.sizes[axis] for axis in _of(len(self.sizes), self.order))

    def then(self, order: Order) -> Turn:
        """This one and another behind it."""
        count = max(len(self.order), len(order))
        own = _of(count, self.order)
        whole = [own[axis] for axis in _of(count, order)]
        while whole and whole[0] == count - len(whole):
            whole = whole[1:]
        return Turn(self.sizes, tuple(axis - count + len(whole) for axis in whole))

    def same(self, other: Turn) -> bool:
        """Whether both do the same to a batch of one size."""
        return self.order == other.order and same_sizes(self.sizes, other.sizes)


@dataclass(frozen=True)
class Layout:
    """Features between two groups of batch axes.

    Attributes:
        split: sizes of the feature axes; ``()`` where one feature was selected.
        after: batch axes behind them.
        batch: sizes of the batch axes; None if they are not known, and then those of the source.
        joined: whether the first feature axis and the batch are one axis of the tensor.
        turns: how the batch comes from that of the source, if not by reshapes alone.
    """

    split: tuple[int, ...]
    after: int = 0
    batch: Sizes | None = None
    joined: bool = False
    turns: tuple[Turn, ...] = ()

    @property
    def count(self) -> int:
        """How many features there are."""
        return prod(self.split)

    @property
    def axes(self) -> int | None:
        """How many axes the tensor has."""
        if self.joined:
            return len(self.split)
        return None if self.batch is None else len(self.batch) + len(self.split)

    @property
    def sizes(self) -> Sizes | None:
        """The sizes of all axes."""
        if self.batch is None:
            return None
        if self.joined:
            return (prod(self.batch) * self.split[0], *self.split[1:])
        front = len(self.batch) - self.after
        return (*self.batch[:front], *self.split, *self.batch[front:])

    def same(self, other: Layout) -> bool:
        """Whether two tensors of one source line up element by element."""
        own = self.split, self.after, self.joined
        return (
            own == (other.split, other.after, other.joined)
            and same_sizes(self.batch, other.batch)
            and len(self.turns) == len(other.turns)
            and all(map(Turn.same, self.turns, other.turns))
        )

    def keeps(self, split: tuple[int, ...], after: int) -> bool:
        """Whether the features are on these axes, and the batch on others."""
        return (self.split, self.after, self.joined) == (split, after, False)

    def seen_as(self, split: tuple[int, ...]) -> Layout | None:
        """The same with features on these axes, if axes of one between them and the batch suffice.

        Such an axis may be of either.
        """
        if self.split == split and not self.joined:
            return self
        if self.joined or self.batch is None:
            return None
        front = len(self.batch) - self.after
        more = len(split) - len(self.split)
        ones = (1,) * abs(more)
        if more > 0 and split == ones + self.split and self.batch[front - more : front] == ones:
            batch = (*self.batch[: front - more], *self.batch[front:])
        elif more < 0 and self.split == ones + split:
            batch = (*self.batch[:front], *ones, *self.batch[front:])
        else:
            return None
        return replace(self, split=split, batch=batch)

    def feature(self, axis: object) -> int | None:
        """Which feature axis an axis of the tensor is, or None."""
        return self._place(axis, new=False)

    def gap(self, axis: object) -> int | None:
        """Where among the feature axes a new axis of the tensor is, or None."""
        return self._place(axis, new=True)

    def _place(self, axis: object, new: bool) -> int | None:
        if not isinstance(axis, int) or (axis >= 0 and self.axes is None):
            return None
        behind = -axis - new if axis < 0 else (self.axes or 0) - axis
        place = len(self.split) - (behind - self.after)
        return place if self.joined <= place < len(self.split) + new else None

    def widened(self, axis: int) -> Layout:
        """With one more feature axis, of size 1."""
        return replace(self, split=(*self.split[:axis], 1, *self.split[axis:]))

    def resized(self, axis: int, size: int) -> Layout:
        """With another size of one feature axis."""
        return replace(self, split=(*self.split[:axis], size, *self.split[axis + 1 :]))

    def reshaped(self, sizes: Sizes) -> Layout | None:
        """What a reshape makes of it, if features stay together and behind the same batch."""
        if self.batch is None or not same_sizes(
            sizes[len(sizes) - self.after :], self.batch[len(self.batch) - self.after :]
        ):
            return None
        size, end = prod(self.split), len(sizes) - self.after
        for count in range(0 if not self.split else 1, end + 1):
            split = sizes[end - count : end]
            if not all(type(n) is int for n in split):
                break
            if prod(split) == size:
                batch = (*sizes[: end - count], *sizes[end:])
                return replace(self, split=split, batch=batch, joined=False)
        return self._joined(sizes)

    def _joined(self, sizes: Sizes) -> Layout | None:
        """One axis of the batch and of the first features, others of features behind it."""
        own = sizes[1:]
        if self.after or not own or not self.split or not all(type(n) is int for n in own):
            return None
        first, rest = divmod(prod(self.split), prod(own)) if prod(own) else (0, 1)
        return replace(self, split=(first, *own), joined=True) if not rest and first else None

    def permuted(self, order: Sequence[int]) -> tuple[Layout, tuple[int, ...]] | None:
        """What a permutation of all axes makes of it, and the new order of the feature axes."""
        if self.joined:
            return None
        front = len(order) - len(self.split) - self.after
        features = range(front, front + len(self.split))
        batch = [axis for axis in order if axis not in features]
        places = [place for place, axis in enumerate(order) if axis in features]
        together = not places or places[-1] - places[0] == len(places) - 1
        if front < 0 or not together:
            return None
        moved = tuple(axis - front for axis in order if axis in features)
        after = len(order) - 1 - places[-1] if places else self.after
        turned = self.turned(tuple(sorted(batch).index(axis) for axis in batch))
        return replace(turned, split=tuple(self.split[m] for m in moved), after=after), moved

    def turned(self, order: Order) -> Layout:
        """With the last axes of the batch in a new order; where those of one are, no row says."""
        wide, own = None, order
        if self.batch is not None:
            wide = tuple(size for size in self.batch if not _is_one(size))
            places = [n for n in _of(len(self.batch), order) if not _is_one(self.batch[n])]
            own = tuple(sorted(places).index(place) for place in places)
        *earlier, last = self.turns or [Turn(wide, ())]
        if not same_sizes(wide, last.result):  # it was reshaped in between
            earlier, last = list(self.turns), Turn(wide, ())
        whole = last.then(own)
        turns = (*earlier, whole) if whole.order else tuple(earlier)
        return replace(self, batch=Turn(self.batch, order).result, turns=turns)

    def swapped(self, one: object, two: object) -> tuple[Layout, tuple[int, ...]] | None:
        """What swapping two axes makes of it."""
        if not isinstance(one, int) or not isinstance(two, int):
            return None
        axes = self.axes
        if axes is not None and not all(-axes <= dim < axes for dim in (one, two)):
            return None
        if axes is None:
            if one >= 0 or two >= 0:
                return None
            axes = max(-one, -two, len(self.split) + self.after)
        order = list(range(axes))
        order[one], order[two] = order[two], order[one]
        return self.permuted(order)

    def column(self, shape: tuple[int, ...]) -> bool:
        """Whether a constant of this shape has one value for each feature, or one for all."""
        axes = self.axes if self.axes is not None else len(self.split) + self.after
        if len(shape) > axes:
            return False
        whole = (*(1,) * (axes - len(shape)), *shape)
        front = axes - self.after - len(self.split)
        own, behind = whole[front : axes - self.after], whole[axes - self.after :]
        if self.joined and own[0] != 1:
            return False
        fits = all(n in (1, m) for n, m in zip(own, self.split, strict=True))
        return fits and all(n == 1 for n in (*whole[:front], *behind))


def _of(count: int, order: Order) -> Order:
    """An order of the last axes as one of more."""
    front = count - len(order)
    return (*range(front), *(front + axis for axis in order))


def _is_one(size: object) -> bool:
    return type(size) is int and size == 1
