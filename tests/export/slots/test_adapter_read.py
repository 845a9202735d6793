"""Adapter files read back as adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from lora_fx.errors import AdapterError
from lora_fx.export import export_adapter
from lora_fx.export.slots import adapter_file
from lora_fx.export.slots.adapter_file import read_adapter_file
from lora_fx.export.slots.check_adapter import read_stored


def write(path: Path, arrays: dict[str, Any], bfloat16: bool = False) -> Path:
    make = ort.OrtValue.ortvalue_from_numpy
    values = {name: make(array) for name, array in arrays.items()}
    if bfloat16:
        code = onnx.TensorProto.BFLOAT16
        make = ort.OrtValue.ortvalue_from_numpy_with_onnx_type
        values = {name: make(array, code) for name, array in arrays.items()}
    file = ort.AdapterFormat()
    file.set_parameters(values)
    file.export_adapter(str(path))
    return path


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    return np.arange(1, 1 + np.prod(shape)).reshape(shape).astype(dtype)


def test_matrices_are_turned_around_and_the_scale_is_one(exported_mlp: Any, tmp_path: Path) -> None:
    adapter = exported_mlp.sample.adapter(3)
    export_adapter(adapter, exported_mlp.path("input"), tmp_path / "a.onnx_adapter")
    found = read_adapter_file(tmp_path / "a.onnx_adapter", "a")
    assert set(found.updates) == set(adapter.updates)
    for path, update in adapter.updates.items():
        assert found.updates[path].scale == 1
        assert torch.equal(found.updates[path].down, update.down)
        assert torch.equal(found.updates[path].up, 2.0 * update.up)
        assert not torch.equal(found.updates[path].up, 2.2 * update.up)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_the_dtype_is_kept(tmp_path: Path, dtype: Any) -> None:
    arrays = {"fc.lora_A": ones(3, 2, dtype=dtype), "fc.lora_B": ones(2, 5, dtype=dtype)}
    update = read_adapter_file(write(tmp_path / "a", arrays), "a").updates["fc"]
    assert (update.down.numpy().dtype, update.down.shape) == (dtype, (2, 3))
    assert np.array_equal(update.up.numpy(), arrays["fc.lora_B"].T)


def test_bfloat16_keeps_every_bit(tmp_path: Path) -> None:
    bits = {"fc.lora_A": ones(3, 2, dtype=np.uint16), "fc.lora_B": ones(2, 5, dtype=np.uint16)}
    update = read_adapter_file(write(tmp_path / "a", bits, bfloat16=True), "a").updates["fc"]
    assert update.up.dtype is torch.bfloat16
    assert np.array_equal(update.up.view(torch.uint16).numpy(), bits["fc.lora_B"].T)


def test_the_file_may_go_away(tmp_path: Path) -> None:
    file = write(tmp_path / "a", {"fc.lora_A": ones(3, 2), "fc.lora_B": ones(2, 5)})
    update = read_adapter_file(file, "a").updates["fc"]
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(update.down, torch.from_numpy(ones(3, 2)).T)


def test_the_memory_of_the_file_may_go_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = {"fc.lora_A": ones(3, 1), "fc.lora_B": ones(1, 5), "norm.weight": ones(4)}
    stored = read_stored(write(tmp_path / "a", arrays))
    monkeypatch.setattr(adapter_file, "read_stored", lambda path: stored)
    adapter = read_adapter_file(tmp_path / "a", "a")
    for value in stored.values.values():
        value.zero_()
    assert torch.equal(adapter.updates["fc"].down, torch.from_numpy(ones(3, 1)).T)
    assert torch.equal(adapter.replacements["norm.weight"], torch.from_numpy(ones(4)))


def test_a_layer_of_rank_0_or_of_zeros_of_rank_1_is_left_out(tmp_path: Path) -> None:
    arrays = {"fc.lora_A": ones(3, 2), "fc.lora_B": ones(2, 5)}
    arrays |= {"up.lora_A": ones(5, 0), "up.lora_B": ones(0, 4)}
    arrays |= {"one.lora_A": 0 * ones(5, 1), "one.lora_B": 0 * ones(1, 4)}
    arrays |= {"two.lora_A": 0 * ones(5, 2), "two.lora_B": 0 * ones(2, 4)}
    assert list(read_adapter_file(write(tmp_path / "a", arrays), "a").updates) == ["fc", "two"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another name": (
        {"fc.lora_A": ones(3, 2), "fc.lora_B": ones(2, 5), "fc.lora_A.quant.scale": ones(2)},
        r"no A .* of a layer: fc\.lora_A\.quant\.scale \(2,\); expected",
    ),
    "a vector": ({"fc.lora_A": ones(2), "fc.lora_B": ones(2, 5)}, r"fc\.lora_A \(2,\)"),
    "half": ({"fc.lora_A": ones(3, 2)}, r"half of a pair.*fc"),
    "ranks": ({"fc.lora_A": ones(3, 2), "fc.lora_B": ones(4, 5)}, "are of two ranks"),
    "ranks of experts": (
        {"fc.lora_A_experts": ones(4, 2, 3), "fc.lora_B_experts": ones(4, 5, 1)},
        "are of two ranks",
    ),
    "nothing": ({}, "no values"),
    "integers": (
        {"fc.lora_A": ones(3, 2, dtype=np.int64), "fc.lora_B": ones(2, 5)},
        r"fc\.lora_A' has dtype torch\.int64",
    ),
    "not finite": (
        {"fc.lora_A": np.full((3, 2), np.nan, np.float32), "fc.lora_B": ones(2, 5)},
        r"fc\.lora_A' holds NaN",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_export_adapter_does_not_write_is_refused(tmp_path: Path, case: str) -> None:
    arrays, message = REFUSED[case]
    with pytest.raises(AdapterError, match=message):
        read_adapter_file(write(tmp_path / "a", arrays), "a")
