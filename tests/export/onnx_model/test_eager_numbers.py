from __future__ import annotations

import unittest.mock
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx.export import Session, to_onnx
from lora_fx.frontend.trace import trace
from lora_fx.numerics import compare
from lora_fx.testing import relative


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> Any:
        return F.logsigmoid(self.fc(x)), self.fc(x).sigmoid().log()


def off(path: Path, model: nn.Module, **inputs: torch.Tensor) -> float:
    """How far a file is from its model, which has numbers there."""
    with torch.no_grad():
        results = model(**inputs)
    expected = [results] if isinstance(results, torch.Tensor) else [*results]
    assert all(each.isfinite().all() for each in expected)
    found = [torch.as_tensor(each) for each in Session(path).run(inputs).values()]
    return max(relative(*pair) for pair in zip(found, expected, strict=True))


def test_gates_that_are_all_but_closed_keep_their_logarithm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Gate().eval(), torch.randn(4, 3)
    to_onnx(trace(model, (x,)), tmp_path / "model.onnx")
    assert off(tmp_path / "model.onnx", model, x=40 * x) < 1e-5
    assert off(tmp_path / "model.onnx", model, x=-40 * x) < 1e-5


class Rare(nn.Module):
    """The probability of an event, in two forms, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 1)
        nn.init.constant_(self.fc.bias, -15.0)

    def forward(self, x: torch.Tensor) -> Any:
        event = self.fc(x).sigmoid()
        return event.squeeze(-1), x * (self.fc(x) + 15).sigmoid(), event


def test_a_probability_near_0_is_given_to_rounding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Rare().eval(), torch.randn(4, 3)
    to_onnx(trace(model, (x,), dynamic_shapes=({0: "batch"},)), tmp_path / "model.onnx")
    found = [torch.as_tensor(v) for v in Session(tmp_path / "model.onnx").run({"x": x}).values()]
    with torch.no_grad():
        expected = model(x)
    assert max(expected[0]) < 1e-5
    assert relative(found[0], expected[0]) < 1e-5
    assert relative(found[2], expected[2]) < 1e-5
    held = onnx.load(tmp_path / "model.onnx").graph.node
    assert [node.op_type for node in held].count("Sigmoid") == 1, "a gate stays one operator"


class Halfway(nn.Module):
    """Float32 at both ends, and bfloat16 in between, as ALiBi is made in Falcon."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).bfloat16()
        h = F.layer_norm(F.gelu(h) * 0.5 + h.softmax(-1) - h.mean(-1, keepdim=True), (16,))
        heads = h[:, None]
        seen = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)[:, 0]
        h = torch.where(seen > 0.1, seen, h).clamp(-3, 3)
        return self.last(F.linear(h, self.first.weight.bfloat16()).float())


def test_bfloat16_in_between_is_rounded_as_eager_rounds_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Halfway().eval(), torch.randn(2, 5, 16)
    to_onnx(trace(model, (x,)), tmp_path / "model.onnx")
    assert off(tmp_path / "model.onnx", model, x=x) < 1e-6
    with torch.no_grad(), unittest.mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.float):
        unrounded = model(x)
    found = Session(tmp_path / "model.onnx").run({"x": x})
    assert relative(torch.as_tensor(found["output"]), unrounded) > 1e-3


