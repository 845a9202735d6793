"""The tools behind us, tried on files as they are exported: merged and swappable.

What a tool needs to be told is in its line of the table: which nodes to leave (those of lora_A and
lora_B), what to feed while it calibrates, and that float16 needs adapters of float16.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.utils
import onnxruntime as ort
import pytest
import torch
from onnx import version_converter
from onnxruntime.quantization import (
    CalibrationMethod,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers import optimizer
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import nn

from lora_fx import fold, inject, trace
from lora_fx.errors import ExportError
from lora_fx.export import CalibrationReader, Session, export_adapter, to_onnx
from lora_fx.export.slots.manifest import KEY
from lora_fx.testing import make_adapter

Tool = Callable[[Path, Path], None]
X = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))


def slots_of(path: Path) -> list[str]:
    """The nodes that a quantiser has to leave alone."""
    return [node.name for node in onnx.load(path).graph.node if "/lora" in node.name]


def pre_process(path: Path, out: Path) -> None:
    quant_pre_process(str(path), str(out))


def dynamic(path: Path, out: Path) -> None:
    quantize_dynamic(str(path), str(out), nodes_to_exclude=slots_of(path))


def calibrated(path: Path, out: Path, reader: Any, **options: Any) -> None:
    quantize_static(
        str(path),
        str(out),
        reader,
        nodes_to_exclude=slots_of(path),
        activation_type=QuantType.QUInt8,
        **options,
    )


def static(path: Path, out: Path) -> None:
    adapter = path.with_name("a.onnx_adapter")
    inputs = [{"input": part} for part in X.split(16)]
    is_open = bool(Session(path).slots)
    reader: Any = CalibrationReader(path, inputs, [adapter]) if is_open else Plain(inputs)
    calibrated(path, out, reader)


class Plain:
    """A reader of inputs alone."""

    def __init__(self, inputs: list[dict[str, torch.Tensor]]) -> None:
        self.inputs = iter([{n: v.numpy() for n, v in each.items()} for each in inputs])

    def get_next(self) -> Any:
        return next(self.inputs, None)


def four_bits(path: Path, out: Path) -> None:
    quantizer = MatMulNBitsQuantizer(
        onnx.load(path), block_size=16, nodes_to_exclude=slots_of(path), bits=8
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(out), False)


def half(path: Path, out: Path) -> None:
    model = convert_float_to_float16(onnx.load(path), keep_io_types=False)
    kept = [entry for entry in model.metadata_props if entry.key != KEY]
    del model.metadata_props[:]  # its slots are of another type now: read from the graph
    model.metadata_props.extend(kept)
    onnx.save(model, str(out))


def optimised(path: Path, out: Path) -> None:
    found = optimizer.optimize_model(str(path), "bert", num_heads=2, hidden_size=32, opt_level=0)
    found.save_model_to_file(str(out))


def converted(path: Path, out: Path) -> None:
    onnx.save(version_converter.convert_version(onnx.load(path), 21), str(out))


def extracted(path: Path, out: Path) -> None:
    model = onnx.load(path)
    inputs = [value.name for value in model.graph.input]
    onnx.utils.extract_model(str(path), str(out), inputs, [v.name for v in model.graph.output])
    part = onnx.load(out)
    part.metadata_props.extend(entry for entry in model.metadata_props if entry.key == KEY)
    onnx.save(part, str(out))


def saved(path: Path, out: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(out)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# Relative error that each may make: of numbers that stay, and of 8 bits.
TOOLS: dict[str, tuple[Tool, float]] = {
    "quant_pre_process": (pre_process, 1e-5),
    "quantize_dynamic": (dynamic, 0.05),
    "quantize_static": (static, 0.05),
    "MatMulNBitsQuantizer": (four_bits, 0.05),
    "float16": (half, 5e-3),
    "transformers.optimizer": (optimised, 1e-5),
    "version_converter": (converted, 1e-5),
    "extract_model": (extracted, 1e-5),
    "saved optimised model": (saved, 1e-5),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return exported(tmp_path_factory.mktemp("tools"), nn.Tanh())


def exported(directory: Path, between: nn.Module) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), between, nn.Linear(48, 17, bias=False)).eval()
    gm = trace(model, (X,), dynamic_shapes=({0: "batch"},))
    adapter = make_adapter({"0": (48, 32), "2": (17, 48)}, rank=4, scale=0.3)
    injected = inject(gm, adapter)
    to_onnx(fold(injected), directory / "merged.onnx", opset=20)
    to_onnx(gm, directory / "base.onnx", opset=20)
    to_onnx(gm, directory / "swappable.onnx", adapters="input", slots="all-linear", opset=20)
    export_adapter(adapter, directory / "swappable.onnx", directory / "a.onnx_adapter")
    with torch.no_grad():
        return directory, adapter, gm(X).numpy(), injected(X).numpy()


def off(found: Any, expected: Any) -> float:
    gap = np.linalg.norm(found.astype(np.float64) - expected)
    return float(gap / np.linalg.norm(expected))


@pytest.mark.parametrize("name", TOOLS)
def test_a_merged_file_survives(name: str, files: Any, tmp_path: Path) -> None:
    directory, _, base, adapted = files
    tool, allowed = TOOLS[name]
    tool(directory / "merged.onnx", tmp_path / "out.onnx")
    x = X.half() if name == "float16" else X
    found = Session(tmp_path / "out.onnx", check=False).run({"input": x})["output"]
    assert off(found, adapted) <= allowed
    assert off(found, base) > 0.3


@pytest.mark.parametrize("name", TOOLS)
def test_a_swappable_file_survives_and_takes_the_adapter(
    name: str, files: Any, tmp_path: Path
) -> None:
    directory, adapter, base, adapted = files
    tool, allowed = TOOLS[name]
    out, file = tmp_path / "out.onnx", tmp_path / "a.onnx_adapter"
    tool(directory / "swappable.onnx", out)
    export_adapter(adapter, out, file, check=False)
    session = Session(out, check=False)
    x = X.half() if name == "float16" else X
    assert session.slots == ["0", "2"]
    tool(directory / "base.onnx", tmp_path / "base.onnx")  # 8 bits cost it something too
    alone = Session(tmp_path / "base.onnx", check=False).run({"input": x})["output"]
    assert off(session.run({"input": x})["output"], alone) <= allowed
    found = session.run({"input": x}, file)["output"]
    assert off(found, adapted) <= allowed
    assert off(found, base) > 0.3


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([], "is calibrated on no inputs: give those of one run"),
        ([{}], "missing inputs: input; unknown inputs: none"),
        ([{"input": X, "0.lora_A": X}], "unknown inputs: 0.lora_A"),
        ([3], r"inputs is \[3\]: expected Iterable"),
    ],
)
def test_what_a_file_is_calibrated_on_is_what_it_takes(
    inputs: Any, said: str, tmp_path: Path
) -> None:
    directory = exported(tmp_path, nn.ReLU())[0]
    with pytest.raises(ExportError, match=said):
        CalibrationReader(directory / "swappable.onnx", inputs, [directory / "a.onnx_adapter"])


def test_a_file_that_is_calibrated_without_adapters_cuts_off_what_they_add(tmp_path: Path) -> None:
    """Why `CalibrationReader` feeds them: a control of the line above that nothing saturates."""
    directory, adapter, _, adapted = exported(tmp_path, nn.ReLU())
    path, file = directory / "swappable.onnx", directory / "a.onnx_adapter"
    found = {}
    for fed in (True, False):
        reader = CalibrationReader(path, [{"input": part} for part in X.split(16)], [file])
        reader._slots = reader._slots if fed else [reader._none]
        calibrated(path, tmp_path / "out.onnx", reader)
        own = tmp_path / f"{fed}.onnx_adapter"
        export_adapter(adapter, tmp_path / "out.onnx", own, check=False)
        session = Session(tmp_path / "out.onnx", check=False)
        found[fed] = off(session.run({"input": X}, own)["output"], adapted)
    assert found[True] <= 0.05
    assert found[False] > 0.3


@pytest.mark.parametrize(
    "options",
    [
        {"calibrate_method": CalibrationMethod.Entropy},
        {"calibrate_method": CalibrationMethod.Percentile},
        {"extra_options": {"CalibStridedMinMax": 4}},
    ],
    ids=str,
)
def test_histograms_and_strides_take_adapters_of_several_ranks(
    options: dict[str, Any], files: Any, tmp_path: Path
) -> None:
    directory, adapter, base, adapted = files
    path, out = directory / "swappable.onnx", tmp_path / "out.onnx"
    small = make_adapter({"0": (48, 32)}, rank=2, name="small")
    export_adapter(small, path, tmp_path / "small.onnx_adapter")
    pair = [directory / "a.onnx_adapter", tmp_path / "small.onnx_adapter"]
    reader: Any = CalibrationReader(path, [{"input": part} for part in X.split(16)], pair)
    assert len(reader) == len(list(reader)) == 8
    reader.rewind()
    calibrated(path, out, reader, **options)
    export_adapter(adapter, out, tmp_path / "a.onnx_adapter", check=False)
    session = Session(out, check=False)
    assert off(session.run({"input": X}, tmp_path / "a.onnx_adapter")["output"], adapted) <= 0.1
    assert off(session.run({"input": X})["output"], base) <= 0.1
    assert off(base, adapted) > 0.3


def test_slots_are_bound_as_values_where_run_options_are_overlooked(files: Any) -> None:
    directory, _, base, adapted = files
    session = ort.InferenceSession(directory / "swappable.onnx", providers=["CPUExecutionProvider"])
    tensors = ort.AdapterFormat.read_adapter(str(directory / "a.onnx_adapter")).get_parameters()
    binding = session.io_binding()
    binding.bind_cpu_input("input", X.numpy())
    for name, value in tensors.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("output")
    session.run_with_iobinding(binding)
    (found,) = binding.copy_outputs_to_cpu()
    assert off(found, adapted) <= 1e-5
    assert off(found, base) > 0.3
    with pytest.raises(RuntimeError, match="Failed to find NodeArg"):
        binding.bind_cpu_input("0.lora_A", tensors["0.lora_A"].numpy())


def test_a_file_that_a_tool_cast_says_so_before_it_runs(files: Any, tmp_path: Path) -> None:
    model = onnx.load(files[0] / "swappable.onnx")
    onnx.save(convert_float_to_float16(model), str(tmp_path / "out.onnx"))
    with pytest.raises(ExportError, match=r"0\.lora_A.*float16 in the graph.*cast the file"):
        Session(tmp_path / "out.onnx", check=False)
