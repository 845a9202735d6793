from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from lora_fx import load_adapter
from lora_fx.cli.inspect import describe
from lora_fx.errors import AdapterError
from lora_fx.export import Session, export_adapter, to_onnx
from lora_fx.export.onnx_model.model_file import load_proto, manifest_in
from lora_fx.export.slots.check_adapter import check_adapter_file, count_of, read_adapter
from lora_fx.export.slots.manifest import Manifest

Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture
def manifest(exported_mlp: Any) -> Manifest:
    path = exported_mlp.path("input")
    found = manifest_in(load_proto(path), path)
    assert found is not None
    return found


def write(path: Path, arrays: Arrays, version: int) -> None:
    values = {name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in arrays.items()}
    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(version)
    file.set_parameters(values)
    file.export_adapter(str(path))


def good() -> Arrays:
    shapes = {"up": (3, 2, 5), "tail.1": (5, 1, 4)}
    arrays: Arrays = {}
    for path, (into, rank, out) in shapes.items():
        arrays[f"{path}.lora_A"] = np.ones((into, rank), np.float32)
        arrays[f"{path}.lora_B"] = np.ones((rank, out), np.float32)
    return arrays


def test_a_file_by_another_hand_that_fits_is_accepted(manifest: Manifest, tmp_path: Path) -> None:
    write(tmp_path / "a", good(), manifest.model_version)
    check_adapter_file(tmp_path / "a", manifest, Path("model.onnx"))


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("up.lora_A", None, "slots without a value: up.lora_A; values without a slot: none"),
        ("up.lora_C", np.ones((2, 2), np.float32), "values without a slot: up.lora_C"),
        ("up.lora_A", np.ones((2, 3), np.float32), r"up\.lora_A is \(2, 3\), expected \(3, 'r'\)"),
        ("up.lora_A", np.ones((3, 4), np.float32), r"up: A and B are of ranks \[2, 4\]"),
        ("up.lora_B", np.ones((2, 5), np.float16), r"float16\), expected tensor\(float\)"),
        ("up.lora_B", np.ones(5, np.float32), r"B is \(5,\), expected"),
    ],
)
def test_names_shapes_and_types_are_checked(
    manifest: Manifest, tmp_path: Path, name: str, array: Any, reason: str
) -> None:
    arrays = good() | {name: array}
    kept = {n: a for n, a in arrays.items() if a is not None}
    write(tmp_path / "a", kept, manifest.model_version)
    with pytest.raises(AdapterError, match=reason):
        check_adapter_file(tmp_path / "a", manifest, Path("model.onnx"))


@pytest.mark.parametrize("version", [0, 1])
def test_a_file_that_does_not_know_the_model_is_refused(
    manifest: Manifest, tmp_path: Path, version: int
) -> None:
    write(tmp_path / "a", good(), version)
    with pytest.raises(AdapterError, match=f"model version {version}, model.onnx has"):
        check_adapter_file(tmp_path / "a", manifest, Path("model.onnx"))


MUTATE = """
import random, sys
from pathlib import Path
from lora_fx.errors import AdapterError
from lora_fx.export.slots.check_adapter import check_adapter_file
from lora_fx.export.onnx_model.model_file import load_proto, manifest_in
model, good, bad = map(Path, sys.argv[1:])
manifest = manifest_in(load_proto(model), model)
content, source, refused = good.read_bytes(), random.Random(0), 0
for _ in range(400):
    damaged = bytearray(content)
    damaged[source.randrange(len(damaged))] ^= 1 << source.randrange(8)
    bad.write_bytes(damaged)
    try:
        check_adapter_file(bad, manifest, model)
    except AdapterError:
        refused += 1
print(refused)
"""


