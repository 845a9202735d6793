"""What a format cannot hold is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fx.adapters.adapter import Adapter, Scaling, Update, WeightUpdate
from lora_fx.adapters.other_updates import added
from lora_fx.adapters.source_record import EMBEDDING
from lora_fx.errors import AdapterError
from lora_fx.formats import save_adapter
from lora_fx.testing import update_of

DOWN, UP = torch.ones(2, 3), torch.ones(5, 2)
PLAIN, ONES = Update(DOWN, UP, 1.5), torch.ones(5)
UNET, VAE = {"component": "unet"}, {"component": "vae"}
INFINITE = replace(PLAIN, scale=float("inf"))
OFT = WeightUpdate("oft", added(UP), (5, 2))
EMPTY = Update(DOWN[:0], UP[:, :0], 1.5)
LOKR = update_of("lokr", (6, 4))  # in files of LyCORIS it has no scale
DAMAGED = Update(torch.full((2, 3), torch.nan), UP, 1.0)


def kernel(rank: int, *sizes: int, **fields: Any) -> Update:
    return Update(torch.ones(rank, 6, *sizes), torch.ones(4, 2), 1.0, **fields)


FC, COUNT = {"fc": PLAIN}, torch.ones(1, dtype=torch.int64)
# A format, its hints, updates, what is said; and parameters that the adapter replaces besides.
REFUSED: list[tuple[Any, ...]] = [
    ("kohya", {}, {}, "the adapter a has no update to write"),
    ("kohya", {}, {"a.proj": PLAIN}, "a.proj begins with no part .* pass component="),
    ("kohya", VAE, {"proj": PLAIN}, "component is 'vae'"),
    ("kohya", {}, {"unet": PLAIN}, "unet begins with no part"),
    ("kohya", UNET, {"a.b_c": PLAIN, "a_b.c": PLAIN},
     r"a\.b_c and a_b\.c would both be called lora_unet_a_b_c"),
    ("kohya", UNET, {"fc": replace(PLAIN, scale=0.0)}, "a scale of 0, which it reads as 1: fc"),
    ("kohya", UNET, {"fc": INFINITE}, "cannot hold scales that are no finite number: fc"),
    *[
        ("kohya", hints, {path: LOKR}, "cannot hold a scale of 0.5 of kind 'lokr'")
        for hints, path in ((UNET, "fc"), ({}, "unet.fc"))
    ],
    ("kohya", UNET, {"fc": PLAIN, "up": EMPTY, "out": EMPTY},
     "kohya's format cannot hold updates of rank 0: up, out; write a PEFT directory"),
    ("kohya", UNET, {"fc": replace(PLAIN, col=torch.ones(3))}, "scale inputs or outputs: fc"),
    ("kohya", UNET, {"fc": Scaling(row=ONES)}, "kind 'ia3', which are no product of two factors"),
    ("kohya", {}, {"unet.fc": replace(PLAIN, bias=ONES)},
     r"cannot hold biases of up-projections \(lora_bias\): unet\.fc"),
    ("diffusers", {}, {"fc": PLAIN}, "fc begins with no component's name"),
    ("diffusers", {}, {"unet": PLAIN}, "unet begins with no component's name"),
    ("diffusers", {}, {"unet.x": OFT}, "cannot hold updates of kind 'oft', .*: unet.x"),
    ("diffusers", VAE, {"fc": PLAIN}, "component is 'vae'"),
    ("diffusers", UNET, {"fc": PLAIN, "up": replace(PLAIN, magnitude=ONES)},
     "unet: PEFT's use_dora is for all layers, but these have no magnitude: fc"),
    ("diffusers", UNET, {"fc": replace(PLAIN, magnitude=ONES, bias=ONES)},
     "unet: PEFT has no lora_bias beside DoRA: fc"),
    ("diffusers", UNET, {"fc": replace(PLAIN, row=ONES)},
     "cannot hold updates of kind 'lora', which scale inputs or outputs: fc"),
    ("diffusers", UNET, {"fc": replace(PLAIN, stored=EMBEDDING)},
     "cannot hold updates of embeddings: fc"),
    ("loralib", {}, {"x": kernel(2, 3)}, r"cannot hold updates of kernels such as \(3,\): x"),
    ("loralib", {}, {"x": kernel(4, 3, 3)}, "cannot hold grouped up-projections: x"),
    ("loralib", {}, {"x": kernel(2, magnitude=torch.ones(4))}, "format cannot hold DoRA: x"),
    ("loralib", {}, {"x": kernel(2, row=torch.ones(4))},
     "cannot hold .* which scale inputs or outputs: x"),
    ("loralib", {}, {"x": OFT}, "kind 'oft', which are no product of two factors: x"),
    ("peft", {}, {}, "the adapter a has no update to write"),
    ("peft", {}, {"fc": DAMAGED}, r"fc\.lora_A\.weight' holds NaN"),
    ("peft", {}, {"fc": INFINITE}, "scales that are no finite number: fc"),
    ("kohya", {}, {"unet.fc": PLAIN}, r"replaced parameters: unet\.norm\.weight",
     {"unet.norm.weight": UP}),
    ("diffusers", {}, {"unet.fc": PLAIN}, r"parameters: unet\.norm\.weight",
     {"unet.norm.weight": ONES}),
    ("loralib", {}, FC, r"cannot hold replaced parameters: head\.weight; write",
     {"head.weight": UP}),
    ("peft", {}, FC, "parameter of the model itself.*: scale", {"scale": ONES}),
    ("peft", {}, FC, "both adapt and replace a module, here fc: fc", {"fc.gain": ONES}),
    ("peft", {}, {"b.fc": PLAIN}, r"and replace a module, here b: b\.fc", {"b.scale": ONES}),
    ("peft", {}, FC, r"bn\.count' has dtype torch\.int64", {"bn.count": COUNT}),
]  # fmt: skip


@pytest.mark.parametrize("row", REFUSED)
def test_what_a_format_cannot_hold_is_refused(tmp_path: Path, row: tuple[Any, ...]) -> None:
    form, hints, updates, message, *replaced = row
    adapter, file = Adapter("a", updates, *replaced), tmp_path / "a.safetensors"
    with pytest.raises(AdapterError, match=message):
        save_adapter(adapter, file, format=form, **hints)
    assert list(tmp_path.iterdir()) == []
