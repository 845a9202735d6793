"""Numbers of tensors that bitsandbytes wrote: bit for bit what it makes of them itself.

``bitsandbytes.safetensors`` was written by bitsandbytes 0.50.2 (``quantize_4bit``,
``QuantState.as_dict(packed=True)``, ``int8_vectorwise_quant``); the digests are of its
``dequantize_4bit`` and ``int8_vectorwise_dequant``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_fx.errors import LoraFxError
from lora_fx.tasks.bitsandbytes import PARTS, STATE, Table, of_rows

TENSORS = load_file(Path(__file__).with_name("bitsandbytes.safetensors"))
DIGESTS = {
    "nested": "154f03d5c4b124a474332b96e2f13d7f",
    "plain": "e81ff73dd153ccf261ec3d26ae2ceb86",
    "other": "bdb2ee6a65f0b75c4d421c5299bd1f76",
}
SAID = {"nested": "nf4:64", "plain": "nf4:64", "other": "fp4:64"}


def digest(numbers: torch.Tensor) -> str:
    plain = numbers.contiguous() + 0.0  # of the two zeros of fp4, one
    return hashlib.sha256(plain.numpy().tobytes()).hexdigest()[:32]


def parts_of(name: str) -> tuple[Table, torch.Tensor, dict[str, torch.Tensor]]:
    weight = f"{name}.weight"
    state = next(key for key in TENSORS if key.startswith(f"{weight}{STATE}"))
    parts = {p: TENSORS[f"{weight}.{p}"] for p in PARTS if f"{weight}.{p}" in TENSORS}
    return Table.of(TENSORS[state]), TENSORS[weight], parts


@pytest.mark.parametrize("name", DIGESTS)
def test_four_bits_are_the_numbers_of_bitsandbytes(name: str) -> None:
    table, packed, parts = parts_of(name)
    assert table.said == SAID[name]
    assert digest(table.numbers(packed, parts)) == DIGESTS[name]


@pytest.mark.parametrize("name", DIGESTS)
def test_the_control_another_byte_or_factor_is_seen(name: str) -> None:
    table, packed, parts = parts_of(name)
    other = packed.clone()
    other[3] ^= 16
    assert digest(table.numbers(other, parts)) != DIGESTS[name]
    factors = parts["absmax"].clone()
    factors[0] += 1
    assert digest(table.numbers(packed, parts | {"absmax": factors})) != DIGESTS[name]


def test_bytes_may_be_held_by_any_type() -> None:
    table, packed, parts = parts_of("nested")
    assert digest(table.numbers(packed.flatten().view(torch.bfloat16), parts)) == DIGESTS["nested"]


def test_eight_bits_are_the_numbers_of_bitsandbytes() -> None:
    found = of_rows(TENSORS["rows.weight"], TENSORS["rows.SCB"])
    assert digest(found) == "068a6084106962df3f20b1ee00cce3b2"


def test_by_hand() -> None:
    state = {"quant_type": "nf4", "blocksize": 2, "shape": [1, 3], "dtype": "float32"}
    table = Table.of(torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8))
    # Codes 15, 0 and 7: 1, -1 and 0; the last half byte is of nothing.
    parts = {"absmax": torch.tensor([2.0, 3.0]), "quant_map": torch.linspace(-1, 1, 16)}
    parts["quant_map"][7] = 0.0
    packed = torch.tensor([[0xF0], [0x70]], dtype=torch.uint8)
    assert table.numbers(packed, parts).tolist() == [[2.0, -2.0, 0.0]]


BROKEN: dict[str, dict[str, Any]] = {
    "kind": {"quant_type": "int3"},
    "block": {"blocksize": 0},
    "block of words": {"blocksize": "64"},
    "no shape": {"shape": None},
    "three sizes": {"shape": [2, 2, 2]},
    "huge": {"shape": [1 << 30, 1 << 30]},
    "offset": {"nested_offset": "0.1"},
    "nested": {"nested_blocksize": -1},
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_state_that_is_none_is_refused(what: str) -> None:
    state = {"quant_type": "nf4", "blocksize": 64, "shape": [7, 33]} | BROKEN[what]
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(LoraFxError, match="expected nf4 or fp4, a blocksize and a shape"):
        Table.of(text)


def test_a_state_that_is_no_text_is_refused() -> None:
    with pytest.raises(LoraFxError, match="JSON"):
        Table.of(torch.tensor([1, 2, 3], dtype=torch.uint8))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing_or_too_short_is_named(part: str) -> None:
    table, packed, parts = parts_of("nested")
    rest = {name: value for name, value in parts.items() if name != part}
    with pytest.raises(LoraFxError, match=f"lacks {part}"):
        table.numbers(packed, rest)
    with pytest.raises(LoraFxError, match=f"{part}, expected"):
        table.numbers(packed, parts | {part: parts[part].flatten()[:-1]})


def test_values_that_do_not_fill_the_shape_are_refused() -> None:
    table, packed, parts = parts_of("plain")
    with pytest.raises(LoraFxError, match="115 values, expected 116"):
        table.numbers(packed[:-1], parts)
    with pytest.raises(LoraFxError, match="expected int8"):
        of_rows(TENSORS["rows.weight"], torch.ones(3))
