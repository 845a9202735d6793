"""Inputs of other shapes than the traced one, within what a model allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lora_fx.export.program.io_signature import SYMBOL, TensorInput, dimension_names
from lora_fx.graph.ops import GUARDS

_STEPS = (1, 2, 4, 8, 16, 32, 64)  # networks that halve an image take multiples of these
_NONE: Mapping[str, int] = MappingProxyType({})
_MOST = 8  # times as large as it was traced is a dimension at most: more takes memory and time
_FEW = 129  # unless it is no larger than this: code that takes pieces takes 64 or 128 at a time


@dataclass(frozen=True)
class Case:
    """Inputs of one shape.

    Attributes:
        label: sizes of the dynamic dimensions, ``"batch=2, sequence=7"``.
        args: inputs by position.
        kwargs: inputs by name.
    """

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the inputs, in the order of the graph inputs."""
        flat = pytree.tree_leaves((self.args, self.kwargs))
        return [value for value in flat if isinstance(value, torch.Tensor)]


def allowed_by(gm: fx.GraphModule) -> Callable[[Case], bool]:
    """Whether the guards of a graph, which torch.export found, let a case pass."""
    calls = list(gm.graph.find_nodes(op="call_module", target=GUARDS))
    inputs = {node: place for place, node in enumerate(gm.graph.find_nodes(op="placeholder"))}

    def passes(case: Case) -> bool:
        flat = pytree.tree_leaves((case.args, case.kwargs))
        try:
            for call in calls:
                gm.get_submodule(GUARDS)(*(flat[inputs[node]] for node in call.args))
        except AssertionError:
            return False
        return True

    return passes


def cases(
    program: torch.export.ExportedProgram,
    leaves: Sequence[TensorInput],
    allowed: Callable[[Case], bool] = lambda case: True,
) -> list[Case]:
    """The traced inputs first, then larger and smaller ones within what the program allows.

    New inputs repeat or drop rows of the traced ones, so ids stay valid. Dimensions of one name
    change together, and nameless ones together with all others of their traced size. One that is
    called ``"past + sequence"`` has the size of these two together.

    Args:
        program: what torch.export made.
        leaves: its inputs.
        allowed: whether a case is one that the graph is good for. Where a size is none, the next
            multiple of a power of two is tried, each dimension by itself.
    """
    traced, names = _traced(leaves, program), dimension_names(leaves)
    groups = _groups(leaves, names, traced)

    def of(sizes: Mapping[str, int]) -> Case:
        return _case(program, leaves, sizes, names)

    found: list[Case] = []
    for change in (_same, _larger, _smaller):
        wanted = [change(traced[members[0]], place) for place, members in enumerate(groups)]
        limits = [_limits(program, members) for members in groups]
        case = of(_sized(groups, wanted, limits, [1] * len(groups)))
        if not allowed(case):
            steps = _steps(groups, wanted, limits, traced, lambda sizes: allowed(of(sizes)))
            case = of(traced | _sized(groups, wanted, limits, steps))
        if case.label not in {known.label for known in found}:
            found.append(case)
    return found


def beyond(
    program: torch.export.ExportedProgram,
    leaves: Sequence[TensorInput],
    allowed: Callable[[Case], bool],
) -> list[list[Case]]:
    """Inputs of sizes that the user left free, and that the graph was not traced for.

    Python code of a model may ask for a size. A graph goes the way that its model took at the
    traced sizes; which others go it too, guards say, but for one place of a dimension: torch.export
    takes that as any other size, and notes no guard.

    Returns:
        Smaller sizes: all dimensions at once, and behind that each alone, for a model that cannot
        be called with the first. Then larger ones, and one of two dimensions that the user names
        apart and a guard wants equal, each of its own.
    """
    traced, names = _traced(leaves, program), dimension_names(leaves)

    def of(sizes: Mapping[str, int]) -> Case:
        return _case(program, leaves, {**traced, **sizes}, names)

    smaller: list[dict[str, int]] = []
    larger: list[dict[str, int]] = []
    for members in _groups(leaves, names, traced):
        size, (low, high) = traced[members[0]], _limits(program, members)
        least, most = _meant(leaves, members)
        if max(1, least) < low:
            smaller.append(dict.fromkeys(members, low - 1))
        for other in (size + 1, high + 1, 2 * size + 1, 4 * size + 1, max(_MOST * size, _FEW)):
            sizes = dict.fromkeys(members, other)
            few = min(most, max(_MOST * size, _FEW))
            if size < other <= few and (other > high or not allowed(of(sizes))):
                larger.append(sizes)
                break
    together = {name: size for sizes in smaller for name, size in sizes.items()}
    small = [together, *(smaller if len(smaller) > 1 else [])] if smaller else []
    alone = [of(sizes) for sizes in larger]
    for label, symbol in _labels(leaves).items():
        if label != names[symbol]:
            alone.append(_case(program, leaves, traced, names, {label: traced[symbol] + 1}))
    return ([[of(sizes) for sizes in small]] if small else []) + [[case] for case in alone]


def _labels(leaves: Sequence[TensorInput]) -> dict[str, str]:
    """What the user calls dimensions -> its symbol, which several may share."""
    return {
        label: str(leaf.sizes[axis])
        for leaf in leaves
        for axis, label in leaf.axes.items()
        if label is not None and SYMBOL.fullmatch(str(leaf.sizes[axis]))
    }


def _meant(leaves: Sequence[TensorInput], members: Sequence[str]) -> tuple[Any, Any]:
    """The sizes that the user said a group has."""
    given = [
        limits
        for leaf in leaves
        for axis, limits in leaf.meant.items()
        if str(leaf.sizes[axis]) in members
    ]
    lows, highs = zip((0, math.inf), *given, strict=True)
    return max(lows), min(highs)


