"""Files that trainers of diffusion models write, held against what diffusers' own loader makes.

Each file is written in the names of its trainer, converted and loaded by diffusers, fused, and its
weights are compared with those that the updates give, on a tiny random model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
)
from diffusers.loaders import lora_conversion_utils as conversion
from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.formats import load_adapter
from lora_fx.testing import relative
from lora_fx.testing.diffusion import LORA, dotted, kohya, pair, size, tiny_diffusion

Tensors = dict[str, torch.Tensor]
BLOCKS = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
}
FLUX_NAMES = {
    **BLOCKS,
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
}
FLUX2_NAMES = {
    **BLOCKS,
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
XLABS_NAMES = {
    "processor.qkv_lora1": BLOCKS["img_attn.qkv"],
    "processor.qkv_lora2": BLOCKS["txt_attn.qkv"],
    "processor.proj_lora1": "attn.to_out.0",
    "processor.proj_lora2": "attn.to_add_out",
}
XLABS_SINGLE = {
    "processor.qkv_lora": "attn.to_q attn.to_k attn.to_v",
    "processor.proj_lora": "proj_out",
}
WAN_NAMES = {
    **{
        f"self_attn.{old}": f"attn1.{new}"
        for old, new in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)
    },
    **{
        f"cross_attn.{old}": f"attn2.{new}"
        for old, new in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)
    },
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
WAN_REST = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
}
FLUX_REST = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **{
        f"{old}.{a}": f"time_text_embed.{new}.{b}"
        for old, new in (("time_in", "timestep_embedder"), ("vector_in", "text_embedder"))
        for a, b in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
    },
    "single_blocks.0.linear2": "single_transformer_blocks.0.proj_out",
    "single_blocks.0.modulation.lin": "single_transformer_blocks.0.norm.linear",
}
FLUX2_REST = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "single_blocks.0.linear1": "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    "single_blocks.0.linear2": "single_transformer_blocks.0.attn.to_out",
}
QWEN = {
    f"{side}.{leaf}"
    for side, leaves in {
        "attn": "to_q to_k to_v add_q_proj add_k_proj add_v_proj to_out.0 to_add_out",
        "img_mlp": "net.0.proj net.2",
        "txt_mlp": "net.0.proj net.2",
        "img_mod": "1",
        "txt_mod": "1",
    }.items()
    for leaf in leaves.split()
}
ACE = {
    f"{side}_attn.{old}_proj": f"{side}_attn.to_{new}"
    for side in ("self", "cross")
    for old, new in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out.0"))
}
Z_IMAGE = {f"attention.to_{leaf}" for leaf in ("q", "k", "v", "out.0")} | {
    f"feed_forward.w{number}" for number in (1, 3)
}


def blocks(
    theirs: str, ours: str, names: Mapping[str, str], rest: Mapping[str, str] = {}
) -> dict[str, list[str]]:
    """Theirs -> ours, of both blocks of a model, and what is beside the blocks."""
    own = {
        f"{theirs}.{number}.{old}": [f"{ours}.{number}.{path}" for path in new.split()]
        for number in (0, 1)
        for old, new in names.items()
    }
    return own | {old: [new] for old, new in rest.items()}


def same(start: str, leaves: set[str]) -> dict[str, list[str]]:
    return {
        f"{start}.{number}.{leaf}": [f"{start}.{number}.{leaf}"]
        for number in (0, 1)
        for leaf in leaves
    }


PEFT = "lora_A.weight", "lora_B.weight", ""
XLABS = ("down.weight", "up.weight", "")


@dataclass(frozen=True)
class Case:
    model: str
    names: Mapping[str, list[str]]
    spell: Callable[[str], str]
    endings: tuple[str, str, str]
    convert: Callable[[Tensors], Tensors]


CASES = {
    "flux, kohya": Case(
        "flux", blocks("double_blocks", "transformer_blocks", FLUX_NAMES, FLUX_REST), kohya, LORA,
        conversion._convert_kohya_flux_lora_to_diffusers,
    ),
    "flux, ComfyUI": Case(
        "flux", blocks("double_blocks", "transformer_blocks", FLUX_NAMES), dotted, LORA,
        conversion._convert_kohya_flux_lora_to_diffusers,
    ),
    "flux, XLabs": Case(
        "flux",
        blocks("double_blocks", "transformer_blocks", XLABS_NAMES)
        | blocks("single_blocks", "single_transformer_blocks", XLABS_SINGLE),
        str, XLABS, conversion._convert_xlabs_flux_lora_to_diffusers,
    ),
    "flux, OneTrainer": Case(
        "flux",
        same("transformer_blocks", {"attn.to_q", "attn.to_out.0", "attn.to_add_out"}),
        lambda name: "lora_transformer_" + name.replace(".", "_"), LORA,
        conversion._convert_kohya_flux_lora_to_diffusers,
    ),
    "flux2, ai-toolkit": Case(
        "flux2", blocks("double_blocks", "transformer_blocks", FLUX2_NAMES, FLUX2_REST),
        dotted, PEFT,
        conversion._convert_non_diffusers_flux2_lora_to_diffusers,
    ),
    "flux2, kohya": Case(
        "flux2", blocks("double_blocks", "transformer_blocks", FLUX2_NAMES, FLUX2_REST),
        kohya, LORA,
        conversion._convert_kohya_flux2_lora_to_diffusers,
    ),
    "wan, ai-toolkit": Case(
        "wan", blocks("blocks", "blocks", WAN_NAMES, WAN_REST), dotted, PEFT,
        conversion._convert_non_diffusers_wan_lora_to_diffusers,
    ),
    "wan, musubi": Case(
        "wan", blocks("blocks", "blocks", WAN_NAMES), kohya, LORA,
        conversion._convert_musubi_wan_lora_to_diffusers,
    ),
    "qwen, musubi": Case(
        "qwen", same("transformer_blocks", {leaf for leaf in QWEN if "attn" in leaf}), kohya, LORA,
        conversion._convert_non_diffusers_qwen_lora_to_diffusers,
    ),
    "qwen, ai-toolkit": Case(
        "qwen", same("transformer_blocks", QWEN), dotted, PEFT,
        conversion._convert_non_diffusers_qwen_lora_to_diffusers,
    ),
    "z-image, kohya": Case(
        "z_image", same("layers", Z_IMAGE), kohya, LORA,
        conversion._convert_non_diffusers_z_image_lora_to_diffusers,
    ),
    "ace-step, its own": Case(
        "ace", blocks("layers", "layers", ACE), str, PEFT,
        conversion._convert_non_diffusers_ace_step_lora_to_diffusers,
    ),
    "z-image, ai-toolkit": Case(
        "z_image", same("layers", Z_IMAGE), dotted, PEFT,
        conversion._convert_non_diffusers_z_image_lora_to_diffusers,
    ),
}  # fmt: skip


def written(case: Case, model: nn.Module) -> Tensors:
    """A trainer's file for a model, of random factors; alphas are of another scale than 1."""
    torch.manual_seed(3)
    tensors: Tensors = {}
    for theirs, ours in case.names.items():
        if not all(path in dict(model.named_modules()) for path in ours):
            continue
        for ending, value in zip(
            case.endings, (*pair(size(model, *ours)), torch.tensor(6.0)), strict=True
        ):
            if ending:
                tensors[f"{case.spell(theirs)}.{ending}"] = value
    return tensors


