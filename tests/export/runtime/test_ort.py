from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from onnxruntime.capi import onnxruntime_pybind11_state as state
from torch import nn

from lora_fx import to_onnx, trace
from lora_fx.errors import ExportError
from lora_fx.export.runtime.ort import call, open_session, to_array
from lora_fx.testing import Computes


def test_outputs_come_by_name_at_every_setting(exported_mlp: Any) -> None:
    feeds = {"x": np.ones((4, 7, 3), np.float32)}
    for optimise in (False, True):
        session = open_session(exported_mlp.path("constant"), threads=1, optimise=optimise)
        assert list(call(session, feeds)) == ["hidden", "score"]


def test_unknown_providers_are_named(exported_mlp: Any) -> None:
    with pytest.raises(ExportError, match="providers NowhereProvider: this onnxruntime has"):
        open_session(exported_mlp.path("constant"), providers=["NowhereProvider"])
    with pytest.raises(ExportError, match="providers NowhereProvider: this onnxruntime has"):
        open_session(exported_mlp.path("constant"), providers="NowhereProvider")


def test_inputs_become_arrays() -> None:
    x = torch.randn(4, 7, requires_grad=True)
    assert np.array_equal(to_array("x", x), x.detach().numpy())
    assert to_array("x", [1, 2]).shape == (2,)
    with pytest.raises(ExportError, match="'x' is a object"):
        to_array("x", object())


def test_numbers_keep_their_value_in_whatever_order_their_bytes_are() -> None:
    x = np.arange(3.0, dtype=">f4")
    assert to_array("x", x).dtype == np.dtype("float32")
    assert np.array_equal(to_array("x", x), x)
    native = np.arange(3.0)
    assert to_array("x", native) is native


@pytest.mark.parametrize("value", [torch.ones(2, dtype=torch.complex64), np.ones(2) * 1j, 1j])
def test_complex_numbers_are_refused_by_name(value: Any) -> None:
    with pytest.raises(ExportError, match=r"input 'x' is complex\d+, .*torch\.view_as_real"):
        to_array("x", value)


@pytest.mark.parametrize("value", [torch.ones(2).to_sparse(), torch.ones(2, device="meta")])
def test_what_holds_no_plain_numbers_is_refused_by_name(value: torch.Tensor) -> None:
    with pytest.raises(ExportError, match=r"input 'x' is no plain tensor: "):
        to_array("x", value)


def test_a_model_of_complex_numbers_is_not_written(tmp_path: Any) -> None:
    model = Computes(lambda m, x: m.layer(x.real), layer=nn.Linear(3, 5)).eval()
    gm = trace(model, (torch.randn(2, 3, dtype=torch.complex64),))
    with pytest.raises(ExportError, match="takes no complex numbers"):
        to_onnx(gm, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_an_output_that_numpy_lacks_is_refused_by_name(tmp_path: Any) -> None:
    model = Computes(lambda m, x: m.layer(x).bfloat16(), layer=nn.Linear(3, 5)).eval()
    with pytest.raises(ExportError, match="outputs output are bfloat16, which numpy lacks"):
        to_onnx(trace(model, (torch.randn(2, 3),)), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_that_memory_is_too_small_for_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise state.RuntimeException("Exception during initialization: std::bad_alloc")

    monkeypatch.setattr(ort, "InferenceSession", full)
    with pytest.raises(ExportError, match=r"model\.onnx: there is not enough memory: free some"):
        open_session(tmp_path / "model.onnx")


@pytest.mark.parametrize(("word", "fails"), [(b"\xff", True), (b"a", False)])
def test_words_that_are_no_text_are_told(word: bytes, fails: bool, tmp_path: Path) -> None:
    y = helper.make_tensor_value_info("y", onnx.TensorProto.STRING, [1])
    words = helper.make_tensor("w", onnx.TensorProto.STRING, [1], [word])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])], "g", [], [y], initializer=[words]
    )
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    session = open_session(tmp_path / "m.onnx")
    if fails:
        with pytest.raises(ExportError, match="onnxruntime: 'utf-8' codec can't decode"):
            call(session, {})
    else:
        assert call(session, {})["y"].tolist() == ["a"]
