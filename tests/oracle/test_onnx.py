"""Every architecture in every ONNX form, against PEFT in eager, at shapes that were not traced."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model

import lora_fx
from lora_fx import Session, compare, export_adapter, fold, inject, load_adapter, to_onnx
from lora_fx.testing import zoo

MODELS = ["bert", "gpt2", "llama", "mlp", "qwen2", "t5", "vit"]
RANKS = (2, 8, 32)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT's own fix


def peft_adapters(case: Any, folder: Path) -> dict[str, Any]:
    """Three adapters of three ranks, saved by PEFT: name -> PEFT's eager outputs."""
    outputs = {}
    for rank in RANKS:
        config = PeftConfig(r=rank, lora_alpha=6, use_rslora=rank > 8, target_modules=case.targets)
        model = get_peft_model(copy.deepcopy(case.model), config)
        torch.manual_seed(rank)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0.0, 0.15)
        path = folder / f"rank{rank}"
        model.save_pretrained(path, save_embedding_layers=False)
        loaded = PeftModel.from_pretrained(copy.deepcopy(case.model), path).eval()
        with torch.no_grad():
            outputs[path.name] = loaded(**case.others)
    return outputs


def named(outputs: Any) -> dict[str, np.ndarray]:
    """Eager outputs by their field names, as the file gives them."""
    fields = outputs if isinstance(outputs, dict) else {"output": outputs}
    return {k: v.detach().numpy() for k, v in fields.items() if isinstance(v, torch.Tensor)}


def worst(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    assert set(wanted) <= set(got)
    return max(compare(got[name], value).relative for name, value in wanted.items())


@pytest.mark.parametrize("model", MODELS)
def test_every_form_equals_peft(model: str, tmp_path: Path) -> None:
    case, gm = zoo(model)
    wanted = {name: named(out) for name, out in peft_adapters(case, tmp_path).items()}
    with torch.no_grad():
        base = named(case.model(**case.others))
    feeds = {name: value.numpy() for name, value in case.others.items()}

    injected = inject(gm, load_adapter(tmp_path / "rank8"))
    for name, graph in {"merged": fold(injected), "unmerged": injected}.items():
        report = to_onnx(graph, tmp_path / f"{name}.onnx")
        assert all(check.ok for check in report.checks)
        got = Session(tmp_path / f"{name}.onnx").run(feeds)
        assert worst(got, wanted["rank8"]) <= 1e-5
        assert worst(got, base) > 1e-2

    path = tmp_path / "swappable.onnx"
    to_onnx(injected, path, adapters="input")
    session = Session(path)
    assert worst(session.run(feeds), base) <= 1e-5
    for name, outputs in wanted.items():
        file = tmp_path / f"{name}.onnx_adapter"
        export_adapter(load_adapter(tmp_path / name), path, file)
        got = session.run(feeds, adapter=file)
        assert worst(got, outputs) <= 1e-5
        assert worst(got, base) > 1e-2
        assert worst(plain_onnxruntime(path, file, feeds), outputs) <= 1e-5
    onnx.checker.check_model(str(path), full_check=True)
    for file in tmp_path.glob("*.onnx"):
        assert str(Path(lora_fx.__file__).parent).encode() not in file.read_bytes()


def plain_onnxruntime(path: Path, adapter: Path, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
    """What a user without this package does."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    loaded = onnxruntime.LoraAdapter()
    loaded.Load(str(adapter))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(loaded)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds, options), strict=True))
