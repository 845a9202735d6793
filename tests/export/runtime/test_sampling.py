"""What a stranger's generation config says of tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lora_fx.errors import ExportError
from lora_fx.export.runtime.sampling import Ends


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
