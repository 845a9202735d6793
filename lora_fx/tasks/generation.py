"""Decoders with a cache: keys and values of what came before are inputs, those of all outputs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lora_fx.errors import LoraFxError
from lora_fx.graph.example import NEW_CACHE
from lora_fx.tasks.calls import Call, Prepared, check_runs
from lora_fx.tasks.example_inputs import example_inputs

_PAST = 5  # tokens of the example that came before
_ALL = "past_sequence_length + sequence_length"


def with_past(model: Any, prepared: Prepared) -> tuple[Call, ...]:
    """One step of generation: some tokens, and the cache of all before them.

    ``input_ids`` (batch, sequence), ``attention_mask`` (batch, past + sequence) and
    ``position_ids`` (batch, sequence), where the model takes them, and for each layer N
    ``past_key_values.N.key`` and ``.value`` (batch, heads, past, size) -> ``logits`` and
    ``present.N.key`` and ``.value`` (batch, heads, past + sequence, size). A past of length 0 is a
    prompt. Names and layout are optimum's.

    Every layer's cache holds all positions: a layer with a sliding window masks what is behind it.

    Raises:
        LoraFxError: the model keeps another cache than keys and values, or takes no ids.
    """
    given, _ = example_inputs(model, prepared.names, prepared.processor)
    if "input_ids" not in given or set(given) - {"input_ids", "attention_mask", "token_type_ids"}:
        raise refusal(model, f"it reads {', '.join(given)}, and no text alone")
    ids = given["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, : _PAST - 2] = 0  # padding stands on the left, where what is generated does not
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    past = _past_of(model, ids[:, :_PAST], mask[:, :_PAST])
    kwargs = {"input_ids": ids[:, _PAST:], "attention_mask": mask}
    shapes: dict[str, Any] = {
        "input_ids": {0: "batch_size", 1: "sequence_length"},
        "attention_mask": {0: "batch_size", 1: _ALL},
    }
    if "position_ids" in inspect.signature(model.forward).parameters:
        kwargs["position_ids"] = positions[:, _PAST:]
        shapes["position_ids"] = shapes["input_ids"]
    names = named_cache(len(past), ("key", "value"))
    axes = {0: "batch_size", 2: "past_sequence_length"}
    step = Call(
        _stepwise(model, prepared.last_logits),
        kwargs | {"past_key_values": past},
        shapes | {"past_key_values": [[axes, axes] for _ in past]},
        names,
        generates=True,
        noted=_new_cache(model.config.get_text_config()),
    )
    return (step,)


def _new_cache(config: Any) -> dict[str, str]:
    """Behind how many tokens a model's own generation begins its cache anew, if anywhere.

    The positions of Phi-3's and its kin turn by other angles from there on, all of them.
    """
    length = getattr(config, "original_max_position_embeddings", None)
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    return {NEW_CACHE: str(length)} if kind == "longrope" and length else {}


def named_cache(layers: int, parts: Sequence[str]) -> dict[str, str]:
    """Optimum's names for the tensors of a cache, by those that they have as a nested argument."""
    return {
        f"past_key_values_{n}_{place}": f"past_key_values.{n}.{part}"
        for n in range(layers)
        for place, part in enumerate(parts)
    }


def _stepwise(model: Any, last_logits: bool) -> nn.Module:
    """The model itself, which takes and gives its cache as tensors: modules keep their paths."""
    from transformers import DynamicCache

    own: Any = type(model)
    taken = inspect.signature(model.forward).parameters
    keeps, cached = "logits_to_keep" in taken, cache_name(model)

    def forward(
        self: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
    ) -> dict[str, torch.Tensor]:
        # Without a config every layer keeps all positions.
        cache: Any = DynamicCache(ddp_cache_data=[tuple(pair) for pair in past_key_values])
        more = {"attention_mask": attention_mask, cached: cache, "use_cache": True}
        more |= {} if position_ids is None else {"position_ids": position_ids}
        more |= {"logits_to_keep": 1} if last_logits and keeps else {}
        found = own.forward(self, input_ids, **more)
        logits = found.logits[:, -1:] if last_logits else found.logits
        result = {"logits": logits}
        for n, layer in enumerate(getattr(found, cached).layers):
            result |= present(f"present.{n}", layer)
        return result

    return called_by(model, forward)


def called_by(model: Any, forward: Callable[..., Any]) -> nn.Module:
    """The model itself under another forward: its modules keep their paths.

    transformers knows by the full name of a class what its models can record.
    """
    own = type(model)
    other = copy.copy(model)
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    other.__class__ = type(own.__name__, (own,), {"forward": forward, **names})
    return other  # type: ignore[no-any-return]


def taking(forward: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    """A forward of ``**given`` that says by what names it takes them, each without a default."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return forward


def present(name: str, layer: Any) -> dict[str, torch.Tensor]:
    """What a layer of a cache holds, by the names of outputs."""
    return {f"{name}.key": layer.keys, f"{name}.value": layer.values}


def _past_of(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[list[torch.Tensor]]:
    """Keys and values of a prompt, by layer."""
    from transformers import DynamicCache

    cached = cache_name(model)
    more: dict[str, Any] = {cached: DynamicCache(), "use_cache": True}
    try:
        with torch.no_grad():
            found = model(input_ids=ids, attention_mask=mask, **more)
    except Exception as error:  # the model's own code meets a cache that it may not know
        check_runs(model, (ids,), {"attention_mask": mask, "use_cache": False})
        raise refusal(model, f"its forward takes none of keys and values ({error})") from error
    layers = getattr(getattr(found, cached, None), "layers", [])
    pairs: list[list[Any]] = [
        [getattr(layer, "keys", None), getattr(layer, "values", None)] for layer in layers
    ]
    whole = len(ids), ids.shape[1]
    shapes = {(t.shape[0], t.shape[2]) if _is_cache(t) else None for pair in pairs for t in pair}
    if shapes != {whole}:
        raise refusal(model, "its cache is not one of keys and values for each position")
    return pairs


def cache_name(model: Any) -> str:
    """What a model calls its cache, which transformers has renamed."""
    names = inspect.signature(model.forward).parameters
    found = next((name for name in ("cache", "past_key_values") if name in names), None)
    if found is None:
        raise refusal(model, "its forward takes none")
    return found


def _is_cache(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 4


def refusal(model: Any, why: str, task: str = "text-generation") -> LoraFxError:
    """Why a model has no form with a cache, and the task that leaves it out."""
    return LoraFxError(
        f"a {model.config.model_type} cannot be exported with a cache: {why}. Export it without, "
        f"--task {task}, or give module:function"
    )
