from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from lora_fx.errors import VerificationError
from lora_fx.export import to_onnx
from lora_fx.export.program.example_inputs import example_inputs
from lora_fx.export.program.export_unit import ExportUnit, export_unit
from lora_fx.export.report import Reference
from lora_fx.export.verification.eager import evaluating
from lora_fx.export.verification.negative_controls import controls
from lora_fx.export.verification.verify import verify_file
from lora_fx.passes import InjectLora
from lora_fx.testing import traced


def trial(gm: fx.GraphModule) -> ExportUnit:
    return export_unit(evaluating(gm), example_inputs(gm, None, None, None))


@pytest.mark.parametrize("form", ["constant", "folded"])
def test_another_model_disagrees_in_every_row(exported_mlp: Any, form: str) -> None:
    gm = exported_mlp.sample.gm
    evidence = verify_file(
        exported_mlp.path(form), trial(gm), [Reference("base", evaluating(gm))], controls(gm)
    )
    assert len(evidence.checks) == 2 * 2 * 3  # outputs, optimisation levels, shapes
    assert not any(row.ok for row in evidence.checks)


def test_a_scale_off_by_ten_percent_is_seen(exported_mlp: Any) -> None:
    sample = exported_mlp.sample
    adapter = sample.adapter(2)
    for scale, ok in ((2.0, True), (2.2, False)):
        updates = {p: type(u)(u.down, u.up, scale) for p, u in adapter.updates.items()}
        gm = InjectLora(type(adapter)("a", updates))(sample.gm).graph_module
        subject = Reference("model", evaluating(gm))
        found = verify_file(exported_mlp.path("constant"), trial(gm), [subject], controls(gm))
        assert {row.ok for row in found.checks} == {ok}


def test_a_control_is_right_where_the_file_differs_from_it(exported_mlp: Any) -> None:
    sample = exported_mlp.sample
    right, base = InjectLora(sample.adapter(2))(sample.gm).graph_module, sample.gm
    for subject, control, differs in ((right, base, True), (base, right, False)):
        model, other = (Reference(n, evaluating(g)) for n, g in (("a", subject), ("b", control)))
        found = verify_file(exported_mlp.path("constant"), trial(right), [model], [other])
        assert {row.ok for row in found.checks} == {differs}
        assert {row.ok for row in found.controls} == {differs}


class Counting(nn.Module):
    """Numbers, and large counts that are a little off."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.fc, self.first = nn.Linear(3, 5), first

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.fc(x), (x > 0).long() + self.first


def test_integers_must_be_equal_whatever_numbers_may_be_off(tmp_path: Path) -> None:
    torch.manual_seed(0)
    right = Counting(1_000_000_000)
    wrong = Counting(1_000_000_001)
    wrong.load_state_dict(right.state_dict())
    gm = traced(right, torch.randn(4, 7, 3))
    to_onnx(gm, tmp_path / "model.onnx", verify=False)
    for model, same in ((gm, True), (traced(wrong, torch.randn(4, 7, 3)), False)):
        subject = Reference("model", evaluating(model))
        found = verify_file(tmp_path / "model.onnx", trial(gm), [subject], controls(gm)).checks
        assert [row.ok for row in found] == [True, same] * 2  # optimised or not


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def test_a_shape_that_eager_cannot_run_is_noted(tmp_path: Path) -> None:
    gm = traced(Sized(), torch.randn(4, 7, 3), dynamic_shapes={"x": {0: "batch"}})
    to_onnx(gm, tmp_path / "model.onnx", verify=False)
    few = evaluating(gm)

    def picky(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 4:
            raise RuntimeError("too many rows\nfor me")
        return gm(x)

    few.forward = picky
    found = verify_file(tmp_path / "model.onnx", trial(gm), [Reference("model", few)], controls(gm))
    assert found.notes == ["model: eager fails at batch=5, skipped: too many rows"]
    assert {row.shape for row in found.checks} == {"batch=4", "batch=2"}


def test_one_shape_alone_is_noted(tmp_path: Path) -> None:
    report = to_onnx(traced(Sized(), torch.randn(4, 7, 3)), tmp_path / "model.onnx")
    assert report.notes == ["model: checked at the traced shape only"]


def test_values_that_are_no_numbers_are_noted(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.tensor([False, True, False, False, False])
            return self.fc(x).masked_fill(hidden, float("-inf"))

    report = to_onnx(traced(Masked(), torch.randn(4, 3)), tmp_path / "model.onnx")
    assert "model: output 'output': 4 of 20 values are NaN or infinite" in report.notes
    assert report.verified


def test_an_output_without_any_number_proves_nothing(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 5))
    with torch.no_grad():
        model[0].bias.fill_(float("nan"))
    with pytest.raises(VerificationError, match="disagree with eager"):
        to_onnx(traced(model, torch.randn(4, 3)), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
