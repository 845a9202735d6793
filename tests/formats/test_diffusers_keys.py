"""The spellings of diffusers, each read as one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_fx.errors import AdapterError
from lora_fx.formats.diffusers_keys import COMPONENTS, sort_by_component
from lora_fx.formats.pairs import ALPHA, DOWN, UP

FILE = Path("a.safetensors")
SPELLINGS = {
    "unet.b.0.attn1.to_q.lora_A.weight": ("unet", "b.0.attn1.to_q", DOWN),
    "unet.b.0.attn1.to_q.lora_B.weight": ("unet", "b.0.attn1.to_q", UP),
    "unet.b.0.attn1.to_out.0.lora.down.weight": ("unet", "b.0.attn1.to_out.0", DOWN),
    "unet.b.0.attn1.to_out.0.lora.up.weight": ("unet", "b.0.attn1.to_out.0", UP),
    "unet.b.0.attn1.processor.to_q_lora.down.weight": ("unet", "b.0.attn1.to_q", DOWN),
    "unet.b.0.attn1.processor.to_out_lora.up.weight": ("unet", "b.0.attn1.to_out.0", UP),
    "text_encoder.l.0.self_attn.to_k_lora.up.weight": ("text_encoder", "l.0.self_attn.k_proj", UP),
    "text_encoder_2.l.0.self_attn.to_out_lora.down.weight": (
        "text_encoder_2",
        "l.0.self_attn.out_proj",
        DOWN,
    ),
    "text_encoder.l.0.q_proj.lora_linear_layer.down.weight": ("text_encoder", "l.0.q_proj", DOWN),
    "text_encoder.l.0.mlp.fc1.lora_linear_layer.up.weight": ("text_encoder", "l.0.mlp.fc1", UP),
    "transformer.blocks.0.to_v.alpha": ("transformer", "blocks.0.to_v", ALPHA),
    "transformer.x_embedder.lora_A.weight": ("transformer", "x_embedder", DOWN),
}


@pytest.mark.parametrize("key", SPELLINGS)
def test_a_key_has_one_component_path_and_role(key: str) -> None:
    component, path, role = SPELLINGS[key]
    tensor = torch.ones(2, 3)
    assert sort_by_component(FILE, {key: tensor}) == {component: {path: {role: (key, tensor)}}}


@pytest.mark.parametrize(
    "key",
    [
        "fc.lora_A.weight",
        "vae.fc.lora_A.weight",
        "unet.lora_A",
        "unet.fc.weight",
        "unet.fc.lora_A.bias",
        "unet.attn.to_x_lora.down.weight",
        "unet",
        "",
    ],
)
def test_another_key_is_named(key: str) -> None:
    assert "vae" not in COMPONENTS
    with pytest.raises(AdapterError, match=f"1 tensors have names of no known use: {key}; exp"):
        sort_by_component(FILE, {key: torch.ones(1)})


@pytest.mark.parametrize(
    ("ending", "feature"),
    [
        ("lora_magnitude_vector", "DoRA"),
        ("lora_magnitude_vector.weight", "DoRA"),
        ("dora_scale", "DoRA"),
        ("lora_B.bias", "the bias of an up-projection"),
        ("hada_w1_a", "LoHa"),
        ("lokr_w2", "LoKr"),
        ("diff", "a full weight"),
        ("diff_b", "a full bias"),
    ],
)
def test_a_feature_is_refused_by_name(ending: str, feature: str) -> None:
    with pytest.raises(AdapterError, match=f"'transformer.fc.{ending}' is {feature}"):
        sort_by_component(FILE, {f"transformer.fc.{ending}": torch.ones(1)})


def test_two_spellings_of_one_tensor_are_refused() -> None:
    keys = ("unet.attn.to_q.lora_A.weight", "unet.attn.processor.to_q_lora.down.weight")
    with pytest.raises(AdapterError, match=r"are both the down of attn\.to_q"):
        sort_by_component(FILE, {key: torch.ones(2, 3) for key in keys})
