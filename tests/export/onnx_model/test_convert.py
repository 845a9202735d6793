from __future__ import annotations

import logging
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import fx, nn

from lora_fx.errors import ExportError
from lora_fx.export import Session, to_onnx
from lora_fx.export.onnx_model.convert import OPSETS, convert
from lora_fx.frontend.torch_export import export_program
from lora_fx.frontend.trace import trace
from lora_fx.numerics import compare


def test_an_operator_without_onnx_form_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(x).real

    x = torch.randn(5, 5)
    gm = trace(Odd(), (x,))
    with pytest.raises(ExportError, match=r"no ONNX form: .*linalg_eig"):
        convert(export_program(gm, (x,), {}, None), None)


@pytest.mark.parametrize("alpha", [1, 3])
def test_whole_numbers_are_taken_off_a_float(
    alpha: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As masks are turned into what is added to scores."""

    class Hides(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return x + torch.rsub(mask, 1.5, alpha=alpha) * -1e4

    x, mask = torch.randn(2, 3), torch.tensor([[1, 1, 0], [1, 0, 0]])
    gm = trace(Hides(), (x, mask), dynamic_shapes=({0: "batch"}, {0: "batch"}))
    to_onnx(gm, tmp_path / "m.onnx")
    assert "nn_module_stack" not in capfd.readouterr().err
    found = Session(tmp_path / "m.onnx").run({"x": x, "mask": mask})
    (value,) = found.values()
    assert compare(value, x + (1.5 - alpha * mask) * -1e4).ok
    assert not compare(value, x + (1.0 - alpha * mask) * -1e4).ok


def test_what_is_asserted_of_values_is_left_out(tmp_path: Path) -> None:
    """As transformers asks of the sizes of images; ONNX can assert nothing."""

    class Asserts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 5)

        def forward(self, x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
            torch._check_tensor_all((sizes > 0).all())
            return self.fc(x) * sizes.sum(-1, keepdim=True)

    model, x, sizes = Asserts().eval(), torch.randn(2, 3), torch.tensor([[4, 1], [2, 3]])
    gm = trace(model, (x, sizes), dynamic_shapes=({0: "batch"}, {0: "batch"}))
    to_onnx(gm, tmp_path / "m.onnx")
    (value,) = Session(tmp_path / "m.onnx").run({"x": x, "sizes": sizes + 1}).values()
    with torch.no_grad():
        assert compare(value, model(x, sizes + 1)).ok
        assert not compare(value, model(x, sizes)).ok


def test_experts_that_are_multiplied_in_groups(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By transformers' own operator, which ONNX lacks; the second of three has no row."""
    import transformers.integrations.moe  # noqa: F401 - registers the operator

    class Groups(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            grouped = torch.ops.transformers.grouped_mm_fallback
            result: torch.Tensor = grouped(x, self.experts, ends)
            return result

    x, ends = torch.randn(6, 4), torch.tensor([2, 2, 6], dtype=torch.int32)
    gm = trace(Groups(), (x, ends), dynamic_shapes=({0: "rows"}, None))
    to_onnx(gm, tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")
    session = Session(tmp_path / "m.onnx")
    for last in ([1, 3, 3], [0, 0, 7], [2, 2, 5]):
        x, ends = torch.randn(7, 4), torch.tensor(last, dtype=torch.int32)
        (found,) = session.run({"x": x, "ends": ends}).values()
        assert compare(found, gm(x, ends)).ok
        assert not compare(found, gm(x, torch.full_like(ends, last[-1]))).ok


def test_the_exporter_is_quiet(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said, logger = BufferingHandler(1000), logging.getLogger("torch.onnx")
    monkeypatch.setattr(logger, "handlers", [said])
    gm = trace(nn.Linear(3, 5), (torch.randn(4, 3),))
    convert(export_program(gm, (torch.randn(4, 3),), {}, None), None)
    assert said.buffer == []
    logging.getLogger("torch.onnx.control").warning("heard")
    assert len(said.buffer) == 1
    assert capfd.readouterr() == ("", "")


def test_t5_whose_attention_reshapes_a_transposed_tensor(tmp_path: Path) -> None:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=100, use_cache=False
    )
    ids = torch.randint(0, 100, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["decoder_input_ids"] = ids[:, :5].clone()
    shapes = {name: {0: "batch", 1: "length"} for name in inputs}
    shapes["decoder_input_ids"] = {0: "batch", 1: "written"}
    model = transformers.T5ForConditionalGeneration(config).eval()
    report = to_onnx(trace(model, (), inputs, dynamic_shapes=shapes), tmp_path / "model.onnx")
    assert report.verified
    assert report.outputs == ["logits", "encoder_last_hidden_state"]


def test_a_view_of_what_attention_gives(tmp_path: Path) -> None:
    """It is laid out by position already, so the graph has no copy there: JetMoe's.

    What writes nothing is converted as it was traced; here it is traced again.
    """

    class Views(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            heads = x.unflatten(-1, (3, 4)).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
            mixed = mixed.reshape(len(x), 3, -1, 4).transpose(1, 2).contiguous()
            kept = torch.zeros_like(x)
            kept.view(-1, 12)[0] = 1.0
            return mixed.view(*x.shape[:2], 2, 6) + kept.view(*x.shape[:2], 2, 6)

    torch.manual_seed(0)
    model, x, mask = Views(), torch.randn(3, 7, 12), torch.rand(3, 1, 1, 7) > 0.2
    axes = ({0: "batch", 1: "length"}, {0: "batch", 3: "length"})
    ir.save(convert(export_program(model, (x, mask), {}, axes), None), tmp_path / "m.onnx")
    x, mask = x[:2, 1:], mask[:2, ..., 1:]
    (found,) = Session(tmp_path / "m.onnx").run({"x": x, "mask": mask}).values()
    assert compare(found, model(x, mask)).ok
    assert not compare(found, model(x, torch.ones_like(mask))).ok


@pytest.mark.parametrize("axis", [-2, 1])
def test_complex_positions_get_another_axis(axis: int, tmp_path: Path) -> None:
    """As DeepSeek-V2 and Llama 4 turn their queries."""

    class Turns(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            angles = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.3])
            turns = torch.polar(torch.ones_like(angles), angles) * 0.7
            heads = torch.view_as_complex(x.unflatten(-1, (3, 2, 2)))
            return torch.view_as_real(heads * turns.unsqueeze(axis))

    x = torch.randn(2, 7, 12)
    to_onnx(trace(Turns(), (x,), dynamic_shapes=({0: "batch", 1: "length"},)), tmp_path / "m.onnx")
    (found,) = Session(tmp_path / "m.onnx").run({"x": x[:1, 2:]}).values()
    assert compare(found, Turns()(x[:1, 2:])).ok
    assert not compare(found, Turns()(x)[:1, 2:]).ok


def test_whether_all_is_true(tmp_path: Path) -> None:
    class Chooses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(torch._is_all_true(x > 0), x, 3 * x)

    x = torch.rand(2, 3) + 1
    to_onnx(trace(Chooses(), (x,)), tmp_path / "m.onnx")
    session = Session(tmp_path / "m.onnx")
    for given, wanted in ((x, x), (x - 5, 3 * (x - 5)), (x - x[0, 0], 3 * (x - x[0, 0]))):
        (found,) = session.run({"x": given}).values()
        assert compare(found, wanted).ok
        assert not compare(found, 2 * given).ok


class Attending(nn.Module):
    """Operators whose form differs from opset to opset."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm = nn.Linear(12, 36), nn.LayerNorm(12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)]
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(-2)
        x = self.norm(x + F.gelu(mixed))
        return (x + self.conv(x.mT).mT).softmax(-1).cumsum(1)


@pytest.fixture(scope="module")
def attending() -> fx.GraphModule:
    torch.manual_seed(0)
    model = Attending().eval()
    return trace(model, (torch.randn(2, 7, 12),), dynamic_shapes=({0: "batch", 1: "length"},))


@pytest.mark.parametrize("opset", OPSETS)
def test_the_opset_that_is_asked_for_is_written(
    attending: fx.GraphModule, tmp_path: Path, opset: int
) -> None:
    report = to_onnx(attending, tmp_path / "model.onnx", opset=opset)
    assert report.verified
    assert report.opset == opset
    found = onnx.load(tmp_path / "model.onnx").opset_import
    assert [(entry.domain, entry.version) for entry in found] == [("", opset)]


@pytest.mark.parametrize(
    "opset", [10, 13, 17, 26, 0, -1, 999, True, False, "18", 18.0, float("nan"), 10**30, [18]]
)
def test_an_opset_that_cannot_be_written_is_refused(
    attending: fx.GraphModule, tmp_path: Path, opset: Any
) -> None:
    told: list[str] = []
    reason = r"opset=.*expected a whole number from 18 to 25, or None"
    with pytest.raises(ExportError, match=reason):
        to_onnx(attending, tmp_path / "model.onnx", opset=opset, progress=told.append)
    assert (told, list(tmp_path.iterdir())) == ([], [])


def test_a_conversion_that_falls_short_is_refused(
    attending: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_fx.export.onnx_model.convert.OPSETS", range(10, 26))
    with pytest.raises(ExportError, match=r"opset=13: .* only be translated to opset 18"):
        to_onnx(attending, tmp_path / "model.onnx", opset=13)
    assert list(tmp_path.iterdir()) == []
