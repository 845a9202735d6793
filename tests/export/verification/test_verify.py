from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from lora_fx import trace
from lora_fx.errors import VerificationError
from lora_fx.export import to_onnx
from lora_fx.export.program.example_inputs import example_inputs
from lora_fx.export.program.export_unit import ExportUnit, export_unit
from lora_fx.export.program.shape_variants import Case
from lora_fx.export.report import Reference
from lora_fx.export.verification import other_sizes
from lora_fx.export.verification.eager import evaluating
from lora_fx.export.verification.negative_controls import controls
from lora_fx.export.verification.rounding import WIDER, _in_wider, widened
from lora_fx.export.verification.verify import verify_file
from lora_fx.numerics import TOLERANCE
from lora_fx.passes import InjectLora
from lora_fx.testing import traced
from lora_fx.testing.models import Computes


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


class Asking(nn.Module):
    """A layer behind which Python code asks for a size."""

    def __init__(self, way: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fc, self.way = nn.Linear(3, 8), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.way(self.fc(x))


def unchecked(model: nn.Module, free: dict[int, Any]) -> fx.GraphModule:
    """A graph of a model that takes another way for one row, which `trace` would refuse."""
    given = (torch.randn(2, 32, 3),)
    return trace(model.eval(), given, dynamic_shapes={"x": free}, check=False)


def padded(y: torch.Tensor) -> torch.Tensor:
    more = -y.shape[1] % 4
    y = F.pad(y, (0, 0, 0, more)) if more else y
    return y.view(y.shape[0], -1, 4, 8)


def by_pieces(y: torch.Tensor) -> torch.Tensor:
    """A step for each 64 places, as linear attention (Qwen3-Next's) takes."""
    more = -y.shape[1] % 64
    for _ in range((y.shape[1] + more) // 64):
        y = 2 * y
    return y


Dim = torch.export.Dim
# What is asked, the first size at which the model takes another way, and sizes where it does not.
ASKED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str, dict[int, Any]]] = {
    "one": (
        lambda y: 2 * y if y.shape[0] == 1 else y,
        "batch=1, length=1",
        {0: Dim("batch", min=2)},
    ),
    "long": (lambda y: 2 * y if y.shape[1] > 16 else y, "length=16", {1: Dim("length", min=17)}),
    "short": (lambda y: 2 * y if y.shape[1] < 40 else y, "length=40", {1: Dim("length", max=39)}),
    "pieces": (by_pieces, "length=65", {1: Dim.DYNAMIC(max=64)}),
    "even": (lambda y: y if y.shape[1] % 2 else 2 * y, "length=33", {}),
}


@pytest.mark.parametrize("asked", ASKED)
def test_a_file_that_is_wrong_at_sizes_that_are_free_is_not_written(
    asked: str, tmp_path: Path
) -> None:
    way, where, meant = ASKED[asked]
    free: dict[int, Any] = {0: "batch", 1: "length"}
    if asked == "even":  # at one place it is wrong as well
        free = {0: Dim("batch", min=2), 1: Dim.DYNAMIC(min=2)}
        where = "x_dim_1=33"
    gm = unchecked(Asking(way), free)
    with pytest.raises(VerificationError, match=rf"another way at .*{where} than at .*=2, .*=32,"):
        to_onnx(gm, tmp_path / "model.onnx")
    assert not [*tmp_path.iterdir()]
    if meant:
        gm = traced(Asking(way), torch.randn(2, 32, 3), dynamic_shapes={"x": free | meant})
        assert to_onnx(gm, tmp_path / "model.onnx").verified


class Pair(nn.Module):
    def __init__(self, is_asked: bool) -> None:
        super().__init__()
        self.fc, self.is_asked = nn.Linear(3, 8), is_asked

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        same = x.shape[0] == y.shape[0] and self.is_asked
        return self.fc(x).sum(0) + self.fc(y).sum(0) * (2 if same else 1)


