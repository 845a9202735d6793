from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from lora_fx import LoraConfig, adapter_from, inject
from lora_fx.adapters.adapter import Adapter, Scaling
from lora_fx.errors import ExportError
from lora_fx.export import Session, export_adapter, to_onnx
from lora_fx.export.slots.adapter_file import read_adapter_file
from lora_fx.export.slots.check_adapter import read_adapter
from lora_fx.export.slots.choose import chosen_slots
from lora_fx.export.slots.probe import probe
from lora_fx.frontend.trace import trace
from lora_fx.numerics import compare
from lora_fx.passes import InjectLora


def test_each_slot_is_an_overridable_input_of_symbolic_rank(exported: Any) -> None:
    path = exported.path("input")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    adapter = exported.sample.adapter(2)
    names = {f"{p}.lora_{side}" for p in adapter.updates for side in "AB"}
    assert {value.name for value in session.get_overridable_initializers()} == names
    graph = onnx.load(path).graph
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    inputs = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
    for target, update in adapter.updates.items():
        out, into = update.shape
        assert sizes[f"{target}.lora_A"] == [into, 0]
        assert sizes[f"{target}.lora_B"] == [0, out]
        a, b = inputs[f"{target}.lora_A"], inputs[f"{target}.lora_B"]
        assert (a[0].dim_value, b[1].dim_value) == (into, out)
        assert a[1].dim_param == b[0].dim_param == f"rank:{target}"


def test_no_shape_between_a_and_b_remembers_a_rank(exported: Any) -> None:
    graph = onnx.load(exported.path("input")).graph
    inner = {value.name: value.type.tensor_type.shape for value in graph.value_info}
    for node in graph.node:
        if any(name.endswith(".lora_A") for name in node.input):
            shape = inner.get(node.output[0])
            assert shape is None or not shape.dim or not shape.dim[-1].dim_value


@pytest.mark.parametrize("rank", [2, 8, 32])
def test_one_model_serves_every_rank_in_plain_onnxruntime(
    exported: Any, rank: int, tmp_path: Path
) -> None:
    sample, path = exported.sample, exported.path("input")
    adapter, file = sample.adapter(rank), tmp_path / "some.onnx_adapter"
    export_adapter(adapter, path, file)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    loaded, options = ort.LoraAdapter(), ort.RunOptions()
    loaded.Load(str(file))
    options.add_active_adapter(loaded)
    feeds = {name: value.numpy() for name, value in sample.other.items()}
    found = session.run(None, feeds, options)
    for value, expected, base in zip(found, sample.eager(adapter), sample.eager(), strict=True):
        assert compare(value, expected).ok
        assert compare(value, base).relative > 1e-2


