"""What the cost model takes for granted, measured: a FLOP, a byte, a call and a panel."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from benchmarks.files import runner
from benchmarks.timing import Run, seconds
from lora_fx.cost import PANEL

ROWS, WIDTH, CALLS = 256, 768, 64


def piece(kinds: Sequence[str], shape: tuple[int, ...], constant: tuple[int, ...] | None) -> Run:
    """Operators one behind the other, each of the result before it and a constant."""
    draw = np.random.default_rng(0)
    names = ["x", *(f"y{place}" for place in range(1, len(kinds))), "y"]
    more = ["c"] if constant else []
    nodes = [
        helper.make_node(kind, [names[place], *more], [names[place + 1]])
        for place, kind in enumerate(kinds)
    ]
    stored = numpy_helper.from_array(draw.standard_normal(constant or (1,), np.float32), "c")
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * len(shape))
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "piece", [given], [result], [stored] if constant else [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    opened = ort.InferenceSession(model.SerializeToString(), options)
    return runner(opened, {"x": draw.standard_normal(shape, np.float32)})


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
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, values in found.items():
            values.append(seconds(runs[name], 20))
    time = {name: statistics.median(values) for name, values in found.items()}
    flop = (time["product"] - time["nothing"]) / (2 * ROWS * WIDTH * WIDTH)
    byte = (time["sum"] - time["nothing"]) / (3 * 4 * ROWS * WIDTH)
    call = (time[f"{CALLS} calls"] - time["nothing"]) / (CALLS - 1)
    rows = {name: {"us": 1e6 * taken, "FLOPs": taken / flop} for name, taken in time.items()}
    rows["a byte"] = {"us": 1e6 * byte, "FLOPs": byte / flop}
    rows["a call"] = {"us": 1e6 * call, "FLOPs": call / flop}
    return rows
