"""diffusers' files; the oracle is its own way of loading one, made again with PEFT.

diffusers takes the keys of a component, makes a ``LoraConfig`` of the metadata or else of ranks and
alphas (``get_peft_kwargs``: without alphas each alpha is its rank), and lets PEFT inject it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.save_and_load import set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.errors import AdapterError
from lora_fx.formats import load_adapter
from lora_fx.formats.dialects import ALPHA
from lora_fx.formats.diffusers import WEIGHTS, sort_by_component, speaks_diffusers
from lora_fx.formats.peft import METADATA
from lora_fx.kinds.lora import BIAS, DOWN, MAGNITUDE, UP
from lora_fx.testing import fits, same_adapter

X = torch.linspace(-1, 1, 84).reshape(4, 7, 3)
Tensors = dict[str, torch.Tensor]


LAYERS = ["blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.0.attn1.to_out.0", "proj_out"]


def seeded() -> nn.Module:
    """Layers named as diffusers' attention names them, each of another size."""
    torch.manual_seed(0)
    attention = OrderedDict(
        to_q=nn.Linear(3, 5, bias=False), first=nn.Tanh(), to_k=nn.Linear(5, 7), second=nn.Tanh(),
        to_out=nn.Sequential(nn.Linear(7, 6), nn.Dropout(0.0)),
    )  # fmt: skip
    block = nn.Sequential(OrderedDict(attn1=nn.Sequential(attention)))
    parts = OrderedDict(blocks=nn.Sequential(block), last=nn.Tanh(), proj_out=nn.Linear(6, 4))
    return nn.Sequential(parts).eval()


def pairs(component: str, seed: int = 0, ranks: tuple[int, ...] = (2, 2, 3, 1)) -> Tensors:
    """A component's tensors by the keys that PEFT gives them, as if trained."""
    make, base = torch.Generator().manual_seed(seed), seeded()
    state = {}
    for path, rank in zip(LAYERS, ranks, strict=True):
        layer: Any = base.get_submodule(path)
        key = f"{component}.{path}"
        state[f"{key}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=make)
        state[f"{key}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=make)
    return state


def modern(key: str) -> str:
    return key.replace("lora_A", "lora.down").replace("lora_B", "lora.up")


def linear_layer(key: str) -> str:
    return key.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up")


def processor(key: str) -> str:
    for name in ("to_q", "to_k", "to_out.0"):
        old = name.removesuffix(".0")
        for new, role in (("lora_A", "down"), ("lora_B", "up")):
            key = key.replace(f".{name}.{new}.", f".processor.{old}_lora.{role}.")
    return modern(key)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "peft": str,
    "modern": modern,
    "linear_layer": linear_layer,
    "processor": processor,
}
ALPHAS: dict[str, list[float] | None] = {
    "none": None,
    "one": [3.0, 3.0, 3.0, 3.0],
    "several": [3.0, 0.5, 3.0, -2.0],
}


def loaded_by_diffusers(component: str, state: Tensors, alphas: list[float] | None) -> torch.Tensor:
    """The output of the model after diffusers' own steps, for tensors by PEFT's keys."""
    start = f"{component}."
    own = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    ranks = {f"^{p}": own[f"{p}.lora_B.weight"].shape[1] for p in LAYERS}
    stored = ranks if alphas is None else dict(zip(ranks, alphas, strict=True))
    config = peft.LoraConfig(
        r=1, lora_alpha=1, rank_pattern=ranks, alpha_pattern=stored, target_modules=LAYERS
    )
    model = seeded()
    peft.inject_adapter_in_model(config, model, adapter_name="default_0")
    missing: Any = set_peft_model_state_dict(model, own, "default_0")
    assert not missing.unexpected_keys
    with torch.no_grad():
        result: torch.Tensor = model(X)
    return result


def write(path: Path, state: Tensors, fields: dict[str, Any] | None = None) -> Path:
    metadata = None if fields is None else {METADATA: json.dumps(fields)}
    save_file(state, path, metadata=metadata)
    return path


@pytest.mark.parametrize("alphas", ALPHAS)
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("component", ["unet", "transformer"])
def test_outputs_are_those_of_diffusers(
    reads: Any, component: str, spelling: str, alphas: str
) -> None:
    state, values = pairs(component), ALPHAS[alphas]
    file = {SPELLINGS[spelling](key): value for key, value in state.items()}
    for path, alpha in zip(LAYERS, values or [], strict=values is not None):
        file[f"{component}.{path}.alpha"] = torch.tensor(alpha)
    adapter = reads(file, component=component)
    assert set(adapter.updates) == set(LAYERS)
    fits(adapter, seeded(), X, loaded_by_diffusers(component, state, values))


def test_without_a_component_paths_are_those_of_the_pipeline(reads: Any) -> None:
    state = pairs("unet") | pairs("text_encoder", seed=1)
    whole = reads(state)
    assert set(whole.updates) == {f"{c}.{p}" for c in ("unet", "text_encoder") for p in LAYERS}
    for component in ("unet", "text_encoder"):
        part = reads(state, component=component)
        own = {p: whole.updates[f"{component}.{p}"] for p in LAYERS}
        same_adapter(part, Adapter("a", own))


def test_a_directory_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / WEIGHTS, pairs("unet"))
    same_adapter(load_adapter(tmp_path), load_adapter(file))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"adapter_config\.json: peft_type is missing"):
        load_adapter(tmp_path)