def test_two_equal_slots_stay_apart(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).eval()
    model[1].load_state_dict(model[0].state_dict())
    x = torch.randn(4, 7, 5)
    gm = trace(model, (x,))
    to_onnx(gm, tmp_path / "model.onnx", adapters="input")
    whole = probe(chosen_slots(gm, None), (2,))
    one = Adapter("one", {"1": whole.updates["1"]})
    export_adapter(one, tmp_path / "model.onnx", tmp_path / "one.onnx_adapter")
    session = Session(tmp_path / "model.onnx")
    found = session.run({"input": x}, tmp_path / "one.onnx_adapter")["output"]
    expected = InjectLora(one)(gm).graph_module(x)
    both = Adapter("both", {"0": whole.updates["1"], "1": whole.updates["1"]})
    assert compare(found, expected.detach()).ok
    assert not compare(found, InjectLora(both)(gm).graph_module(x).detach()).ok


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc(torch.relu(self.fc(x))))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_a_layer_called_twice_is_one_slot(tmp_path: Path) -> None:
    gm = trace(Twice().eval(), (torch.randn(4, 7, 5),))
    report = to_onnx(gm, tmp_path / "model.onnx", adapters="input")
    assert report.verified
    assert report.slots == ["fc"]  # the output embedding is left out
    names = [t.name for t in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert sorted(n for n in names if "fc" in n) == [
        "fc.bias",
        "fc.lora_A",
        "fc.lora_B",
        "fc.weight",
    ]


def test_slots_are_those_with_a_branch_or_as_asked_for(mlp: Any) -> None:
    gm = trace(Twice().eval(), (torch.randn(4, 7, 5),))
    adapter = probe(chosen_slots(gm, ["head"]), (2,))
    branched = InjectLora(adapter)(gm).graph_module
    assert [slot.path for slot in chosen_slots(branched, None)] == ["head"]
    assert [slot.path for slot in chosen_slots(gm, "all-linear")] == ["fc", "head"]
    others = trace(Convolved().eval(), (torch.randn(2, 3, 16),))
    for asked in (None, "all-linear"):
        assert [slot.path for slot in chosen_slots(others, asked)] == ["head"]
    with pytest.raises(ExportError, match="no layer at tail, nowhere; there are fc, head"):
        chosen_slots(gm, ["fc", "tail", "nowhere"])
    wrong: list[Any] = ["fc", 3, [3]]
    for slots in wrong:
        with pytest.raises(ExportError, match='give "all-linear" or a list'):
            chosen_slots(gm, slots)
    with pytest.raises(
        ExportError, match=r'no linear layer to adapt, .* slots={"<path>": "weight"}'
    ):
        chosen_slots(trace(nn.ReLU(), (torch.randn(4, 7),)), None)


def test_probe_fills_each_slot_with_its_own_rank(mlp: Any) -> None:
    first = probe(chosen_slots(mlp.gm, None), (1, 4))
    assert [update.rank for update in first.updates.values()] == [1, 4]
    assert [update.shape for update in first.updates.values()] == [(5, 3), (4, 5)]
    again = probe(chosen_slots(mlp.gm, None), (1, 4))
    assert np.array_equal(first.updates["up"].down, again.updates["up"].down)


class Convolved(nn.Module):
    """Two convolutions in a row, as onnxruntime 1.31 computed wrongly at rank 0, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 5, 1)
        self.head = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.two(torch.relu(self.one(self.head(x))))
        return y


def test_a_thousand_runs_of_convolutions_that_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm = trace(nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 5, 1)).eval())
    x, path = torch.randn(1000, 2, 3, 16), tmp_path / "model.onnx"
    to_onnx(gm, path, adapters="input", slots=["0", "2"], args=(x[0],))
    export_adapter(probe(chosen_slots(gm, ["0", "2"]), (2,)), path, tmp_path / "probe")
    session = Session(path, threads=1)
    with torch.no_grad():
        expected = gm(x.flatten(0, 1)).unflatten(0, (1000, 2))
    found = [session.run({"input": part})["output"] for part in x]
    assert sum(not compare(*pair).ok for pair in zip(found, expected, strict=True)) == 0
    control = session.run({"input": x[0]}, tmp_path / "probe")["output"]
    assert compare(control, expected[0]).relative > 1e-2


def test_what_is_neutral_has_channels_where_it_is_convolved(tmp_path: Path) -> None:
    gm = trace(Convolved().eval(), (torch.randn(2, 3, 16),))
    path, names = tmp_path / "model.onnx", ["one", "two", "head"]
    to_onnx(gm, path, adapters="input", slots=names, vectors=True)
    ranks = {"one": 1, "two": 1, "head": 0}
    stored = {tensor.name: list(tensor.dims) for tensor in onnx.load(path).graph.initializer}
    for name, rank in ranks.items():
        assert stored[f"{name}.lora_B"][0 if name == "head" else 1] == rank
    row = {"one": Scaling(row=torch.full((8,), 1.5))}
    export_adapter(Adapter("a", row), path, tmp_path / "a")
    values = {k: v.numpy() for k, v in read_adapter(tmp_path / "a").get_parameters().items()}
    for name, rank in ranks.items():
        assert values[f"{name}.lora_B"].shape[0 if name == "head" else 1] == rank
    found = read_adapter_file(tmp_path / "a", "a").updates
    assert {name: update.rank for name, update in found.items()} == {"one": 0}


class Renamed(nn.Module):
    """A module of two names that is called by both, the later name first."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.one, self.end = layer, nn.Linear(3, 5)
        self.other = self.one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(torch.tanh(self.one(torch.tanh(self.other(x)))))


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
@pytest.mark.parametrize("slots", [None, ["one"], ["other", "one"]])
@pytest.mark.parametrize("layer", [nn.Linear(3, 3), nn.Conv1d(4, 4, 3, padding=1)])
def test_a_module_of_two_names_has_one_slot(
    layer: nn.Module, slots: list[str] | None, frontend: str, tmp_path: Path
) -> None:
    if slots is None and isinstance(layer, nn.Conv1d):
        slots = ["end", "one"]
    model, x = Renamed(layer).eval().requires_grad_(False), torch.randn(2, 4, 3)
    gm = trace(model, (x,), frontend=frontend)
    chosen = chosen_slots(gm, slots)
    assert [slot.path for slot in chosen if slot.path != "end"] == ["one"]
    file = tmp_path / "m.onnx"
    to_onnx(gm, file, adapters="input", slots=slots, vectors=frontend == "export")
    adapter = probe([slot for slot in chosen if slot.path == "one"], (2,))
    export_adapter(adapter, file, tmp_path / "a.onnx_adapter")
    session = Session(file)
    (base,) = session.run({"x": x}).values()
    (adapted,) = session.run({"x": x}, adapter=tmp_path / "a.onnx_adapter").values()
    assert compare(base, model(x)).ok
    changed = Renamed(copy.deepcopy(layer)).eval().requires_grad_(False)
    changed.end = model.end
    changed.one.weight.add_(adapter.updates["one"].delta())
    assert compare(adapted, changed(x)).ok
    assert compare(base, changed(x)).relative > 1e-2


def test_a_fresh_adapter_of_a_module_of_two_names_fits_its_slot(tmp_path: Path) -> None:
    model, x = Renamed(nn.Linear(3, 3)).eval(), torch.randn(2, 4, 3)
    tuned = inject(trace(model, (x,)), LoraConfig(r=2, name="a"))
    for parameter in tuned.parameters():
        parameter.data.add_(0.1)
    to_onnx(tuned, tmp_path / "m.onnx", adapters="input")
    adapter = adapter_from(tuned)
    assert [*adapter.updates] == ["one", "end"]
    export_adapter(adapter, tmp_path / "m.onnx", tmp_path / "a")
    (adapted,) = Session(tmp_path / "m.onnx").run({"x": x}, adapter=tmp_path / "a").values()
    assert compare(adapted, tuned(x)).ok
    assert compare(adapted, model(x)).relative > 1e-2
