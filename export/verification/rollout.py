"""A decoder generates: each token is fed back, by the file and by eager, and all are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from lora_fx.errors import ExportError
from lora_fx.export.program.export_unit import ExportUnit
from lora_fx.export.program.shape_variants import Case
from lora_fx.export.report import Check, Reference
from lora_fx.export.runtime.active_adapter import ActiveAdapter
from lora_fx.export.runtime.generation import (
    IDS,
    LOGITS,
    PAST,
    Array,
    Values,
    bound_run,
    steps,
)
from lora_fx.export.runtime.in_place import run_in_place
from lora_fx.export.verification.eager import EAGER_ERRORS, run_eager
from lora_fx.export.verification.rounding import WIDER, tolerances
from lora_fx.numerics import TOLERANCE, compare

TOKENS = 32


def rollout(
    subject: Reference,
    session: Any,
    active: ActiveAdapter,
    trial: ExportUnit,
    dtype: torch.dtype,
    *,
    in_place: bool,
) -> Check:
    """Holds the greedy tokens of a file against those of eager, from an empty cache on.

    The prompt is that of the example, its second row padded on the left. Eager is asked once, of
    prompt and tokens as one: tokens that are its choice at each place are those that it would
    generate. Where that cannot be told (it gives the last logits alone, has fewer positions, or
    computes another thing of a longer text), it generates itself.

    Args:
        subject: the eager model.
        session: of the file.
        active: the adapter to run with.
        trial: its inputs by name.
        dtype: the model's precision.
        in_place: the file writes into the cache: it gets one with room for all, which holds what is
            no number.
    """
    given = trial.feeds(trial.example)
    ids = given[IDS]
    mask = np.ones_like(ids)
    mask[1:, : ids.shape[1] // 4] = 0
    start = {n: v[:, :, :0] if n.startswith(PAST) else v for n, v in given.items()}
    room = ids.shape[1] + TOKENS if in_place else 0
    file = (run_in_place if in_place else bound_run)(session, active)
    eager, allowed = _eager(subject, trial), TOLERANCE[dtype]
    try:
        found = _greedy(file, ids, mask, _with_room(start, room), TOKENS)
        wanted = _chosen(eager, found[0], ids, mask, start)
    except (ExportError, *EAGER_ERRORS):
        wanted = None
    if wanted is not None:
        check = _check(subject.what, found, wanted, dtype, allowed)
        if check.ok:
            return check
    wanted = _greedy(eager, ids, mask, start, TOKENS)
    found = _greedy(file, ids, mask, _with_room(start, room), wanted[0].shape[1])
    check = _check(subject.what, found, wanted, dtype, allowed)
    if check.ok or dtype not in WIDER:
        return check
    rounded = _rounded(subject, trial, _fed(wanted[0], ids, mask, start), dtype)
    return _check(subject.what, found, wanted, dtype, rounded)


def _with_room(start: Values, room: int) -> Values:
    """The inputs of a first step, with a cache that has room for so many positions."""
    return {
        n: np.full((*v.shape[:2], room, *v.shape[3:]), np.nan, v.dtype) if n.startswith(PAST) else v
        for n, v in start.items()
    }


def _chosen(
    run: Callable[[Values], Values], tokens: Array, ids: Array, mask: Array, start: Values
) -> tuple[Array, Array] | None:
    """What `_greedy` gives if these are its tokens, of one run; None without all logits."""
    fed = _fed(tokens, ids, mask, start)
    every = run(fed)[LOGITS]
    if every.shape[1] != fed[IDS].shape[1]:
        return None
    every = every[:, -tokens.shape[1] :]
    return every.argmax(-1), every


def _fed(tokens: Array, ids: Array, mask: Array, start: Values) -> Values:
    """What a first step is fed of a prompt and the tokens behind it, as one text."""
    fed: list[Values] = []

    def kept(feeds: Values) -> Values:
        fed.append(feeds)
        return {LOGITS: np.zeros((1, 1, 1))}

    text = np.concatenate([ids, tokens[:, :-1].astype(ids.dtype)], axis=1)
    known = np.concatenate([mask, np.ones_like(text[:, ids.shape[1] :])], axis=1)
    next(steps(kept, text, known, start))
    return fed[0]


def _greedy(
    run: Callable[[Values], Values], ids: Array, mask: Array, start: Values, count: int
) -> tuple[Array, Array]:
    """Tokens (batch, tokens), and the logits that they are the largest of.

    Eager ends where the model has no more positions.
    """
    generation = steps(run, ids, mask, start)
    seen = [next(generation)]
    while len(seen) < count:
        try:
            seen.append(generation.send(seen[-1].argmax(-1)))
        except EAGER_ERRORS:
            break
    every = np.stack(seen, axis=1)
    return every.argmax(-1), every


def _check(
    what: str,
    found: tuple[Array, Array],
    wanted: tuple[Array, Array],
    dtype: torch.dtype,
    allowed: float,
) -> Check:
    """Equal tokens and logits, up to where two of eager's logits are equal as far as allowed."""
    (tokens, logits), (own, expected) = found, wanted
    unlike = np.flatnonzero((tokens != own).any(0))
    length = tokens.shape[1]
    count = int(unlike[0]) if len(unlike) else length
    differing = 0
    if count < length and not _is_tie(tokens[:, count], expected[:, count], allowed):
        differing = int((tokens[:, count:] != own[:, count:]).sum())
    seen = min(count + 1, length)
    result = compare(logits[:, :seen], torch.from_numpy(expected[:, :seen]), dtype)
    result = replace(result, tolerance=allowed)
    shape = f"{length if differing else count} tokens"
    numbers = differing, result.relative, result.tolerance
    return Check(what, shape, "all", "tokens", *numbers, result.ok and not differing)


def _is_tie(chosen: Array, expected: Array, allowed: float) -> bool:
    """Whether eager could as well have chosen these tokens."""
    most = expected.max(-1)
    gap = most - np.take_along_axis(expected, chosen[:, None], -1)[:, 0]
    return bool((gap <= allowed * np.abs(expected).max(-1)).all())


def _eager(subject: Reference, trial: ExportUnit) -> Callable[[Values], Values]:
    def run(feeds: Values) -> Values:
        outputs = run_eager(subject.eager, _case(trial, feeds))
        return dict(zip(trial.outputs, (value.numpy() for value in outputs), strict=True))

    return run


def _rounded(subject: Reference, trial: ExportUnit, fed: Values, dtype: torch.dtype) -> float:
    """The relative error that the logits of a text are allowed, by what eager rounds there."""
    case = _case(trial, fed)
    every = tolerances(subject, case, run_eager(subject.eager, case), dtype)
    return every[list(trial.outputs).index(LOGITS)]


def _case(trial: ExportUnit, feeds: Values) -> Case:
    """What eager is called with, of inputs by name."""
    _, spec = pytree.tree_flatten((trial.example.args, trial.example.kwargs))
    flat = [torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in trial.inputs]
    return Case("", *pytree.tree_unflatten(flat, spec))