def test_a_scale_is_not_guessed(tmp_path: Path) -> None:
    """A language model that PEFT trained may be called transformer too, and has alpha / r."""
    state = {f"transformer.h.0.attn.c_attn.lora_{m}.weight": torch.ones(2, 2) for m in "AB"}
    file = write(tmp_path / "a.safetensors", state)
    message = "nothing says what the scale is: .*; pass format=.diffusers. for the one, or save"
    with pytest.raises(AdapterError, match=message):
        load_adapter(file)
    alphas = {"transformer.h.0.attn.c_attn.alpha": torch.tensor(3.0)}
    fields = {"r": 2, "lora_alpha": 3, "peft_type": "LORA"}
    of_part = {f"transformer.{key}": value for key, value in fields.items()}
    for name, more, config, hints, scale in (
        ("a", {}, None, {"format": "diffusers"}, 1),
        (WEIGHTS, {}, None, {}, 1),  # a file of diffusers' name is diffusers'
        ("b", alphas, None, {}, 1.5),
        ("c", {}, of_part, {}, 1.5),
        ("d", {}, fields, {}, 1.5),
    ):
        file = write((tmp_path / name).with_suffix(".safetensors"), {**state, **more}, config)
        [update] = load_adapter(file, **hints).updates.values()
        assert isinstance(update, Update)
        assert update.scale == scale, name


@pytest.mark.parametrize("spelled", ["peft", "processor"])
def test_what_one_model_saved_of_old_is_found_in_its_directory(
    spelled: str, tmp_path: Path
) -> None:
    """``save_attn_procs`` before there was metadata: paths of the model alone, and a pickle."""
    state = pairs("unet")
    bare = {SPELLINGS[spelled](key).removeprefix("unet."): value for key, value in state.items()}
    torch.save(bare, tmp_path / "pytorch_lora_weights.bin")
    adapter = load_adapter(tmp_path, base=seeded(), allow_pickle=True)
    fits(adapter, seeded(), X, loaded_by_diffusers("unet", state, None))


KEYS = {
    "unet.b.0.attn1.to_q.lora_A.weight": ("unet", "b.0.attn1.to_q", DOWN),
    "unet.b.0.attn1.to_q.lora_B.weight": ("unet", "b.0.attn1.to_q", UP),
    "unet.b.0.attn1.to_out.0.lora.down.weight": ("unet", "b.0.attn1.to_out.0", DOWN),
    "unet.b.0.attn1.to_out.0.lora.up.weight": ("unet", "b.0.attn1.to_out.0", UP),
    "unet.b.0.attn1.processor.to_q_lora.down.weight": ("unet", "b.0.attn1.to_q", DOWN),
    "unet.b.0.attn1.processor.to_out_lora.up.weight": ("unet", "b.0.attn1.to_out.0", UP),
    "text_encoder.l.0.self_attn.to_k_lora.up.weight": ("text_encoder", "l.0.self_attn.k_proj", UP),
    "unet.b.0.attn1.processor.to_v_lora.up.weight": ("unet", "b.0.attn1.to_v", UP),
    "text_encoder.l.0.self_attn.to_v_lora.up.weight": ("text_encoder", "l.0.self_attn.v_proj", UP),
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


@pytest.mark.parametrize("key", KEYS)
def test_a_key_has_one_component_path_and_role(key: str) -> None:
    component, path, role = KEYS[key]
    tensor = torch.ones(2, 3)
    assert sort_by_component({key: tensor}) == {component: {path: {role: (key, tensor)}}}


@pytest.mark.parametrize("key", KEYS)
def test_a_file_of_one_model_has_no_component(key: str) -> None:
    component, path, role = KEYS[key]
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
    "a DiT of two media": ([f"transformer.visual_transformer_blocks.0.ff.in_layer.{A}"], True),
    "attention": ([f"transformer.blocks.0.attn1.to_q.{A}"], True),
    "attention that is added": ([f"transformer.b.0.attn.add_k_proj.{A}"], True),
    "with alpha": ([f"transformer.h.0.{A}", "transformer.h.0.alpha"], True),
    "another spelling": (["transformer.h.0.fc.lora.down.weight"], True),
    "LoKr": (["transformer.h.0.fc.lokr_w1"], True),
    "LoKr with alpha": (["transformer.h.0.fc.lokr_w1", "transformer.h.0.fc.alpha"], False),
    "LyCORIS' magnitude": ([f"transformer.h.0.{A}", "transformer.h.0.dora_scale"], False),
    "a difference": ([f"unet.h.0.{A}", "unet.h.1.diff"], False),
    "kohya": (["lora_unet_h_0.lora_down.weight", "lora_unet_h_0.alpha"], False),
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
