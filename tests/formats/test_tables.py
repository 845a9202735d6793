"""Every kind of adapter on every layer in every dialect: kept to the bit, or refused by name."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx.adapters.adapter import Adapter
from lora_fx.errors import AdapterError, LoraFxError
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.testing import Between, LayerShape, means, same_tensors, update_of
from lora_fx.testing.updates import UPDATES

Tensors = dict[str, torch.Tensor]
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], LayerShape]] = {
    "L": (lambda: nn.Linear(4, 6), (7, 4), LayerShape((6, 4))),
    "E": (lambda: nn.Embedding(10, 6), (7,), LayerShape((6, 10), is_table=True)),
    "1": (lambda: nn.Conv1d(4, 6, 3), (4, 9), LayerShape((6, 4, 3))),
    "2": (lambda: nn.Conv2d(4, 6, (3, 3)), (4, 7, 8), LayerShape((6, 4, 3, 3))),
    "G": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 7, 8), LayerShape((6, 2, 3, 3), 2)),
}
# Of each kind, the layers that it is defined on.
DEFINED = dict.fromkeys(UPDATES, "LE12G") | {
    "lora_bias": "L12G", "vera": "LE", "ia3_in": "L12G", "fused": "L", "tokens": "E",
}  # fmt: skip
# Format -> hints, and kind -> the layers that it holds; nothing else, refused by name.
HELD: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "peft_file": ({}, {**DEFINED, "oft": "LE", "full": "", "glora": ""}),
    "kohya": (
        {"component": "lycoris"},
        {
            **dict.fromkeys(("lora", "rslora", "dora"), "L12"),
            **dict.fromkeys(("adalora", "loha", "full", "glora"), "LE12G"),
            "vera": "LE",
            "oft": "12G",
            "fused": "L",
        },
    ),
    "diffusers": (
        {"component": "unet"},
        {
            **dict.fromkeys(("lora", "rslora", "dora", "lora_bias"), "L12G"),
            **dict.fromkeys(("adalora", "loha", "lokr"), "LE12G"),
            "vera": "LE",
            "fused": "L",
        },
    ),
    "loralib": (
        {},
        {
            **dict.fromkeys(("lora", "rslora"), "LE2"),
            **dict.fromkeys(("adalora", "loha"), "LE2G"),
            "vera": "LE",
            "fused": "L",
        },
    ),
}
Case = tuple[str, str, str]
CASES: list[Case] = [(f, k, n) for f, (_, held) in HELD.items() for k in held for n in held[k]]
REFUSED: list[Case] = [
    (form, kind, layer)
    for form in HELD
    for kind, layers in DEFINED.items()
    for layer in layers
    if (form, kind, layer) not in CASES
]
# Format, damage, end of a key: what a file may lack, VeRA's projections, which may be wider than a
# layer, the up-projection of groups, which may be that of the whole, and the difference of a weight
# beside that of a bias.
HARMLESS = {
    ("kohya", "dropped", "alpha"),
    ("kohya", "dropped", "dora_scale"),
    ("kohya", "dropped", "diff_b"),
    ("kohya", "dropped", "diff"),
    ("diffusers", "dropped", "lora_B.bias"),
    ("peft_file", "wide first axis", "vera_B"),
    ("peft_file", "wide second axis", "vera_A"),
}
# What a message names: the layer, the place that its tensor was moved to, or the field of a config
# that promises what is gone; or that nothing is left.
NAMED = ("layer", "other", "use_dora", "save_projection", "nothing is adapted")
GROUPED_UP = "wide second axis", "lora_B.weight"


@functools.cache
def base_of(layer: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    make, inputs, shape = LAYERS[layer]
    model = Between(make()).eval()
    x = torch.randint(0, 10, (2, *inputs)) if shape.is_table else torch.randn(2, *inputs)
    return model, lora_fx.trace(model, (x,))


def written(case: Case, path: Path) -> Path:
    form, kind, layer = case
    update = update_of(kind, LAYERS[layer][2])
    save_adapter(Adapter("a", {"layer": update}), path, format=form, **HELD[form][0])
    return path


def read(case: Case, path: Path) -> Adapter:
    hints = HELD[case[0]][0] if case[0] == "diffusers" else {}
    return load_adapter(path, name="a", base=base_of(case[2])[0], format=case[0], **hints)


@functools.cache
def contents(case: Case) -> tuple[Tensors, dict[str, str] | None]:
    """What is written of a case, its tensors and its metadata: only read."""
    with tempfile.TemporaryDirectory() as directory:
        path = written(case, Path(directory) / "a.safetensors")
        with safe_open(path, framework="pt") as file:
            return load_file(path), file.metadata()


def edited(case: Case, path: Path, tensors: Tensors) -> Path:
    """The file of a case with other tensors and its own metadata."""
    metadata = contents(case)[1]
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_load_save_load_keeps_every_bit(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    narrow = {k: t if "alpha" in k else t.to(dtype) for k, t in contents(case)[0].items()}
    first = read(case, edited(case, tmp_path / "a.safetensors", narrow))
    save_adapter(first, tmp_path / "b.safetensors", format=case[0], **HELD[case[0]][0])
    same_tensors(load_file(tmp_path / "b.safetensors"), narrow)
    second = read(case, tmp_path / "b.safetensors")
    assert str(second) == str(first)
    pairs = zip(first.updates["layer"].tensors(), second.updates["layer"].tensors(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_what_is_written_means_the_same(case: Case, tmp_path: Path) -> None:
    found = read(case, written(case, tmp_path / "a.safetensors")).updates["layer"]
    wanted, (_, _, shape) = update_of(case[1], LAYERS[case[2]][2]), LAYERS[case[2]]
    weight = torch.randn(shape.shape, generator=torch.Generator().manual_seed(0))
    if shape.groups > 1:  # a weight of one group is no weight of such an update
        assert all(map(torch.equal, found.tensors(), wanted.tensors()))
        return
    means(found, weight, wanted.weight(weight))


@pytest.mark.parametrize("case", REFUSED, ids="-".join)
def test_what_a_dialect_does_not_hold_is_refused_by_name(case: Case, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"(hold|holds) .*: layer"):
        written(case, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def dropped(tensors: Tensors, key: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != key}


def renamed(tensors: Tensors, key: str) -> Tensors:
    return {f"{key}_x" if name == key else name: tensor for name, tensor in tensors.items()}


def elsewhere(tensors: Tensors, key: str) -> Tensors:
    return {**dropped(tensors, key), key.replace("layer", "other"): tensors[key]}


def beside(tensors: Tensors, key: str) -> Tensors:
    return {**tensors, f"{key.rpartition('.')[0]}.unheard_of": tensors[key].clone()}


def widened(axis: int) -> Callable[[Tensors, str], Tensors]:
    def widen(tensors: Tensors, key: str) -> Tensors:
        tensor = tensors[key]
        if tensor.ndim <= axis:
            return tensors
        return {**tensors, key: torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)}

    return widen


DAMAGES: dict[str, Callable[[Tensors, str], Tensors]] = {
    "dropped": dropped,
    "renamed": renamed,
    "elsewhere": elsewhere,
    "beside": beside,
    "wide first axis": widened(0),
    "wide second axis": widened(1),
}


def is_harmless(case: Case, damage: str, key: str) -> bool:
    form, kind, layer = case
    ends = any((form, damage) == row[:2] and key.endswith(f".{row[2]}") for row in HARMLESS)
    is_up = damage == GROUPED_UP[0] and key.endswith(GROUPED_UP[1])
    return ends or (layer == "G" and is_up and kind in ("lora", "rslora", "lora_bias"))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_damaged_file_is_refused_by_name(case: Case, damage: str, tmp_path: Path) -> None:
    sound, _ = contents(case)
    for place, key in enumerate(sound):
        tensors = DAMAGES[damage](sound, key)
        if tensors is sound or (damage == "elsewhere" and tensors.keys() == sound.keys()):
            continue
        file = edited(case, tmp_path / f"{place}.safetensors", tensors)
        if is_harmless(case, damage, key) and tensors:
            lora_fx.inject(base_of(case[2])[1], read(case, file))
            continue
        with pytest.raises(LoraFxError) as caught:
            lora_fx.inject(base_of(case[2])[1], read(case, file))
        said = str(caught.value).replace(str(tmp_path), "")
        moved = tensors.keys() - sound.keys()
        assert any(name in said for name in (*NAMED, key, *moved)), said