@pytest.mark.parametrize("is_asked", [True, False])
def test_dimensions_that_are_named_apart_are_tried_apart(is_asked: bool, tmp_path: Path) -> None:
    given = torch.randn(4, 3), torch.randn(4, 3)
    gm = traced(Pair(is_asked), *given, dynamic_shapes={"x": {0: "a"}, "y": {0: "b"}})
    if is_asked:
        with pytest.raises(VerificationError, match="another way at a=4, b=5 than at a=4,"):
            to_onnx(gm, tmp_path / "model.onnx")
    else:
        assert to_onnx(gm, tmp_path / "model.onnx").verified


def test_sizes_that_a_file_refuses_are_noted_and_others_are_checked(tmp_path: Path) -> None:
    free = {"x": {0: "batch", 1: "length"}}
    report = to_onnx(
        traced(Asking(padded), torch.randn(2, 32, 3), dynamic_shapes=free), tmp_path / "a.onnx"
    )
    assert "batch=1, length=32" in {row.shape for row in report.checks}
    assert report.notes == [
        f"{where}: the file refuses it, the model takes it"
        for where in ("batch=2, length=1", "batch=2, length=33")
    ]
    report = to_onnx(
        traced(Sized(), torch.randn(2, 32, 3), dynamic_shapes=free), tmp_path / "b.onnx"
    )
    assert report.notes == []
    assert "batch=1, length=1" in {row.shape for row in report.checks}


def test_sizes_at_which_a_model_fails_are_tried_one_by_one(tmp_path: Path) -> None:
    def way(y: torch.Tensor) -> torch.Tensor:
        if y.shape[1] < 2:
            raise ZeroDivisionError("too short")
        return 2 * y if y.shape[0] == 1 else y

    free = {0: "batch", 1: "length"}
    with pytest.raises(VerificationError, match="another way at batch=1, length=32 than"):
        to_onnx(unchecked(Asking(way), free), tmp_path / "model.onnx")
    right = unchecked(Asking(lambda y: way(y) / (2 if y.shape[0] == 1 else 1)), free)
    assert to_onnx(right, tmp_path / "model.onnx").notes == []


def spread(y: torch.Tensor) -> torch.Tensor:
    return (y - y.mean(1, keepdim=True)).square().sum(1) / (y.shape[1] - 1)


def at_one_place(way: Callable[[torch.Tensor], Any], path: Path) -> tuple[set[str], str]:
    """The shapes that were checked, and what is said of the file: its notes, or why it is none."""
    free = {"x": {0: Dim("batch", min=2), 1: "length"}}
    gm = traced(Asking(way), torch.randn(2, 32, 3), dynamic_shapes=free)
    try:
        report = to_onnx(gm, path)
    except VerificationError as error:
        return set(), str(error)
    return {row.shape for row in report.checks}, "\n".join(report.notes)


def test_one_place_may_give_no_number(tmp_path: Path) -> None:
    shapes, said = at_one_place(spread, tmp_path / "model.onnx")
    assert len(shapes) == 3
    assert "batch=2, length=1" not in shapes
    assert said == ""


ONE, NONE, EMPTY = torch.ones(2), torch.full((2,), torch.nan), torch.ones(0)


@pytest.mark.parametrize(
    ("file", "model", "told"),
    [(ONE, NONE, 1), (NONE, ONE, 1), (NONE, NONE, 0), (ONE, ONE, 1), (EMPTY, EMPTY, 1)],
)
def test_no_number_is_left_out_where_both_give_none(
    file: torch.Tensor, model: torch.Tensor, told: int
) -> None:
    assert other_sizes._told(["y"], [file], (model,)) == (
        (["y"], [file], [model]) if told else ([], [], [])
    )


def test_one_place_may_not_give_another_number_of_tensors(tmp_path: Path) -> None:
    """onnxruntime 1.31 refuses what 1.32 gives two tensors for."""
    said = at_one_place(lambda y: torch.chunk(y, 2, 1), tmp_path / "model.onnx")[1]
    told = r"length=1 .*\n.*1 tensors, the file 2|length=1: the file refuses it"
    assert re.search(told, said)


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


