"""What torch.onnx does not do twice is not missed: the same bytes as with its own passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch.export import exported_program
from torch.onnx._internal.exporter import _decomp, _fx_passes, _registration

from lora_fx.errors import ExportError
from lora_fx.export import to_onnx
from lora_fx.export.onnx_model import idle_work
from lora_fx.frontend.trace import trace
from lora_fx.testing import Computes

MIXED: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "whole numbers": lambda m, x: x * 2 + 3 - m.count,
    "true division": lambda m, x: m.count / 3 + x,
    "floor division": lambda m, x: torch.div(x.long(), 2, rounding_mode="floor") * x,
    "halves": lambda m, x: x.half() + x,
    "doubles": lambda m, x: (x.double() * x).sum(-1, keepdim=True) + m.count,
    "booleans": lambda m, x: (x > 0) + (x > 0).sum(-1, keepdim=True) * x,
    "powers": lambda m, x: x**2 + 2 ** (x > 1).int(),
    "choices": lambda m, x: torch.where(x > 0, x, 1) + torch.where(x > 0, m.count, x),
    "sizes": lambda m, x: x * x.shape[0] + x.shape[0] / 2,
    "sums of numbers": lambda m, x: (x.int().sum() + x.int().cumsum(0).sum() + x.any()) * x,
    "parts": lambda m, x: torch.cat([*(x * 3).split(2, -1)], 0) + m.count[:1],
}


def composite_operators() -> Any:
    """As run_decompositions collects them."""
    return vars(exported_program)["_collect_all_valid_cia_ops"]()


@contextmanager
def own_passes() -> Iterator[None]:
    """As torch.onnx has it."""
    yield


@pytest.mark.parametrize("name", MIXED)
def test_types_are_promoted_as_torch_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Computes(MIXED[name], count=torch.arange(4)).eval()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    gm = trace(model, (x,), dynamic_shapes=({0: "batch"},), frontend="export")
    to_onnx(gm, tmp_path / "ours.onnx")
    monkeypatch.setattr(idle_work, "without_idle_work", own_passes)
    to_onnx(gm, tmp_path / "theirs.onnx", verify=False)
    assert (tmp_path / "ours.onnx").read_bytes() == (tmp_path / "theirs.onnx").read_bytes()


def test_without_the_pass_the_types_would_be_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Computes(MIXED["doubles"], count=torch.arange(4)).eval()
    gm = trace(model, (torch.randn(3, 4),), frontend="export")
    monkeypatch.setattr(idle_work, "_insert_type_promotion", lambda module: None)
    with pytest.raises(ExportError, match="not valid ONNX"):
        to_onnx(gm, tmp_path / "none.onnx")


def test_torch_onnx_is_left_as_it_was() -> None:
    replaced: list[tuple[Any, str]] = [
        (_registration.ONNXRegistry, "from_torchlib"),
        (_fx_passes, "insert_type_promotion_nodes"),
        (_decomp, "create_onnx_friendly_decomposition_table"),
        (exported_program, "_collect_all_valid_cia_ops"),
        (ir.schemas.OpSignature, "from_op_schema"),
    ]
    before = [vars(owner)[name] for owner, name in replaced]
    with idle_work.without_idle_work():
        assert all(vars(o)[n] is not old for (o, n), old in zip(replaced, before, strict=True))
    with pytest.raises(ValueError, match="stop"), idle_work.without_idle_work():
        raise ValueError("stop")
    assert all(vars(o)[n] is old for (o, n), old in zip(replaced, before, strict=True))


def test_a_translation_that_is_added_is_not_kept() -> None:
    with idle_work.without_idle_work():
        first = _registration.ONNXRegistry.from_torchlib()
        target = next(iter(first.functions))
        first.register_op(target, lambda x: x)
        again = _registration.ONNXRegistry.from_torchlib()
    own = _registration.ONNXRegistry.from_torchlib()
    assert again.functions.keys() == own.functions.keys()
    counts = [len(r.functions[target]) for r in (first, again, own)]
    assert counts == [counts[2] + 1, counts[2], counts[2]]


def test_an_operator_that_is_registered_later_is_decomposed() -> None:
    with idle_work.without_idle_work():
        _decomp.create_onnx_friendly_decomposition_table({torch.ops.aten.relu.default})
        known = composite_operators()
        with torch.library._scoped_library("lora_fx_idle_work", "FRAGMENT") as library:
            library.define("twice(Tensor x) -> Tensor")
            library.impl("twice", lambda x: x + x, "CompositeImplicitAutograd")
            found = _decomp.create_onnx_friendly_decomposition_table({torch.ops.aten.relu.default})
            twice = torch.ops.lora_fx_idle_work.twice.default
            assert composite_operators() == known | {twice}
    assert twice in found
    own = _decomp.create_onnx_friendly_decomposition_table({torch.ops.aten.relu.default})
    assert found.keys() - own.keys() <= {twice}
    assert own.keys() <= found.keys()
    assert composite_operators() == known
