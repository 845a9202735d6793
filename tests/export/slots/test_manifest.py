from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx.errors import ExportError
from lora_fx.export.slots.choose import chosen_slots
from lora_fx.export.slots.manifest import KEY, Manifest, manifest_of, read_manifest
from lora_fx.export.slots.slot import Slot
from lora_fx.frontend.trace import trace

MANIFEST = Manifest(
    (
        Slot("up", "linear", 3, 5, "float32", digest="ab" * 16),
        Slot("conv", "conv2d", 4, 6, "float16", (3, 1), True, "cd" * 16, "ef" * 16),
    )
)


def changed(**fields: Any) -> str:
    return json.dumps(json.loads(MANIFEST.to_json()) | fields)


def slot(**fields: Any) -> list[dict[str, Any]]:
    return [json.loads(MANIFEST.to_json())["slots"][0] | fields]


def test_reading_gives_back_what_was_written() -> None:
    assert read_manifest({KEY: MANIFEST.to_json()}) == MANIFEST
    assert read_manifest({"other": "x"}) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "version None, expected 2"),
        (changed(version=1), "version 1, expected 2"),
        (changed(slots=None), "no list of slots"),
        (changed(base=3), "no base digest"),
        (changed(extra=1), "unknown or missing fields"),
        (changed(slots=[3]), "slot 0: path is None"),
        (changed(slots=slot(in_features=True)), "slot 0: in_features is True"),
        (changed(slots=slot(out_features=0)), "out of range"),
        (changed(slots=slot(dtype="int8")), "out of range"),
        (changed(slots=slot(kind="attention")), "out of range"),
        (changed(slots=slot(kernel=[3, 0])), "out of range"),
        (changed(slots=slot(vectors=1)), "slot 0: vectors is 1"),
        (changed(slots=slot(inputs=["a", "b"])), "unknown or missing fields"),
    ],
)
def test_a_damaged_manifest_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ExportError, match=f"^{KEY}: .*{reason}"):
        read_manifest({KEY: text})


def test_the_version_tells_weights_and_slots_apart() -> None:
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4)), torch.randn(4, 7, 3)
    gm = trace(model, (x,))
    slots = chosen_slots(gm, None)
    here, fewer = manifest_of(gm, slots), manifest_of(gm, slots[:1])
    assert manifest_of(trace(model, (x,)), slots) == here
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-3
    other = manifest_of(trace(model, (x,)), slots)
    assert len({m.model_version for m in (here, fewer, other)}) == 3
    assert all(0 < m.model_version < 2**31 for m in (here, fewer, other))
