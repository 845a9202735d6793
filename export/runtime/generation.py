"""Generation with a decoder whose cache is an input: optimum's names, one step after the other."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from lora_fx.errors import ExportError
from lora_fx.export.runtime.active_adapter import ActiveAdapter
from lora_fx.export.runtime.ort import NUMPY, failures_told, to_array
from lora_fx.export.runtime.sampling import GENAI, Ends

Array = np.ndarray[Any, Any]
Values = Mapping[str, Any]

IDS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
PAST, PRESENT = "past_key_values.", "present."


def steps(
    run: Callable[[Values], Values],
    ids: Array,
    mask: Array,
    start: Values,
    new_cache: int | None = None,
) -> Generator[Array, Array, None]:
    """Runs a prompt, and then whatever tokens it is sent.

    Args:
        run: one step, from its inputs to its outputs, both by name. Logits are an array; what the
            cache is made of is passed on as it is.
        ids: the prompt, (batch, sequence), padded on the left.
        mask: of the prompt, 0 where it is padded.
        start: the other inputs of the first step: a cache of length 0, and positions if the model
            takes them.
        new_cache: behind so many tokens a cache is begun anew, with all of the text.

    Yields:
        The logits of the last position, (batch, vocabulary). It is sent the tokens that follow,
        (batch,).
    """
    text, past = [ids], {name: value for name, value in start.items() if name.startswith(PAST)}
    while True:
        feeds = {IDS: ids, MASK: mask, **past}
        if POSITIONS in start:
            feeds[POSITIONS] = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        found = run(feeds)
        tokens = yield found[LOGITS][:, -1]
        ids = tokens[:, None].astype(ids.dtype)
        text.append(ids)
        if mask.shape[1] == new_cache:
            ids, past = np.concatenate(text, axis=1), {name: start[name] for name in past}
        else:
            past = {name: found[name.replace(PAST, PRESENT, 1)] for name in past}
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)


def prompt(ids: Any, mask: Any) -> tuple[Array, Array]:
    """Ids and mask of a prompt, (batch, sequence), int64.

    Raises:
        ExportError: they are of other shapes or no numbers of tokens, or there is no token.
    """
    tokens = to_array(IDS, ids)
    known = np.ones_like(tokens) if mask is None else to_array(MASK, mask)
    if tokens.ndim != 2 or not tokens.size or known.shape != tokens.shape:
        raise ExportError(
            f"input_ids is {tokens.shape}, attention_mask {known.shape}: expected (batch, sequence)"
        )
    if tokens.dtype.kind not in "iu" or not known[:, -1].all():
        raise ExportError("a prompt is integers, padded on the left: the last column is no padding")
    if tokens.min() < 0 or not np.isin(known, (0, 1)).all():
        raise ExportError(
            "a prompt's tokens are at least 0, and its mask is 1, or 0 where it is padded: give "
            "the input_ids and the attention_mask of a tokenizer"
        )
    return tokens.astype(np.int64), known.astype(np.int64)


def generated(
    generation: Generator[Array, Array, None],
    ids: Array,
    choose: Callable[[Array], Array],
    count: int,
    ends: Ends,
    streamer: Any,
) -> Array:
    """The tokens that follow a prompt, (batch, at most ``count``), until every row has ended."""
    if not isinstance(count, int | np.integer) or count < 1:
        raise ExportError(f"max_new_tokens is {count!r}: give a whole number, at least 1")
    if streamer is not None and not all(hasattr(streamer, name) for name in ("put", "end")):
        raise ExportError(f"streamer is {streamer!r:.80}: give one with put and end, or None")
    if streamer is not None:
        streamer.put(torch.from_numpy(ids))
    found: list[Array] = []
    done = np.zeros(len(ids), dtype=bool)
    logits = next(generation)
    while True:
        if np.isnan(logits[~done]).any():
            raise ExportError(
                "the logits hold NaN, so no token is the likeliest: export the model in a wider "
                "dtype, or leave out the adapter if that alone makes them"
            )
        tokens = np.where(done, ends.pad, choose(logits)).astype(np.int64)
        found.append(tokens)
        if streamer is not None:
            streamer.put(torch.from_numpy(tokens))
        done |= np.isin(tokens, ends.tokens)
        if len(found) == count or done.all():
            break
        logits = generation.send(tokens)
    if streamer is not None:
        streamer.end()
    return np.stack(found, axis=1)


def empty_cache(
    session: Any, genai: Mapping[str, Any], batch: int, room: int = 0
) -> dict[str, Any]:
    """The other inputs of a first step: a cache of no positions, and a mark of positions.

    Args:
        session: of the model.
        genai: what onnxruntime-genai's config beside its file says, as the size of a head.
        batch: rows of the prompt.
        room: for so many positions, of a cache that is written in place.

    Raises:
        ExportError: the file does not say how many heads its cache has, or how large they are.
    """
    start: dict[str, Any] = {}
    decoder = genai.get("decoder")
    said = decoder.get("head_size") if isinstance(decoder, dict) else None
    for value in session.get_inputs():
        if value.name.startswith(PAST):
            _, heads, _, size = value.shape if len(value.shape) == 4 else [None] * 4
            size = said if isinstance(size, str) else size
            if not isinstance(heads, int) or not isinstance(size, int) or size < 1:
                raise ExportError(
                    f"{value.name} is {value.shape}: expected (batch, heads, past, size), heads "
                    f"and size as numbers, or the size as head_size in a {GENAI} beside the file; "
                    "a file of another exporter's runs in its own client"
                )
            if value.type not in NUMPY:
                raise ExportError(
                    f"{value.name} is {value.type}, which numpy lacks: export the model in float32 "
                    "or float16"
                )
            empty = np.zeros((batch, heads, room, size), dtype=NUMPY[value.type])
            start[value.name] = ort.OrtValue.ortvalue_from_numpy(empty)
        elif value.name == POSITIONS:
            start[POSITIONS] = None
    return start


def bound_run(session: Any, active: ActiveAdapter) -> Callable[[Values], Values]:
    """One step of a session that leaves the cache where onnxruntime has put it."""
    names = [output.name for output in session.get_outputs()]

    def run(feeds: Values) -> Values:
        values = {name: ort_value(value) for name, value in feeds.items()}
        with failures_told():
            outputs = session.run_with_ort_values(names, values | active.feeds, active.options)
        found = dict(zip(names, outputs, strict=True))
        return found | {LOGITS: found[LOGITS].numpy()}

    return run


def ort_value(value: Any) -> Any:
    """An array as onnxruntime takes it, or what is that already."""
    is_array = isinstance(value, np.ndarray)
    return ort.OrtValue.ortvalue_from_numpy(value) if is_array else value
