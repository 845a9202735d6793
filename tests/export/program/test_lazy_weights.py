from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from onnx_ir.tensor_adapters import TorchTensor
from torch import fx, nn

from lora_fx.errors import ExportError
from lora_fx.export import Session, to_onnx
from lora_fx.export.program.lazy_weights import StandIn, replace_stand_ins, with_stand_ins
from lora_fx.export.verification.eager import evaluating
from lora_fx.frontend.trace import trace
from lora_fx.graph.graph_module import targets
from lora_fx.graph.lazy_tensor import LazyTensor, get_unevaluated
from lora_fx.numerics import compare
from lora_fx.passes import FoldLora, InjectLora
from lora_fx.testing.adapters import make_adapter

MODES = ("inline", "beside")


def folded(sample: Any) -> fx.GraphModule:
    return FoldLora()(InjectLora(sample.adapter(2))(sample.gm).graph_module).graph_module


def lazy(gm: fx.GraphModule) -> dict[str, LazyTensor]:
    found = {target: get_unevaluated(gm, target) for target in targets(gm.graph)}
    return {target: value for target, value in found.items() if isinstance(value, LazyTensor)}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lazy tensors that were computed, in order; what passes one on is not counted."""
    keys: list[int] = []
    compute = LazyTensor.evaluate

    def note(self: LazyTensor) -> torch.Tensor:
        if self.cache:
            keys.append(id(self))
        return compute(self)

    monkeypatch.setattr(LazyTensor, "evaluate", note)
    return keys


def test_a_stand_in_has_the_shape_and_computes_nothing(mlp: Any, computed: list[int]) -> None:
    gm = folded(mlp)
    hollow, stand_ins = with_stand_ins(evaluating(gm))
    assert {s.name for s in stand_ins} == set(lazy(gm)) >= {"up.weight", "tail.1.weight"}
    for stand_in in stand_ins:
        held = hollow.get_parameter(stand_in.name)
        assert held is stand_in.tensor
        assert (held.shape, held.dtype) == (stand_in.weight.shape, stand_in.weight.dtype)
    assert computed == []
    assert all(value._cached is None for value in lazy(gm).values())
    lazy(gm)["up.weight"].evaluate()  # control: this is seen
    assert len(computed) == 1


def model_of(*tensors: tuple[str, torch.Tensor]) -> ir.Model:
    values = []
    for name, tensor in tensors:
        held = TorchTensor(tensor, name=name)
        values.append(ir.Value(name=name, shape=held.shape, type=ir.TensorType(held.dtype)))
        values[-1].const_value = held
    return ir.Model(ir.Graph([], [], nodes=[], initializers=values), ir_version=10)


def stand_in_for(weight: torch.Tensor) -> StandIn:
    later = LazyTensor(tuple(weight.shape), weight.dtype, weight.clone, "fc.weight")
    return StandIn("fc.weight", later, nn.Parameter(torch.full_like(weight, torch.nan)))


def test_a_lazy_tensor_takes_the_place_of_its_stand_in() -> None:
    weight, bias = torch.randn(5, 3), torch.randn(5)
    stand_in = stand_in_for(weight)
    model = model_of(("fc.weight", stand_in.tensor.detach()), ("fc.bias", bias))
    replace_stand_ins(model, [stand_in])
    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert isinstance(held["fc.weight"], ir.LazyTensor)
    assert held["fc.weight"].tobytes() == weight.numpy().tobytes()
    assert held["fc.bias"] is not None
    assert held["fc.bias"].tobytes() == bias.numpy().tobytes()


SPOILT: dict[str, Callable[[torch.Tensor], list[tuple[str, torch.Tensor]]]] = {
    "gone": lambda stand_in: [],
    "copied": lambda stand_in: [("fc.weight", stand_in.clone())],
    "seen otherwise": lambda stand_in: [("fc.weight", stand_in.view(3, 5))],
    "kept beside": lambda stand_in: [("fc.weight", stand_in), ("val_1", stand_in.view(15))],
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_stand_in_that_is_left_is_an_error(how: str) -> None:
    stand_in = stand_in_for(torch.randn(5, 3))
    model = model_of(*SPOILT[how](stand_in.tensor.detach()))
    with pytest.raises(ExportError, match=r"lost in translation: (fc\.weight|val_1)"):
        replace_stand_ins(model, [stand_in])


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_computed_while_they_are_written_and_not_kept(
    sample: Any, mode: str, tmp_path: Path, computed: list[int]
) -> None:
    gm = folded(sample)
    weights = lazy(gm)
    limit = 0 if mode == "beside" else 10**9
    to_onnx(gm, tmp_path / "once.onnx", verify=False, external_data_above=limit)
    assert sorted(computed) == sorted(map(id, weights.values()))  # each once
    report = to_onnx(gm, tmp_path / "model.onnx", external_data_above=limit)
    assert report.verified
    # Once more for this file: what it is held against is the module, not the folded graph.
    assert sorted(computed) == sorted([*map(id, weights.values())] * 2)
    assert all(value._cached is None for value in weights.values())
    stored = {t.name: t for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    for name, value in weights.items():
        read = value.materialize().detach()  # as whoever reads the graph gets it
        found = torch.from_numpy(numpy_helper.to_array(stored[name]).copy())
        assert torch.equal(found, read) or (read.ndim == 2 and torch.equal(found.mT, read)), name


def test_a_transposed_weight_keeps_its_name(mlp: Any, tmp_path: Path) -> None:
    gm = folded(mlp)
    to_onnx(gm, tmp_path / "model.onnx", verify=False)
    graph = onnx.load(tmp_path / "model.onnx").graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    assert stored["up.weight"].shape == (3, 5)  # in, out: MatMul reads it as it lies
    assert stored["up.weight"].tobytes() == gm.get_parameter("up.weight").T.numpy().tobytes()
    assert not any(node.op_type == "Transpose" for node in graph.node)


@pytest.mark.parametrize("mode", MODES)
def test_two_exports_write_the_same_bytes(mlp: Any, mode: str, tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        limit = 0 if mode == "beside" else 10**9
        path = tmp_path / name / "model.onnx"
        to_onnx(folded(mlp), path, verify=False, external_data_above=limit)
        written.append({file.name: file.read_bytes() for file in path.parent.iterdir()})
    assert written[0] == written[1]
    assert len(written[0]) == (2 if mode == "beside" else 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_that_cannot_be_computed_is_not_written(
    mlp: Any, mode: str, tmp_path: Path
) -> None:
    gm = folded(mlp)
    limit = 0 if mode == "beside" else 10**9

    def fail() -> torch.Tensor:
        raise ExportError("up.weight: not finite")

    lazy(gm)["up.weight"]._make = fail
    with pytest.raises(ExportError, match=r"^up\.weight: not finite"):
        to_onnx(gm, tmp_path / "model.onnx", verify=False, external_data_above=limit)
    assert list(tmp_path.iterdir()) == []


def test_a_call_that_only_a_dropout_reads_needs_no_weight(tmp_path: Path) -> None:
    """As in the last layer of PEGASUS-X: what it does to global tokens is thrown away."""

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nn.functional.dropout(self.fc(2 * x), 0.1, self.training)
            result: torch.Tensor = self.fc(x)
            return result

    torch.manual_seed(0)
    model, x = Idle().eval(), torch.randn(2, 3)
    tuned = InjectLora(make_adapter({"fc": (5, 3)}))(trace(model, (x,))).graph_module
    to_onnx(FoldLora()(tuned).graph_module, tmp_path / "m.onnx")
    (found,) = Session(tmp_path / "m.onnx").run({"x": x}).values()
    assert compare(found, tuned(x)).ok
    assert not compare(found, model(x)).ok
