"""The calls of a pipeline's models that are exported, by optimum's names."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import torch

from lora_fx.tasks.calls import Call
from lora_fx.tasks.example_inputs import example_inputs
from lora_fx.tasks.generation import called_by, taking
from lora_fx.tasks.pipeline import Pipeline
from lora_fx.tasks.pipeline_inputs import (
    ADDED,
    BATCH,
    SEQUENCE,
    denoiser_inputs,
    facts_of,
    halvings,
    image,
)

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
    kwargs, axes = denoiser_inputs(facts_of(model, pipeline.fields), own.__name__)
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

    ``hidden_states.N`` of every layer are among it where the pipeline asks for them.
    """
    own = type(model)
    ids = example_inputs(model)[0]["input_ids"]
    asked = {"output_hidden_states": True} if _wants_layers(pipeline.kind(), component) else {}

    def forward(self: Any, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        found = own.forward(self, input_ids, **asked)
        result = {n: value for n, value in found.items() if isinstance(value, torch.Tensor)}
        layers = found.hidden_states if asked else ()
        return result | {f"hidden_states.{n}": value for n, value in enumerate(layers)}

    axes = {"input_ids": {0: BATCH, 1: SEQUENCE}}
    return Call(called_by(model, forward), {"input_ids": ids}, axes, file=file_of(component))


def _wants_layers(kind: Any, component: str) -> bool:
    """Whether a pipeline's class asks a text encoder for all its layers whenever it calls it.

    Its code says so. Where it has no call of this one by name, it calls one after the other as
    ``text_encoder``.
    """
    if not inspect.isclass(kind):
        return False
    calls = [*_calls(kind)]
    named = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == component]
    several = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "text_encoder"]
    found = named or several
    return bool(found) and all(map(_asks, found))


def _calls(kind: type) -> Iterator[ast.Call]:
    for base in kind.__mro__:
        if not base.__module__.startswith("diffusers."):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _asks(call: ast.Call) -> bool:
    given = {word.arg: word.value for word in call.keywords}
    value = given.get("output_hidden_states")
    return isinstance(value, ast.Constant) and value.value is True