class Autocast(nn.Module):
    """Layers under autocast, of which the outputs are held to its precision."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layer(x).float()


def test_a_model_that_turns_autocast_on_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Autocast().eval(), torch.randn(2, 5, 16)
    report = to_onnx(trace(model, (x,)), tmp_path / "model.onnx")
    assert off(tmp_path / "model.onnx", model, x=x) < 1e-2
    model.layer.linear2.weight.data.mul_(1.1)
    assert off(tmp_path / "model.onnx", model, x=x) > 1e-2
    assert all(check.tolerance == 1e-2 for check in report.checks)


LEAST = torch.finfo(torch.float32).min


class Masked(nn.Module):
    """Attention under a mask of numbers, or of booleans."""

    def __init__(self, hidden: float | None) -> None:
        super().__init__()
        self.fc, self.hidden = nn.Linear(3, 8), hidden

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> Any:
        q = self.fc(x).view(2, 4, 2, 4).transpose(1, 2)
        mask = seen[:, None]
        if self.hidden is not None:
            mask = torch.where(mask, 0.0, self.hidden)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)


@pytest.mark.parametrize("queries", [4, 1])
@pytest.mark.parametrize(
    ("hidden", "options"),
    [
        (None, {"opset": 23}),
        (None, {"portable": True}),
        (-torch.inf, {}),
        (-torch.inf, {"portable": True}),
        (LEAST, {"opset": 23}),
    ],
)
def test_a_row_that_a_mask_hides_whole_is_as_eager_has_it(
    hidden: float | None, options: dict[str, Any], queries: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Masked(hidden).eval(), torch.randn(2, 4, 3)
    seen = torch.ones(2, queries, 4, dtype=torch.bool)
    to_onnx(trace(model, (x, seen)), tmp_path / "model.onnx", **options)
    seen[0, 0] = False
    assert off(tmp_path / "model.onnx", model, x=x, seen=seen) < 1e-5
    other = Masked(None if hidden == LEAST else LEAST)
    other.load_state_dict(model.state_dict())
    assert off(tmp_path / "model.onnx", other, x=x, seen=seen) > 1e-2


@pytest.mark.parametrize("opset", [None, 18])
def test_no_guard_stays_where_no_row_can_be_empty(opset: int | None, tmp_path: Path) -> None:
    model, x = Masked(LEAST).eval(), torch.randn(2, 4, 3)
    seen = torch.ones(2, 4, 4, dtype=torch.bool)
    to_onnx(trace(model, (x, seen)), tmp_path / "model.onnx", opset=opset)
    kinds = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert ("Attention" in kinds) == (opset is None)
    assert "IsNaN" not in kinds


class Windows(nn.Module):
    """Attention within windows, which stand before the heads, or without heads at all."""

    def __init__(self, heads: tuple[int, ...], **options: Any) -> None:
        super().__init__()
        self.qkv, self.heads, self.options = nn.Linear(8, 18), heads, options

    def forward(self, x: torch.Tensor) -> Any:
        parts = self.qkv(x).unflatten(-1, (3, *self.heads, -1)).unbind(x.dim() - 1)
        q, k, v = (part.transpose(1, -2) if self.heads else part for part in parts)
        return F.scaled_dot_product_attention(q, k, v, **self.options)


HIDDEN = torch.tensor([[True, False, True]]).repeat(3, 1)
HIDDEN[1] = False


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"attn_mask": HIDDEN}, {"attn_mask": -1.0 * HIDDEN, "scale": 0.3}],
)
def test_attention_has_any_number_of_axes(
    options: dict[str, Any], shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Three of them, or five as in Hiera; torch.onnx takes four."""
    torch.manual_seed(0)
    model = Windows((2,) if len(shape) > 3 else (), **options).eval()
    batch = {"x": {0: "batch"}}
    to_onnx(trace(model, (torch.randn(shape),), dynamic_shapes=batch), tmp_path / "model.onnx")
    x = torch.randn(3, *shape[1:])
    assert off(tmp_path / "model.onnx", model, x=x) < 1e-5
    model.options = {"scale": 0.9}
    assert off(tmp_path / "model.onnx", model, x=x) > 1e-3


class Inverse(nn.Module):
    """Torch puts the windows of a spectrum at places in int32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        window = torch.hann_window(16)
        spectrum = torch.stft(x, 16, 4, window=window, return_complex=True)
        halved = torch.view_as_complex(torch.view_as_real(spectrum) * 0.5)
        return torch.istft(halved, 16, 4, window=window)


def test_what_is_put_at_narrow_places_is_put_there(tmp_path: Path) -> None:
    x = torch.randn(4, 60)
    to_onnx(trace(Inverse(), (x[:2],), dynamic_shapes=({0: "batch"},)), tmp_path / "m.onnx")
    (found,) = Session(tmp_path / "m.onnx").run({"x": x}).values()
    assert compare(found, Inverse()(x)).ok
    assert not compare(found, Inverse()(x.flip(0))).ok


class Pool(nn.Module):
    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.pool(x)
        return y


@pytest.mark.parametrize("kind", [nn.AvgPool2d, nn.AvgPool3d])
@pytest.mark.parametrize(
    "options", [{"padding": 1, "count_include_pad": False}, {"kernel_size": 3, "stride": 1}]
)
def test_sums_of_windows_are_divided_by_what_is_said(
    kind: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    model = Pool(kind(**{"kernel_size": 2, "divisor_override": 3, **options}))
    x = torch.randn(2, 3, 4, 5, 6)[:, :, 0 if kind is nn.AvgPool2d else slice(None)]
    to_onnx(trace(model, (x,)), tmp_path / "model.onnx")
    assert off(tmp_path / "model.onnx", model, x=x) < 1e-5
    model.pool = kind(**{"kernel_size": 2, **options})
    assert off(tmp_path / "model.onnx", model, x=x) > 1e-3


class Distances(nn.Module):
    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return torch.cdist(x, codes, self.p, self.mode)


BY_SIZE = "use_mm_for_euclid_dist_if_necessary"


@pytest.mark.parametrize(
    ("p", "mode", "codes"),
    [
        (2.0, BY_SIZE, 7), (2.0, BY_SIZE, 30), (2.0, "use_mm_for_euclid_dist", 7),
        (2.0, "donot_use_mm_for_euclid_dist", 30), (1.0, BY_SIZE, 7), (3.0, BY_SIZE, 7),
        (0.0, BY_SIZE, 7), (float("inf"), BY_SIZE, 7),
    ],
)  # fmt: skip
def test_distances_between_rows_have_a_form(
    p: float, mode: str, codes: int, tmp_path: Path
) -> None:
    """As codecs ask for the nearest code (Mimi, and whoever quantises vectors)."""
    torch.manual_seed(0)
    model, path = Distances(p, mode), tmp_path / "model.onnx"
    free = ({0: "batch", 1: "rows"}, {0: "batch"})
    example = torch.randn(2, 5, 3), torch.randn(2, codes, 3)
    to_onnx(trace(model, example, dynamic_shapes=free), path)
    inputs = {"x": torch.randn(3, 40, 3), "codes": torch.randn(3, codes, 3)}
    assert off(path, model, **inputs) < 1e-5
    assert off(path, Distances(p + 1, mode) if p < 9 else Distances(4, mode), **inputs) > 1e-3