def fused(model: nn.Module, tensors: Tensors, prefix: str = "transformer") -> Tensors:
    """The weights that diffusers makes of a model with an adapter, those that it changed."""
    tuned: Any = copy.deepcopy(model)
    starts = f"{prefix}."
    own = {k if k.startswith(starts) else starts + k: v for k, v in tensors.items()}
    tuned.load_lora_adapter(own, prefix=prefix)
    return changed(model, tuned)


def changed(model: nn.Module, tuned: nn.Module) -> Tensors:
    """The weights of a model that its adapter changes, merged by PEFT."""
    before = model.state_dict()
    for module in tuned.modules():
        if isinstance(module, BaseTunerLayer) and not module.merged:
            module.merge()
    own = {k: v for k, v in tuned.state_dict().items() if "lora_" not in k}
    after = {k.replace(".base_layer", ""): v for k, v in own.items()}
    return {k: v for k, v in after.items() if not torch.equal(v, before[k])}


def made(model: nn.Module, adapter: Adapter) -> Tensors:
    """The weights that the updates give."""
    found = {}
    for path, update in adapter.updates.items():
        module: Any = model.get_submodule(path)
        found[f"{path}.weight"] = update.weight(module.weight.detach())
        if update.bias is not None:
            found[f"{path}.bias"] = module.bias.detach() + update.shift(lambda: None)
    return found


def check_same(got: Tensors, want: Tensors) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert relative(got[name], value) < 1e-5, name


