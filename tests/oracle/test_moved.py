"""Adapters of models whose modules were moved, renamed or fused since, held against PEFT."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import fx, nn
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from lora_fx import inject, to_onnx, trace
from lora_fx.errors import AdapterError
from lora_fx.formats import load_adapter
from lora_fx.testing import relative

FEED = {"input_ids": torch.tensor([[1, 5, 9, 7, 2]]), "use_cache": False}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 40, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


def directory(path: Path, tensors: Mapping[str, torch.Tensor], **fields: Any) -> Path:
    path.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"} | fields
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(tensors), path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


def pairs(sizes: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    found = {}
    for path, (out, into) in sizes.items():
        found[f"base_model.model.{path}.lora_A.weight"] = torch.randn(4, into)
        found[f"base_model.model.{path}.lora_B.weight"] = torch.randn(out, 4) * 0.3
    return found


def outputs(model: Any) -> torch.Tensor:
    found = model(**FEED)
    value: torch.Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return value.detach()


def by_peft(base: nn.Module, path: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of what the file lacks
        tuned = PeftModel.from_pretrained(copy.deepcopy(base), str(path)).eval()
    want = outputs(tuned)
    assert relative(outputs(base), want) > 1e-3  # the control
    return want


@functools.cache
def traced(base: nn.Module) -> fx.GraphModule:
    """A model's graph, of which it remembers the model: both are only read."""
    return trace(base, (), FEED)


def ours(base: nn.Module, path: Path) -> torch.Tensor:
    return outputs(inject(traced(base), load_adapter(path, base=base)))


@functools.cache
def llava() -> nn.Module:
    from transformers import Qwen2Config

    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                image_size=8, patch_size=4,
            ),
            text_config=Qwen2Config(**SIZES, **HEADS),
            image_token_index=39,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("leaf", ["o_proj", "q_proj"])
def test_a_language_model_that_was_moved_into_the_model(tmp_path: Path, leaf: str) -> None:
    base = llava()
    names = [f"language_model.model.layers.{n}.self_attn.{leaf}" for n in (0, 1)]
    path = directory(tmp_path / "a", pairs(dict.fromkeys(names, (16, 16))), target_modules=[leaf])
    assert relative(ours(base, path), by_peft(base, path)) < 1e-5
    moved = load_adapter(path, base=base).moved
    assert moved == {"language_model.model": "model.language_model"}


def test_a_language_model_s_adapter_inside_of_a_vision_language_model(tmp_path: Path) -> None:
    base = llava()
    sizes = {
        f"layers.{n}.{leaf}": size
        for n in (0, 1)
        for leaf, size in (("self_attn.q_proj", (16, 16)), ("mlp.gate_proj", (24, 16)))
    }
    targets = ["q_proj", "gate_proj"]
    own = pairs({f"model.{path}": size for path, size in sizes.items()})
    told = pairs({f"model.language_model.{path}": size for path, size in sizes.items()})
    path = directory(tmp_path / "a", own, target_modules=targets)
    want = by_peft(base, directory(tmp_path / "b", told, target_modules=targets))
    assert relative(ours(base, path), want) < 1e-5


def test_what_may_be_either_tower_s_lists_both(tmp_path: Path) -> None:
    names = ["model.layers.0.self_attn.q_proj"]
    path = directory(tmp_path / "a", pairs({names[0]: (16, 16)}), target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="mean several layers") as caught:
        load_adapter(path, base=llava())
    assert "model.language_model.layers.0.self_attn.q_proj" in str(caught.value)
    assert "vision_tower" in str(caught.value)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.backbone = inner

    def forward(self, **kwargs: Any) -> Any:
        return self.backbone(**kwargs)


@functools.cache
def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval()


@functools.cache
def base_of(form: str) -> Any:
    inner = llama() if form == "wrapped" else llama().model
    return Wrapper(inner) if form.startswith("wrapped") else inner


