"""torchtune's adapters against plain arithmetic: its rows are turned as its rotary embedding is."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lora_fx
from lora_fx.errors import AdapterError
from lora_fx.numerics import compare

IDS = torch.tensor([[1, 5, 9, 7, 2]])
FIELDS: dict[str, Any] = {
    "r": 2, "lora_alpha": 6, "peft_type": "LORA", "target_modules": ["q_proj", "output_proj"],
}  # fmt: skip
# torchtune's name of a layer -> transformers', and how many heads its rows are of.
LAYERS = {
    "layers.0.attn.q_proj": ("model.layers.0.self_attn.q_proj", 4),
    "layers.1.attn.k_proj": ("model.layers.1.self_attn.k_proj", 2),
    "layers.1.attn.v_proj": ("model.layers.1.self_attn.v_proj", 0),
    "layers.0.attn.output_proj": ("model.layers.0.self_attn.o_proj", 0),
    "layers.1.mlp.w1": ("model.layers.1.mlp.gate_proj", 0),
    "layers.1.mlp.w2": ("model.layers.1.mlp.down_proj", 0),
    "layers.1.mlp.w3": ("model.layers.1.mlp.up_proj", 0),
    "output": ("lm_head", 0),
}


def small(kind: str, **fields: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=20, pad_token_id=0, tie_word_embeddings=False, **fields,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def tensors_for(model: nn.Module, dora: bool = False) -> dict[str, torch.Tensor]:
    gen, found = torch.Generator().manual_seed(1), {}
    for own, (theirs, _) in LAYERS.items():
        out, into = model.get_submodule(theirs).weight.shape
        found[f"{own}.lora_a.weight"] = 0.3 * torch.randn(2, into, generator=gen)
        found[f"{own}.lora_b.weight"] = 0.3 * torch.randn(out, 2, generator=gen)
        if dora:
            found[f"{own}.magnitude"] = 1 + torch.rand(out, generator=gen)
    return found


def half_split(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of neighbours as rows of halves, head by head and pair by pair."""
    found, size = rows.clone(), len(rows) // max(heads, 1)
    for head in range(heads):
        for pair in range(size // 2):
            start = head * size
            found[start + pair] = rows[start + 2 * pair]
            found[start + size // 2 + pair] = rows[start + 2 * pair + 1]
    return found


def merged(
    model: nn.Module, tensors: dict[str, torch.Tensor], turned: bool = True, scale: float = 3
) -> torch.Tensor:
    """Logits of transformers' model with the layers' weights as torchtune would have them."""
    tuned: Any = copy.deepcopy(model)
    with torch.no_grad():
        for own, (theirs, heads) in LAYERS.items():
            layer, heads = tuned.get_submodule(theirs), heads if turned else 0
            up, down = tensors[f"{own}.lora_b.weight"], tensors[f"{own}.lora_a.weight"]
            layer.weight += half_split(scale * up @ down, heads)
            if f"{own}.magnitude" in tensors:
                magnitude = half_split(tensors[f"{own}.magnitude"], heads)
                layer.weight *= (magnitude / layer.weight.norm(dim=1))[:, None]
        logits: torch.Tensor = tuned(input_ids=IDS, use_cache=False).logits
    return logits


def output(model: nn.Module, adapter: lora_fx.Adapter) -> torch.Tensor:
    gm = lora_fx.trace(model, (), {"input_ids": IDS, "use_cache": False})
    found: torch.Tensor = lora_fx.inject(gm, adapter)(input_ids=IDS, use_cache=False).logits
    return found


def written(path: Path, tensors: dict[str, torch.Tensor], name: str, **fields: Any) -> Path:
    path.mkdir(exist_ok=True)
    save = save_file if name.endswith(".safetensors") else torch.save
    save(tensors, path / name)
    (path / "adapter_config.json").write_text(json.dumps({**FIELDS, **fields}))
    return path


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("kind", "turned"), [("Llama", True), ("Mistral", True), ("Qwen2", False)])
def test_rows_of_heads_are_turned_as_the_model_turns_them(
    kind: str, turned: bool, dora: bool, tmp_path: Path
) -> None:
    model = small(kind)
    tensors = tensors_for(model, dora)
    path = written(tmp_path / "a", tensors, "adapter_model.safetensors", use_dora=dora)
    adapter = lora_fx.load_adapter(path, base=model)
    got = output(model, adapter)
    assert set(adapter.updates) == {theirs for theirs, _ in LAYERS.values()}
    assert compare(got, merged(model, tensors, turned)).ok
    for wrong in (merged(model, tensors, not turned), merged(model, tensors, turned, scale=2.7)):
        assert not compare(got, wrong).ok  # the controls


def test_the_last_epoch_of_a_directory_is_read(tmp_path: Path) -> None:
    model = small("Llama")
    tensors = tensors_for(model)
    for epoch in (0, 2, 10):
        own = {key: value * (epoch == 10) for key, value in tensors.items()}
        path = written(tmp_path / "a", own, f"adapter_{epoch}.pt")
    with pytest.raises(AdapterError, match=r"adapter_10\.pt: a pickle"):
        lora_fx.load_adapter(path, base=model)
    for place in (path, path / "adapter_10.pt"):
        adapter = lora_fx.load_adapter(place, base=model, allow_pickle=True)
        assert compare(output(model, adapter), merged(model, tensors)).ok


def test_a_model_of_torchtunes_own_names_has_its_own_rows(tmp_path: Path) -> None:
    layer, x = nn.Sequential(OrderedDict(q_proj=nn.Linear(3, 8))), torch.randn(4, 3)
    root = nn.Sequential(nn.Identity(), layer).eval()
    down, up = torch.randn(2, 3), torch.randn(8, 2)
    pair = {"1.q_proj.lora_a.weight": down, "1.q_proj.lora_b.weight": up}
    path = written(tmp_path / "a", pair, "adapter_model.safetensors")
    adapter = lora_fx.load_adapter(path, base=root)
    want = (layer(x) + 3 * x @ down.T @ up.T).detach()
    assert compare(lora_fx.inject(lora_fx.trace(root, (x,)), adapter)(x), want).ok


def test_what_peft_reads_of_torchtune_is_peft_s(tmp_path: Path) -> None:
    """torchtune writes PEFT's keys too, and its own beside them as a pickle."""
    model, own = small("Llama"), "base_model.model.model.layers.0.self_attn.v_proj"
    pair = {f"{own}.lora_A.weight": torch.ones(2, 16), f"{own}.lora_B.weight": torch.ones(8, 2)}
    fields = {"target_modules": ["v_proj"], "layers_to_transform": [0]}
    path = written(tmp_path / "a", pair, "adapter_model.safetensors", **fields)
    torch.save(tensors_for(model), path / "adapter_model.pt")
    adapter = lora_fx.load_adapter(path, base=model)
    assert list(adapter.updates) == ["model.layers.0.self_attn.v_proj"]


def test_a_directory_without_a_file_is_refused(tmp_path: Path) -> None:
    written(tmp_path, {}, "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="neither adapter_model"):
        lora_fx.load_adapter(tmp_path, base=nn.Linear(3, 5), format="torchtune")