@pytest.mark.parametrize("name", CASES)
def test_a_trainer_s_file_gives_the_weights_of_diffusers(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    model = tiny_diffusion(case.model).eval()
    tensors = written(case, model)
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", base=model)
    want = fused(model, case.convert(dict(tensors)))
    assert len(want) >= len(case.names) / 2
    check_same(made(model, adapter), want)
    base = {key: model.state_dict()[key] for key in want}
    with pytest.raises(AssertionError):  # the control: the base alone
        check_same(base, want)


ATTENTION = "transformer_blocks.0."
SGM = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.2.0.emb_layers.1": "down_blocks.0.resnets.1.time_emb_proj",
    "input_blocks.2.0.out_layers.3": "down_blocks.0.resnets.1.conv2",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    f"input_blocks.4.1.{ATTENTION}attn1.to_q": f"down_blocks.1.attentions.0.{ATTENTION}attn1.to_q",
    f"input_blocks.5.1.{ATTENTION}attn2.to_k": f"down_blocks.1.attentions.1.{ATTENTION}attn2.to_k",
    f"input_blocks.5.1.{ATTENTION}ff.net.2": f"down_blocks.1.attentions.1.{ATTENTION}ff.net.2",
    "input_blocks.5.1.proj_in": "down_blocks.1.attentions.1.proj_in",
    "middle_block.0.in_layers.2": "mid_block.resnets.0.conv1",
    "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
    f"middle_block.1.{ATTENTION}attn2.to_v": f"mid_block.attentions.0.{ATTENTION}attn2.to_v",
    "output_blocks.2.0.in_layers.2": "up_blocks.0.resnets.2.conv1",
    f"output_blocks.1.1.{ATTENTION}attn1.to_v": f"up_blocks.0.attentions.1.{ATTENTION}attn1.to_v",
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.4.0.skip_connection": "up_blocks.1.resnets.1.conv_shortcut",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "out.2": "conv_out",
}
OWN = [ours for ours in SGM.values() if "time_emb" not in ours]


@pytest.mark.parametrize("names", [SGM, {ours: ours for ours in OWN}], ids=["SDXL", "SD1.5"])
def test_a_unet_by_sgm_s_names_and_by_its_own(tmp_path: Path, names: Mapping[str, str]) -> None:
    case = Case("unet", {old: [new] for old, new in names.items()}, kohya, LORA, dict)
    model: Any = tiny_diffusion("unet")
    tensors = written(case, model)
    save_file(tensors, tmp_path / "a.safetensors")
    loader = StableDiffusionXLLoraLoaderMixin
    state, alphas = loader.lora_state_dict(dict(tensors), unet_config=model.config)
    tuned: Any = copy.deepcopy(model)
    loader.load_lora_into_unet(state, alphas, tuned)
    want = changed(model, tuned)
    assert len(want) == len(names)
    check_same(made(model, load_adapter(tmp_path / "a.safetensors", base=model)), want)


