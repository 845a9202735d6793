"""The files that are compared, and how they are run: onnxruntime, one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime as ort
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import fx

import lora_fx
from benchmarks.timing import Run
from lora_fx import Adapter, Update
from lora_fx.branch_lowering.selection import Form
from lora_fx.export import export_adapter, to_onnx
from lora_fx.export.modes import Constant
from lora_fx.export.verification.eager import evaluating
from lora_fx.layers.sites import by_path
from lora_fx.passes import ChooseForm

Shapes = Mapping[str, tuple[int, ...]]
Arrays = Mapping[str, np.ndarray[Any, Any]]


def adapter_for(gm: fx.GraphModule, rank: int, seed: int = 0) -> Adapter:
    """A random adapter for every linear layer."""
    make = torch.Generator().manual_seed(seed)
    updates = {}
    for path, (site, *_) in by_path(gm).items():
        if site.is_linear:
            down = torch.randn(rank, site.in_features, generator=make) / site.in_features**0.5
            up = torch.randn(site.out_features, rank, generator=make) / rank**0.5
            updates[path] = Update(down, up, 0.25)
    return Adapter("bench", updates)


@contextmanager
def as_written() -> Iterator[None]:
    """Exports a graph in the form it has: nothing is raised or chosen."""

    def plain(gm: fx.GraphModule, **_: bool) -> Constant:
        return Constant(gm, evaluating(gm), evaluating(gm))

    with mock.patch.object(Constant, "of", plain):
        yield


def write(gm: fx.GraphModule, adapter: Adapter, form: str, path: Path, share: bool = True) -> None:
    """Exports a base with an adapter: merged, swappable, in a form by name, or in the best one."""
    injected = lora_fx.inject(gm, adapter)
    if form == "merged":
        to_onnx(lora_fx.fold(injected), path, verify=False)
    elif form == "swappable":
        to_onnx(injected, path, verify=False, adapters="input")
    else:
        wanted = None if form == "chosen" else Form(form)
        with as_written():
            to_onnx(ChooseForm(form=wanted, share=share)(injected).graph_module, path, verify=False)


def session(path: Path) -> Any:
    """A session of one thread."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Active:
    """Run options under which an adapter acts on a swappable file.

    Args:
        adapter: for that file.
        model: the file.
        path: where the adapter is written for it.
    """

    def __init__(self, adapter: Adapter, model: Path, path: Path) -> None:
        export_adapter(adapter, model, path)
        self._adapter = ort.LoraAdapter()  # run options do not keep it alive
        self._adapter.Load(str(path))
        self.options = ort.RunOptions()
        self.options.add_active_adapter(self._adapter)


def caller(opened: Any, feeds: Arrays, active: Active | None = None) -> Run:
    """A plain call, with an adapter or without."""
    given, options = dict(feeds), active and active.options
    return lambda: opened.run(None, given, options)


def runner(opened: Any, feeds: Arrays) -> Run:
    """A call with inputs and outputs that stay where they are."""
    binding = opened.io_binding()
    for name, value in feeds.items():
        binding.bind_cpu_input(name, value)
    for output in opened.get_outputs():
        binding.bind_output(output.name, "cpu")
    return lambda: opened.run_with_iobinding(binding)


def agree(runs: Mapping[str, Callable[[], Any]], first: str = "merged") -> None:
    """Fails unless all calls give the same numbers: a fast wrong form is no form."""
    results = {name: run() for name, run in runs.items()}
    for name, found in results.items():
        for one, other in zip(results[first], found, strict=True):
            error = np.linalg.norm(one - other) / np.linalg.norm(one)
            if not error < 1e-4:
                raise AssertionError(f"{name} is off by {error:.1e}")


def calls(nodes: list[NodeProto], inputs: Shapes, constants: Shapes) -> Run:
    """A model of some nodes, the last of which gives ``y``, on random data."""
    draw = np.random.default_rng(0)
    data = {name: draw.standard_normal(shape, np.float32) for name, shape in inputs.items()}
    stored = [
        numpy_helper.from_array(draw.standard_normal(shape, np.float32), name)
        for name, shape in constants.items()
    ]
    given = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(shape))
        for name, shape in inputs.items()
    ]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "parts", given, [result], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return runner(ort.InferenceSession(model.SerializeToString(), options), data)
