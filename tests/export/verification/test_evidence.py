from __future__ import annotations

from dataclasses import replace

import pytest

from lora_fx.errors import VerificationError
from lora_fx.export.report import Check, Verification

ROW = Check("model", "batch=2", "off", "output", 1e-7, 2e-7, 1e-5, ok=True)
WRONG = replace(ROW, output="score", relative=0.3, ok=False)


def test_agreement_and_a_control_that_differs_pass() -> None:
    Verification([ROW], [ROW, replace(ROW, ok=False)]).judge("model.onnx")
    Verification([ROW], [], ["no control"]).judge("model.onnx")


def test_a_row_that_disagrees_is_shown() -> None:
    with pytest.raises(VerificationError, match=r"(?s)model\.onnx: 1 of 2 .*score.*3\.0e-01"):
        Verification([ROW, WRONG], [ROW]).judge("model.onnx")


def test_a_control_that_agrees_everywhere_is_shown() -> None:
    with pytest.raises(VerificationError, match="the control agrees"):
        Verification([ROW], [WRONG, WRONG]).judge("model.onnx")
