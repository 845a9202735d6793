"""What eager would generate, asked at once: the same as token by token, or not told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lora_fx.errors import ExportError
from lora_fx.export.report import Reference
from lora_fx.export.runtime.generation import Values
from lora_fx.export.verification import rollout

IDS = np.array([[3, 1, 4], [0, 5, 9]])
MASK = np.array([[1, 1, 1], [0, 1, 1]])
START = {"past_key_values.0": np.zeros((2, 1, 0))}
Run = Callable[[Values], Values]


def decoder(
    last: bool = False,
    positions: int = 99,
    by_length: int = 0,
    step: int = 7,
    error: type[Exception] = IndexError,
) -> Run:
    """Its token is a sum over the text; of a longer text another one, if ``by_length`` is set."""

    def run(feeds: Values) -> Values:
        past = feeds["past_key_values.0"][:, 0]
        text = np.concatenate([past, feeds["input_ids"]], axis=1) * feeds["attention_mask"]
        if text.shape[1] > positions:
            raise error("no more positions")
        chosen = (step * text.cumsum(1) + by_length * text.shape[1]) % 11
        logits = np.eye(11, dtype=np.float32)[chosen.astype(int)][:, past.shape[1] :]
        return {"logits": logits[:, -1:] if last else logits, "present.0": text[:, None]}

    return run


def greedy(run: Run) -> tuple[Any, Any]:
    return rollout._greedy(run, IDS, MASK, START, rollout.TOKENS)


def checked(file: Run, eager: Run, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, int]:
    """The check of a file, and how often eager was run."""
    calls: list[Values] = []

    def counted(feeds: Values) -> Values:
        calls.append(feeds)
        return eager(feeds)

    monkeypatch.setattr(rollout, "bound_run", lambda session, active: file)
    monkeypatch.setattr(rollout, "_eager", lambda subject, trial: counted)
    feeds = {"input_ids": IDS, "past_key_values.0": np.zeros((2, 1, 4))}
    trial: Any = type("Trial", (), {"example": None, "feeds": lambda self, case: feeds})()
    subject: Any = Reference("base", None, None)  # type: ignore[arg-type]
    given = subject, None, None, trial, torch.float32
    return rollout.rollout(*given, in_place=False), len(calls)


def test_one_run_says_what_32_would() -> None:
    tokens, logits = greedy(decoder())
    told = rollout._chosen(decoder(), tokens, IDS, MASK, START)
    assert told is not None
    assert np.array_equal(told[0], tokens)
    assert np.array_equal(told[1], logits)
    wrong = tokens.copy()
    wrong[0, 5] += 1
    other = rollout._chosen(decoder(), wrong, IDS, MASK, START)
    assert other is not None
    assert np.flatnonzero((other[0] != wrong).any(0))[0] == 5
    assert rollout._chosen(decoder(last=True), tokens, IDS, MASK, START) is None


@pytest.mark.parametrize(
    ("file", "eager", "runs", "count"),
    [
        ({}, {}, 1, 32),
        ({"last": True}, {"last": True}, 1 + 32, 32),
        ({"by_length": 2}, {"by_length": 2}, 1 + 32, 32),  # as dynamic rotary frequencies do
        ({"positions": 20, "error": ExportError}, {"positions": 20}, 19, 18),
        ({}, {"positions": 20}, 1 + 19, 18),
    ],
)
def test_a_right_file_is_right_however_eager_tells(
    file: Any, eager: Any, runs: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, calls = checked(decoder(**file), decoder(**eager), monkeypatch)
    assert (check.ok, check.shape, calls) == (True, f"{count} tokens", runs)


@pytest.mark.parametrize("eager", [{}, {"last": True}, {"positions": 20}])
def test_a_wrong_file_is_refused(eager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check, _ = checked(decoder(step=8), decoder(**eager), monkeypatch)
    assert not check.ok
    assert check.max_abs > 0  # how many tokens differ
