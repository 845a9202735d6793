from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.errors import AdapterWarning, ExportError, TraceError, VerificationError
from lora_fx.export import Session, to_onnx
from lora_fx.export.onnx_model.convert import convert
from lora_fx.export.program.decompose import LoweredProgram
from lora_fx.frontend.trace import trace
from lora_fx.graph.printer import text
from lora_fx.numerics import compare
from lora_fx.passes import FoldLora, InjectLora
from lora_fx.testing import traced

FORMS = ("constant", "folded", "input")


def run(path: Path, inputs: dict[str, torch.Tensor]) -> list[np.ndarray[Any, Any]]:
    """Plain onnxruntime: nothing of this package."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


@pytest.mark.parametrize("form", FORMS)
def test_plain_onnxruntime_agrees_at_another_shape(exported: Any, form: str) -> None:
    sample, path = exported.sample, exported.path(form)
    adapted, base = sample.eager(sample.adapter(2)), sample.eager()
    right, wrong = (base, adapted) if form == "input" else (adapted, base)
    for found, expected, control in zip(run(path, sample.other), right, wrong, strict=True):
        assert compare(found, expected).ok
        assert compare(found, control).relative > 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_report_holds_checks_controls_and_sizes(exported: Any, form: str) -> None:
    path = exported.path(form)
    report = exported.reports[form]
    assert report.verified
    assert {row.shape for row in report.checks} >= {"batch=2, length=7", "batch=3, length=9"}
    assert {row.optimisation for row in report.checks} == {"off", "all"}
    assert max(row.relative for row in report.checks) <= 1e-5
    assert max(row.relative for row in report.controls) >= 1e-2
    assert report.files == {path.name: path.stat().st_size}
    assert set(report.seconds) == {"trace", "convert", "optimise", "write", "verify"}


@pytest.mark.parametrize("form", FORMS)
def test_inputs_outputs_and_dimensions_have_the_users_names(exported: Any, form: str) -> None:
    graph = onnx.load(exported.path(form)).graph
    slots = {tensor.name for tensor in graph.initializer}
    inputs = {value.name: value for value in graph.input if value.name not in slots}
    fields = {
        "mlp": ["hidden", "score"],
        "bert": ["last_hidden_state", "pooler_output"],
        "gpt2": ["logits"],
    }
    assert list(inputs) == list(exported.sample.other)
    assert [value.name for value in graph.output] == fields[exported.sample.name]
    for value in [*inputs.values(), graph.output[0]]:
        dims = [dim.dim_param for dim in value.type.tensor_type.shape.dim]
        assert dims[:2] == ["batch", "length"]


@pytest.mark.parametrize("form", FORMS)
def test_weights_keep_their_names_and_are_stored_once(exported: Any, form: str) -> None:
    stored = {t.name: t for t in onnx.load(exported.path(form)).graph.initializer}
    anonymous = [n for n, t in stored.items() if n.startswith("val_") and np.prod(t.dims) > 16]
    assert anonymous == []
    sample = exported.sample
    weights = {name: value for name, value in sample.gm.state_dict().items() if value.ndim > 1}
    if form != "folded":
        assert weights.keys() <= stored.keys()
    sizes = sum(value.nbytes for value in weights.values())
    big = sum(len(t.raw_data) for n, t in stored.items() if "lora_" not in n)
    # B and the bias may be rows of W; nothing is stored twice.
    widths = [update.shape[0] for update in sample.adapter(2).updates.values()]
    stacked = 4 * 3 * sum(widths) if form == "constant" else 0
    assert big < sizes * 1.2 + stacked


@pytest.mark.parametrize("form", FORMS)
def test_file_tells_nothing_of_the_machine(exported: Any, form: str) -> None:
    content = exported.path(form).read_bytes()
    for trace_of in (b"site-packages", b'File "', b".py", str(Path.home()).encode(), b"/tmp/"):
        assert trace_of not in content
    assert b"stack_trace" not in content


@pytest.mark.parametrize("adapters", ["constant", "input"])
def test_graph_and_its_tensors_are_unchanged(mlp: Any, adapters: str, tmp_path: Path) -> None:
    gm = InjectLora(mlp.adapter(2))(mlp.gm).graph_module
    before, tensors = text(gm), {n: (t, t.clone()) for n, t in gm.state_dict().items()}
    to_onnx(gm, tmp_path / "model.onnx", adapters=adapters)
    assert text(gm) == before
    for name, value in gm.state_dict().items():
        same, copy = tensors[name]
        assert value.data_ptr() == same.data_ptr()
        assert torch.equal(value, copy)


def test_existing_output_is_refused_and_replaced_by_force(mlp: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("precious")
    with pytest.raises(ExportError, match=r"model\.onnx: exists: pass force=True"):
        to_onnx(mlp.gm, path)
    assert path.read_text() == "precious"
    to_onnx(mlp.gm, path, force=True, verify=False)
    assert Session(path).outputs == ["hidden", "score"]


def test_a_wrong_file_is_not_published(
    mlp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: ir.Model) -> None:
        weight = model.graph.initializers["up.bias"]
        assert weight.const_value is not None
        weight.const_value = ir.tensor(weight.const_value.numpy() * 1.1)

    monkeypatch.setattr(sys.modules["lora_fx.export.exporter"], "anonymise", spoil)
    with pytest.raises(VerificationError, match="disagree with eager") as caught:
        to_onnx(mlp.gm, tmp_path / "model.onnx")
    assert "FAIL model" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_program_without_onnx_form_is_traced_again(
    mlp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[type] = []

    def refuse(program: torch.export.ExportedProgram, opset: int | None) -> ir.Model:
        tried.append(type(program))
        if isinstance(program, LoweredProgram):
            raise ExportError("no ONNX form")
        return convert(program, opset)

    monkeypatch.setattr(sys.modules["lora_fx.export.exporter"], "convert", refuse)
    gm = InjectLora(mlp.adapter(2))(mlp.gm).graph_module
    assert to_onnx(FoldLora()(gm).graph_module, tmp_path / "model.onnx").verified
    assert tried == [LoweredProgram, torch.export.ExportedProgram]


def test_without_example_inputs_it_says_what_to_pass(tmp_path: Path) -> None:
    gm = trace(nn.Linear(3, 5), frontend="symbolic")
    with pytest.raises(ExportError, match=r"no example inputs.*pass args="):
        to_onnx(gm, tmp_path / "model.onnx")
    report = to_onnx(
        gm,
        tmp_path / "model.onnx",
        args=(torch.randn(4, 7, 3),),
        dynamic_shapes={"input": {0: torch.export.Dim("rows")}},
    )
    assert report.verified
    assert report.outputs == ["output"]


def test_an_adapter_without_effect_is_a_warning(mlp: Any, tmp_path: Path) -> None:
    nothing = {"up": Update(torch.randn(2, 3), torch.zeros(5, 2), 1.0)}
    gm = InjectLora(Adapter("none", nothing))(mlp.gm).graph_module
    with pytest.warns(AdapterWarning, match="change no output"):
        report = to_onnx(gm, tmp_path / "model.onnx")
    assert report.verified
    assert report.controls[0].what.endswith("x 1.1")


def test_large_weights_go_to_an_aligned_file_beside_the_model(mlp: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    gm = trace(nn.Linear(64, 96).eval(), (torch.randn(4, 7, 64),))
    report = to_onnx(gm, path, external_data_above=0)
    assert report.verified
    assert set(report.files) == {"model.onnx", "model.onnx.data"}
    assert set(report.files) == {file.name for file in tmp_path.iterdir()}
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    entries = {t.name: {e.key: e.value for e in t.external_data} for t in tensors}
    assert int(entries["weight"]["offset"]) % 4096 == 0
    assert entries["weight"]["location"] == "model.onnx.data"
    to_onnx(gm, path, force=True)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx"}


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, pair: Any, k: int = 2, *, mask: torch.Tensor) -> Any:
        y = self.fc(pair["left"]) * k
        return y, [y.argmax(-1), None], pair["left"], y


def test_nested_inputs_and_outputs_are_named_and_repeated_ones_kept_apart(tmp_path: Path) -> None:
    inputs = {"left": torch.randn(4, 7, 3), "right": torch.randn(2)}
    mask = torch.ones(3)
    gm = trace(
        Nested().eval(),
        (inputs,),
        {"k": 3, "mask": mask},
        dynamic_shapes={"pair": {"left": {0: "n"}, "right": None}, "k": None, "mask": None},
    )
    report = to_onnx(gm, tmp_path / "model.onnx")
    assert report.verified
    assert report.inputs == ["pair_left", "pair_right", "mask"]
    assert report.outputs == ["output_0", "output_1_0", "output_2", "output_3"]
    assert {row.tolerance for row in report.checks if row.output == "output_1_0"} == {0.0}


def test_an_output_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Counted(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return {"y": x + 1, "count": 3}

    with pytest.raises(ExportError, match="'count' is a int"):
        to_onnx(traced(Counted(), torch.randn(4, 7)), tmp_path / "model.onnx")


@pytest.mark.parametrize("adapters", ["constant", "input"])
def test_float16(adapters: str, tmp_path: Path) -> None:
    gm = traced(nn.Sequential(nn.Linear(3, 5).half()), torch.randn(4, 7, 3).half())
    report = to_onnx(gm, tmp_path / "model.onnx", adapters=adapters)
    assert report.verified
    assert {row.tolerance for row in report.checks} == {2e-3}


@pytest.mark.parametrize("adapters", ["constant", "input"])
def test_bfloat16_is_an_error_that_says_what_to_do(adapters: str, tmp_path: Path) -> None:
    gm = traced(nn.Sequential(nn.Linear(3, 5)).bfloat16(), torch.randn(4, 7, 3).bfloat16())
    with pytest.raises(ExportError, match="float32 or float16"):
        to_onnx(gm, tmp_path / "model.onnx", adapters=adapters)
    assert list(tmp_path.iterdir()) == []
    assert to_onnx(gm, tmp_path / "model.onnx", adapters=adapters, verify=False).notes


def test_a_graph_that_was_converted_since_needs_inputs_of_its_own(tmp_path: Path) -> None:
    gm = traced(nn.Sequential(nn.Linear(3, 5)), torch.randn(4, 7, 3)).double()
    advice = r"^the graph does not run on .*: give args= of the types and sizes.*, and as"
    with pytest.raises(ExportError, match=advice):
        to_onnx(gm, tmp_path / "model.onnx")
    assert to_onnx(gm, tmp_path / "model.onnx", args=(torch.randn(4, 7, 3).double(),)).verified


X = torch.randn(4, 7, 3)


@pytest.mark.parametrize("args", [(X.numpy(),), (X, X), (None,), ("x",), ({"x": X},)])
def test_inputs_that_the_graph_was_not_traced_for_are_refused(args: Any, tmp_path: Path) -> None:
    gm = trace(nn.Sequential(nn.Linear(3, 5)), (X,))
    with pytest.raises(ExportError, match=r"does not run on .*: give args= of the types and sizes"):
        to_onnx(gm, tmp_path / "model.onnx", args=args)
    assert to_onnx(gm, tmp_path / "model.onnx", args=(X + 1,)).verified


def test_weights_without_values_are_named(tmp_path: Path) -> None:
    gm = traced(nn.Sequential(nn.Linear(3, 5, device="meta")), torch.randn(4, 7, 3, device="meta"))
    with pytest.raises(ExportError, match=r"^0\.weight, 0\.bias: on the meta device"):
        to_onnx(gm, tmp_path / "model.onnx")


def test_a_graph_in_training_mode_is_exported_in_eval_mode(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5)).train()
    for frontend in ("symbolic", "export"):
        gm = trace(model, (torch.randn(4, 7, 3),), frontend=frontend)
        assert to_onnx(gm, tmp_path / f"{frontend}.onnx").verified
        assert gm.training
    assert model[1].training


def test_what_is_no_graph_is_told_to_be_traced(tmp_path: Path) -> None:
    module: Any = nn.Linear(2, 2)
    with pytest.raises(ExportError, match=r"not a Linear: trace the model first"):
        to_onnx(module, tmp_path / "a.onnx")
    with pytest.raises(TraceError, match=r"'base.onnx' is a str: .* lora_fx.export.add_lora"):
        trace("base.onnx")  # type: ignore[arg-type]


def test_unknown_modes_and_slots_without_use_are_refused(mlp: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="expected 'constant', 'input' or 'required'"):
        to_onnx(mlp.gm, tmp_path / "model.onnx", adapters="inputs")
    with pytest.raises(ExportError, match='that needs adapters="input"'):
        to_onnx(mlp.gm, tmp_path / "model.onnx", slots=["up"])
    with pytest.raises(ExportError, match="directory does not exist"):
        to_onnx(mlp.gm, tmp_path / "nowhere" / "model.onnx")


def test_progress_names_each_stage_and_opset_is_kept(mlp: Any, tmp_path: Path) -> None:
    stages: list[str] = []
    report = to_onnx(mlp.gm, tmp_path / "model.onnx", opset=18, progress=stages.append)
    assert stages == ["trace", "convert", "optimise", "write", "verify"]
    assert report.opset == 18
    assert re.search(r"control  ok", str(report))
    with pytest.raises(ExportError, match=r"(?s)progress=.* was told 'trace' and failed: "):
        to_onnx(mlp.gm, tmp_path / "other.onnx", progress=mlp.gm)


def test_nothing_is_exported_where_nothing_has_values(mlp: Any, tmp_path: Path) -> None:
    with torch.device("meta"), pytest.raises(ExportError, match="call to_onnx outside it"):
        to_onnx(mlp.gm, tmp_path / "model.onnx")
