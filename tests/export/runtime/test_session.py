from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import fx

from lora_fx.errors import AdapterError, ExportError
from lora_fx.export import Session, export_adapter, to_onnx
from lora_fx.numerics import compare


@pytest.fixture
def session(exported_mlp: Any) -> Session:
    return Session(exported_mlp.path("input"), threads=1)


def agrees(found: dict[str, Any], expected: list[torch.Tensor]) -> bool:
    return all(compare(a, e).ok for a, e in zip(found.values(), expected, strict=True))


def test_base_and_adapters_take_turns(exported: Any, tmp_path: Path) -> None:
    sample, session = exported.sample, Session(exported.path("input"), threads=1)
    expected = {None: sample.eager()}
    for rank in (2, 8, 32):
        adapter, file = sample.adapter(rank), tmp_path / f"{rank}.onnx_adapter"
        export_adapter(adapter, exported.path("input"), file)
        expected[file] = sample.eager(adapter)
    for file in [*expected, *reversed(expected)]:
        found = session.run(sample.other, file)
        assert list(found) == session.outputs
        assert [f for f, values in expected.items() if agrees(found, values)] == [file]


@pytest.mark.parametrize("threads", [-1, 10**9, 10**12])
def test_a_number_of_threads_that_no_machine_has_is_refused(
    exported_mlp: Any, threads: int
) -> None:
    with pytest.raises(ExportError, match=rf"^threads is {threads}: give a number from 1 to "):
        Session(exported_mlp.path("input"), threads=threads)
    assert Session(exported_mlp.path("input"), threads=0).slots, "the control: onnxruntime's own"


def test_garbage_collection_does_not_drop_the_adapter(
    session: Session, exported_mlp: Any, tmp_path: Path
) -> None:
    sample, file = exported_mlp.sample, tmp_path / "a.onnx_adapter"
    export_adapter(sample.adapter(8), exported_mlp.path("input"), file)
    for _ in range(3):
        found = session.run(sample.other, file)
        gc.collect()
        assert agrees(found, sample.eager(sample.adapter(8)))
        assert not agrees(found, sample.eager())


def test_a_replaced_adapter_file_is_loaded_anew(
    session: Session, exported_mlp: Any, tmp_path: Path
) -> None:
    sample, file = exported_mlp.sample, tmp_path / "a.onnx_adapter"
    for seed in (1, 2):
        adapter = sample.adapter(2, seed)
        export_adapter(adapter, exported_mlp.path("input"), file, force=True)
        assert agrees(session.run(sample.other, file), sample.eager(adapter))


def test_names_and_arrays(session: Session, exported_mlp: Any) -> None:
    assert (session.inputs, session.outputs) == (["x"], ["hidden", "score"])
    assert session.slots == ["up", "tail.1"]
    x = exported_mlp.sample.other["x"]
    by_array, by_tensor = session.run({"x": x.numpy()}), session.run({"x": x})
    assert all(np.array_equal(by_array[name], by_tensor[name]) for name in session.outputs)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({}, "missing inputs: x; unknown inputs: none; the model takes x"),
        ({"x": torch.ones(4, 7, 3), "y": 1}, "missing inputs: none; unknown inputs: y"),
        ({"x": torch.ones(4, 7, 3), "up.lora_A": 1}, "unknown inputs: up.lora_A"),
        ({"x": torch.ones(4, 7, 3).double()}, "'x' is float64, and the model takes float32: give"),
        ({"x": [[[1, 2, 3]]]}, "input 'x' is int64, and the model takes float32"),
        ({"x": torch.ones(4, 7, 5)}, "onnxruntime: .*x.*Got: 5 Expected: 3"),
        ({"x": torch.ones(4, 7, 3).bfloat16()}, "'x' is bfloat16"),
        ({"x": [object()]}, "'x' is a list: give a tensor"),
    ],
)
def test_wrong_inputs_are_named(session: Session, inputs: Any, reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        session.run(inputs)


def test_a_foreign_adapter_is_refused(
    session: Session, exported_mlp: Any, twin: fx.GraphModule, tmp_path: Path
) -> None:
    sample = exported_mlp.sample
    to_onnx(twin, tmp_path / "twin.onnx", adapters="input", verify=False)
    export_adapter(sample.adapter(2), tmp_path / "twin.onnx", tmp_path / "a.onnx_adapter")
    with pytest.raises(AdapterError, match="made for another model: model version"):
        session.run(sample.other, tmp_path / "a.onnx_adapter")


def test_missing_and_other_files_are_refused(
    session: Session, exported_mlp: Any, tmp_path: Path
) -> None:
    inputs = exported_mlp.sample.other
    with pytest.raises(AdapterError, match="no such adapter file"):
        session.run(inputs, tmp_path / "nowhere.onnx_adapter")
    with pytest.raises(AdapterError, match=r"is a directory; .* lora_fx.export_adapter"):
        session.run(inputs, tmp_path)
    with pytest.raises(AdapterError, match=r"adapter is a list, expected .* lora_fx.combine"):
        session.run(inputs, [tmp_path, tmp_path])  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="not an adapter file: identifier"):
        session.run(inputs, exported_mlp.path("input"))
    with pytest.raises(AdapterError, match="takes no adapter: its weights are constants"):
        Session(exported_mlp.path("constant")).run(inputs, tmp_path / "any")
    with pytest.raises(ExportError, match=r"nowhere\.onnx: cannot be read"):
        Session(tmp_path / "nowhere.onnx")


def test_truncated_adapters_and_models_are_refused(exported_mlp: Any, tmp_path: Path) -> None:
    file, model = tmp_path / "a.onnx_adapter", exported_mlp.path("input")
    export_adapter(exported_mlp.sample.adapter(2), model, file)
    content = file.read_bytes()
    for end in (0, 6, 40, len(content) // 2):
        (tmp_path / "cut").write_bytes(content[:end])
        with pytest.raises(AdapterError, match=r"cut: (not an adapter file|damaged)"):
            Session(model).run(exported_mlp.sample.other, tmp_path / "cut")
    whole = model.read_bytes()
    for end in (0, 40, len(whole) // 2):
        (tmp_path / "cut.onnx").write_bytes(whole[:end])
        with pytest.raises(ExportError, match=r"cut\.onnx"):
            Session(tmp_path / "cut.onnx")


def test_a_session_shows_what_it_takes(session: Session, exported_mlp: Any) -> None:
    table = ElementTree.fromstring(session._repr_html_())
    rows = [[cell.text for cell in row] for row in table[2:]]
    assert [row[1] for row in rows if row[0] == "input"] == session.inputs
    assert [row[1] for row in rows if row[0] == "output"] == session.outputs
    slots = [row for row in rows if row[0] and row[0].startswith("slot ")]
    assert list(dict.fromkeys(row[0] for row in slots)) == [f"slot {p}" for p in session.slots]
    assert all(".lora_" in str(row[1]) and "r" in str(row[3]) for row in slots)
    assert repr(session).endswith(f"{len(session.slots)} slots")
    constant = Session(exported_mlp.path("constant"), threads=1)
    assert "slot" not in constant._repr_html_()


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_a_copy_opens_the_file_again(
    again: Any, exported_mlp: Any, session: Session, tmp_path: Path
) -> None:
    sample, file = exported_mlp.sample, tmp_path / "a.onnx_adapter"
    export_adapter(sample.adapter(2), exported_mlp.path("input"), file)
    found = again(session).run(sample.other, file)
    assert agrees(found, sample.eager(sample.adapter(2)))
    assert not agrees(found, sample.eager())
