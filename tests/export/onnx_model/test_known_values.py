"""What ONNX has no operator for is computed before, where constants alone are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import ExportError
from lora_fx.testing import Computes, make_adapter, relative

Function = Callable[[torch.Tensor], torch.Tensor]
LACKING: dict[str, Function] = {
    "erfinv": torch.erfinv,
    "lgamma": torch.lgamma,
    "digamma": torch.digamma,
    "polygamma": lambda t: torch.polygamma(1, t),
    "ndtri": torch.special.ndtri,
    "zeta": lambda t: torch.special.zeta(t + 2, t),
    "i0": torch.i0,
    "i0e": torch.special.i0e,
    "matrix_exp": torch.linalg.matrix_exp,
    "searchsorted": lambda t: torch.searchsorted(t[0].contiguous(), t).float(),
}
WINDOW: Function = lambda t: torch.kaiser_window(9, True, 4.0).reshape(3, 3)  # noqa: E731


class Reads(nn.Module):
    def __init__(self, function: Function, reads: str) -> None:
        super().__init__()
        values = torch.linspace(0.1, 0.9, 9).reshape(3, 3)
        self.function, self.reads = function, reads
        self.register_buffer("buffer", values)
        self.weight = nn.Parameter(values.clone())
        self.fc = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        read = {"buffer": self.buffer, "weight": self.weight, "input": x}[self.reads]
        return self.fc(x) + self.function(read)


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
@pytest.mark.parametrize("name", [*LACKING, "kaiser_window"])
def test_a_call_on_constants_is_a_constant(name: str, frontend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Reads(LACKING.get(name, WINDOW), "buffer").eval()
    x, adapter = torch.rand(3, 3), make_adapter({"fc": (3, 3)})
    gm = lora_fx.inject(lora_fx.trace(model, (x,), frontend=frontend), adapter)
    lora_fx.to_onnx(gm, tmp_path / "a.onnx")
    (found,) = lora_fx.Session(tmp_path / "a.onnx").run({"x": x}).values()
    with torch.no_grad():
        assert relative(torch.from_numpy(found), gm(x)) <= 1e-5
        assert relative(torch.from_numpy(found) - model.function(model.buffer), gm(x)) > 1e-2


@pytest.mark.parametrize("reads", ["input", "weight"])
@pytest.mark.parametrize("name", LACKING)
def test_a_call_on_inputs_and_weights_is_refused(name: str, reads: str, tmp_path: Path) -> None:
    gm = lora_fx.trace(Reads(LACKING[name], reads).eval(), (torch.rand(3, 3),))
    with pytest.raises(ExportError, match="has no ONNX form: No ONNX function found"):
        lora_fx.to_onnx(gm, tmp_path / "a.onnx")
    assert not [*tmp_path.iterdir()]


def test_a_quantile_of_the_normal_distribution(tmp_path: Path) -> None:
    """As Gemma 3n finds how much of an activation is cut off."""

    def cut(own: Computes, x: torch.Tensor) -> torch.Tensor:
        share = torch.tensor(0.95, dtype=torch.float32)
        y = own.fc(x)
        return torch.relu(
            y - y.std(-1, keepdim=True) * torch.distributions.Normal(0, 1).icdf(share)
        )

    model, x = Computes(cut, fc=nn.Linear(6, 40)).eval(), torch.randn(4, 6)
    gm = lora_fx.trace(model, (x,))
    lora_fx.to_onnx(gm, tmp_path / "a.onnx")
    (found,) = lora_fx.Session(tmp_path / "a.onnx").run({"x": x}).values()
    assert relative(torch.from_numpy(found), model(x).detach()) <= 1e-5
