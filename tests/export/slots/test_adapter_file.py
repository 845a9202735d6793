from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import EngineError
from torch import nn

from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.adapters.updates import activated
from lora_fx.errors import AdapterError, ExportError
from lora_fx.export import Session, export_adapter, to_onnx
from lora_fx.numerics import compare
from lora_fx.passes import InjectLora
from lora_fx.testing import traced


def stored(path: Path) -> dict[str, Any]:
    parameters = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
    return {name: torch.from_numpy(value.numpy().copy()) for name, value in parameters.items()}


def test_a_and_b_are_transposed_and_b_carries_the_scale(exported_mlp: Any, tmp_path: Path) -> None:
    adapter = exported_mlp.sample.adapter(2)
    export_adapter(adapter, exported_mlp.path("input"), tmp_path / "a.onnx_adapter")
    values = stored(tmp_path / "a.onnx_adapter")
    for path, update in adapter.updates.items():
        assert torch.equal(values[f"{path}.lora_A"], update.down.T)
        assert torch.equal(values[f"{path}.lora_B"], 2.0 * update.up.T)
        assert not torch.equal(values[f"{path}.lora_B"], 2.2 * update.up.T)
    assert ort.AdapterFormat.read_adapter(str(tmp_path / "a.onnx_adapter")).get_adapter_version()


def test_a_layer_that_the_adapter_leaves_alone_stays_the_base(
    exported_mlp: Any, tmp_path: Path
) -> None:
    sample = exported_mlp.sample
    part = Adapter("part", {"up": sample.adapter(2).updates["up"]})
    export_adapter(part, exported_mlp.path("input"), tmp_path / "part.onnx_adapter")
    assert stored(tmp_path / "part.onnx_adapter")["tail.1.lora_A"].shape == (5, 0)
    session = Session(exported_mlp.path("input"))
    found = session.run(sample.other, tmp_path / "part.onnx_adapter")
    pairs = zip(found.values(), sample.eager(part), sample.eager(), strict=True)
    for value, expected, base in pairs:
        assert compare(value, expected).ok
        assert not compare(value, base).ok


def test_half_precision_adapters_are_rounded_once(tmp_path: Path) -> None:
    x = torch.randn(4, 7, 3).half()
    gm = traced(nn.Sequential(nn.Linear(3, 5)).half(), x)
    to_onnx(gm, tmp_path / "model.onnx", adapters="input")
    update = Update(torch.randn(2, 3).bfloat16(), torch.randn(5, 2).bfloat16(), 1.7)
    adapter = Adapter("rounded", {"0": update})
    export_adapter(adapter, tmp_path / "model.onnx", tmp_path / "half.onnx_adapter")
    values = stored(tmp_path / "half.onnx_adapter")
    assert torch.equal(values["0.lora_B"], (1.7 * update.up.float()).half().T)
    found = Session(tmp_path / "model.onnx").run({"input": x}, tmp_path / "half.onnx_adapter")
    assert compare(found["output"], InjectLora(adapter)(gm).graph_module(x).detach()).ok
    loud = Adapter("loud", {"0": replace(update, scale=1e6)})
    with pytest.raises(AdapterError, match=r"0: adapter loud: values overflow torch.float16"):
        export_adapter(loud, tmp_path / "model.onnx", tmp_path / "loud.onnx_adapter")
    assert not (tmp_path / "loud.onnx_adapter").exists()


def test_bfloat16_adapters_keep_every_bit(tmp_path: Path) -> None:
    gm = traced(nn.Sequential(nn.Linear(3, 5)).bfloat16(), torch.randn(4, 7, 3).bfloat16())
    model, file = tmp_path / "model.onnx", tmp_path / "a.onnx_adapter"
    to_onnx(gm, model, adapters="input", verify=False)
    update = Update(torch.randn(2, 3), torch.randn(5, 2), 1.7)
    export_adapter(Adapter("a", {"0": update}), model, file)
    values = ort.AdapterFormat.read_adapter(str(file)).get_parameters()
    up = torch.from_dlpack(values["0.lora_B"])
    assert torch.equal(up, (1.7 * update.up).bfloat16().T)
    assert not torch.equal(up, (1.87 * update.up).bfloat16().T)