@pytest.mark.parametrize("form", ["headless", "wrapped", "wrapped headless", "whole on headless"])
@pytest.mark.parametrize("with_base", [True, False])
def test_an_adapter_meets_its_model_without_a_head_or_wrapped(
    tmp_path: Path, form: str, with_base: bool
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    trained: Any = llama() if form != "wrapped headless" else llama().model
    tuned: Any = get_peft_model(copy.deepcopy(trained), config)
    for name, value in tuned.named_parameters():
        if "lora_" in name:
            nn.init.normal_(value.data, 0, 0.3)
    tuned.eval().save_pretrained(tmp_path / "a")
    base = base_of(form)
    own = tuned.get_base_model()
    want = outputs(own.model if "headless" in form and hasattr(own, "model") else own)
    adapter = load_adapter(tmp_path / "a", base=base if with_base else None)
    got = outputs(inject(traced(base), adapter))
    assert relative(got, want) < 1e-5
    assert relative(outputs(base), want) > 1e-3


FAMILIES = {
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=3)),
        "block_sparse_moe", {"w1": (24, 16), "w3": (24, 16), "w2": (16, 24)},
    ),
    "qwen2 moe": (
        lambda: Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                **SIZES, **HEADS, num_experts=3, moe_intermediate_size=20, num_experts_per_tok=2,
                shared_expert_intermediate_size=12,
            )
        ),
        "mlp", {"gate_proj": (20, 16), "up_proj": (20, 16), "down_proj": (16, 20)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_their_own_meet_fused_parameters(tmp_path: Path, family: str) -> None:
    make, block, leaves = FAMILIES[family]
    torch.manual_seed(0)
    base = make().eval()
    sizes = {
        f"model.layers.{n}.{block}.experts.{e}.{leaf}": size
        for n in (0, 1)
        for e in range(3)
        for leaf, size in leaves.items()
    }
    if block != "mlp":
        sizes |= {f"model.layers.{n}.{block}.gate": (3, 16) for n in (0, 1)}
    if block == "mlp":  # named by the same targets
        shared = {"gate_proj": (12, 16), "up_proj": (12, 16), "down_proj": (16, 12)}
        start = "model.layers.{}.mlp.shared_expert.{}"
        sizes |= {start.format(n, leaf): size for n in (0, 1) for leaf, size in shared.items()}
    targets = [*leaves, *(["gate"] if block != "mlp" else [])]
    tensors = pairs(sizes)
    path = directory(tmp_path / "a", tensors, target_modules=targets, task_type="CAUSAL_LM")
    got = ours(base, path)
    assert relative(got, merged_by_hand(base, sizes, tensors)) < 1e-5
    if family == "mixtral":  # PEFT forgets the shared experts of the other
        assert relative(got, by_peft(base, path)) < 1e-5


def merged_by_hand(
    base: nn.Module, sizes: Mapping[str, tuple[int, int]], tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """What the model gives with 2 * up @ down added to each expert's rows."""
    tuned = copy.deepcopy(base)
    for path in sizes:
        down, up = (tensors[f"base_model.model.{path}.lora_{ab}.weight"] for ab in "AB")
        path = path.replace("block_sparse_moe", "mlp")
        owner, _, leaf = path.rpartition(".")
        stack, _, number = owner.rpartition(".")
        if not number.isdigit():
            tuned.get_submodule(path).weight.data += 2 * up @ down  # type: ignore[operator]
            continue
        name = "down_proj" if leaf in ("w2", "down_proj") else "gate_up_proj"
        rows = tuned.get_parameter(f"{stack}.{name}").data[int(number)]
        half = len(rows) // 2
        part = {"w1": slice(half), "gate_proj": slice(half), "w3": slice(half, None)}
        part |= {"up_proj": part["w3"]}
        rows[part.get(leaf, slice(None))] += 2 * up @ down
    return outputs(tuned)


def test_experts_that_a_file_lacks_stay_as_they_are(tmp_path: Path) -> None:
    """The control of the sum over experts: each changes its own rows, and no others."""
    torch.manual_seed(0)
    base = FAMILIES["mixtral"][0]().eval()
    start = "model.layers.1.block_sparse_moe.experts.2"
    tensors = pairs({f"{start}.w3": (24, 16)})
    path = directory(tmp_path / "a", tensors, target_modules=["w3"])
    [(name, update)] = load_adapter(path, base=base).updates.items()
    own = base.get_parameter(name).detach()
    want = own.clone()
    down, up = tensors.values()
    want[2, 24:] += 2 * up @ down
    assert name == "model.layers.1.mlp.experts.gate_up_proj"
    assert relative(update.weight(own), want) < 1e-5
    assert relative(own, want) > 1e-2


def test_the_report_says_what_was_moved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModel.from_config(LlamaConfig(**SIZES, **HEADS)).eval()
    names = {"model.layers.0.self_attn.q_proj": (16, 16)}
    path = directory(tmp_path / "a", pairs(names), target_modules=["q_proj"])
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"layers_to_transform": [0]}))
    gm = inject(trace(base, (), FEED), load_adapter(path, base=base))
    report = to_onnx(gm, tmp_path / "m.onnx")
    assert "adapter a: paths moved: model -> (root)" in report.notes
    assert len(load_file(path / "adapter_model.safetensors")) == 2
