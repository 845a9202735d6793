"""Holds a `AffineMap`, what the analysis says of a node, against what the graph computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lora_fx.affine.affine_map import AffineMap, OneHot
from lora_fx.affine.analysis import Alias, Analysis, Opaque
from lora_fx.affine.feature_layout import Layout
from lora_fx.affine.transfer import analyse
from lora_fx.algebra.evaluate import dense
from lora_fx.choices import Frontend
from lora_fx.frontend.trace import trace

SHAPES = {
    "w": (5, 3),
    "v": (6, 5),
    "six": (6, 3),
    "square": (3, 3),
    "up": (5, 2),
    "down": (2, 3),
    "b": (5,),
    "b6": (6,),
    "b3": (3,),
    "gain": (5,),
    "gain6": (6,),
    "gain3": (3,),
    "one": (1,),
    "table": (11, 3),
    "wide_table": (11, 5),
    "blocks": (2, 4, 3),
    "kernel1": (5, 3, 1),
    "grouped1": (4, 3, 1),
    "kernel_long": (5, 3, 2),
    "back_long": (3, 5, 2),
    "kernel": (5, 3, 3, 2),
    "other_kernel": (5, 3, 3, 2),
    "pointwise": (6, 5, 1, 1),
    "kernel_volume": (5, 3, 2, 1, 3),
}


class Holds(nn.Module):
    """A function of one input and of constants, as a module. No two sizes are equal by chance."""

    w: torch.Tensor
    b: torch.Tensor
    six: torch.Tensor
    b6: torch.Tensor

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        make = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=make)))
        self.drop, self.same = nn.Dropout(0.5), nn.Identity()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        """What the function says, of a model and x."""
        return self.function(self, x)

    def low(self, x: torch.Tensor) -> torch.Tensor:
        """Five features of three."""
        return F.linear(x, self.w, self.b)

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        """Six features of three."""
        return F.linear(x, self.six, self.b6)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Six features as two by three."""
        return self.wide(x).reshape(4, 7, 2, 3)

    def places(self, *order: int) -> torch.Tensor:
        """Places that a graph computes from constants."""
        return torch.stack([self.b.argsort()[0] * 0 + place for place in order])


def _inputs() -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(1)
    shapes = {
        "batch": (4, 7, 3),
        "flat": (4, 3),
        "one": (3,),
        "turned": (4, 3, 7),
        "long": (2, 3, 8),
        "image": (2, 3, 7, 8),
        "volume": (2, 3, 4, 5, 6),
    }
    inputs = {name: torch.randn(*s, generator=make).double() for name, s in shapes.items()}
    return inputs | {"ids": torch.randint(11, (4, 7), generator=make)}


INPUTS = _inputs()


class _Record(fx.Interpreter):
    """Runs a graph and keeps what every node computes."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]


def analysed(
    function: Callable[..., Any], x: torch.Tensor, frontend: Frontend, check: bool = True
) -> tuple[Analysis, Any]:
    """The analysis of a function's graph, and the node of its result."""
    gm = trace(Holds(function).double().eval(), (x,), frontend=frontend, check=check)
    result = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    return analyse(gm), result[0] if isinstance(result, tuple | list) else result


def _source(value: AffineMap) -> AffineMap:
    while value.parent is not None:
        value = value.parent
    return value


def _rows(value: AffineMap, seen: torch.Tensor) -> torch.Tensor:
    """A tensor as (batch, features), by what the AffineMap says about where these are."""
    split, after = value.layout.split, value.layout.after
    if value.layout.joined:
        assert tuple(seen.shape[1:]) == split[1:]
        return seen.reshape(-1, value.size)
    front = seen.ndim - after - len(split)
    axes = [*range(front), *range(seen.ndim - after, seen.ndim)]
    axes += list(range(front, seen.ndim - after))
    assert tuple(seen.shape[front : seen.ndim - after]) == split
    rows = seen.permute(axes)
    return rows.reshape(-1, value.size) if not value.layout.turns else _unturned(value.layout, rows)


