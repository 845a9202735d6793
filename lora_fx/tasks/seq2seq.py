"""Encoders and decoders as three files: the encoder, the decoder's first step, and its others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lora_fx.errors import LoraFxError
from lora_fx.tasks.calls import Call, Prepared
from lora_fx.tasks.example_inputs import example_inputs
from lora_fx.tasks.generation import cache_name, called_by, named_cache, present, refusal, taking

_PARTS = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")
_MASK, _HIDDEN, _IDS = "encoder_attention_mask", "encoder_hidden_states", "input_ids"
_PAST_LENGTH = "past_decoder_sequence_length"


def in_three(model: Any, prepared: Prepared) -> tuple[Call, ...]:
    """``encoder_model``, ``decoder_model`` and ``decoder_with_past_model``, as optimum names them.

    The encoder's own inputs -> ``last_hidden_state``. Then ``input_ids`` (batch, decoder
    sequence), ``encoder_hidden_states``, and ``encoder_attention_mask`` if the encoder has a mask
    -> ``logits`` and for each layer N ``present.N.decoder.key`` and ``.value``, and the same of
    ``encoder``. Then ``past_key_values.N.decoder.key`` and its kin in place of the hidden states
    -> ``logits`` and ``present.N.decoder.key`` and ``.value``: what comes of the encoder stays.

    Raises:
        LoraFxError: the model keeps another cache, or is called otherwise.
    """
    given, axes = example_inputs(model, prepared.names, prepared.processor)
    ids = given.pop("decoder_input_ids", None)
    if ids is None or not hasattr(model, "get_encoder"):
        raise _refusal(model, "it has no encoder and decoder of its own")
    mask = given.get("attention_mask")
    encoder = called_by(model, _encoder(list(given)))
    states = _run(model, model.get_encoder(), given)
    hidden, kind = states.last_hidden_state, type(states)
    lengths = {0: "batch_size", 1: "encoder_sequence_length"}
    shapes: dict[str, Any] = {_IDS: {0: "batch_size", 1: "decoder_sequence_length"}}
    shapes |= {_HIDDEN: lengths if 1 in axes[model.main_input_name] else {0: "batch_size"}}
    own = {} if mask is None else {_MASK: mask}
    shapes |= {_MASK: lengths} if own else {}
    first = called_by(model, _step(model, kind, with_past=False))
    feeds = own | {_IDS: ids[:, :3], _HIDDEN: hidden}
    found = _run(model, first, feeds)
    count = (len(found) - 1) // len(_PARTS)
    past = [[found[f"present.{n}.{part}"] for part in _PARTS] for n in range(count)]
    rest = own | {_IDS: ids[:, 3:5], "past_key_values": past}
    grows = {0: "batch_size", 2: _PAST_LENGTH}
    kept = {0: "batch_size"} | ({2: lengths[1]} if 1 in shapes[_HIDDEN] else {})
    layers = [[grows, grows, kept, kept] for _ in past]
    encoded = {name: _renamed(axis) for name, axis in axes.items() if name in given}
    return (
        Call(encoder, given, encoded, file="encoder_model.onnx"),
        Call(first, feeds, {n: shapes[n] for n in feeds}, file="decoder_model.onnx"),
        Call(
            called_by(model, _step(model, kind, with_past=True)),
            rest,
            {n: shapes[n] for n in own} | {_IDS: shapes[_IDS], "past_key_values": layers},
            named_cache(count, _PARTS),
            file="decoder_with_past_model.onnx",
            joined="decoder_model_merged.onnx",
        ),
    )


def _renamed(axes: dict[int, str]) -> dict[int, str]:
    return {a: {"batch": "batch_size"}.get(n, f"encoder_{n}_length") for a, n in axes.items()}


def _encoder(names: Sequence[str]) -> Callable[..., Any]:
    def forward(self: Any, **given: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"last_hidden_state": self.get_encoder()(**given).last_hidden_state}

    return taking(forward, names)


def _step(model: Any, states: Callable[..., Any], with_past: bool) -> Callable[..., Any]:
    """One call of the decoder, behind what its encoder gives: states of a class of its own."""
    from transformers import DynamicCache, EncoderDecoderCache

    own: Any = type(model)
    cached = cache_name(model)

    def stepped(
        self: Any, ids: torch.Tensor, hidden: torch.Tensor, mask: torch.Tensor | None, past: Any
    ) -> dict[str, torch.Tensor]:
        caches: list[Any] = [
            DynamicCache(ddp_cache_data=[tuple(layer[half]) for layer in past]) if past
            else DynamicCache()
            for half in (slice(0, 2), slice(2, 4))
        ]  # fmt: skip
        more = {} if mask is None else {"attention_mask": mask}
        found = own.forward(
            self, decoder_input_ids=ids, encoder_outputs=states(last_hidden_state=hidden),
            use_cache=True, **more, **{cached: EncoderDecoderCache(*caches)},
        )  # fmt: skip
        cache = getattr(found, cached)
        result = {"logits": found.logits}
        for n, layer in enumerate(cache.self_attention_cache.layers):
            result |= present(f"present.{n}.decoder", layer)
            if not with_past:
                result |= present(f"present.{n}.encoder", cache.cross_attention_cache.layers[n])
        return result

    def first(
        self: Any,
        input_ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        return stepped(self, input_ids, encoder_hidden_states, encoder_attention_mask, [])

    def later(
        self: Any,
        input_ids: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
    ) -> dict[str, torch.Tensor]:
        keys = past_key_values[0][2]  # of the encoder: what is read of its states is their length
        size = self.config.get_text_config().hidden_size
        hidden = keys.new_zeros(keys.shape[0], keys.shape[2], size)
        return stepped(self, input_ids, hidden, encoder_attention_mask, past_key_values)

    return later if with_past else first


def _run(model: Any, call: nn.Module, given: Any) -> Any:
    try:
        with torch.no_grad():
            found = call(**given)
    except Exception as error:  # the model's own code meets a cache that it may not know
        raise _refusal(model, f"its forward fails on it ({error})") from error
    return found


def _refusal(model: Any, why: str) -> LoraFxError:
    is_speech = model.main_input_name != _IDS
    return refusal(
        model, why, "automatic-speech-recognition" if is_speech else "text2text-generation"
    )
