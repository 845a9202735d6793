"""Which configs are read through PEFT itself."""

from __future__ import annotations

from typing import Any

import pytest

from lora_fx.formats.peft.types import is_traced


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"peft_type": "BOFT"}, True),
        ({"peft_type": "NO_SUCH"}, True),
        ({"peft_type": "LOHA"}, False),
        ({"peft_type": "LORA"}, False),
        ({"peft_type": "LORA", "use_qalora": False, "arrow_config": None}, False),
        ({"peft_type": "LORA", "use_qalora": True}, True),
        ({"peft_type": "LORA", "kasa_config": {}}, True),  # an empty one is not off
        ({"peft_type": 3}, False),
        ({}, False),
    ],
)
def test_a_type_without_a_kind_or_an_option_that_none_computes(
    fields: dict[str, Any], wanted: bool
) -> None:
    assert is_traced(fields) is wanted
