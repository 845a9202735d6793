"""Tiny pipelines of diffusers, with random weights, and adapters that diffusers itself writes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_SIZES = {"norm_num_groups": 4, "block_out_channels": (8, 16)}
_TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 54, "max_position_embeddings": 20, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1, "projection_dim": 12,
}  # fmt: skip


def _libraries() -> tuple[Any, Any]:
    import diffusers
    import transformers

    return diffusers, transformers


def tiny_unet(**more: Any) -> Any:
    """A UNet with an attention on the way down, and one in the middle."""
    diffusers, _ = _libraries()

    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16, "layers_per_block": 1, "attention_head_dim": 4, "sample_size": 8,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**{**_SIZES, **blocks, **more}).eval()


def tiny_vae() -> Any:
    """A VAE that makes 2 x 2 pixels of each latent."""
    diffusers, _ = _libraries()

    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "sample_size": 16,
    }
    return diffusers.AutoencoderKL(**_SIZES, **blocks).eval()


def tiny_text_encoder(projected: bool = False) -> Any:
    """A CLIP text model of two layers, with the projection of its kind or without."""
    _, transformers = _libraries()

    torch.manual_seed(0)
    kind: Any = (
        transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    )
    return kind(transformers.CLIPTextConfig(**_TEXT)).eval()


def tiny_pipeline(path: Path) -> Path:
    """A Stable Diffusion pipeline that is saved to a directory, its tokenizer one of letters."""
    diffusers, transformers = _libraries()

    words = path / "tokenizer"
    _write_tokenizer(words)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    diffusers.StableDiffusionPipeline(
        vae=tiny_vae(), text_encoder=tiny_text_encoder(), unet=tiny_unet(), scheduler=scheduler,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(words), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(path)  # fmt: skip
    _write_tokenizer(words)  # with the files that older versions of transformers read
    text = path / "text_encoder" / "model.safetensors"  # as what is published names its tensors
    save_file({f"text_model.{name}": value for name, value in load_file(text).items()}, text)
    return path


def _write_tokenizer(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    end = dict.fromkeys(("eos_token", "unk_token", "pad_token"), words[1])
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 20, "bos_token": words[0]}
    (path / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    (path / "tokenizer_config.json").write_text(json.dumps(config | end))


def save_diffusers_adapter(path: Path, seed: int = 0, **parts: Any) -> dict[str, Any]:
    """Trains nothing: random LoRA on models of a pipeline, in a file of diffusers'.

    Args:
        path: the directory to write.
        seed: of the numbers.
        **parts: the models by the names of their components.

    Returns:
        Copies of the models as PEFT computes them with the adapter.
    """
    import peft

    diffusers, _ = _libraries()

    torch.manual_seed(seed)
    tuned, layers = {}, {}
    for name, model in parts.items():
        is_text = name.startswith("text")
        targets = ["q_proj", "v_proj", "fc1"] if is_text else ["to_q", "to_v"]
        config: Any = peft.LoraConfig(
            r=3, lora_alpha=6, init_lora_weights=False, target_modules=targets
        )
        tuned[name] = peft.inject_adapter_in_model(config, copy.deepcopy(model)).eval()
        found = peft.get_peft_model_state_dict(tuned[name])
        wrapper = "text_model." if is_text else ""  # as what is published names its layers
        layers[f"{name}_lora_layers"] = {f"{wrapper}{key}": t for key, t in found.items()}
        layers[f"{name}_lora_adapter_metadata"] = config.to_dict()
    diffusers.StableDiffusionPipeline.save_lora_weights(path, **layers)
    return tuned
