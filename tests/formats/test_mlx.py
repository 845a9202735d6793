"""MLX's adapters against plain arithmetic: what its layers compute, written out."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save
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
    (path / "adapters.safetensors").write_bytes(as_mlx(save(tensors)))
    (path / "adapter_config.json").write_text(json.dumps(fields.pop("config", FIELDS) | fields))
    return path


def as_mlx(content: bytes) -> bytes:
    """A file as ``mx.save_safetensors`` writes it: its metadata is null."""
    end = 8 + int.from_bytes(content[:8], "little")
    text = json.dumps({"__metadata__": None, **json.loads(content[8:end])}).encode()
    return len(text).to_bytes(8, "little") + text + content[end:]


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


def test_a_legacy_file_of_mlx_vlm_has_alpha_over_the_rank(net: Any, tmp_path: Path) -> None:
    gen = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 2, generator=gen), torch.randn(2, 5, generator=gen)
    x = net.emb(IDS)
    for alpha, is_right in ((0.6, True), (0.66, False)):
        config = {"rank": 2, "alpha": alpha, "dropout": 0.1}
        path = written(tmp_path / str(alpha), {"fc.A": a, "fc.B": b}, config=config)
        want = net.head(net.fc(x) + 0.3 * x @ a @ b).detach()
        assert compare(output(net, lora_fx.load_adapter(path, base=net)), want).ok == is_right


class Experts(nn.Module):
    """Three experts, all of which read every token, by the names of transformers' modules."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 10, 4))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = torch.einsum("bi,eoi->ebo", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("ebi,eoi->bo", F.silu(gate) * up, self.down_proj)


def test_each_expert_has_a_pair_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net: Any = nn.Sequential(OrderedDict(mlp=nn.Sequential(OrderedDict(experts=Experts()))))
    x = torch.randn(6, 4)
    sizes = {"gate_proj": (4, 5), "up_proj": (4, 5), "down_proj": (5, 4)}
    pairs = {n: (torch.randn(3, 2, i), torch.randn(3, o, 2)) for n, (i, o) in sizes.items()}
    tensors: dict[str, torch.Tensor] = {}
    for name, (down, up) in pairs.items():
        tensors |= {f"mlp.switch_mlp.{name}.lora_a": down, f"mlp.switch_mlp.{name}.lora_b": up}
    delta = {name: 0.1 * up @ down for name, (down, up) in pairs.items()}
    changed: Any = copy.deepcopy(net)
    with torch.no_grad():
        changed.mlp.experts.gate_up_proj += torch.cat([delta["gate_proj"], delta["up_proj"]], 1)
        changed.mlp.experts.down_proj += delta["down_proj"]
    for scale, is_right in ((0.1, True), (0.11, False)):
        parameters = {"rank": 2, "scale": scale, "dropout": 0.0}
        path = written(tmp_path / str(scale), tensors, lora_parameters=parameters)
        adapter = lora_fx.load_adapter(path, base=net)
        got = lora_fx.inject(lora_fx.trace(net, (x,)), adapter)(x)
        assert compare(got, changed(x).detach()).ok == is_right
    tensors["mlp.switch_mlp.up_proj.lora_b"] = torch.randn(2, 5, 2)
    path = written(tmp_path / "odd", tensors)
    with pytest.raises(AdapterError, match=r"up_proj: up is .2, 5, 2., expected .* experts = 3"):
        lora_fx.load_adapter(path, base=net)


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


class Tied(nn.Module):
    """A table whose weight is a head's too, as ``tie_word_embeddings`` says."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(11, 3), nn.Linear(3, 11, bias=False)
        self.head.weight = self.emb.weight
        self.config = SimpleNamespace(tie_word_embeddings=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(torch.tanh(self.emb(ids)))
        return result


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_a_head_is_tied_to_the_adapted_table(tmp_path: Path, kind: str) -> None:
    """MLX has one module for both, which multiplies with what it adapted."""
    torch.manual_seed(0)
    net: Any = Tied().eval()
    tensors = {key: 3 * value for key, value in factors("emb", 11, 3).items()}
    table = net.emb.weight.detach() + 20 * tensors["emb.lora_a"] @ tensors["emb.lora_b"]
    if kind == "dora":
        tensors["emb.m"] = torch.rand(11) + 0.5
        table = table * (tensors["emb.m"] / table.norm(dim=1))[:, None]
    tensors = {"emb.weight": table} if kind == "full" else tensors
    adapter = lora_fx.load_adapter(written(tmp_path / "a", tensors, fine_tune_type=kind), base=net)
    inner = torch.tanh(F.embedding(IDS, table))
    assert compare(output(net, adapter), inner @ table.T).ok
    assert not compare(output(net, adapter), inner @ net.emb.weight.detach().T).ok


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_without_a_base_nobody_knows_which_head_is_tied(kind: str, tmp_path: Path) -> None:
    """MLX multiplies with the changed table there too, so the head's change would be lost."""
    pair = factors("model.embed_tokens", 11, 3)
    whole = {"model.embed_tokens.weight": torch.ones(11, 3)}
    path = written(tmp_path / "a", pair if kind == "lora" else whole, fine_tune_type=kind)
    with pytest.raises(AdapterError, match=r"embed_tokens\..*tied to it too: pass base="):
        lora_fx.load_adapter(path)
    with pytest.warns(lora_fx.AdapterWarning, match="tied to it too"):
        lora_fx.load_adapter(path, strict=False)
    lora_fx.load_adapter(written(tmp_path / "b", factors("fc", 3, 5)))  # which is no table
