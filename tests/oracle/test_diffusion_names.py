"""What each name of a checkpoint means, held against what diffusers' own conversion makes of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file

from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError
from lora_fx.formats import load_adapter
from lora_fx.layers.base_layers import layers_of
from lora_fx.layers.meanings import Meaning
from lora_fx.layers.trainer_names import names_of
from lora_fx.testing import relative
from lora_fx.testing.diffusion import LORA, dotted, kohya, pair, size, tiny_diffusion

Tensors = dict[str, torch.Tensor]


class Sparse(dict[str, torch.Tensor]):
    """A checkpoint that lacks what no adapter changes; converters ask for all of it."""

    def pop(self, key: str, default: Any = None) -> Any:
        return super().pop(key, default)


LAST = r"final_layer\.(linear|adaLN)"
BFL = rf"((double|single)_blocks\.(?!.*processor)|img_in|txt_in|\w+_in\.|{LAST}|\w+_modul)"
CHECKPOINTS = {
    "sd3": (
        "sd3", r"(joint_blocks|[xty]_embedder|final_layer\.(linear|ada))",
        single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    ),
    "flux2": ("flux2", BFL, single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers),
    "wan": (
        "wan", r"(blocks(?!.*(_proj|_[xy])$)|time_(emb|proj)|text_emb|img_emb|head)",
        single_file_utils.convert_wan_transformer_to_diffusers,
    ),
    "z-image": (
        "z_image", r"((layers|\w+_refiner)(?!.*attention\.o$)|x_emb|final_layer)",
        single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
    ),
    # Packed layers are cut at the real sizes there: those lines are of models above too.
    "hunyuan": (
        "hunyuan",
        r"(double_blocks\.\d+\.\w+(mod\.linear|mlp\.fc)|single_blocks.*mod.*linear|txt_in\.|img_in\.proj|"
        r"(time|guidance)_in\.mlp|vector_in|final_layer\.(linear|ada))",
        single_file_utils.convert_hunyuan_video_transformer_to_diffusers,
    ),
    "lumina": (
        "lumina", rf"(?!.*qkv)(layers|\w+_refiner|cap_embedder|t_embedder|{LAST})",
        single_file_utils.convert_lumina2_to_diffusers,
    ),
    "aura": (
        "aura", r"(double_layers|single_layers|init_x|cond_seq|t_embedder\.mlp|modF|final_linear)",
        single_file_utils.convert_auraflow_transformer_checkpoint_to_diffusers,
    ),
    "cosmos": (
        "cosmos",
        r"(blocks\.\d+\.(adaln|(self|cross)_attn\.\w+_proj|mlp\.layer)|final_layer\.(linear|adaln)|"
        r"t_embedder\.1|x_embedder\.proj\.1)",
        single_file_utils.convert_cosmos_transformer_checkpoint_to_diffusers,
    ),
    "mochi": (
        "mochi",
        r"(blocks\.\d+\.(mod_|mlp_|attn\.\w+_[xy])|x_embedder\.proj$|t5_y|t_embedder\.mlp|"
        r"final_layer\.(linear|mod$))",
        single_file_utils.convert_mochi_transformer_checkpoint_to_diffusers,
    ),
    "krea": (
        "krea", r"(blocks\.|txtfusion|first|last|tmlp|tproj|txtmlp)",
        single_file_utils.convert_krea2_transformer_checkpoint_to_diffusers,
    ),
    "flux3": (
        "flux3",
        r"(\w+_blocks\..*(_proj|attn_out|mlp_\w+)$|\w+_modulations|(emb|txt|time)_in\.|"
        r"final_layer\.image)",
        single_file_utils.convert_flux3_transformer_checkpoint_to_diffusers,
    ),
    "vace": (
        "vace", r"((vace_)?blocks\.\d\.((self|cross)_attn\.[qkvo]$|ffn|(before|after)_proj)|head)",
        single_file_utils.convert_wan_transformer_to_diffusers,
    ),
    "sana": (
        "sana",
        r"(blocks\..*(conv\.conv|attn\.qkv|attn\.proj|_linear)$|x_embedder\.proj$|t_embedder|t_block|"
        r"y_embedder\.y_proj|final_layer\.linear)",
        single_file_utils.convert_sana_transformer_to_diffusers,
    ),
    "ltx2": (
        "ltx2", r"(\w*patchify_proj|\w*adaln_single(?!_))",
        single_file_utils.convert_ltx2_transformer_to_diffusers,
    ),
    "h3": (
        "h3",
        r"((token_refiner\.)?blocks\.\d+\.(attn\.(qkv|out)_proj|mlp\.fc[12])$|\w+_patch_proj|"
        r"condition_proj|time_embedder\.proj|final_layer\.(video|audio|adaln_proj))",
        lambda checkpoint: single_file_utils.convert_minimax_h3_transformer_checkpoint_to_diffusers(
            checkpoint, {}
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("kind", ["lora", "diff"])
def test_every_name_means_what_a_checkpoint_s_does(tmp_path: Path, name: str, kind: str) -> None:
    """Whoever converts a whole checkpoint converts a change of its weights."""
    of, own_names, convert = CHECKPOINTS[name]
    model = tiny_diffusion(of)
    base = layers_of(model)
    known = {
        theirs: meaning for theirs, meaning in names_of(base).items()
        if re.match(own_names, theirs) and all(base[path].is_matrix for path in meaning.layers)
    }  # fmt: skip
    known |= {"context_embedder": Meaning(("context_embedder",))} if name == "sd3" else {}
    tensors: Tensors = {}
    checkpoint: Tensors = {"pos_embed": torch.zeros(1)} if name == "sd3" else {}
    for theirs, meaning in known.items():
        out, into, *kernel = (n or 0 for n in meaning.shape(base))
        down, up = pair((out, into, *kernel))
        delta = torch.einsum("ri...,or->oi...", down, up.flatten(1)).contiguous()
        checkpoint |= {f"{theirs}.weight": delta, f"{theirs}.bias": delta.flatten(1)[:, 0].clone()}
        own = {"lora_A.weight": down, "lora_B.weight": up} if kind == "lora" else {"diff": delta}
        own |= {"diff_b": checkpoint[f"{theirs}.bias"]} if kind == "diff" else {}
        tensors |= {f"diffusion_model.{theirs}.{leaf}": value for leaf, value in own.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", base=model)
    converted = {k: value for k, value in convert(Sparse(checkpoint)).items() if value is not None}
    assert len(adapter.updates) > 15
    for path, update in adapter.updates.items():
        layer: Any = model.get_submodule(path)
        own_weight = layer.weight.detach()
        delta = update.weight(own_weight) - own_weight
        assert relative(delta, converted[f"{path}.weight"]) < 1e-5, path
        if kind == "diff" and f"{path}.bias" in converted and layer.bias is not None:
            assert relative(update.shift(lambda: None), converted[f"{path}.bias"]) < 1e-5, path
    weights = {f"{path}.weight" for path in adapter.updates}
    assert {key for key in converted if key.endswith(".weight")} == weights


@pytest.mark.parametrize("spell", [dotted, kohya])
@pytest.mark.parametrize(
    ("of", "theirs", "path"),
    [
        # MiniMax has the halves of it in the other order, Stability's MLP of that name has none
        ("flux", "blocks.0.mlp.fc1", "transformer_blocks.0.ff.net.0.proj"),
        ("flux", "token_refiner.blocks.0.mlp.fc2", "transformer_blocks.0.ff.net.2"),
    ],
)
def test_the_end_of_another_model_s_name_means_nothing(
    tmp_path: Path, of: str, theirs: str, path: str, spell: Callable[[str], str]
) -> None:
    model = tiny_diffusion(of)
    down, up = pair(size(model, path))
    tensors = dict(
        zip((f"{spell(theirs)}.{e}" for e in LORA), (down, up, torch.tensor(3.0)), strict=True)
    )
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="1 names mean no layer of the base"):
        load_adapter(tmp_path / "a.safetensors", base=model)


def test_rows_by_head_are_refused(tmp_path: Path) -> None:
    """DiffSynth trains MiniMax-H3 as its shards are, and names its factors as PEFT's model does."""
    model = tiny_diffusion("h3")
    down, up = pair((48, 16))
    tensors = {"blocks.0.attn.qkv_proj.lora_A.default.weight": down}
    tensors |= {"blocks.0.attn.qkv_proj.lora_B.default.weight": up}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="is DiffSynth's of MiniMax-H3, with rows by head"):
        load_adapter(tmp_path / "a.safetensors", base=model)


