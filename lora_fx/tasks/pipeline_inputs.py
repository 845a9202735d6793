"""Example inputs for the models of a pipeline: what their forward takes, of sizes of their config.

No list of architectures: the names in the signature of ``forward`` and the fields of the config
decide what is fed, and how large it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_fx.errors import LoraFxError

BATCH, SEQUENCE = "batch_size", "sequence_length"
ADDED = ("text_embeds", "time_ids")  # inputs that a UNet takes in added_cond_kwargs
OPTIONAL = ("encoder_attention_mask",)  # fed only if somebody needs or gives them
_BATCH, _LENGTH, _HEIGHT, _WIDTH = 2, 5, 4, 6
_PACKED = "packed_height_width"
_GRID = (2, 3)  # patches of a picture whose positions are inputs
# Fields for the width of what comes of the text; the first that a config has is meant.
_WIDTHS = (
    "encoder_hid_dim", "joint_attention_dim", "caption_channels", "cap_feat_dim", "text_embed_dim",
    "cross_attention_dim",
)  # fmt: skip

Made = tuple[torch.Tensor, dict[int, str]]


@dataclass(frozen=True)
class Facts:
    """What is known of a model.

    Attributes:
        config: its fields.
        parameters: of its forward.
        dtype: of its weights.
        time_ids: how many numbers say the size of a picture.
        source: of random numbers.
    """

    config: Mapping[str, Any]
    parameters: Mapping[str, inspect.Parameter]
    dtype: torch.dtype
    time_ids: int = 6
    source: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def number(self, *names: str) -> int | None:
        """The first of these fields that is a number, or a list of them whose first is taken."""
        for name in names:
            found = self.config.get(name)
            found = found[0] if isinstance(found, list | tuple) and found else found
            if type(found) is int:
                return found
        return None

    def random(self, *shape: int) -> torch.Tensor:
        """Random numbers of a shape."""
        return torch.randn(*shape, generator=self.source).to(self.dtype)


def facts_of(model: Any, fields: Mapping[str, Any]) -> Facts:
    """What a model and its pipeline's ``model_index.json`` say of its inputs."""
    parameters = inspect.signature(model.forward).parameters
    count = 5 if fields.get("requires_aesthetics_score") else 6
    return Facts(model.config, parameters, model.dtype, count)


