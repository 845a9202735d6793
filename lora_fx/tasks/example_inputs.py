"""Example inputs for a model of transformers: those its forward takes, of sizes its config says.

No list of architectures: the signature of ``forward``, the fields of the config and the names
that the directory's own tokenizer gives decide what is fed.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_fx.errors import LoraFxError

_BATCH, _LENGTH, _DECODER_LENGTH, _FRAMES = 2, 16, 8, 48
_PLACEHOLDER = re.compile(r"(image|video|audio|speech)_token_(id|index)")
_PROCESSED = "what its processor makes, with a token for each piece of an image or a sound"
_MEDIA = {"pixel_values", "pixel_values_videos", "input_features", "input_values"}
_TOKEN = re.compile(r"token_(id|ids|index)$")


@dataclass(frozen=True)
class Facts:
    """What is known of a model.

    Attributes:
        config: its config, whose parts are configs too: of the text, the image, the decoder.
        main: the name of its first input.
        prepared: what the directory says of its preparation of images and sound.
        samples: of sound that its convolutions make one frame of; 1 where there are none.
        source: of random numbers.
    """

    config: Any
    main: str
    prepared: Mapping[str, Any]
    samples: int = 1
    source: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def find(self, *names: str) -> Any:
        """The value of the first of these fields that the config, or a part of it, has."""
        values = (getattr(part, name, None) for name in names for part in with_parts(self.config))
        return next((value for value in values if value is not None), None)

    @property
    def fields(self) -> list[tuple[str, Any]]:
        """What the config, and each part of it, holds by name."""
        return [field for part in with_parts(self.config) for field in vars(part).items()]


def with_parts(config: Any) -> list[Any]:
    """A config, the configs inside it (of the text, the image, the decoder), and those in these."""
    found = [config]
    for one in found:  # it grows
        parts = [part for part in vars(one).values() if hasattr(part, "model_type")]
        found += [part for part in parts if not any(part is known for known in found)]
    return found


Made = tuple[torch.Tensor, dict[int, str]]


def example_inputs(
    model: Any, names: Collection[str] = (), prepared: Mapping[str, Any] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    """Inputs for a model of transformers, with named dynamic axes.

    Args:
        model: of transformers.
        names: what its tokenizer gives.
        prepared: the directory's ``preprocessor_config.json``.

    Raises:
        LoraFxError: an input that the model needs cannot be made; names it.
    """
    strides = [m.stride[0] for m in model.modules() if isinstance(m, torch.nn.Conv1d)]
    facts = Facts(model.config, model.main_input_name, prepared or {}, math.prod(strides))
    parameters = inspect.signature(model.forward).parameters
    kind = model.config.model_type
    if facts.main not in parameters:
        raise _refusal(kind, facts.main)
    wanted = _wanted(model, facts, parameters, names)
    unknown = next((name for name in wanted if name not in _MAKERS), None)
    if unknown is not None:
        raise _refusal(kind, unknown)
    if wanted != ["input_ids"] and _has_placeholder(facts, parameters):
        raise _refusal(kind, "text", _PROCESSED)
    made: dict[str, Made] = {}
    for name in sorted(wanted, key=list(_MAKERS).index):  # a mask needs to know what it masks
        value = _MAKERS[name](facts, made)
        if value is None:
            raise _refusal(kind, name)
        made[name] = value
    made = {name: made[name] for name in parameters if name in made}
    values = {n: v.to(model.dtype) if v.is_floating_point() else v for n, (v, _) in made.items()}
    return values, {n: axes for n, (_, axes) in made.items()}


def _refusal(
    kind: str, name: str, why: str = "of no kind that its config gives sizes for"
) -> LoraFxError:
    return LoraFxError(
        f"no example inputs can be made for a {kind}: its {name} is {why}; give module:function, "
        "which returns the model and its inputs"
    )


def _wanted(
    model: Any, facts: Facts, parameters: Mapping[str, inspect.Parameter], names: Collection[str]
) -> list[str]:
    """The inputs to feed, in the order of the signature."""
    needed = {
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    wanted = {facts.main, *needed}
    if "input_ids" in wanted:
        wanted |= {"attention_mask", *names}
        if facts.find("max_2d_position_embeddings"):
            wanted.add("bbox")
        types = facts.find("type_vocab_size")
        if types is not None:
            (wanted.add if types > 1 else wanted.discard)("token_type_ids")
        if facts.find("image_size", "input_size") and facts.find("num_channels"):
            wanted.add("pixel_values")
    elif facts.prepared.get("return_attention_mask") is True:
        wanted.add("attention_mask")
    if facts.find("is_encoder_decoder") and (model.can_generate() or model.base_model is model):
        wanted.add("decoder_input_ids")
    return [name for name in parameters if name in wanted]


def _has_placeholder(facts: Facts, parameters: Collection[str]) -> bool:
    """Whether the text holds a token for each piece of an image or a sound."""
    found = any(_PLACEHOLDER.fullmatch(n) and isinstance(value, int) for n, value in facts.fields)
    return found and bool(_MEDIA & set(parameters))


def _ids(facts: Facts, made: dict[str, Made]) -> Made | None:
    """Words of the text: no special tokens but the end, and padding behind the second one's."""
    length = _length(facts, _LENGTH)
    ids = _words(facts, length)
    if ids is None:
        return None
    full, end, pad = length, _token(facts, "eos_token_id"), _token(facts, "pad_token_id")
    for row, count in enumerate((full, length * 3 // 4)):
        if end is not None:
            ids[row, count - 1] = end
        if pad is not None:
            ids[row, count:] = pad
    return ids, {0: "batch", 1: "sequence"}


def _words(facts: Facts, length: int) -> torch.Tensor | None:
    size = facts.find("vocab_size")
    if not isinstance(size, int) or size < 1:
        return None
    special = torch.zeros(size, dtype=torch.bool)
    special[[token for token in _specials(facts) if 0 <= token < size]] = True
    words = torch.arange(size)[~special] if not special.all() else torch.arange(size)
    return words[torch.randint(0, len(words), (_BATCH, length), generator=facts.source)]


def _specials(facts: Facts) -> list[int]:
    values = [value for name, value in facts.fields if _TOKEN.search(name)]
    flat = [token for v in values for token in (v if isinstance(v, list | tuple) else [v])]
    return [token for token in flat if type(token) is int]


def _token(facts: Facts, name: str) -> int | None:
    found, size = facts.find(name), facts.find("vocab_size")
    token = found[0] if isinstance(found, list | tuple) and found else found
    known = type(token) is int and isinstance(size, int) and 0 <= token < size
    return token if known else None


def _length(facts: Facts, length: int) -> int:
    """Well below the most positions there are: other lengths run too, and some begin late."""
    limit = facts.find("max_position_embeddings")
    if not isinstance(limit, int) or limit < 1:
        return length
    begin = (_token(facts, "pad_token_id") or 0) + 1
    begin = begin if 2 * begin < limit else 0  # no table of positions begins behind half of it
    return max(2, min(length, (limit - begin) // 2))


def _mask(facts: Facts, made: dict[str, Made]) -> Made:
    value, axes = made[facts.main]
    mask = torch.ones(value.shape[:2], dtype=torch.long)
    mask[1, mask.shape[1] * 3 // 4 :] = 0  # so that a graph which ignores the mask is found out
    return mask, {axis: name for axis, name in axes.items() if axis < 2}


def _types(facts: Facts, made: dict[str, Made]) -> Made:
    """Two sentences each, of different lengths."""
    value, axes = made["input_ids"]
    types = torch.zeros_like(value)
    if (facts.find("type_vocab_size") or 2) > 1:
        types[0, value.shape[1] // 2 :] = 1
        types[1, value.shape[1] // 4 :] = 1
    return types, axes


def _boxes(facts: Facts, made: dict[str, Made]) -> Made:
    value, axes = made["input_ids"]
    most = min(1000, facts.find("max_2d_position_embeddings") - 1)
    ends = torch.randint(0, most + 1, (*value.shape, 2, 2), generator=facts.source)
    return torch.cat([ends.amin(-2), ends.amax(-2)], -1), axes  # left, top, right, bottom


def _decoder_ids(facts: Facts, made: dict[str, Made]) -> Made | None:
    ids = _words(facts, _length(facts, _DECODER_LENGTH))
    start = _token(facts, "decoder_start_token_id") if ids is not None else None
    if ids is not None and start is not None:
        ids[:, 0] = start
    return None if ids is None else (ids, {0: "batch", 1: "decoder_sequence"})


def _pixels(facts: Facts, made: dict[str, Made]) -> Made | None:
    channels = facts.find("num_channels")
    size = _size(facts.find("image_size", "input_size")) or _size(
        facts.prepared.get("crop_size") or facts.prepared.get("size")
    )
    if not isinstance(channels, int) or size is None:
        return None
    frames = facts.find("num_frames")
    shape = (channels, *size) if not isinstance(frames, int) else (frames, channels, *size)
    axis = "batch" if facts.main == "pixel_values" else "image_batch"
    return torch.randn(_BATCH, *shape, generator=facts.source), {0: axis}


def _size(given: Any) -> tuple[int, int] | None:
    """Height and width, however they are spelled."""
    if isinstance(given, Mapping):
        edge = given.get("shortest_edge")
        given = [given.get("height", edge), given.get("width", edge)]
    sizes = list(given) if isinstance(given, list | tuple) else [given, given]
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        return None
    return sizes[0], sizes[1]


def _waves(facts: Facts, made: dict[str, Made]) -> Made | None:
    """Samples as a microphone gives them, or frames of a spectrum if it says how many."""
    bins, most = facts.find("num_mel_bins"), facts.find("max_length")
    if isinstance(bins, int) and isinstance(most, int):
        return torch.randn(_BATCH, most, bins, generator=facts.source), {0: "batch"}
    if facts.samples > 1:
        wave = torch.randn(_BATCH, facts.samples * _FRAMES, generator=facts.source)
        return wave, {0: "batch", 1: "samples"}
    return None


def _features(facts: Facts, made: dict[str, Made]) -> Made | None:
    """Frames of a spectrum: as many as there are, or all that the positions are for."""
    channels = facts.find("input_feat_per_channel", "feature_projection_input_dim")
    if isinstance(channels, int):
        size = channels * (facts.find("input_channels") or 1)
        frames = torch.randn(_BATCH, _FRAMES, size, generator=facts.source)
        return frames, {0: "batch", 1: "frames"}
    bins, most = facts.find("num_mel_bins"), facts.find("max_source_positions")
    if isinstance(bins, int) and isinstance(most, int):  # the encoder takes every second frame
        return torch.randn(_BATCH, bins, 2 * most, generator=facts.source), {0: "batch"}
    return None


_MAKERS: dict[str, Callable[[Facts, dict[str, Made]], Made | None]] = {
    "input_ids": _ids,
    "pixel_values": _pixels,
    "input_values": _waves,
    "input_features": _features,
    "attention_mask": _mask,
    "token_type_ids": _types,
    "bbox": _boxes,
    "decoder_input_ids": _decoder_ids,
}
