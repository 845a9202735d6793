"""What is assigned to, or read from, places that a mask names, against eager."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from lora_fx.errors import ExportError
from lora_fx.export import to_onnx
from lora_fx.frontend.trace import trace
from lora_fx.testing import Computes, relative

Tensor = torch.Tensor
ROWS = [True, False, True, False, False, False, True]


def assigns(assign: Callable[[Any, Tensor, Tensor], Tensor]) -> nn.Module:
    """Two activations, (batch, 7, 5) and (batch, 7, 3), of which something is assigned."""
    grid = torch.arange(35).reshape(7, 5) % 3 == 1
    masks = {"mask": torch.tensor([True, False, True, True, False]), "grid": grid}
    return Computes(
        lambda m, x: assign(m, torch.tanh(m.wide(x)), torch.sin(m.narrow(x))),
        wide=nn.Linear(3, 5),
        narrow=nn.Linear(3, 3),
        **{name: nn.Buffer(mask) for name, mask in (masks | {"rows": torch.tensor(ROWS)}).items()},
    )


def put(y: Tensor, places: Any, values: Any) -> Tensor:
    y = y.clone()
    y[places] = values
    return y


# By torch.export alone: symbolic tracing cannot follow an assignment to an item.
ITEMS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "features": lambda m, y, z: put(y, (..., m.mask), z),
    "features of a view": lambda m, y, z: put(y.view(-1, 5), (slice(None), m.mask), z.view(-1, 3)),
    "not": lambda m, y, z: put(y, (..., ~m.mask), z[..., :2]),
    "a number": lambda m, y, z: put(y, (..., m.mask), 0.5),
    "a row": lambda m, y, z: put(y, (..., m.mask), z[:1, :1]),
    "the middle axis": lambda m, y, z: put(y, (slice(None), m.rows), y[:, :3] * 2),
    "two axes": lambda m, y, z: put(y, (slice(None), m.grid), y[:, m.grid] * 2),
    "two masks": lambda m, y, z: put(y, (slice(None), m.rows, m.mask), z[:, 0]),
    "two masks apart": lambda m, y, z: put(
        torch.stack([y, -y], 2), (slice(None), m.rows, slice(None), m.mask), z[:1, :1, :1] * 2
    ),
    "a mask and a list": lambda m, y, z: put(y, (slice(None), m.rows, [4, 0, -3]), z[:, 0]),
    "nothing": lambda m, y, z: put(y, (..., m.mask & ~m.mask), z[..., :0]),
    "everything": lambda m, y, z: put(y, (..., m.mask | ~m.mask), y * 2),
    "zeros": lambda m, y, z: put(y.new_zeros(y.shape), (..., m.mask), z),
    "twice": lambda m, y, z: put(put(y, (..., m.mask), z), (..., ~m.mask), z[..., 1:]),
}
CALLS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "index_put": lambda m, y, z: torch.index_put(y.movedim(-1, 0), [m.mask], z.movedim(-1, 0)),
    "index_put of all": lambda m, y, z: torch.ops.aten.index_put(y, [None, None, m.mask], z),
    "accumulating": lambda m, y, z: torch.ops.aten.index_put(y, [None, None, m.mask], z, True),
    "in place": lambda m, y, z: torch.ops.aten.index_put_(y * 1, [None, None, m.mask], z),
    "read": lambda m, y, z: y[..., m.mask] + z,
    "read two axes": lambda m, y, z: y[:, m.grid] * 2,
}
CASES = [(name, "export") for name in (*ITEMS, *CALLS)] + [(name, "symbolic") for name in CALLS]


def ran(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(found)


@pytest.mark.parametrize(("name", "frontend"), CASES)
def test_a_mask_becomes_a_gather(name: str, frontend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = assigns({**ITEMS, **CALLS}[name]).eval()
    x, other = torch.randn(4, 7, 3), torch.randn(2, 7, 3)
    gm = trace(model, (x,), dynamic_shapes=({0: "batch"},), frontend=frontend)
    to_onnx(gm, tmp_path / "m.onnx")
    with torch.no_grad():
        wanted = model(other)
        assert relative(ran(tmp_path / "m.onnx", other), wanted) <= 1e-5
        assert wanted.numel() == 0 or relative(ran(tmp_path / "m.onnx", -other), wanted) > 1e-2
    kinds = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert not {"NonZero", "GatherND"} & kinds


def test_the_last_write_to_a_place_stays(tmp_path: Path) -> None:
    places = torch.tensor([True, False, True, False, False])
    repeats = [None, None, torch.tensor([1, 4, 1])]
    torch.manual_seed(0)
    model = assigns(
        lambda m, y, z: torch.ops.aten.index_put(put(y, (..., places), 0.0), repeats, z)
    ).eval()
    x = torch.randn(4, 7, 3)
    to_onnx(trace(model, (x,)), tmp_path / "m.onnx")
    assert relative(ran(tmp_path / "m.onnx", x), model(x).detach()) <= 1e-5


def test_a_mask_of_the_input_is_refused_as_it_was(tmp_path: Path) -> None:
    def assign(m: Any, y: Tensor, z: Tensor) -> Tensor:
        return torch.ops.aten.index_put(y, [None, None, z[0, 0].sum() > m.mask], z[..., :1])

    gm = trace(assigns(assign).eval(), (torch.randn(4, 7, 3),), dynamic_shapes=({0: "batch"},))
    with pytest.raises(ExportError, match="no ONNX form"):
        to_onnx(gm, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