def resized(
    program: torch.export.ExportedProgram,
    leaves: Sequence[TensorInput],
    case: Case,
    wanted: Mapping[str, int],
) -> Case:
    """A case, with dimensions of these names in other sizes.

    Args:
        program: what torch.export made.
        leaves: its inputs.
        case: of the program.
        wanted: name of a dimension -> its size.
    """
    names = dimension_names(leaves)
    sizes = {s: wanted.get(names[s], size) for s, size in _sizes(leaves, case).items()}
    return _case(program, leaves, sizes, names)


def _sized(
    groups: Sequence[Sequence[str]],
    wanted: Sequence[int],
    limits: Sequence[tuple[int, int]],
    steps: Sequence[int | None],
) -> dict[str, int]:
    """Symbol -> size, of those groups that have a step: the wanted one, rounded up to it."""
    return {
        symbol: min(max(-(-size // step) * step, low), high)
        for members, size, (low, high), step in zip(groups, wanted, limits, steps, strict=True)
        for symbol in members
        if step is not None
    }


def _steps(
    groups: Sequence[Sequence[str]],
    wanted: Sequence[int],
    limits: Sequence[tuple[int, int]],
    traced: Mapping[str, int],
    allowed: Callable[[Mapping[str, int]], bool],
) -> list[int | None]:
    """The first step of each group that passes with the other groups as they were traced."""
    found: list[int | None] = []
    for place in range(len(groups)):
        alone = groups[place : place + 1], wanted[place : place + 1], limits[place : place + 1]
        passing = (n for n in _STEPS if allowed({**traced, **_sized(*alone, [n])}))
        found.append(next(passing, None))
    return found


def _sum(name: str, sizes: Mapping[str, int]) -> int:
    """The size of a dimension, or the sum of those that it is named after."""
    parts = name.split(" + ")
    return sum(sizes[part] for part in parts) if sizes.keys() >= {*parts} else sizes[name]


def _same(size: int, place: int) -> int:
    return size


def _larger(size: int, place: int) -> int:
    return size + 1 + place  # of a large vocabulary each token more costs memory


def _smaller(size: int, place: int) -> int:
    return max(1, (size + 1) // 2)


def _traced(leaves: Sequence[TensorInput], program: torch.export.ExportedProgram) -> dict[str, int]:
    """Symbol -> the size it was traced with."""
    args, kwargs = program.example_inputs or ((), {})
    return _sizes(leaves, Case("", tuple(args), dict(kwargs)))


def _sizes(leaves: Sequence[TensorInput], case: Case) -> dict[str, int]:
    """Symbol -> its size."""
    return {
        str(size): tensor.shape[axis]
        for leaf, tensor in zip(leaves, case.tensors(), strict=True)
        for axis, size in enumerate(leaf.sizes)
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol
    }


def _groups(
    leaves: Sequence[TensorInput], names: Mapping[str, str], traced: Mapping[str, int]
) -> list[list[str]]:
    given = {
        str(leaf.sizes[axis])
        for leaf in leaves
        for axis, label in leaf.axes.items()
        if label is not None
    }
    groups: dict[Any, list[str]] = {}
    for symbol in traced:
        key = names[symbol] if symbol in given else traced[symbol]
        groups.setdefault(key, []).append(symbol)
    return list(groups.values())


def _limits(program: torch.export.ExportedProgram, members: Sequence[str]) -> tuple[int, int]:
    """The sizes that every symbol of a group allows."""
    low, high = 1, 2**31
    for symbol, allowed in program.range_constraints.items():
        if str(symbol) in members:
            low = max(low, int(allowed.lower))
            high = min(high, int(allowed.upper)) if allowed.upper < high else high
    return low, high


def _case(
    program: torch.export.ExportedProgram,
    leaves: Sequence[TensorInput],
    sizes: Mapping[str, int],
    names: Mapping[str, str],
    apart: Mapping[str, int] = _NONE,
) -> Case:
    """Inputs of these sizes, some dimensions of one of their own: what the user calls them."""
    by_name = {names[symbol]: size for symbol, size in sizes.items()}
    sizes = {symbol: _sum(names[symbol], by_name) for symbol in sizes}
    args, kwargs = program.example_inputs or ((), {})
    flat, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    rest = iter(leaves)
    changed = [
        _resize(value, next(rest), sizes, apart) if isinstance(value, torch.Tensor) else value
        for value in flat
    ]
    labels = {names[symbol]: size for symbol, size in sizes.items()} | dict(apart)
    label = ", ".join(f"{name}={size}" for name, size in labels.items())
    new_args, new_kwargs = pytree.tree_unflatten(changed, spec)
    return Case(label or "as traced", new_args, new_kwargs)


def _resize(
    tensor: torch.Tensor, leaf: TensorInput, sizes: Mapping[str, int], apart: Mapping[str, int]
) -> torch.Tensor:
    for axis, size in enumerate(leaf.sizes):
        if isinstance(size, torch.SymInt):
            expression = size.node.expr
            known = {symbol: sizes[str(symbol)] for symbol in expression.free_symbols}
            wanted = apart.get(leaf.axes[axis] or "", int(expression.subs(known)))
            places, length = torch.arange(wanted), tensor.shape[axis]
            places = places.clamp(max=length - 1) if _rises(tensor) else places % length
            tensor = tensor.index_select(axis, places)
    return tensor


def _rises(tensor: torch.Tensor) -> bool:
    """Whether it may say where parts begin: such offsets rise, and other calls mean nothing."""
    is_whole = not tensor.dtype.is_floating_point and not tensor.dtype.is_complex
    return is_whole and tensor.ndim == 1 and bool((tensor[1:] >= tensor[:-1]).all())
