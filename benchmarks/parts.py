"""Where the time of an augmented layer goes: each of its calls alone, over the merged layer."""

from __future__ import annotations

from onnx import helper

from benchmarks.files import calls
from benchmarks.layers import QUICK, ROWS, Size, allowed
from benchmarks.timing import Run, medians, seconds


def parts(size: Size, rows: int) -> dict[str, Run]:
    """The merged layer, nothing, and the calls of ``concat(x, x A + e) @ [W; B; b]``."""
    d, o, wide = size.d, size.o, size.r + 1
    node = helper.make_node
    product, added = node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["y"])
    alone = node("MatMul", ["x", "w"], ["y"])
    x, h = (rows, d), (rows, wide)
    return {
        "merged": calls([product, added], {"x": x}, {"w": (d, o), "b": (o,)}),
        "nothing": calls([node("Abs", ["x"], ["y"])], {"x": (1, 1)}, {}),
        "shrink": calls([alone], {"x": x}, {"w": (d, wide)}),
        "ones": calls([node("Add", ["x", "b"], ["y"])], {"x": h}, {"b": (wide,)}),
        "concat": calls([node("Concat", ["x", "h"], ["y"], axis=-1)], {"x": x, "h": h}, {}),
        "product": calls([alone], {"x": (rows, d + wide)}, {"w": (d + wide, o)}),
    }


def measure(size: Size, rows: int, rounds: int) -> dict[str, float]:
    """Medians of each part, without what any run costs, over the merged layer."""
    runs = parts(size, rows)
    repeats = max(3, int(0.002 / seconds(runs["merged"])))
    time = medians(runs, rounds, repeats)
    run, merged = time.pop("nothing"), time.pop("merged")
    shares = {name: max(0.0, taken - run) / merged for name, taken in time.items()}
    shares["any run"] = run / merged
    shares["sum"] = sum(shares.values())
    return {"shrink, FLOPs alone": size.r / size.o} | shares | {"allowed": allowed(size, rows)}


def run(sizes: list[Size] = QUICK, rounds: int = 31) -> dict[str, dict[str, float]]:
    """Every size at each number of rows."""
    return {
        f"{size.d} -> {size.o}, r {size.r}, n {rows}": measure(size, rows, rounds)
        for size in sizes
        for rows in ROWS
    }