def clip(seed: int, cls: type = CLIPTextModel) -> nn.Module:
    torch.manual_seed(seed)
    return cls(
        CLIPTextConfig(
            vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=8, projection_dim=6,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    "start", ["lora_te{}_text_model_", "text_encoders.clip_{}.transformer.text_model."]
)
def test_text_encoders_of_a_pipeline(tmp_path: Path, start: str) -> None:
    pipe = nn.Module()
    pipe.text_encoder, pipe.text_encoder_2 = clip(1), clip(2, CLIPTextModelWithProjection)
    leaves = ["self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
    flat, words = start.startswith("lora"), ("1", "2") if start.startswith("lora") else ("l", "g")
    plain: Tensors = {}
    tensors: Tensors = {}
    for number, (word, encoder) in enumerate(zip(words, pipe.children(), strict=True), 1):
        owner = dict(encoder.named_modules())
        for leaf in leaves:
            name = f"encoder.layers.1.{leaf}"
            path = next(path for path in owner if path.endswith(name))
            values = zip(LORA, (*pair(size(encoder, path)), torch.tensor(6.0)), strict=True)
            for ending, value in values:
                spelt = name.replace(".", "_") if flat else name
                tensors[f"{start.format(word)}{spelt}.{ending}"] = value
                plain[f"lora_te{number}_text_model_{name.replace('.', '_')}.{ending}"] = value
    save_file(tensors, tmp_path / "a.safetensors")
    loader = StableDiffusionXLLoraLoaderMixin
    state, alphas = loader.lora_state_dict(dict(plain))
    tuned: Any = copy.deepcopy(pipe)
    for part in ("text_encoder", "text_encoder_2"):
        loader.load_lora_into_text_encoder(state, alphas, getattr(tuned, part), prefix=part)
    want = changed(pipe, tuned)
    assert len(want) == 8
    check_same(made(pipe, load_adapter(tmp_path / "a.safetensors", base=pipe)), want)


@pytest.mark.parametrize("convert", ["kohya", "ComfyUI"])
def test_the_packed_layer_of_flux_s_single_blocks(tmp_path: Path, convert: str) -> None:
    """Diffusers has this model's sizes in its code: they are the real ones, without numbers."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=0, num_single_layers=1, guidance_embeds=False)
    spell = kohya if convert == "kohya" else dotted
    values = (torch.randn(2, 3072), torch.randn(21504, 2), torch.tensor(3.0))
    tensors = {
        f"{spell('single_blocks.0.linear1')}.{ending}": value
        for ending, value in zip(LORA, values, strict=True)
    }
    save_file(tensors, tmp_path / "a.safetensors")
    found = load_adapter(tmp_path / "a.safetensors", base=model).updates
    want = conversion._convert_kohya_flux_lora_to_diffusers(dict(tensors))
    assert {f"transformer.{path}.lora_A.weight" for path in found} < want.keys()
    assert len(found) == 4
    for path, update in found.items():
        down, up = (want[f"transformer.{path}.lora_{ab}.weight"] for ab in "AB")
        assert isinstance(update, Update)
        probe = torch.randn(5, 3072)
        own = update.scale * probe @ update.down.T @ update.up.T
        assert relative(own, probe @ down.T @ up.T) < 1e-5
        assert relative(own, probe @ down.T @ up.roll(1, 0).T) > 1e-1


def test_biases_beside_lora(tmp_path: Path) -> None:
    """Diffusers takes Wan's differences of biases for those of the up-projections."""
    case = CASES["wan, ai-toolkit"]
    model = tiny_diffusion("wan")
    tensors = written(case, model)
    for theirs, [path] in case.names.items():
        bias: Any = model.get_submodule(path).bias
        tensors[f"{dotted(theirs)}.diff_b"] = torch.randn_like(bias)
    save_file(tensors, tmp_path / "a.safetensors")
    state = case.convert(dict(tensors))
    want = fused(model, {key.replace("lora_A.bias", "lora_B.bias"): v for key, v in state.items()})
    adapter = load_adapter(tmp_path / "a.safetensors", base=model)
    got = made(model, adapter)
    assert sum(key.endswith(".bias") for key in want) > 20
    check_same({key: got[key] for key in want}, want)
    assert all(isinstance(update, Update) for update in adapter.updates.values())


def test_all_that_stands_beside_lora_of_a_layer_adds_up(tmp_path: Path) -> None:
    """LoRA, differences of weight and bias, and of norms, by plain arithmetic."""
    model: Any = tiny_diffusion("wan")
    down, up = pair((16, 16))
    diff, shift, gain = torch.randn(16, 16), torch.randn(16), torch.randn(16)
    lone = torch.randn(24)
    start = "diffusion_model.blocks.1"
    tensors = {
        f"{start}.self_attn.q.lora_down.weight": down,
        f"{start}.self_attn.q.lora_up.weight": up,
        f"{start}.self_attn.q.alpha": torch.tensor(6.0),
        f"{start}.self_attn.q.diff": diff,
        f"{start}.self_attn.q.diff_b": shift,
        f"{start}.self_attn.norm_q.diff": gain,
        f"{start}.norm3.diff": gain,
        f"{start}.norm3.diff_b": shift,
        f"{start}.ffn.0.diff_b": lone,
    }
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "a.safetensors")
    updates = load_adapter(tmp_path / "a.safetensors", base=model).updates
    block = model.blocks[1]
    want = {
        "attn1.to_q": block.attn1.to_q.weight + 2 * up @ down + diff,
        "attn1.norm_q.weight": block.attn1.norm_q.weight + gain,
        "norm2.weight": block.norm2.weight + gain,
        "norm2.bias": block.norm2.bias + shift,
        "ffn.net.0.proj.bias": block.ffn.net[0].proj.bias + lone,
    }
    assert updates.keys() == {f"blocks.1.{path}" for path in want}
    for path, value in want.items():
        name = f"blocks.1.{path}"
        own = model.get_parameter(name if path.endswith(("weight", "bias")) else f"{name}.weight")
        assert relative(updates[name].weight(own.detach()), value.detach()) < 1e-5, path
    assert torch.equal(updates["blocks.1.attn1.to_q"].bias, shift)  # type: ignore[arg-type]


def test_lokr_of_a_packed_projection_is_cut(tmp_path: Path) -> None:
    """Diffusers fuses the model's projections for it; here each gets its rows."""
    model: Any = tiny_diffusion("flux2")
    first, second = torch.randn(12, 4), torch.randn(4, 4)
    name = "diffusion_model.double_blocks.1.img_attn.qkv"
    tensors = {f"{name}.lokr_w1": first, f"{name}.lokr_w2": second, f"{name}.alpha": torch.ones(1)}
    save_file(tensors, tmp_path / "a.safetensors")
    updates = load_adapter(tmp_path / "a.safetensors", base=model).updates
    deltas = torch.kron(first, second).chunk(3)
    for leaf, delta in zip(("to_q", "to_k", "to_v"), deltas, strict=True):
        path = f"transformer_blocks.1.attn.{leaf}"
        own = model.get_submodule(path).weight.detach()
        assert relative(updates[path].weight(own) - own, delta) < 1e-5
        assert relative(delta, deltas[0].flip(0)) > 1e-1