@pytest.mark.parametrize("is_cast", [True, False])
def test_an_output_of_another_type_is_named_as_one(is_cast: bool, tmp_path: Path) -> None:
    def way(y: torch.Tensor) -> torch.Tensor:
        return y.float().sum(1).half() if is_cast else y.sum(1)

    gm = traced(Asking(way).half(), torch.randn(2, 4, 3).half())
    if is_cast:
        assert to_onnx(gm, tmp_path / "model.onnx").verified
    else:
        with pytest.raises(VerificationError, match="'output' is float32, eager's is float16"):
            to_onnx(gm, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("dtype", "way", "least", "most"),
    [
        (torch.float16, lambda y: (y + 16) - 16, 2e-3, 2e-2),
        (torch.float32, lambda y: (300 * y).sin(), 1e-5, 2e-4),
    ],
)
def test_what_eager_itself_rounds_is_allowed(
    dtype: torch.dtype, way: Any, least: float, most: float, tmp_path: Path
) -> None:
    model = Computes(lambda self, x: way(self.layer(x)), layer=nn.Linear(64, 5)).to(dtype)
    gm = traced(model, torch.randn(7, 64).to(dtype))
    report = to_onnx(gm, tmp_path / "model.onnx")
    assert any(least < row.relative for row in report.checks)
    assert all(row.relative < row.tolerance < most for row in report.checks)
    with torch.no_grad():
        model.layer.weight *= 1.1
    larger = [Reference("larger", evaluating(gm))]
    evidence = verify_file(tmp_path / "model.onnx", trial(gm), larger, [])
    assert not any(row.ok for row in evidence.checks)


@pytest.mark.parametrize(
    ("rounding", "dtype", "found"),
    [
        (4e-3, torch.float16, 8e-3),
        (5e-4, torch.float16, 2e-3),
        (1.1e-2, torch.bfloat16, 1e-2),  # as much as a wrong scale makes
        (float("nan"), torch.float16, 2e-3),
        (2e-6, torch.float32, 2e-5),
        (5e-7, torch.float32, 1e-5),
        (3e-5, torch.float32, 1e-5),
    ],
)
def test_what_rounding_is_allowed_is_less_than_a_wrong_scale_makes(
    rounding: float, dtype: torch.dtype, found: float
) -> None:
    assert widened(rounding, TOLERANCE[dtype], dtype) == pytest.approx(found)
    assert widened(rounding, 0.0, dtype) == 0.0  # a whole number


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_type_that_is_named_is_the_wider_one_too(dtype: torch.dtype) -> None:
    """A third in float16 would be off by rounding that nobody asked about."""
    model = Computes(lambda m, x: x * torch.full_like(x, 1 / 3, dtype=dtype))
    x = torch.randn(4, 6, dtype=dtype)
    subject = Reference("model", trace(model, (x,), frontend="export"))
    (found,) = _in_wider(subject, Case("", (x,), {}), dtype)
    wide = x.to(WIDER[dtype][0])
    assert torch.equal(found, wide * torch.full_like(wide, 1 / 3))
    assert not torch.equal(found, wide * torch.full_like(x, 1 / 3))


def test_an_output_without_any_number_proves_nothing(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 5))
    with torch.no_grad():
        model[0].bias.fill_(float("nan"))
    with pytest.raises(VerificationError, match="disagree with eager"):
        to_onnx(traced(model, torch.randn(4, 3)), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_result_is_held_to_no_more_than_its_own_type(tmp_path: Path) -> None:
    def halved(m: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = m.fc(x).half() * 3  # onnxruntime rounds the product otherwise
        return y

    torch.manual_seed(0)
    model = Computes(halved, fc=nn.Linear(64, 64)).eval()
    report = to_onnx(trace(model, (torch.randn(16, 64),)), tmp_path / "a.onnx")
    assert report.verified
    assert {row.tolerance for row in report.checks} == {TOLERANCE[torch.float16]}
    assert max(row.relative for row in report.checks) > TOLERANCE[torch.float32]
