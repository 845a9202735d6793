from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import lora_fx
from lora_fx.testing import make_adapter

SUBMODULES_FIRST = """
import lora_fx.layers.sites, lora_fx.frontend.trace, lora_fx.explanation, lora_fx
assert callable(lora_fx.trace) and callable(lora_fx.compare) and callable(lora_fx.text)
"""


def test_every_public_name_is_there() -> None:
    assert sorted(dir(lora_fx)) == sorted(lora_fx.__all__)
    assert all(getattr(lora_fx, name) is not None for name in lora_fx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'merge'"):
        _ = lora_fx.merge


def test_a_function_is_never_hidden_by_the_module_it_lives_in() -> None:
    subprocess.run([sys.executable, "-c", SUBMODULES_FIRST], check=True)


def test_the_passes_as_functions(ragged: Any, x: Any) -> None:
    gm = lora_fx.trace(ragged, (x,))
    injected = lora_fx.inject(gm, make_adapter({"wide": (5, 3)}))
    folded = lora_fx.fold(injected)
    assert lora_fx.compare(folded(x), injected(x)).ok
    assert not lora_fx.compare(folded(x), gm(x)).ok
    assert torch.equal(lora_fx.unfold(folded)(x), injected(x))


def test_errors_have_one_base() -> None:
    names = ["AdapterError", "ExportError", "PassError", "TraceError", "VerificationError"]
    assert all(issubclass(getattr(lora_fx, name), lora_fx.LoraFxError) for name in names)
