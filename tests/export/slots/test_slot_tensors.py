"""Adapters for one model in safetensors: what is written, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lora_fx import Adapter, AdapterError, ExportError, Update, load_adapter, save_adapter
from lora_fx.cli.inspect import describe
from lora_fx.export import Session, export_adapter, to_onnx
from lora_fx.export.onnx_model.model_file import load_proto, manifest_in
from lora_fx.export.slots.check_adapter import check_adapter_file
from lora_fx.export.slots.manifest import Manifest
from lora_fx.io.adapter_files import KEY, is_ort_adapter, is_slot_tensors
from lora_fx.testing import traced

Values = dict[str, torch.Tensor]


@pytest.fixture
def model(exported_mlp: Any) -> Path:
    found: Path = exported_mlp.path("input")
    return found


@pytest.fixture
def manifest(model: Path) -> Manifest:
    found = manifest_in(load_proto(model), model)
    assert found is not None
    return found


@pytest.fixture
def french(exported_mlp: Any, model: Path, tmp_path: Path) -> Path:
    export_adapter(exported_mlp.sample.adapter(2), model, tmp_path / "french.safetensors")
    return tmp_path / "french.safetensors"


def said(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[KEY])


def test_it_holds_the_slots_by_name_and_tells_its_model(
    french: Path, exported_mlp: Any, manifest: Manifest
) -> None:
    values = load_file(french)
    for path, update in exported_mlp.sample.adapter(2).updates.items():
        assert torch.equal(values[f"{path}.lora_A"], update.down.T)
        assert torch.equal(values[f"{path}.lora_B"], 2.0 * update.up.T)
    assert said(french) == {
        "version": 1,
        "adapter": "rank2",
        "base": manifest.base,
        "model_version": manifest.model_version,
        "slots": {
            "up.lora_A": {"dtype": "float32", "shape": [3, None]},
            "up.lora_B": {"dtype": "float32", "shape": [None, 5]},
            "tail.1.lora_A": {"dtype": "float32", "shape": [5, None]},
            "tail.1.lora_B": {"dtype": "float32", "shape": [None, 4]},
        },
    }


def test_no_adapter_is_zeros_of_rank_1(model: Path, tmp_path: Path) -> None:
    export_adapter(None, model, tmp_path / "none.safetensors")
    values = load_file(tmp_path / "none.safetensors")
    assert {name: list(value.shape) for name, value in values.items()} == {
        "up.lora_A": [3, 1], "up.lora_B": [1, 5], "tail.1.lora_A": [5, 1], "tail.1.lora_B": [1, 4],
    }  # fmt: skip
    assert not any(value.any() for value in values.values())
    assert said(tmp_path / "none.safetensors")["adapter"] is None


def test_the_format_is_what_is_said_or_what_the_name_ends_in(
    exported_mlp: Any, model: Path, tmp_path: Path
) -> None:
    adapter = exported_mlp.sample.adapter(2)
    export_adapter(adapter, model, tmp_path / "a.bin", format="safetensors")
    export_adapter(adapter, model, tmp_path / "b.safetensors")
    export_adapter(adapter, model, tmp_path / "c.safetensors", format="onnx_adapter")
    export_adapter(adapter, model, tmp_path / "d.bin")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "d.bin").read_bytes()
    assert [is_ort_adapter(p) for p in sorted(tmp_path.iterdir())] == [False, False, True, True]
    assert [is_slot_tensors(p) for p in sorted(tmp_path.iterdir())] == [True, True, False, False]
    session, found = Session(model), []
    for file in sorted(tmp_path.iterdir()):
        found.append(session.run(exported_mlp.sample.other, file))
    for each in found[1:]:
        assert all((each[name] == found[0][name]).all() for name in each)
    with pytest.raises(ExportError, match="format 'peft': expected onnx_adapter or safetensors"):
        export_adapter(adapter, model, tmp_path / "e", format="peft")
    assert not (tmp_path / "e").exists()


def test_what_exists_stays_and_what_does_not_fit_is_not_written(
    exported_mlp: Any, model: Path, tmp_path: Path
) -> None:
    adapter, out = exported_mlp.sample.adapter(2), tmp_path / "a.safetensors"
    out.write_text("precious")
    with pytest.raises(ExportError, match="exists: pass force=True"):
        export_adapter(adapter, model, out)
    assert out.read_text() == "precious"
    wide: Any = replace(adapter.updates["up"], down=torch.randn(2, 4))
    with pytest.raises(AdapterError, match="up: made for a layer 4 -> 5, the model's is 3 -> 5"):
        export_adapter(Adapter("wide", {"up": wide}), model, out, force=True)
    assert out.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [out]
    export_adapter(adapter, model, out, force=True)
    assert is_slot_tensors(out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_keeps_its_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    gm = traced(nn.Sequential(nn.Linear(3, 5)).to(dtype), torch.randn(4, 7, 3).to(dtype))
    to_onnx(gm, tmp_path / "model.onnx", adapters="required", verify=False)
    update = Update(torch.randn(2, 3), torch.randn(5, 2), 1.7)
    export_adapter(Adapter("a", {"0": update}), tmp_path / "model.onnx", tmp_path / "a.safetensors")
    up = load_file(tmp_path / "a.safetensors")["0.lora_B"]
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(up, (1.7 * update.up.to(wide)).to(dtype).T)
    assert not torch.equal(up, (1.87 * update.up).to(dtype).T)


def without(name: str) -> Callable[[Values, Any], object]:
    return lambda values, said: [each.pop(name) for each in (values, said["slots"])]


def unlisted(values: Values, said: Any) -> None:
    values["up.lora_C"] = torch.ones(2, 2)


def beside(values: Values, said: Any) -> None:
    values["up.lora_C"] = torch.ones(2, 2)
    said["slots"]["up.lora_C"] = {"dtype": "float32", "shape": [2, None]}


def reshaped(values: Values, said: Any) -> None:
    values["up.lora_A"] = values["up.lora_A"].T.contiguous()


def turned(values: Values, said: Any) -> None:
    reshaped(values, said)
    said["slots"]["up.lora_A"]["shape"] = [2, None]


def of_two_ranks(values: Values, said: Any) -> None:
    values["up.lora_A"] = torch.ones(3, 4)


def halved(values: Values, said: Any) -> None:
    values["up.lora_A"] = values["up.lora_A"].half()
    said["slots"]["up.lora_A"]["dtype"] = "float16"


def spoilt(values: Values, said: Any) -> None:
    values["up.lora_A"][0, 0] = float("nan")


def loud(values: Values, said: Any) -> None:
    values |= {name: torch.full_like(value, 1e25) for name, value in values.items()}


def empty(values: Values, said: Any) -> None:
    values |= {"up.lora_A": torch.zeros(3, 0), "up.lora_B": torch.zeros(0, 5)}


def noted(**fields: Any) -> Callable[[Values, Any], None]:
    return lambda values, said: said.update(fields)


REFUSED: dict[str, tuple[Callable[[Values, Any], object], str]] = {
    "half of a pair": (without("up.lora_A"), "slots without a value: up.lora_A"),
    "a tensor that is not listed": (unlisted, "the list of slots differ in up.lora_C"),
    "a slot of another model": (beside, "values without a slot: up.lora_C"),
    "a shape that is not listed": (reshaped, r"float32 \[2, 3\], and listed as"),
    "a shape that does not fit": (turned, r"up\.lora_A is \(2, 3\), expected \(3, 'r'\)"),
    "two ranks": (of_two_ranks, r"up: A and B are of ranks \[2, 4\]"),
    "another dtype": (halved, r"float16\), expected tensor\(float\)"),
    "not finite": (spoilt, "holds NaN or infinity"),
    "a product that overflows": (loud, "up: the product of down and up overflows float32"),
    "no values": (empty, "it is empty"),
    "another base": (noted(base="0" * 32), "made for another model"),
    "another version of the model": (noted(model_version=3), "made for another model: .* 3, "),
    "no slots": (noted(slots=None), "slots is None"),
    "slots that are none": (noted(slots={}), "the list of slots differ"),
    "an entry that is none": (noted(slots=dict.fromkeys(
        ["up.lora_A", "up.lora_B", "tail.1.lora_A", "tail.1.lora_B"], 3
    )), "listed as 3"),
    "a base that is none": (noted(base=7), "base is 7"),
    "a version that is none": (noted(model_version=True), "model_version is True"),
    "a later format": (noted(version=2), "version 2, expected 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_does_not_fit_is_refused(
    case: str, french: Path, manifest: Manifest, model: Path, exported_mlp: Any
) -> None:
    change, reason = REFUSED[case]
    check_adapter_file(french, manifest, model)
    values, texts = {n: v.clone() for n, v in load_file(french).items()}, said(french)
    change(values, texts)
    save_file(values, french, {KEY: json.dumps(texts)})
    with pytest.raises(AdapterError, match=rf"french\.safetensors.*{reason}"):
        check_adapter_file(french, manifest, model)
    with pytest.raises(AdapterError, match=reason):
        Session(model).run(exported_mlp.sample.other, french)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1, "version": 1}', "x" * 9])
def test_metadata_that_cannot_be_read_are_refused(
    text: str, french: Path, manifest: Manifest, model: Path
) -> None:
    values = {n: v.clone() for n, v in load_file(french).items()}
    save_file(values, french, {KEY: text})
    with pytest.raises(AdapterError, match=rf"french\.safetensors: {KEY}: "):
        check_adapter_file(french, manifest, model)


def test_damaged_bytes_end_in_an_error(french: Path, manifest: Manifest, model: Path) -> None:
    content, refused = french.read_bytes(), 0
    source = torch.Generator().manual_seed(0)
    for _ in range(300):
        place, bit = (int(torch.randint(n, (), generator=source)) for n in (len(content), 8))
        french.write_bytes(
            content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]
        )
        try:
            check_adapter_file(french, manifest, model)
        except AdapterError:
            refused += 1
    assert refused > 150  # flipped values inside the tensors cannot be told
    for length in (0, 7, 8, 9, 40, len(content) - 1):
        french.write_bytes(content[:length])
        with pytest.raises(AdapterError):
            check_adapter_file(french, manifest, model)


def test_a_trainers_file_is_no_file_of_slots(
    exported_mlp: Any, model: Path, tmp_path: Path
) -> None:
    save_adapter(exported_mlp.sample.adapter(2), tmp_path / "a.safetensors", format="loralib")
    assert not is_slot_tensors(tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=r"not an adapter file.*make one with export_adapter"):
        Session(model).run(exported_mlp.sample.other, tmp_path / "a.safetensors")


def test_it_is_read_as_an_adapter_and_not_as_loralibs(french: Path, exported_mlp: Any) -> None:
    """Its names are loralib's too, whose A is the other way round."""
    found, own = load_adapter(french), exported_mlp.sample.adapter(2)
    assert found.name == "french"
    for path, update in own.updates.items():
        assert torch.equal(found.updates[path].down, update.down)
        assert torch.equal(found.updates[path].up, 2.0 * update.up)
    report = describe(french)
    assert report["kind"] == "adapter file"
    assert [value["name"] for value in report["values"]] == sorted(load_file(french))


def test_a_replaced_file_is_loaded_anew(french: Path, model: Path, exported_mlp: Any) -> None:
    sample, session = exported_mlp.sample, Session(model)
    first = session.run(sample.other, french)
    export_adapter(sample.adapter(3), model, french, force=True)
    second = session.run(sample.other, french)
    assert not all((first[name] == second[name]).all() for name in first)
    french.write_bytes(b"")
    with pytest.raises(AdapterError):
        session.run(sample.other, french)
