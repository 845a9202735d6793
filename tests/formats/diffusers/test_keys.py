"""The spellings of diffusers, each read as one."""

from __future__ import annotations

import pytest
import torch

from lora_fx.formats.dialects import ALPHA
from lora_fx.formats.diffusers import sort_by_component, speaks_diffusers
from lora_fx.kinds.lora import BIAS, DOWN, MAGNITUDE, UP

SPELLINGS = {
    "unet.b.0.attn1.to_q.lora_A.weight": ("unet", "b.0.attn1.to_q", DOWN),
    "unet.b.0.attn1.to_q.lora_B.weight": ("unet", "b.0.attn1.to_q", UP),
    "unet.b.0.attn1.to_out.0.lora.down.weight": ("unet", "b.0.attn1.to_out.0", DOWN),
    "unet.b.0.attn1.to_out.0.lora.up.weight": ("unet", "b.0.attn1.to_out.0", UP),
    "unet.b.0.attn1.processor.to_q_lora.down.weight": ("unet", "b.0.attn1.to_q", DOWN),
    "unet.b.0.attn1.processor.to_out_lora.up.weight": ("unet", "b.0.attn1.to_out.0", UP),
    "text_encoder.l.0.self_attn.to_k_lora.up.weight": ("text_encoder", "l.0.self_attn.k_proj", UP),
    "text_encoder_2.l.0.self_attn.to_out_lora.down.weight": (
        "text_encoder_2", "l.0.self_attn.out_proj", DOWN,
    ),
    "text_encoder.l.0.q_proj.lora_linear_layer.down.weight": ("text_encoder", "l.0.q_proj", DOWN),
    "text_encoder.l.0.mlp.fc1.lora_linear_layer.up.weight": ("text_encoder", "l.0.mlp.fc1", UP),
    "transformer.blocks.0.to_v.alpha": ("transformer", "blocks.0.to_v", ALPHA),
    "transformer.x_embedder.lora_A.weight": ("transformer", "x_embedder", DOWN),
    "unet.conv_in.lora_B.bias": ("unet", "conv_in", BIAS),
    "unet.a.to_out.0.lora_magnitude_vector": ("unet", "a.to_out.0", MAGNITUDE),
    "unet.a.to_q.lora_magnitude_vector.weight": ("unet", "a.to_q", MAGNITUDE),
    "unet.a.to_q.lora_magnitude_vector": ("unet", "a.to_q", MAGNITUDE),
    "unet.a.to_out.lora_magnitude_vector": ("unet", "a.to_out.0", MAGNITUDE),
    "text_encoder.a.to_k.lora_magnitude_vector": ("text_encoder", "a.k_proj", MAGNITUDE),
    "transformer.fc.lokr_w1": ("transformer", "fc", "lokr_w1"),
    "transformer.fc.lokr_w2_a": ("transformer", "fc", "lokr_w2_a"),
}  # fmt: skip


@pytest.mark.parametrize("key", SPELLINGS)
def test_a_key_has_one_component_path_and_role(key: str) -> None:
    component, path, role = SPELLINGS[key]
    tensor = torch.ones(2, 3)
    assert sort_by_component({key: tensor}) == {component: {path: {role: (key, tensor)}}}


@pytest.mark.parametrize("key", SPELLINGS)
def test_a_file_of_one_model_has_no_component(key: str) -> None:
    component, path, role = SPELLINGS[key]
    if component != "text_encoder" and not component.startswith("text"):
        rest = key.removeprefix(f"{component}.")
        found = sort_by_component({rest: torch.ones(1)}, bare=True)
        assert {p: list(roles) for p, roles in found[""].items()} == {path: [role]}


A, B = "lora_A.weight", "lora_B.weight"
SPEECH: dict[str, tuple[list[str], bool | None]] = {
    "GPT-2": ([f"transformer.h.0.attn.c_attn.{A}", f"transformer.h.0.attn.c_attn.{B}"], None),
    "Falcon with DoRA": (["transformer.h.0.mlp.dense.lora_magnitude_vector"], None),
    "a DiT of bare names": ([f"transformer.blocks.0.ffn.{A}"], None),
    "a DiT": ([f"transformer.transformer_blocks.0.ff.net.2.{A}"], True),
    "a DiT of one stream": ([f"transformer.single_transformer_blocks.0.proj_mlp.{A}"], True),
    "attention": ([f"transformer.blocks.0.attn1.to_q.{A}"], True),
    "attention that is added": ([f"transformer.b.0.attn.add_k_proj.{A}"], True),
    "with alpha": ([f"transformer.h.0.{A}", "transformer.h.0.alpha"], True),
    "another spelling": (["transformer.h.0.fc.lora.down.weight"], True),
    "LoKr": (["transformer.h.0.fc.lokr_w1"], True),
    "a UNet": ([f"unet.fc.{A}"], True),
    "a text encoder": ([f"text_encoder_2.fc.{A}"], True),
    "a UNet beside": ([f"transformer.h.0.{A}", f"unet.fc.{A}"], True),
    "PEFT": ([f"base_model.model.transformer.h.0.{A}"], False),
    "no component": ([f"blocks.0.to_q.{A}"], False),
    "processors of one model": (["b.0.attn1.processor.to_q_lora.down.weight"], True),
    "loralib": (["unet.fc.lora_A", "unet.fc.lora_B"], False),
    "no adapter": (["transformer.h.0.fc.weight"], False),
}


@pytest.mark.parametrize("case", SPEECH)
def test_names_that_diffusers_alone_gives_are_told(case: str) -> None:
    names, expected = SPEECH[case]
    assert speaks_diffusers(names) is expected
