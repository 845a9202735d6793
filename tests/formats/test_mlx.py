"""MLX's adapters against plain arithmetic: what its layers compute, written out."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import lora_fx
from lora_fx.errors import AdapterError
from lora_fx.numerics import compare

IDS = torch.tensor([[1, 4, 7, 10], [0, 2, 9, 3]])
FIELDS: dict[str, Any] = {
    "fine_tune_type": "lora", "num_layers": 4, "model": "x", "seed": 0, "batch_size": 4,
    "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": ["fc"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def net() -> Any:
    torch.manual_seed(0)
    layers = OrderedDict(emb=nn.Embedding(11, 3), fc=nn.Linear(3, 5), head=nn.Linear(5, 7))
    return nn.Sequential(layers).eval()


def factors(path: str, into: int, out: int) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(into)
    a, b = torch.randn(into, 2, generator=gen), torch.randn(2, out, generator=gen)
    return {f"{path}.lora_a": 0.1 * a, f"{path}.lora_b": 0.1 * b}


def written(path: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> Path:
    path.mkdir()
    save_file(tensors, path / "adapters.safetensors", metadata={"format": "mlx"})
    (path / "adapter_config.json").write_text(json.dumps({**FIELDS, **fields}))
    return path


def output(net: Any, adapter: lora_fx.Adapter) -> torch.Tensor:
    found: torch.Tensor = lora_fx.inject(lora_fx.trace(net, (IDS,)), adapter)(IDS)
    return found


def test_factors_stand_the_other_way_round_and_the_scale_is_stored(
    net: Any, tmp_path: Path
) -> None:
    tensors = {**factors("fc", 3, 5), **factors("emb", 11, 3)}
    path = written(tmp_path / "a", tensors)
    table = net.emb.weight + 20 * tensors["emb.lora_a"] @ tensors["emb.lora_b"]
    x = F.embedding(IDS, table)
    want = net.head(net.fc(x) + 20 * (x @ tensors["fc.lora_a"]) @ tensors["fc.lora_b"]).detach()
    for place in (path, path / "adapters.safetensors"):
        adapter = lora_fx.load_adapter(place, base=net)
        assert compare(output(net, adapter), want).ok
    off = {"rank": 2, "scale": 18.0}
    wrong = written(tmp_path / "b", tensors, lora_parameters=off)
    assert not compare(output(net, lora_fx.load_adapter(wrong, base=net)), want).ok


def test_dora_norms_each_output(net: Any, tmp_path: Path) -> None:
    m = torch.linspace(0.5, 2, 5)
    tensors = {**factors("fc", 3, 5), "fc.m": m}
    path = written(tmp_path / "a", tensors, fine_tune_type="dora")
    adapted = net.fc.weight + 20 * (tensors["fc.lora_a"] @ tensors["fc.lora_b"]).T
    weight = adapted * (m / adapted.norm(dim=1))[:, None]
    want = net.head(F.linear(net.emb(IDS), weight, net.fc.bias)).detach()
    adapter = lora_fx.load_adapter(path, base=net)
    assert adapter.updates["fc"].kind == "dora"
    assert compare(output(net, adapter), want).ok


def test_a_full_fine_tune_is_whole_weights(net: Any, tmp_path: Path) -> None:
    weight = torch.ones(7, 5)
    path = written(tmp_path / "a", {"head.weight": weight}, fine_tune_type="full")
    want = F.linear(net.fc(net.emb(IDS)), weight, net.head.bias).detach()
    assert compare(output(net, lora_fx.load_adapter(path)), want).ok


def test_what_was_read_is_written_as_another_format(net: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "a", {**factors("fc", 3, 5), **factors("emb", 11, 3)})
    adapter = lora_fx.load_adapter(path, base=net)
    lora_fx.save_adapter(adapter, tmp_path / "peft")
    again = lora_fx.load_adapter(tmp_path / "peft", base=net)
    assert compare(output(net, again), output(net, adapter)).ok
    with pytest.raises(AdapterError, match="mlx is read and not written; choose one of onnx"):
        lora_fx.save_adapter(adapter, tmp_path / "b", format="mlx")
    assert not (tmp_path / "b").exists()
