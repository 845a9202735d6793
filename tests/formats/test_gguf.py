"""llama.cpp's adapters against plain arithmetic: its names, its rows, its scale."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import AdapterError
from lora_fx.numerics import compare
from tests.formats.test_torchtune import IDS, half_split, output, small
from tests.io.gguf_bytes import gguf

SAID: dict[str, Any] = {
    "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora",
    "adapter.lora.alpha": 6.0,
}  # fmt: skip
# llama.cpp's name -> transformers', and how many heads its rows are of.
LAYERS = {
    "blk.0.attn_q": ("model.layers.0.self_attn.q_proj", 4),
    "blk.1.attn_k": ("model.layers.1.self_attn.k_proj", 2),
    "blk.1.attn_v": ("model.layers.1.self_attn.v_proj", 0),
    "blk.0.attn_output": ("model.layers.0.self_attn.o_proj", 0),
    "blk.1.ffn_gate": ("model.layers.1.mlp.gate_proj", 0),
    "blk.0.ffn_up": ("model.layers.0.mlp.up_proj", 0),
    "blk.1.ffn_down": ("model.layers.1.mlp.down_proj", 0),
    "output": ("lm_head", 0),
    "token_embd": ("model.embed_tokens", 0),
}
PAIR = {"blk.0.attn_q.weight.lora_a": (2, 16), "blk.0.attn_q.weight.lora_b": (16, 2)}


def tensors_for(model: nn.Module) -> dict[str, torch.Tensor]:
    gen, found = torch.Generator().manual_seed(1), {}
    for own, (theirs, _) in LAYERS.items():
        out, into = model.get_submodule(theirs).weight.shape
        a, b = ((out, 2), (into, 2)) if own == "token_embd" else ((2, into), (out, 2))
        found[f"{own}.weight.lora_a"] = 0.3 * torch.randn(a, generator=gen)
        found[f"{own}.weight.lora_b"] = 0.3 * torch.randn(b, generator=gen)
    return found


def written(path: Path, tensors: dict[str, torch.Tensor], **said: Any) -> Path:
    names = {name.replace("_", "."): value for name, value in said.items()}
    path.write_bytes(gguf({**SAID, **names}, tensors))
    return path


def merged(
    model: nn.Module, tensors: dict[str, torch.Tensor], turned: bool, scale: float = 3
) -> torch.Tensor:
    """Logits of transformers' model with the layers' weights as llama.cpp has them."""
    tuned: Any = copy.deepcopy(model)
    with torch.no_grad():
        for own, (theirs, heads) in LAYERS.items():
            a, b = (tensors[f"{own}.weight.lora_{end}"] for end in "ab")
            delta = a @ b.T if own == "token_embd" else half_split(b @ a, heads if turned else 0)
            tuned.get_submodule(theirs).weight += scale * delta
        logits: torch.Tensor = tuned(input_ids=IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize(
    ("kind", "architecture", "turned"),
    [("Llama", "llama", True), ("Mistral", "llama", True), ("Qwen2", "qwen2", False)],
)
def test_rows_of_heads_are_turned_as_the_converter_turns_them(
    kind: str, architecture: str, turned: bool, tmp_path: Path
) -> None:
    model = small(kind)
    tensors = tensors_for(model)
    path = written(tmp_path / "a.gguf", tensors, general_architecture=architecture)
    adapter = lora_fx.load_adapter(path, base=model)
    got = output(model, adapter)
    assert set(adapter.updates) == {theirs for theirs, _ in LAYERS.values()}
    assert compare(got, merged(model, tensors, turned)).ok
    for wrong in (merged(model, tensors, not turned), merged(model, tensors, turned, scale=2.7)):
        assert not compare(got, wrong).ok  # the controls
    lora_fx.save_adapter(adapter, tmp_path / "again")
    again = lora_fx.load_adapter(tmp_path / "again", base=model, name=adapter.name)
    assert compare(output(model, again), got).ok


@pytest.mark.parametrize("alpha", [{}, {"adapter_lora_alpha": 0.0}])
def test_without_an_alpha_the_scale_is_one(alpha: dict[str, float], tmp_path: Path) -> None:
    model, said = small("Llama"), SAID | {"adapter.lora.alpha": 0.0}
    tensors = tensors_for(model)
    if not alpha:
        del said["adapter.lora.alpha"]
    (tmp_path / "a.gguf").write_bytes(gguf(said, tensors))
    adapter = lora_fx.load_adapter(tmp_path / "a.gguf", base=model)
    assert {update.scale for update in adapter.updates.values()} == {1}


def test_experts_stand_one_after_the_other(tmp_path: Path) -> None:
    fields = {"num_experts": 3, "moe_intermediate_size": 5, "num_experts_per_tok": 2, "head_dim": 4}
    model, gen = small("Qwen3Moe", **fields), torch.Generator().manual_seed(2)
    sizes = {"gate": (5, 16), "up": (5, 16), "down": (16, 5)}
    pairs = {
        leaf: (0.3 * torch.randn(3, 2, into, generator=gen), torch.randn(3, out, 2, generator=gen))
        for leaf, (out, into) in sizes.items()
    }
    tensors = {
        f"blk.1.ffn_{leaf}_exps.weight.lora_{end}": tensor
        for leaf, pair in pairs.items()
        for end, tensor in zip("ab", pair, strict=True)
    }
    path = written(tmp_path / "a.gguf", tensors, general_architecture="qwen3moe")
    updates, experts = (
        lora_fx.load_adapter(path, base=model).updates,
        model.model.layers[1].mlp.experts,
    )
    each = {leaf: 3 * b @ a for leaf, (a, b) in pairs.items()}
    wanted = {
        "gate_up_proj": torch.cat([each["gate"], each["up"]], dim=1),
        "down_proj": each["down"],
    }
    assert sorted(updates) == sorted(f"model.layers.1.mlp.experts.{name}" for name in wanted)
    for name, delta in wanted.items():
        weight = getattr(experts, name).detach()
        made = updates[f"model.layers.1.mlp.experts.{name}"].weight(weight)
        assert compare(made, weight + delta).ok
        assert not compare(made, weight + 0.9 * delta).ok  # the control


def test_tokens_make_it_an_alora(tmp_path: Path) -> None:
    tensors = {key: torch.ones(shape) for key, shape in PAIR.items()}
    said = SAID | {"adapter.alora.invocation_tokens": [5, 9]}
    (tmp_path / "a.gguf").write_bytes(gguf(said, tensors))
    [update] = lora_fx.load_adapter(tmp_path / "a.gguf", base=small("Llama")).updates.values()
    assert (update.kind, update.invocation) == ("alora", (5, 9))


@pytest.mark.parametrize(
    ("stored", "said", "kind", "message"),
    [
        (PAIR, {}, None, "has llama.cpp's names, .*pass base="),
        (PAIR, {}, "Qwen2", "architecture 'llama', the base is a 'qwen2'"),
        (PAIR, {"general_architecture": "gpt2"}, "Llama", "architecture 'gpt2'"),
        (PAIR, {"general_type": "model"}, "Llama", r"types \('model', 'lora'\)"),
        (PAIR, {"adapter_type": "ia3"}, "Llama", r"types \('adapter', 'ia3'\)"),
        (PAIR, {"adapter_lora_alpha": "x"}, "Llama", "adapter.lora.alpha of its metadata is 'x'"),
        (PAIR | {"blk.0.attn_norm.weight": (16,)}, {}, "Llama", "attn_norm.*llama.cpp itself pass"),
        (PAIR | {"blk.0.ffn_up.weight": (24, 16)}, {}, "Llama", "no known use: blk.0.ffn_up"),
        ({"blk.0.attn_q.weight.lora_a": (2, 16)}, {}, "Llama", "half of a pair, up is missing"),
        ({key.replace("_q", "_x"): s for key, s in PAIR.items()}, {}, "Llama", "is called blk.0.a"),
        ({key: (*s[:-1], 3) for key, s in PAIR.items()}, {}, "Llama", r"lora_b is \(16, 3\)"),
        ({"blk.0.attn_q.weight.lora_a": (2, 16), "blk.0.attn_q.weight.lora_b": (12, 2)}, {},
         "Llama", "has 12 rows, the base 4 heads"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(
    stored: dict[str, tuple[int, ...]], said: Any, kind: str | None, message: str, tmp_path: Path
) -> None:
    tensors = {key: torch.ones(shape) for key, shape in stored.items()}
    path = written(tmp_path / "a.gguf", tensors, **said)
    with pytest.raises(AdapterError, match=message) as error:
        lora_fx.load_adapter(path, base=kind and small(kind))
    assert str(path) in str(error.value)