UPDATE = Update(torch.randn(2, 3), torch.randn(5, 2), 1.0)
BEHIND = Update(torch.randn(2, 5), torch.randn(4, 2), 1.0)
MISFITS = {
    r"no slot at up\.fc, x; the model has slots at up, tail\.1": Adapter(
        "other", {"up": UPDATE, "up.fc": UPDATE, "x": UPDATE}
    ),
    r"up: made for a layer 4 -> 5, the model's is 3 -> 5": Adapter(
        "wide", {"up": replace(UPDATE, down=torch.randn(2, 4))}
    ),
    r"no slot at tail\.1\.weight; .* export the model with slots= for these": Adapter(
        "saved", {"up": UPDATE}, {"tail.1.weight": torch.zeros(4, 5)}
    ),
    "up: lora_bias needs a vector .* vectors=True": Adapter(
        "biased", {"up": replace(UPDATE, bias=torch.ones(5))}
    ),
    r"act from the tokens \(1,\) on, and from \(2,\): one file has one": Adapter(
        "two", {"up": activated(UPDATE, [1]), "tail.1": activated(BEHIND, [2])}
    ),
    r"act from the tokens \(\) on, and from \(2,\): one file has one": Adapter(
        "part", {"up": UPDATE, "tail.1": activated(BEHIND, [2])}
    ),
    r"acts from its invocation tokens \[2\] on .* the model has no slot for these": Adapter(
        "late", {"up": activated(UPDATE, [2]), "tail.1": activated(BEHIND, [2])}
    ),
    "up: adapter broken holds NaN": Adapter(
        "broken", {"up": replace(UPDATE, up=torch.full((5, 2), float("nan")))}
    ),
}


@pytest.mark.parametrize("reason", MISFITS)
def test_an_adapter_that_does_not_fit_is_refused(
    exported_mlp: Any, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=reason):
        export_adapter(MISFITS[reason], exported_mlp.path("input"), tmp_path / "a.onnx_adapter")
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_exist_or_are_inputs_are_refused(exported_mlp: Any, tmp_path: Path) -> None:
    adapter, model = exported_mlp.sample.adapter(2), exported_mlp.path("input")
    out = tmp_path / "a.onnx_adapter"
    out.write_text("precious")
    with pytest.raises(ExportError, match="exists: pass force=True"):
        export_adapter(adapter, model, out)
    assert out.read_text() == "precious"
    export_adapter(adapter, model, out, force=True)
    assert out.read_bytes()[4:8] == b"TORT"
    with pytest.raises(ExportError, match="is an input of this call"):
        export_adapter(adapter, model, model, force=True)


def test_a_model_without_slots_is_refused(exported_mlp: Any, tmp_path: Path) -> None:
    adapter = exported_mlp.sample.adapter(2)
    with pytest.raises(ExportError, match="; give it slots with lora-fx add-lora, or export it"):
        export_adapter(adapter, exported_mlp.path("constant"), tmp_path / "a.onnx_adapter")


def test_a_file_that_onnxruntime_cannot_write_says_where_to_look(
    exported_mlp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not tell a full disk from other failures."""

    class Full:
        def __getattr__(self, name: str) -> Any:
            return fails if name == "export_adapter" else lambda *_: None

    def fails(path: str) -> None:
        raise EngineError(f"Failed to flush {path}")

    monkeypatch.setattr("onnxruntime.AdapterFormat", Full)
    adapter, model = exported_mlp.sample.adapter(2), exported_mlp.path("input")
    out = tmp_path / "a.onnx_adapter"
    with pytest.raises(ExportError, match=f"make room there: Failed to flush {out}"):
        export_adapter(adapter, model, out)
    assert list(tmp_path.iterdir()) == []
