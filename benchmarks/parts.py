"""Where the time of an augmented layer goes: each of its calls alone, over the merged layer."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

from onnx import helper

from benchmarks.files import calls
from benchmarks.layers import QUICK, ROWS, Size, allowed
from benchmarks.timing import Run, seconds
from lora_fx.cost import Shape


def parts(size: Size, rows: int) -> dict[str, Run]:
    """The merged layer, nothing, and the calls of ``concat(x, x A + e) @ [W; B; b]``."""
    d, o, wide = size.d, size.o, size.r + 1
    node = helper.make_node
    product, added = node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["y"])
    alone = partial(node, "MatMul", ["x", "w"], ["y"])
    x, h = (rows, d), (rows, wide)
    make: dict[str, Callable[[], Run]] = {
        "merged": lambda: calls([product, added], {"x": x}, {"w": (d, o), "b": (o,)}),
        "nothing": lambda: calls([node("Abs", ["x"], ["y"])], {"x": (1, 1)}, {}),
        "shrink": lambda: calls([alone()], {"x": x}, {"w": (d, wide)}),
        "ones": lambda: calls([node("Add", ["x", "b"], ["y"])], {"x": h}, {"b": (wide,)}),
        "concat": lambda: calls([node("Concat", ["x", "h"], ["y"], axis=-1)], {"x": x, "h": h}, {}),
        "product": lambda: calls([alone()], {"x": (rows, d + wide)}, {"w": (d + wide, o)}),
    }
    return {name: made() for name, made in make.items()}


def measure(size: Size, rows: int, rounds: int) -> dict[str, float]:
    """Medians of each part, without what any run costs, over the merged layer."""
    runs = parts(size, rows)
    repeats = max(3, int(0.002 / seconds(runs["merged"])))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, values in found.items():
            values.append(seconds(runs[name], repeats))
    time = {name: statistics.median(values) for name, values in found.items()}
    run = time.pop("nothing")
    merged = time.pop("merged")
    shares = {name: max(0.0, taken - run) / merged for name, taken in time.items()}
    least = Shape(rows, size.d, size.o, size.r).r / size.o
    shares = {"shrink, FLOPs alone": least} | shares
    total = run / merged + sum(shares[name] for name in time)
    return shares | {"any run": run / merged, "sum": total, "allowed": allowed(size, rows)}


def run(sizes: list[Size] = QUICK, rounds: int = 31) -> dict[str, dict[str, float]]:
    """Every size at each number of rows."""
    return {
        f"{size.d} -> {size.o}, r {size.r}, n {rows}": measure(size, rows, rounds)
        for size in sizes
        for rows in ROWS
    }
