"""What a session gets for an adapter: options where it can be, values where it must be fed."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from lora_fx.export import export_adapter, to_onnx
from lora_fx.export.onnx_model.model_file import load_proto, manifest_in
from lora_fx.export.runtime.active_adapter import activated
from lora_fx.export.runtime.ort import call, open_session
from lora_fx.numerics import compare


@pytest.fixture(scope="module")
def models(exported_mlp: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    required = tmp_path_factory.mktemp("required") / "model.onnx"
    to_onnx(exported_mlp.sample.gm, required, adapters="required", verify=False)
    return {"input": exported_mlp.path("input"), "required": required}


# Whether slots have a default, the adapter's file, whether values are fed.
CASES = [
    ("input", None, False),
    ("input", "a.onnx_adapter", False),
    ("input", "a.safetensors", True),
    ("required", None, True),
    ("required", "a.onnx_adapter", True),
    ("required", "a.safetensors", True),
]


@pytest.mark.parametrize(("mode", "name", "is_fed"), CASES)
def test_an_adapter_is_in_the_options_or_fed_and_its_file_may_go(
    mode: str,
    name: str | None,
    is_fed: bool,
    models: dict[str, Path],
    exported_mlp: Any,
    tmp_path: Path,
) -> None:
    sample, model = exported_mlp.sample, models[mode]
    adapter = None if name is None else sample.adapter(2)
    file = None if name is None else tmp_path / name
    if file is not None:
        export_adapter(adapter, model, file)
    session = open_session(model, threads=1)
    active = activated(session, model, manifest_in(load_proto(model), model), file)
    assert bool(active.feeds) == is_fed
    assert (active.options is not None) == (name is not None and not is_fed)
    if file is not None and is_fed:
        file.write_bytes(b"\0" * file.stat().st_size)
    gc.collect()
    inputs = {key: value.numpy() for key, value in sample.other.items()}
    found = list(call(session, inputs | active.feeds, active.options).values())
    for value, wanted in zip(found, sample.eager(adapter), strict=True):
        assert compare(value, wanted).ok
    for value, other in zip(found, sample.eager(sample.adapter(3)), strict=True):
        assert not compare(value, other).ok
