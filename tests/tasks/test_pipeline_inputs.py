"""What the models of pipelines are fed: derived from signatures and configs, and it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from lora_fx.cli.commands import export_model
from lora_fx.cli.model_source import find_model
from lora_fx.errors import LoraFxError
from lora_fx.tasks.pipeline_inputs import denoiser_inputs, facts_of
from lora_fx.testing.pipelines import tiny_unet

NOISE, TEXT, STEP = "sample", "encoder_hidden_states", "timestep"
EXTRA = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 12,
}  # fmt: skip
UNETS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "plain": ({}, {}),
    "two sizes": (EXTRA, {"text_embeds": (2, 12), "time_ids": (2, 6)}),
    "guided": ({"time_cond_proj_dim": 7}, {"timestep_cond": (2, 7)}),
    "labels": ({"num_class_embeds": 5}, {"class_labels": (2,)}),
}


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
        caption_projection_dim=16, pooled_projection_dim=10, pos_embed_max_size=16,
    )  # fmt: skip


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10,
        axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip


def sana() -> Any:
    return diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=12, sample_size=8, patch_size=1,
    )  # fmt: skip


POOLED = {"pooled_projections": (2, 10)}
TRANSFORMERS: dict[Callable[[], Any], dict[str, tuple[int, ...]]] = {
    sd3: {"hidden_states": (2, 4, 8, 12), TEXT: (2, 5, 12), STEP: (2,)} | POOLED,
    flux: {
        "hidden_states": (2, 6, 4), TEXT: (2, 5, 12), STEP: (2,), "img_ids": (6, 3),
        "txt_ids": (5, 3), "guidance": (2,),
    } | POOLED,
    sana: {"hidden_states": (2, 4, 4, 6), TEXT: (2, 5, 12), STEP: (2,)},
}  # fmt: skip


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_is_fed_what_it_takes(name: str) -> None:
    more, extra = UNETS[name]
    model = tiny_unet(**more)
    inputs, axes = denoiser_inputs(facts_of(model, {}), "a UNet")
    wanted = {NOISE: (2, 4, 8, 12), STEP: (), TEXT: (2, 5, 16)} | extra
    assert {name: tuple(value.shape) for name, value in inputs.items()} == wanted
    assert axes[NOISE] == {0: "batch_size", 2: "height", 3: "width"}
    assert axes[STEP] == {}
    added = {name: inputs.pop(name) for name in ("text_embeds", "time_ids") if name in inputs}
    given = inputs | ({"added_cond_kwargs": added} if added else {})
    with torch.no_grad():
        assert model(**given).sample.isfinite().all()


@pytest.mark.parametrize("make", TRANSFORMERS)
def test_a_transformer_is_fed_what_it_takes(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    inputs, axes = denoiser_inputs(facts_of(model, {}), "a transformer")
    shapes = {name: tuple(value.shape) for name, value in inputs.items()}
    assert shapes == TRANSFORMERS[make]
    assert axes[STEP] == {0: "batch_size"}
    with torch.no_grad():
        assert model(**inputs).sample.isfinite().all()


def test_the_refiner_has_five_numbers_for_the_sizes() -> None:
    fields = {"requires_aesthetics_score": True}
    inputs, _ = denoiser_inputs(facts_of(tiny_unet(**EXTRA), fields), "a UNet")
    assert inputs["time_ids"].shape == (2, 5)
    assert inputs["text_embeds"].shape == (2, 60 - 5 * 8)


def test_a_mask_is_fed_only_to_whom_the_pipeline_gives_one() -> None:
    facts = facts_of(sana(), {})
    assert "encoder_attention_mask" not in denoiser_inputs(facts, "Sana")[0]
    inputs, axes = denoiser_inputs(facts, "Sana", ["encoder_attention_mask"])
    assert inputs["encoder_attention_mask"].sum(1).tolist() == [5, 2]
    assert axes["encoder_attention_mask"] == {0: "batch_size", 1: "sequence_length"}


def test_an_input_that_cannot_be_made_is_named() -> None:
    class Odd(torch.nn.Module):
        config: dict[str, Any] = {"in_channels": 4}  # noqa: RUF012
        dtype = torch.float32

        def forward(self, hidden_states: Any, camera: Any) -> None: ...

    with pytest.raises(LoraFxError, match="made for a Odd: its camera is of no kind"):
        denoiser_inputs(facts_of(Odd(), {}), "Odd")


@pytest.mark.parametrize(("make", "name"), [(lambda: tiny_unet(**EXTRA), "unet"), (sd3, "mmdit")])
def test_what_is_exported_agrees_at_every_shape(make: Any, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / name)
    report: Any = export_model(
        str(tmp_path / name), [], "merged", tmp_path / "o", False, lambda _: None
    )
    assert report.verified
    extra = ["text_embeds", "time_ids"] if name == "unet" else ["pooled_projections"]
    assert {*extra} < {*report.inputs}
    assert report.outputs == ["out_sample" if name == "unet" else "out_hidden_states"]
    assert report.task == ("unet" if name == "unet" else "transformer")
    shapes = {row.shape for row in report.checks}
    assert len(shapes) > 3
    assert any("batch_size=1" in shape for shape in shapes)


def test_a_vae_without_a_distribution_gives_latents(tmp_path: Path) -> None:
    torch.manual_seed(0)
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    diffusers.AutoencoderTiny(**channels, **counts, upsampling_scaling_factor=2).save_pretrained(
        tmp_path
    )
    source = find_model(str(tmp_path))
    assert [part.file for part in (source, *source.more)] == [
        "vae_encoder/model.onnx", "vae_decoder/model.onnx"
    ]  # fmt: skip
    assert isinstance(source.model, torch.nn.Module)
    with torch.no_grad():
        found = source.model(**source.kwargs)
    assert list(found) == ["latent_sample"]
    assert found["latent_sample"].shape == (2, 4, 4, 6)
