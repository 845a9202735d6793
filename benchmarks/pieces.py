"""What the cost model takes for granted, measured: a FLOP, a byte, a call and a panel."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import helper

from benchmarks.files import calls
from benchmarks.timing import Run, medians
from lora_fx.branch_lowering.cost import PANEL

ROWS, WIDTH, CALLS = 256, 768, 64


def piece(kinds: Sequence[str], shape: tuple[int, ...], constant: tuple[int, ...] | None) -> Run:
    """Operators one behind the other, each of the result before it and a constant."""
    names = ["x", *(f"y{place}" for place in range(1, len(kinds))), "y"]
    more = ["c"] if constant else []
    nodes = [
        helper.make_node(kind, [names[place], *more], [names[place + 1]])
        for place, kind in enumerate(kinds)
    ]
    return calls(nodes, {"x": shape}, {"c": constant} if constant else {})


def run(rounds: int = 31) -> dict[str, dict[str, float]]:
    """Each in turn; medians.

    Returns:
        Microseconds, and what they make of the constants of `lora_fx.cost`.
    """
    runs = {
        "nothing": piece(["Abs"], (1, 1), None),
        f"{CALLS} calls": piece(["Abs"] * CALLS, (1, 1), None),
        "product": piece(["MatMul"], (ROWS, WIDTH), (WIDTH, WIDTH)),
        "sum": piece(["Add"], (ROWS, WIDTH), (ROWS, WIDTH)),
        "1 column": piece(["MatMul"], (ROWS, WIDTH), (WIDTH, 1)),
        f"{PANEL // 2} columns": piece(["MatMul"], (ROWS, WIDTH), (WIDTH, PANEL // 2)),
        f"{PANEL} columns": piece(["MatMul"], (ROWS, WIDTH), (WIDTH, PANEL)),
        f"{PANEL + 1} columns": piece(["MatMul"], (ROWS, WIDTH), (WIDTH, PANEL + 1)),
    }
    time = medians(runs, rounds, 20)
    flop = (time["product"] - time["nothing"]) / (2 * ROWS * WIDTH * WIDTH)
    byte = (time["sum"] - time["nothing"]) / (3 * 4 * ROWS * WIDTH)
    call = (time[f"{CALLS} calls"] - time["nothing"]) / (CALLS - 1)
    rows = {name: {"us": 1e6 * taken, "FLOPs": taken / flop} for name, taken in time.items()}
    rows["a byte"] = {"us": 1e6 * byte, "FLOPs": byte / flop}
    rows["a call"] = {"us": 1e6 * call, "FLOPs": call / flop}
    return rows
