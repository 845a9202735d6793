"""A graph as text, said anew, and both run on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx_ir.passes import common

from lora_fx.export.spelling.rewrite import Spelling
from lora_fx.testing import relative

HEAD = '<ir_version: 10, opset_import: ["" : 23]>\n'
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


class Spelled(NamedTuple):
    count: int
    text: list[str]
    off: float


def shown(model: ir.Model) -> list[str]:
    """``name = Operator(inputs)``, of all that is no constant."""
    rows = [(n.outputs[0].name, n.op_type, n.inputs) for n in model.graph]
    return [
        f"{name} = {kind}({', '.join(str(v.name) for v in inputs if v is not None)})"
        for name, kind, inputs in rows
        if kind != "Constant"
    ]


def run(model: ir.Model, sizes: dict[str, int]) -> list[torch.Tensor]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), options)
    draw = np.random.default_rng(0)
    feeds = {}
    for value in session.get_inputs():
        shape = [sizes.get(size, size) for size in value.shape]
        numbers = draw.standard_normal(shape)
        kept = numbers > 0
        if len(shape) > 1:
            kept[0, ..., :] = False  # a row of a mask that is wholly masked
        whole = {"tensor(bool)": kept, "tensor(int64)": kept.astype(np.int64)}
        feeds[value.name] = whole.get(value.type, numbers.astype(TYPES.get(value.type, "f4")))
    return [torch.from_numpy(value) for value in session.run(None, feeds)]


@pytest.fixture
def spelled() -> Callable[..., Spelled]:
    """Runs one spelling on a graph, and says how far the numbers are off afterwards."""

    def spell(spelling: type[Spelling], text: str, **sizes: int) -> Spelled:
        model = ir.from_proto(onnx.parser.parse_model(HEAD + text))
        before = run(model, sizes)
        done = spelling()
        done(model)
        common.RemoveUnusedNodesPass()(model)
        after = run(model, sizes)
        off = relative(after, before)
        return Spelled(done.count, shown(model), off)

    return spell