def test_damaged_files_never_end_in_a_crash(exported_mlp: Any, tmp_path: Path) -> None:
    model, good = exported_mlp.path("input"), tmp_path / "good"
    export_adapter(exported_mlp.sample.adapter(2), model, good)
    command = [sys.executable, "-W", "ignore", "-c", MUTATE, str(model), str(good)]
    done = subprocess.run(
        [*command, str(tmp_path / "bad")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50  # flipped values inside the tensors cannot be told


@pytest.mark.parametrize("part", ["A", "B", "gain", "bias", "col"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_what_is_not_finite_is_refused_by_name(
    vector_slots: tuple[Path, Arrays, int],
    tmp_path: Path,
    part: str,
    bad: float,
) -> None:
    model, arrays, version = vector_slots
    name = f"up.lora_{part}"
    spoilt = {key: value.copy() for key, value in arrays.items()}
    spoilt[name].flat[0] = bad
    good, file = tmp_path / "good", tmp_path / "a"
    write(good, arrays, version)
    write(file, spoilt, version)
    x = {"x": torch.ones(4, 7, 3)}
    Session(model).run(x, good)
    for read in (
        lambda: Session(model).run(x, file),
        lambda: load_adapter(file),
        lambda: describe(file.rename(tmp_path / "a.onnx_adapter")),
    ):
        with pytest.raises(AdapterError, match=rf"'{re.escape(name)}' holds NaN or infinity"):
            read()


def test_a_product_that_overflows_is_refused(
    vector_slots: tuple[Path, Arrays, int], tmp_path: Path
) -> None:
    model, arrays, version = vector_slots
    large = {k: np.full_like(v, 1e25) if k[-1] in "AB" else v for k, v in arrays.items()}
    write(tmp_path / "a", large, version)
    with pytest.raises(AdapterError, match="up: the product of down and up overflows float32"):
        Session(model).run({"x": torch.ones(4, 7, 3)}, tmp_path / "a")


@pytest.fixture(scope="module")
def vector_slots(
    exported_mlp: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Arrays, int]:
    """A model whose slots take vectors, what an adapter for it holds, and its version."""
    directory = tmp_path_factory.mktemp("vectors")
    model, file = directory / "model.onnx", directory / "a.onnx_adapter"
    to_onnx(exported_mlp.sample.gm, model, adapters="input", vectors=True, verify=False)
    export_adapter(exported_mlp.sample.adapter(2), model, file)
    stored = read_adapter(file)
    arrays = {name: value.numpy().copy() for name, value in stored.get_parameters().items()}
    return model, arrays, stored.get_model_version()


def doubled(path: Path, version: int, name: str) -> None:
    """A file that names a value twice, with other numbers: its table is edited by hand."""
    other = f"{name[:-1]}~"
    write(path, good() | {other: good()[name] * 100}, version)
    path.write_bytes(path.read_bytes().replace(other.encode(), name.encode()))


@pytest.mark.parametrize("name", sorted(good()))
def test_a_name_twice_is_refused(
    exported_mlp: Any, manifest: Manifest, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "a.onnx_adapter"
    doubled(path, manifest.model_version, name)
    message = r"a\.onnx_adapter: 5 values of 4 names, expected a name for each"
    with pytest.raises(AdapterError, match=message):
        check_adapter_file(path, manifest, Path("model.onnx"))
    with pytest.raises(AdapterError, match=message):
        load_adapter(path)
    model = exported_mlp.path("input")
    session = Session(model)
    with pytest.raises(AdapterError, match=message):
        session.run({name: np.zeros((1, 1, 3), np.float32) for name in session.inputs}, path)


@pytest.mark.parametrize("content", [b"", b"TORT", b"\xff" * 4 + b"TORT" * 9])
def test_a_table_that_lies_elsewhere_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(AdapterError, match="damaged: its table cannot be read"):
        count_of(tmp_path / "a")
    with pytest.raises(AdapterError):
        read_adapter(tmp_path / "a")


def test_an_adapter_without_values_lists_none(tmp_path: Path) -> None:
    write(tmp_path / "a", {}, 1)
    assert count_of(tmp_path / "a") == 0
