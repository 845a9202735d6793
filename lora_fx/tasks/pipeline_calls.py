"""The calls of a pipeline's models that are exported, by optimum's names."""

from __future__ import annotations

from typing import Any

import torch

from lora_fx.tasks.calls import Call
from lora_fx.tasks.example_inputs import example_inputs
from lora_fx.tasks.generation import called_by, taking
from lora_fx.tasks.pipeline import Pipeline
from lora_fx.tasks.pipeline_code import passes
from lora_fx.tasks.pipeline_inputs import (
    ADDED,
    BATCH,
    OPTIONAL,
    SEQUENCE,
    denoiser_inputs,
    facts_of,
    halvings,
    image,
)

HIDDEN, MASK = "output_hidden_states", "attention_mask"
_BLOCKS = ("block_out_channels", "encoder_block_out_channels")


def calls_of(pipeline: Pipeline, component: str) -> tuple[Call, ...]:
    """What is exported of a component: of a VAE both its halves, ``vae_encoder`` and its decoder.

    Raises:
        LoraFxError: an input that a model needs cannot be made; names it.
    """
    model: Any = pipeline.models[component].model
    if component == "vae":
        return _encoder(model, pipeline), _decoder(model, pipeline)
    if component.startswith("text_encoder"):
        return (_text_encoder(model, pipeline, component),)
    return (_denoiser(model, pipeline, component),)


def file_of(name: str) -> str:
    """Where the file of a component lies in a pipeline's directory."""
    return f"{name}/model.onnx"


def _denoiser(model: Any, pipeline: Pipeline, component: str) -> Call:
    """``sample``, ... -> ``out_sample`` of a UNet, ``hidden_states``, ... likewise."""
    own = type(model)
    given = [name for name in OPTIONAL if passes(pipeline.kind(), component, name)]
    kwargs, axes = denoiser_inputs(facts_of(model, pipeline.fields), own.__name__, given)
    result = f"out_{next(iter(kwargs))}"

    def forward(self: Any, **given: Any) -> dict[str, torch.Tensor]:
        added = {name: given.pop(name) for name in ADDED if name in given}
        given |= {"added_cond_kwargs": added} if added else {}
        return {result: own.forward(self, **given, return_dict=False)[0]}

    return Call(called_by(model, taking(forward, kwargs)), kwargs, axes, file=file_of(component))


def _encoder(model: Any, pipeline: Pipeline) -> Call:
    """``sample`` (batch, channels, height, width) -> ``latent_parameters``, or ``latent_sample``.

    Parameters are those of a distribution, mean and log of the variance.
    """
    facts = facts_of(model, pipeline.fields)
    names = "sample_height", "sample_width"
    value, axes = image(facts, facts.number("in_channels") or 3, halvings(facts, *_BLOCKS), names)

    def forward(self: Any, sample: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.encode(sample, return_dict=False)[0]
        if isinstance(found, torch.Tensor):
            return {"latent_sample": found}
        return {"latent_parameters": found.parameters}

    file = file_of("vae_encoder")
    return Call(called_by(model, forward), {"sample": value}, {"sample": axes}, file=file)


def _decoder(model: Any, pipeline: Pipeline) -> Call:
    """``latent_sample`` (batch, latent channels, height, width) -> ``sample``."""
    facts = facts_of(model, pipeline.fields)
    value, axes = image(
        facts, facts.number("latent_channels") or 4, 1, ("latent_height", "latent_width")
    )

    def forward(self: Any, latent_sample: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sample": self.decode(latent_sample, return_dict=False)[0]}

    kwargs = {"latent_sample": value}
    file = file_of("vae_decoder")
    return Call(called_by(model, forward), kwargs, {"latent_sample": axes}, file=file)


def _text_encoder(model: Any, pipeline: Pipeline, component: str) -> Call:
    """``input_ids`` (batch, sequence) -> what the model gives, in its own order.

    ``hidden_states.N`` of every layer are among it where the pipeline asks for them, and an
    ``attention_mask`` among the inputs where it gives one.
    """
    own, kind = type(model), pipeline.kind()
    asked = {"output_hidden_states": True} if passes(kind, component, HIDDEN) else {}
    names = ["input_ids", *([MASK] if passes(kind, component, MASK) else [])]
    found = example_inputs(model)[0]
    kwargs = {name: found[name] for name in names if name in found}

    def forward(self: Any, **given: torch.Tensor) -> dict[str, torch.Tensor]:
        found = own.forward(self, **given, **asked)
        result = {n: value for n, value in found.items() if isinstance(value, torch.Tensor)}
        layers = found.hidden_states if asked else ()
        return result | {f"hidden_states.{n}": value for n, value in enumerate(layers)}

    axes = {name: {0: BATCH, 1: SEQUENCE} for name in kwargs}
    return Call(called_by(model, taking(forward, kwargs)), kwargs, axes, file=file_of(component))
