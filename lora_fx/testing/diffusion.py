"""Tiny diffusion models with random weights, and what trainers' files hold of their layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

RANK = 3
LORA = "lora_down.weight", "lora_up.weight", "alpha"


def _of(cls: str, **sizes: Any) -> tuple[str, dict[str, Any]]:
    return cls, sizes


_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": _of(
        "FluxTransformer2DModel",
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=10, pooled_projection_dim=6,
        guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    ),
    "flux2": _of(
        "Flux2Transformer2DModel",
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=10, timestep_guidance_channels=6,
        axes_dims_rope=(2, 2, 2, 2),
    ),
    "wan": _of(
        "WanTransformer3DModel",
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=8, in_channels=4,
        out_channels=4, text_dim=10, freq_dim=6, ffn_dim=24, num_layers=2, image_dim=7,
        added_kv_proj_dim=16, rope_max_seq_len=8,
    ),
    "qwen": _of(
        "QwenImageTransformer2DModel",
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=10, axes_dims_rope=(2, 2, 4),
    ),
    "z_image": _of(
        "ZImageTransformer2DModel",
        in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=10, axes_dims=[2, 2, 4], axes_lens=[8, 8, 8],
    ),
    "ace": _of(
        "AceStepTransformer1DModel",
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, in_channels=12, audio_acoustic_hidden_dim=4,
        encoder_hidden_size=10,
    ),
    "unet": _of(
        "UNet2DConditionModel",
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=2,
        cross_attention_dim=10, attention_head_dim=4, norm_num_groups=4,
    ),
    "sd3": _of(
        "SD3Transformer2DModel",
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=10,
        caption_projection_dim=16, pooled_projection_dim=6, pos_embed_max_size=4,
        dual_attention_layers=(0,),
    ),
    "hunyuan": _of(
        "HunyuanVideoTransformer3DModel",
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2,
        num_single_layers=2, num_refiner_layers=1, patch_size=1, patch_size_t=1,
        guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    ),
    "lumina": _of(
        "Lumina2Transformer2DModel",
        sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2,
        num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=2,
        cap_feat_dim=8, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32),
    ),
    "aura": _of(
        "AuraFlowTransformer2DModel",
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=2,
        num_single_dit_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=10, caption_projection_dim=16, pos_embed_max_size=16,
    ),
    "cosmos": _of(
        "CosmosTransformer3DModel",
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        mlp_ratio=2, text_embed_dim=10, adaln_lora_dim=6, max_size=(4, 8, 8),
    ),
    "mochi": _of(
        "MochiTransformer3DModel",
        num_attention_heads=2, attention_head_dim=8, num_layers=48, pooled_projection_dim=6,
        in_channels=4, text_embed_dim=10, time_embed_dim=4,
    ),
    "krea": _of(
        "Krea2Transformer2DModel",
        in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24, timestep_embed_dim=6, text_hidden_dim=12,
        num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=20, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(2, 2, 4),
    ),
    "flux3": _of(
        "Flux3Transformer2DModel",
        in_channels=4, cond_in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=10, timestep_channels=6,
        axes_dims_rope=(2, 2, 2, 2),
    ),
    "vace": _of(
        "WanVACETransformer3DModel",
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=8, in_channels=4,
        out_channels=4, text_dim=10, freq_dim=6, ffn_dim=24, num_layers=2, vace_layers=[0, 1],
        vace_in_channels=4, rope_max_seq_len=8,
    ),
    "sana": _of(
        "SanaTransformer2DModel",
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=10, sample_size=4,
    ),
    "ltx2": _of(
        "LTX2VideoTransformer3DModel",
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=2, audio_attention_head_dim=6, audio_cross_attention_dim=12,
        num_layers=2, caption_channels=10,
    ),
    "h3": _of(
        "MiniMaxH3Transformer3DModel",
        in_channels=4, audio_in_channels=4, num_layers=2, num_refiner_layers=1, hidden_size=16,
        num_attention_heads=2, attention_head_dim=8, text_dim=10, ffn_dim=24, freq_dim=6,
        time_embed_hidden_dim=16, time_embed_dim=12, rope_freq_dim=2,
    ),
}  # fmt: skip


def tiny_diffusion(name: str) -> nn.Module:
    """A model of a class of diffusers', of torch's own random state."""
    import diffusers

    cls, sizes = _MODELS[name]
    made: nn.Module = getattr(diffusers, cls)(**sizes)
    return made


def size(model: nn.Module, *paths: str) -> tuple[int, ...]:
    """The shape of a weight that holds the rows of several layers, one behind the other."""
    weights: Any = [model.get_submodule(path).weight for path in paths]
    return sum(len(weight) for weight in weights), *weights[0].shape[1:]


def pair(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random factors of a weight, as files have them."""
    out, into, *kernel = shape
    return torch.randn(RANK, into, *kernel), torch.randn(out, RANK, *[1 for _ in kernel]) * 0.3


def kohya(name: str) -> str:
    """What kohya calls a layer."""
    return "lora_unet_" + name.replace(".", "_")


def dotted(name: str) -> str:
    """What ComfyUI and others call a layer."""
    return f"diffusion_model.{name}"
