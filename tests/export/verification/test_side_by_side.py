"""Files held against files: numbers may round, types and integers may not, controls must differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from lora_fx.export.verification.file_run import Run
from lora_fx.export.verification.side_by_side import Pair, coarsest_named, held_against

FEEDS = {"batch=4": {"x": np.linspace(1, 2, 12, dtype=np.float32).reshape(4, 3)}}


def file(path: Path, factor: float = 2.0, count: int = 1_000_000_000, to: str = "FLOAT") -> Run:
    """A file of x times a factor, in some type, and of a count."""
    nodes = [
        helper.make_node("Mul", ["x", "factor"], ["product"]),
        helper.make_node("Cast", ["product"], ["y"], to=getattr(TensorProto, to)),
        helper.make_node("Identity", ["count"], ["n"]),
    ]
    values = {"factor": np.float32(factor), "count": np.array([count, 7])}
    stored = [numpy_helper.from_array(np.asarray(v), name) for name, v in values.items()]
    takes = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 3])]
    gives = [
        helper.make_tensor_value_info("y", getattr(TensorProto, to), [4, 3]),
        helper.make_tensor_value_info("n", TensorProto.INT64, [2]),
    ]
    graph = helper.make_graph(nodes, "g", takes, gives, stored)
    imports = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return Run(path)


@pytest.mark.parametrize(
    ("changes", "right"),
    [
        ({}, (True, True)),
        ({"factor": 2.00001}, (True, True)),
        ({"factor": 2.2}, (False, True)),
        ({"count": 1_000_000_001}, (True, False)),
        ({"to": "DOUBLE"}, (False, True)),
        ({"to": "FLOAT16"}, (False, True)),
    ],
)
def test_each_output_of_a_file_is_held_to_its_type(
    changes: dict[str, float], right: tuple[bool, bool], tmp_path: Path
) -> None:
    found = file(tmp_path / "found.onnx", **changes)  # type: ignore[arg-type]
    pair = Pair("found", found, file(tmp_path / "expected.onnx"))
    rows = held_against([pair], {}, FEEDS).checks
    assert [(row.output, row.optimisation) for row in rows] == [
        (name, level) for level in ("off", "all") for name in ("y", "n")
    ]
    assert [row.ok for row in rows] == [*right, *right]


def test_a_control_is_right_where_it_differs(tmp_path: Path) -> None:
    same, other = file(tmp_path / "same.onnx"), file(tmp_path / "other.onnx", 2.2)
    found = held_against([Pair("a", same, same)], {"same": same, "other": other}, FEEDS)
    assert all(row.ok for row in found.checks)
    said = {(row.what, row.output): row.ok for row in found.controls}
    assert said == {
        ("same", "y"): False,
        ("same", "n"): False,
        ("other", "y"): True,
        ("other", "n"): False,
    }


def test_a_control_runs_on_the_next_inputs_until_it_differs(tmp_path: Path) -> None:
    same, other = file(tmp_path / "same.onnx"), file(tmp_path / "other.onnx", 2.2)
    zeros, ones = ({"x": np.full((4, 3), number, np.float32)} for number in (0, 1))
    for feeds, runs in (
        ({"zeros": zeros, "ones": ones, "more": ones}, ["zeros", "ones"]),
        ({"ones": ones, "zeros": zeros}, ["ones"]),
        ({"zeros": zeros}, ["zeros"]),
    ):
        control = Run(other.path)
        found = held_against([Pair("a", same, same)], {"other": control}, feeds)
        assert [label for _, label in control.known] == runs
        assert any(row.ok for row in found.controls) == ("ones" in feeds)


def test_what_can_be_asked_for_is_the_coarsest_of_the_types() -> None:
    assert coarsest_named(["float32", "int64"]) is torch.float32
    assert coarsest_named(["float32", "bfloat16", "float16"]) is torch.bfloat16
    assert coarsest_named([]) is torch.float32
