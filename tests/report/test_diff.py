"""Adapters and files against each other: what differs, and by how much."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Adapter
from lora_fx.errors import LoraFxError
from lora_fx.export import export_adapter, to_onnx
from lora_fx.report.diff import diff
from lora_fx.testing import UPDATES, make_adapter, update_of

ONE = make_adapter({"fc": (5, 3), "out": (4, 5)})


def scaled(adapter: Adapter, factor: float, *paths: str) -> Adapter:
    updates: dict[str, Any] = dict(adapter.updates)
    updates |= {p: replace(updates[p], scale=factor * updates[p].scale) for p in paths}
    return replace(adapter, updates=updates)


def test_an_adapter_is_equal_to_itself_in_any_format_and_form(tmp_path: Path) -> None:
    base = nn.ModuleDict({"fc": nn.Linear(3, 5), "out": nn.Linear(5, 4)})
    assert str(diff(ONE, ONE)) == "french and french: 0 differ, 2 are equal"
    lora_fx.save_adapter(ONE, tmp_path / "peft")
    lora_fx.save_adapter(ONE, tmp_path / "a.safetensors", format="kohya", component="unet")
    found = diff(tmp_path / "peft", tmp_path / "a.safetensors", base=base)
    assert (found.same, found.equal) == (True, 2)
    louder = replace(ONE.updates["fc"], up=2 * ONE.updates["fc"].up, scale=0.75)  # type: ignore[attr-defined]
    again = replace(ONE, updates={**ONE.updates, "fc": louder})
    (row,) = diff(ONE, again).rows
    assert (row.path, row.relative) == ("fc", 0.0)
    assert "scale 0.75" in str(row)


def test_a_layer_that_differs_is_told_with_its_distance() -> None:
    found = diff(ONE, scaled(ONE, 1.1, "fc"))
    (row,) = found.rows
    assert (row.path, found.equal) == ("fc", 1)
    assert row.relative == pytest.approx(0.1, rel=1e-6)
    assert "scale 1.5 -> lora  3 -> 5  rank 2  scale 1.65  relative 0.1" in str(found)


def test_the_distance_is_that_of_the_dense_products() -> None:
    other = make_adapter({"fc": (5, 3), "out": (4, 5)}, rank=3, scale=0.7)
    for row in diff(ONE, other).rows:
        one, two = (a.updates[row.path].delta().double() for a in (ONE, other))  # type: ignore[attr-defined]
        assert row.relative == pytest.approx(float((two - one).norm() / one.norm()), rel=1e-6)


def test_what_only_one_has_is_said() -> None:
    more = replace(ONE, replacements={"head.bias": torch.ones(3)})
    found = diff(more, make_adapter({"fc": (5, 3), "new": (5, 3)}))
    assert [(row.path, row.first is None, row.second is None) for row in found.rows] == [
        ("out", False, True),
        ("new", True, False),
        ("head.bias", False, True),
    ]
    assert "head.bias  only in the first: float32 (3,)" in str(found)
    assert found.equal == 1


@pytest.mark.parametrize("kind", [kind for kind in UPDATES if kind != "tokens"])
def test_any_kind_is_compared_on_its_base_and_by_its_tensors_without(kind: str) -> None:
    torch.manual_seed(0)
    update = update_of(kind, (6, 8))
    out, into = (size or own for size, own in zip(update.shape, (6, 8), strict=True))
    base = nn.ModuleDict({"fc": nn.Linear(into, out)})
    one = Adapter("a", {"fc": update})
    plain = make_adapter({"fc": (out, into)})
    for given in (base, None):
        assert diff(one, one, base=given).same
        assert not diff(one, plain, base=given).same
    (row,) = diff(one, plain, base=base).rows
    weight = base["fc"].weight.detach()
    first, second = (a.updates["fc"].weight(weight) - weight for a in (one, plain))
    if update.bias is None and kind not in ("ia3", "lora_bias"):
        expected = float((second - first).double().norm() / first.double().norm())
        assert row.relative == pytest.approx(expected, rel=1e-5)


def test_a_bias_alone_is_a_difference() -> None:
    one = update_of("lora_bias", (6, 8))
    assert one.bias is not None
    two: Any = replace(one, bias=2 * one.bias)  # type: ignore[type-var]
    (row,) = diff(Adapter("a", {"fc": one}), Adapter("b", {"fc": two})).rows
    assert row.relative
    assert row.relative > 1e-3


def test_tokens_from_which_on_it_acts_are_a_difference() -> None:
    one: Any = ONE.updates["fc"]
    pair = [Adapter("a", {"fc": replace(one, kind="alora", invocation=(n,))}) for n in (1, 2)]
    assert diff(pair[0], pair[0]).same
    assert "from tokens [1]" in str(diff(*pair))


def test_files_are_compared_tensor_by_tensor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).eval()
    gm = lora_fx.trace(model, (torch.randn(2, 3),))
    adapter = make_adapter({"0": (5, 3)})
    to_onnx(gm, tmp_path / "base.onnx")
    to_onnx(lora_fx.fold(lora_fx.inject(gm, adapter)), tmp_path / "merged.onnx")
    to_onnx(gm, tmp_path / "slots.onnx", adapters="input")
    found = diff(tmp_path / "base.onnx", tmp_path / "merged.onnx")
    (row,) = found.rows
    update: Any = adapter.updates["0"]
    expected = float(update.delta().norm() / model[0].weight.detach().norm())  # type: ignore[operator]
    assert (row.path, row.relative) == ("0.weight", pytest.approx(expected, rel=1e-5))
    assert diff(tmp_path / "base.onnx", tmp_path / "base.onnx").same
    opened = diff(tmp_path / "base.onnx", str(tmp_path / "slots.onnx"))
    assert "0.lora_A  only in the second" in str(opened)
    assert "MatMul  only in the second" in str(opened) or "MatMul  " in str(opened)
    export_adapter(adapter, tmp_path / "slots.onnx", tmp_path / "a.onnx_adapter")
    (row,) = diff(adapter, tmp_path / "a.onnx_adapter").rows
    assert row.relative is not None
    assert row.relative < 1e-6


def test_two_sorts_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(LoraFxError, match=r"a\.onnx is a model, the other an adapter"):
        diff(tmp_path / "a.onnx", ONE)


def test_it_is_json_and_a_table() -> None:
    zero = scaled(ONE, 0.0, "fc", "out")
    found = diff(zero, ONE)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (values["same"], values["rows"][0]["relative"]) == (False, None)
    rows = ElementTree.fromstring(found._repr_html_())
    assert [row[0].text for row in rows[2:]] == ["fc", "out"]
