from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx.errors import ExportError
from lora_fx.export import to_onnx
from lora_fx.export.onnx_model.model_file import load_proto, manifest_in
from lora_fx.export.slots.choose import chosen_slots
from lora_fx.export.slots.manifest import (
    KEY,
    Manifest,
    check_slots,
    manifest_of,
    read_manifest,
)
from lora_fx.export.slots.slot import Slot
from lora_fx.frontend.trace import trace
from lora_fx.testing import traced

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
        ("[]", "not JSON .*holds a list"),
        (changed(slots=slot(path="\ud800")), "is half a character"),
        (MANIFEST.to_json()[:-1] + ',"version":2}', "the key 'version' appears twice"),
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


DEEP = "[" * 50_000 + "]" * 50_000
HOSTILE = {
    "deep": (DEEP, "not JSON"),
    "deep inside": (changed(slots=[]).replace("[]", DEEP), "not JSON"),
    "deep objects": ('{"a":' * 50_000 + "1" + "}" * 50_000, "not JSON"),
    "kernel of a million axes": (changed(slots=slot(kernel=[3] * 1_000_000)), "out of range"),
    "kernel of nine": (changed(slots=slot(kernel=[1] * 9)), "out of range"),
    "kernel of lists": (changed(slots=slot(kernel=[[3], [3]])), "out of range"),
    "a million inputs": (changed(slots=slot(inputs=["a"] * 1_000_000)), "out of range"),
    "size 1e12": (changed(slots=slot(in_features=10**12)), "out of range"),
    "size 1e30": (changed(slots=slot(out_features=10**30)), "out of range"),
    "size 1e4000": (changed(slots=slot(out_features=10**4000)), "out of range"),
    "size of 5,000 digits": (changed(slots=[]).replace("[]", f"[{'9' * 5000}]"), "not JSON"),
    "sizes of 1e12 together": (
        changed(slots=slot(in_features=10**9, out_features=10**9)),
        "out of range",
    ),
    "kernel 1e30": (changed(slots=slot(kernel=[10**30])), "out of range"),
    "groups 1e30": (changed(slots=slot(groups=10**30)), "out of range"),
    "size -1e30": (changed(slots=slot(in_features=-(10**30))), "out of range"),
    "size 1e12 as a float": (changed(slots=slot(in_features=1e12)), "in_features is 1000000000000"),
    "shape 1e30": (
        changed(slots=[{"kind": "tensor", "path": "p", "shape": [10**30], "dtype": "float32"}]),
        "",
    ),
    "version without end": (changed(version="9" * 1_000_000), "version '9+"),
    "a path of 1 MB twice": (changed(slots=slot(path="p" * 1_000_000, kernel=[0])), "out of range"),
    "a slot twice": (changed(slots=slot() * 2), "two slots of one name"),
    "20 MB": (changed(extra="x" * 20_000_000), "expected at most 16777216"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_manifest_is_refused_soon(case: str) -> None:
    text, reason = HOSTILE[case]
    begin = time.perf_counter()
    with pytest.raises(ExportError, match=f"^{KEY}: .*{reason}") as error:
        read_manifest({KEY: text})
    assert time.perf_counter() - begin < 2
    assert len(str(error.value)) < 600


def test_a_type_that_there_is_not_is_told_by_its_number(exported_mlp: Any) -> None:
    proto = load_proto(exported_mlp.path("input"))
    manifest = manifest_in(proto, Path("x"))
    assert manifest is not None
    given = next(v for v in proto.graph.input if v.name == "up.lora_A")
    for kind, name in ((99, "type 99"), (11, "double")):
        given.type.tensor_type.elem_type = kind
        with pytest.raises(ExportError, match=f"up.lora_A: {name} in the graph"):
            check_slots(proto, manifest)


def test_sizes_are_those_of_the_graph(exported_mlp: Any) -> None:
    """The digests are as they should be: whoever writes a file can write those too."""
    proto = load_proto(exported_mlp.path("input"))
    manifest = manifest_in(proto, Path("x"))
    assert manifest is not None
    wide = replace(manifest.slots[0], in_features=2_000_000_000)
    with pytest.raises(ExportError, match=r"up\.lora_A is of \(2000000000, None\), but \(3, 0\)"):
        check_slots(proto, replace(manifest, slots=(wide, *manifest.slots[1:])))


def test_a_slot_without_a_default_is_no_larger_than_the_weights(tmp_path: Path) -> None:
    """Graph and manifest may agree on a size: a value for it would be made of memory."""
    path, gm = tmp_path / "m.onnx", traced(nn.Sequential(nn.Linear(3, 5)), torch.randn(4, 3))
    to_onnx(gm, path, adapters="required", verify=False)
    proto = load_proto(path)
    manifest = manifest_in(proto, path)
    assert manifest is not None
    (down,) = (value for value in proto.graph.input if value.name == "0.lora_A")
    for size in (15, 16):
        down.type.tensor_type.shape.dim[0].dim_value = size
        wide = replace(manifest, slots=(replace(manifest.slots[0], in_features=size),))
        if size == 15:
            check_slots(proto, wide)
            continue
        with pytest.raises(ExportError, match=r"0\.lora_A: larger than any weight of the file"):
            check_slots(proto, wide)


def test_names_of_many_slots_are_made_once() -> None:
    """Each name of a file is asked for among them: made anew each time, a minute for 750 layers."""
    slot = MANIFEST.slots[0]
    many = Manifest(tuple(replace(slot, path=f"layers.{n}.fc") for n in range(2000)))
    start = time.process_time()
    assert all(name in many.names for name in many.names[:2000])
    assert time.process_time() - start < 2
