"""What is read of the code of pipelines, for those that optimum has a table of."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from lora_fx.tasks import ModelSource
from lora_fx.tasks.directory import Loaded
from lora_fx.tasks.pipeline import Pipeline
from lora_fx.tasks.pipeline_calls import calls_of
from lora_fx.tasks.pipeline_code import passes
from lora_fx.testing.pipelines import tiny_text_encoder

LAYERS, MASK = "output_hidden_states", "attention_mask"
TEXTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
WANT_LAYERS = {
    "StableDiffusionPipeline": (),  # only if somebody skips some
    "StableDiffusionXLPipeline": TEXTS[:2],
    "StableDiffusionXLImg2ImgPipeline": TEXTS[:2],
    "StableDiffusion3Pipeline": TEXTS[:2],
    "FluxPipeline": (),
    "SanaPipeline": (),
}


@pytest.mark.parametrize("name", WANT_LAYERS)
def test_who_wants_all_layers_of_a_text_encoder(name: str) -> None:
    kind = getattr(diffusers, name)
    found = [text for text in TEXTS[: 2 + ("3P" in name)] if passes(kind, text, LAYERS)]
    assert found == list(WANT_LAYERS[name])


def test_who_gives_a_mask() -> None:
    assert passes(diffusers.SanaPipeline, "text_encoder", MASK)
    assert passes(diffusers.SanaPipeline, "transformer", "encoder_attention_mask")
    assert not passes(diffusers.StableDiffusionPipeline, "text_encoder", MASK)  # unless it is asked
    assert not passes(diffusers.StableDiffusionPipeline, "unet", "encoder_attention_mask")
    assert not passes(None, "unet", "encoder_attention_mask")


@pytest.mark.parametrize("projected", [False, True])
def test_layers_are_outputs_behind_the_model_s_own(projected: bool, tmp_path: Any) -> None:
    """The first is what pipelines take for the pooled text."""
    model = tiny_text_encoder(projected)
    fields = {"_class_name": "StableDiffusionXLPipeline"}
    pipeline = Pipeline(tmp_path, {"text_encoder_2": Loaded(model, ())}, fields)
    (call,) = calls_of(pipeline, "text_encoder_2")
    assert call.file == "text_encoder_2/model.onnx"
    gm = ModelSource(call.model, (), call.kwargs, call.dynamic_shapes).traced()
    found = gm(**call.kwargs)
    own = ["text_embeds", "last_hidden_state"] if projected else [
        "last_hidden_state", "pooler_output"
    ]  # fmt: skip
    assert list(found) == own + [f"hidden_states.{n}" for n in range(3)]
    with torch.no_grad():
        wanted = model(**call.kwargs, output_hidden_states=True).hidden_states
    assert all(torch.equal(found[f"hidden_states.{n}"], wanted[n]) for n in range(3))
    assert not torch.equal(wanted[1], wanted[2])