def denoiser_inputs(
    facts: Facts, kind: str, given: Collection[str] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Inputs of a UNet or a transformer, by name, and their named dynamic axes.

    Args:
        facts: of the model.
        kind: of its class.
        given: which of `OPTIONAL` the pipeline gives it, though it need not have them.

    Raises:
        LoraFxError: an input that the model needs cannot be made; names it.
    """
    extra = facts.config.get("addition_embed_type")
    if extra not in (None, "text", "text_time"):
        raise _refusal(kind, f"added_cond_kwargs for addition_embed_type {extra!r}")
    made: dict[str, Made] = {}
    for name, parameter in facts.parameters.items():
        is_needed = parameter.default is parameter.empty
        if name in OPTIONAL and name not in given and not is_needed:
            continue
        makers = ADDED if name == "added_cond_kwargs" else (name,)
        found = {n: _MAKERS[n](facts) for n in makers if n in _MAKERS}
        made |= {n: value for n, value in found.items() if value is not None}
        named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if is_needed and named and name not in made:
            raise _refusal(kind, name)
    return {n: value for n, (value, _) in made.items()}, {n: axes for n, (_, axes) in made.items()}


def _refusal(kind: str, name: str) -> LoraFxError:
    return LoraFxError(
        f"no example inputs can be made for a {kind}: its {name} is of no kind that its config "
        "gives sizes for; give module:function, which returns the model and its inputs"
    )


def image(facts: Facts, channels: int, factor: int, axes: tuple[str, str]) -> Made:
    """A small picture (batch, channels, height, width), whose sizes a network can halve."""
    value = facts.random(_BATCH, channels, _HEIGHT * factor, _WIDTH * factor)
    return value, {0: BATCH, 2: axes[0], 3: axes[1]}


def halvings(facts: Facts, *names: str) -> int:
    """What the sizes of a picture are divided by: each block but the last halves them."""
    blocks = next((b for n in names if isinstance(b := facts.config.get(n), list | tuple)), [1])
    return int(2 ** (len(blocks) - 1))


def _sample(facts: Facts) -> Made | None:
    channels = facts.number("in_channels")
    factor = halvings(facts, "block_out_channels") * (facts.number("patch_size") or 1)
    return None if channels is None else image(facts, channels, factor, ("height", "width"))


def _hidden(facts: Facts) -> Made | None:
    """A picture, or its patches in a row where their positions are an input."""
    channels = facts.number("in_channels")
    if "img_ids" not in facts.parameters or channels is None:
        return _sample(facts)
    count = _GRID[0] * _GRID[1]
    return facts.random(_BATCH, count, channels), {0: BATCH, 1: _PACKED}


def _timestep(facts: Facts) -> Made:
    """One number where forward takes plain numbers too, or one for each picture."""
    said = str(facts.parameters["timestep"].annotation)
    if "float" in said or "int" in said:
        return torch.tensor(37.0, dtype=facts.dtype), {}
    return torch.tensor([3.0, 7.0], dtype=facts.dtype), {0: BATCH}


def _text(facts: Facts) -> Made | None:
    width = facts.number(*_WIDTHS)
    axes = {0: BATCH, 1: SEQUENCE}
    return None if width is None else (facts.random(_BATCH, _LENGTH, width), axes)


def _text_mask(facts: Facts) -> Made:
    """Padding behind the second text: a graph that ignores the mask is found out."""
    mask = torch.ones(_BATCH, _LENGTH, dtype=torch.long)
    mask[1, _LENGTH // 2 :] = 0
    return mask, {0: BATCH, 1: SEQUENCE}


def _pooled(facts: Facts) -> Made | None:
    width = facts.number("pooled_projection_dim")
    return None if width is None else (facts.random(_BATCH, width), {0: BATCH})


def _text_embeds(facts: Facts) -> Made | None:
    """The rest of what the embedding of the added conditions reads beside the sizes."""
    if facts.config.get("addition_embed_type") != "text_time":
        return None
    each = facts.number("addition_time_embed_dim") or 0
    width = (facts.number("projection_class_embeddings_input_dim") or 0) - facts.time_ids * each
    return (facts.random(_BATCH, width), {0: BATCH}) if width > 0 else None


def _time_ids(facts: Facts) -> Made | None:
    if facts.config.get("addition_embed_type") != "text_time":
        return None
    sizes = torch.arange(1.0, _BATCH * facts.time_ids + 1).reshape(_BATCH, -1)
    return sizes.to(facts.dtype), {0: BATCH}


def _timestep_cond(facts: Facts) -> Made | None:
    width = facts.number("time_cond_proj_dim")
    return None if width is None else (facts.random(_BATCH, width), {0: BATCH})


def _guidance(facts: Facts) -> Made | None:
    given = facts.config.get("guidance_embeds")
    return (torch.tensor([3.5, 5.0], dtype=facts.dtype), {0: BATCH}) if given else None


def _labels(facts: Facts) -> Made | None:
    count = facts.number("num_class_embeds")
    return None if count is None else (torch.tensor([0, count - 1]), {0: BATCH})


def _places(facts: Facts) -> Made:
    """Row and column of each patch, behind the axes that a picture has none of."""
    rows, columns = torch.meshgrid(*map(torch.arange, _GRID), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1).to(facts.dtype)
    return torch.cat([places.new_zeros(len(places), _axes(facts) - 2), places], 1), {0: _PACKED}


def _text_places(facts: Facts) -> Made:
    return torch.zeros(_LENGTH, _axes(facts), dtype=facts.dtype), {0: SEQUENCE}


def _axes(facts: Facts) -> int:
    return len(facts.config.get("axes_dims_rope") or (0, 0, 0))


_MAKERS: Mapping[str, Callable[[Facts], Made | None]] = {
    "sample": _sample,
    "hidden_states": _hidden,
    "timestep": _timestep,
    "encoder_hidden_states": _text,
    "encoder_attention_mask": _text_mask,
    "pooled_projections": _pooled,
    "text_embeds": _text_embeds,
    "time_ids": _time_ids,
    "timestep_cond": _timestep_cond,
    "class_labels": _labels,
    "guidance": _guidance,
    "img_ids": _places,
    "txt_ids": _text_places,
}
