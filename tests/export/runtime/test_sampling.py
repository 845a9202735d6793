"""How a token is chosen, and what a stranger's generation config says of tokens."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_fx.errors import ExportError
from lora_fx.export.runtime.generation import generated
from lora_fx.export.runtime.sampling import Ends, Sampling


def beside(directory: Path, **fields: object) -> Path:
    (directory / "generation_config.json").write_text(json.dumps(fields))
    return directory / "model.onnx"


@pytest.mark.parametrize("field", ["eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", ["</s>", "7", 1.5, 1e300, 10**30, -2, True, {"a": 1}, [["x"]]])
def test_what_is_no_token_is_told(field: str, value: object, tmp_path: Path) -> None:
    model = beside(tmp_path, **{field: value})
    with pytest.raises(
        ExportError, match=rf"generation_config\.json: {field} holds .*expected num"
    ):
        Ends.of(model, None, None, {})


def test_tokens_are_read(tmp_path: Path) -> None:
    model = beside(tmp_path, eos_token_id=[3, None, 5], pad_token_id=-1)
    assert Ends.of(model, None, None, {}) == Ends((3, 5), -1)
    assert Ends.of(model, np.int64(4), None, {}) == Ends((4,), -1)
    assert Ends.of(beside(tmp_path, eos_token_id=2), None, None, {}) == Ends((2,), 2)
    assert Ends.of(beside(tmp_path), None, None, {}) == Ends((), 0)


@pytest.mark.parametrize("temperature", [1e-320, 1e-3])
def test_the_lowest_temperature_draws_the_likeliest(temperature: float) -> None:
    logits = np.array([[1.0, 3.0, 2.0], [30.0, -9.0, 4.0]], np.float32)
    for seed in range(5):
        assert [*Sampling(temperature, seed=seed).chooser()(logits)] == [1, 0]
    drawn = {int(Sampling(10.0, seed=seed).chooser()(logits)[0]) for seed in range(20)}
    assert len(drawn) == 3


def test_a_seed_below_0_is_refused() -> None:
    with pytest.raises(ExportError, match="seed=-1: give a number of at least 0"):
        Sampling(1.0, seed=-1)


def steps_of(*every: Any) -> Generator[Any, Any, None]:
    for logits in every:
        yield np.array(logits, np.float32)


def test_logits_of_nan_are_no_token() -> None:
    prompt, likeliest = np.array([[1], [2]]), Sampling().chooser()
    nan = [[np.nan, 0.0, 1.0], [0.0, 1.0, 0.0]]
    first = [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    with pytest.raises(
        ExportError, match=r"logits hold NaN, .*: export the model in a wider dtype"
    ):
        generated(steps_of(first, nan), prompt, likeliest, 2, Ends((), 0), None)
    # A row that has ended is nobody's.
    found = generated(steps_of(first, nan), prompt, likeliest, 2, Ends((1,), 0), None)
    assert found.tolist() == [[1, 0], [2, 1]]
    with pytest.raises(ExportError, match="streamer is 3: give one with put and end"):
        generated(steps_of(first), prompt, likeliest, 1, Ends((), 0), 3)