def _unturned(layout: Layout, rows: torch.Tensor) -> torch.Tensor:
    """Rows in the order that they have in the source."""
    for turn in reversed(layout.turns):
        batch = turn.result or rows.shape[: -len(layout.split)]
        rows = rows.reshape(*batch, layout.count)
        front = len(batch) - len(turn.order)
        back = [front + turn.order.index(axis) for axis in range(len(turn.order))]
        rows = rows.permute(*range(front), *back, len(batch))
    return rows.reshape(-1, layout.count)


def _read(source: AffineMap, seen: torch.Tensor) -> torch.Tensor:
    """What the source's weight is multiplied with."""
    how = source.reading
    if how is None:
        return _rows(source, seen)
    if isinstance(how, OneHot):
        return F.one_hot(seen, source.size).double().reshape(-1, source.size)
    dims = len(how.kernel)
    channels = seen.shape[seen.ndim - dims - 1]
    eye = torch.eye(source.size, dtype=seen.dtype).reshape(-1, channels, *how.kernel)
    if how.extra is None:
        run = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        patches = run(seen, eye, None, how.stride, how.padding, how.dilation)
    else:
        back = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        rest = how.stride, how.padding, how.extra, 1, how.dilation
        patches = back(seen, eye.transpose(0, 1), None, *rest)
    return patches.movedim(patches.ndim - 1 - dims, -1).reshape(-1, source.size)


def computes(
    function: Callable[..., Any], x: torch.Tensor, frontend: Frontend, tolerance: float = 1e-9
) -> None:
    """Asserts that the result's map says what the graph computes, and nothing else would do."""
    analysis, node = analysed(function, x, frontend)
    known = analysis.values.get(node)
    while isinstance(known, Alias):
        node = known.node
        known = analysis.values.get(node)
    assert isinstance(known, AffineMap), known
    source = _source(known)
    assert source is not known
    record = _Record(analysis.gm)
    with torch.no_grad():
        record.run(x)
        weight, bias = known.relative_to(source)
        assert weight.shape == (known.size, source.size)
        read = _read(source, record.seen[source.node])
        got = read @ dense(weight, torch.float64).T
        if bias is not None:
            got = got + dense(bias, torch.float64).reshape(-1)
        wanted = record.seen[node]
    assert known.dtype in (None, wanted.dtype)
    if known.layout.sizes is not None:
        assert known.layout.sizes == tuple(wanted.shape)
    rows = _rows(known, wanted).double()
    assert rows.shape == got.shape
    assert (got - rows).norm() <= tolerance * rows.norm()
    assert (1.1 * got - rows).norm() > tolerance * rows.norm()


def reason(function: Callable[..., Any], x: torch.Tensor, frontend: Frontend) -> str:
    """Why the result is not affine."""
    analysis, node = analysed(function, x, frontend)
    value = analysis.values.get(node)
    assert isinstance(value, Opaque), value
    return value.reason


def check_case(case: tuple[Any, ...], frontend: Frontend, tolerance: float = 1e-9) -> None:
    """`computes` of one entry of a table of cases: ``(function, name of the input, ...)``."""
    computes(case[0], INPUTS[case[1]], frontend, tolerance)


def check_reason(case: tuple[Any, ...], frontend: Frontend) -> None:
    """Asserts the refusal of one entry of a table: ``(function, name of the input, words, ...)``.

    Raises:
        AssertionError: the result is affine, or the reason has other words.
    """
    assert case[2] in reason(case[0], INPUTS[case[1]], frontend)


def analyse_function(
    function: Callable[..., Any],
    name: str = "batch",
    frontend: Frontend = "export",
    check: bool = True,
) -> tuple[Analysis, Any]:
    """The analysis of a function's graph on an input by name, and the node of its result."""
    return analysed(function, INPUTS[name], frontend, check)
