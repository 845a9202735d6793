"""What eager would generate, asked at once: the same as token by token, or not told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_fx.errors import ExportError
from lora_fx.export import to_onnx
from lora_fx.export.report import Reference
from lora_fx.export.runtime.generation import Values
from lora_fx.export.verification import rollout
from lora_fx.numerics import TOLERANCE
from lora_fx.tasks import load
from lora_fx.testing.zoo import tiny

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


def checked(
    file: Run, eager: Run, monkeypatch: pytest.MonkeyPatch, rounded: float = 1e-5
) -> tuple[Any, int]:
    """The check of a file, and how often eager was run, which rounds so much."""
    calls: list[Values] = []

    def counted(feeds: Values) -> Values:
        calls.append(feeds)
        return eager(feeds)

    monkeypatch.setattr(rollout, "bound_run", lambda session, active: file)
    monkeypatch.setattr(rollout, "_eager", lambda subject, trial: counted)
    monkeypatch.setattr(rollout, "_rounded", lambda *given: rounded)
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


def test_eager_is_fed_whole_numbers_of_the_prompts_type() -> None:
    fed = rollout._fed(np.array([[7, 8], [9, 6]]), IDS.astype(np.int32), MASK, START)
    assert fed["input_ids"].dtype == np.int32
    assert fed["input_ids"].tolist() == [[3, 1, 4, 7], [0, 5, 9, 9]]


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


@pytest.mark.parametrize(("rounded", "right"), [(1e-4, True), (1e-5, False)])
def test_logits_are_allowed_what_eager_rounds_in_them(
    rounded: float, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(feeds: Values) -> Values:
        found = dict(decoder()(feeds))
        return found | {"logits": found["logits"] * np.float32(1 + 5e-5)}

    check, _ = checked(off, decoder(), monkeypatch, rounded)
    assert (check.ok, check.max_abs, check.tolerance) == (right, 0, rounded)


def test_a_decoder_in_float16_is_held_to_what_it_rounds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny("LlamaForCausalLM", num_hidden_layers=4, max_position_embeddings=96).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.half().save_pretrained(tmp_path / "base")
    (part,) = load(tmp_path / "base", "text-generation-with-past")
    report = to_onnx(part.traced(), tmp_path / "model.onnx")
    row = next(row for row in report.checks if row.output == "tokens")
    assert TOLERANCE[torch.float16] < row.relative <= row.tolerance < 2e-2