@pytest.mark.parametrize("spell", [dotted, kohya, str])
def test_one_alpha_of_minimax_is_a_text_beside(tmp_path: Path, spell: Callable[[str], str]) -> None:
    """diffusers reads it too, where no tensor is an alpha; where one is, it says nothing."""
    model = tiny_diffusion("h3")
    down, up = pair((48, 16))
    tensors = {f"{spell('blocks.0.attn.qkv_proj')}.lora_down.weight": down}
    tensors |= {f"{spell('blocks.0.attn.qkv_proj')}.lora_up.weight": up}
    file = tmp_path / "a.safetensors"
    for metadata, more, scale in (
        ({}, {}, 1.0), ({"alpha": "6"}, {}, 2.0), ({"alpha": "6"}, {"alpha": 1.5}, 0.5),
    ):  # fmt: skip
        own = {f"{spell('blocks.0.attn.qkv_proj')}.{k}": torch.tensor(n) for k, n in more.items()}
        save_file({**tensors, **own}, file, metadata)
        for update in load_adapter(file, base=model).updates.values():
            assert isinstance(update, Update)
            assert update.scale == scale
    save_file(tensors, file, {"alpha": "much"})
    with pytest.raises(AdapterError, match="alpha of its metadata is 'much', expected a finite"):
        load_adapter(file, base=model)
