"""Files of no plain kind, and of no bounded size: every reader refuses them before it reads."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import save_file

from lora_fx.errors import AdapterError, LoraFxError
from lora_fx.export.onnx_model.external_data import check_external_data
from lora_fx.export.onnx_model.model_file import load_proto
from lora_fx.export.runtime.sampling import Ends
from lora_fx.export.slots.check_adapter import read_adapter
from lora_fx.io.plain_file import check_path, check_plain, read_plain
from lora_fx.io.safetensors_file import read_metadata, read_names, read_tensors
from lora_fx.io.state_dict import read_file, read_pickle
from lora_fx.io.strict_json import read_json, read_object

GIGA = 1 << 30
READERS: dict[str, Callable[[Path], object]] = {
    "tensors": read_tensors,
    "names": read_names,
    "metadata": read_metadata,
    "pickle": read_pickle,
    "json": read_object,
    "directory": read_json,
    "onnx": load_proto,
    "onnx_adapter": read_adapter,
    "plain": lambda path: read_plain(path, 100),
}


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to(path.with_name("pipe"))


def holes(path: Path) -> None:
    path.touch()
    os.truncate(path, 40 * GIGA)


def tensors_of_holes(path: Path) -> None:
    """A header that is right in all it says, before 200 GB that nobody wrote."""
    entry = {"dtype": "F32", "shape": [50 * GIGA], "data_offsets": [0, 200 * GIGA]}
    header = json.dumps({"a": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 200 * GIGA)


def model_before_zeros(path: Path) -> None:
    """A model that is right, and 2 GB of holes."""
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    sizes = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2]) for n in ("x", "y")]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", sizes[:1], sizes[1:]))
    path.write_bytes(model.SerializeToString())
    os.truncate(path, 2 * GIGA - 1)


def adapter_before_holes(path: Path) -> None:
    path.write_bytes(b"\x08\0\0\0TORT" + bytes(100))
    os.truncate(path, 2 * GIGA - 1)


HOSTILE = (
    fifo,
    device,
    link_to_fifo,
    holes,
    tensors_of_holes,
    model_before_zeros,
    adapter_before_holes,
)


@pytest.mark.parametrize("make", HOSTILE)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_soon_and_reads_nothing(
    reader: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    make(path)
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LoraFxError, match=r"file: .*expected"):
        READERS[reader](path)
    assert time.perf_counter() - begin < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


@pytest.mark.parametrize("name", ["no", "nul\0", "n" * 300, "\udcff"])
@pytest.mark.parametrize("reader", READERS)
def test_a_path_of_no_file_is_refused(reader: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(LoraFxError, match="cannot be read"):
        READERS[reader](tmp_path / name)


@pytest.mark.parametrize("make", [holes, tensors_of_holes])
def test_external_data_of_holes_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "data")
    model = onnx.ModelProto()
    tensor = model.graph.initializer.add(name="w", dims=[10 * GIGA], data_type=1, data_location=1)
    for key, value in {"location": "data", "offset": "0", "length": f"{40 * GIGA}"}.items():
        tensor.external_data.add(key=key, value=value)
    with pytest.raises(LoraFxError, match=r"data: .* nearly all are holes, expected stored"):
        check_external_data(model, tmp_path / "m.onnx")


def test_what_generates_has_a_plain_file_beside_it(tmp_path: Path) -> None:
    holes(tmp_path / "generation_config.json")
    with pytest.raises(LoraFxError, match=r"generation_config\.json: 42949672960 bytes, expected"):
        Ends.of(tmp_path / "model.onnx", None, None, {})


def test_a_file_that_shows_fewer_bytes_than_it_gives_is_refused() -> None:
    made_when_read = Path("/proc/self/maps")
    assert check_plain(made_when_read, most=100) == 0
    with pytest.raises(LoraFxError, match=r"maps: grew while it was read, expected at most 100"):
        read_plain(made_when_read, 100)


def test_links_to_plain_files_and_stored_zeros_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "zeros": torch.zeros(20_000_000)}
    save_file(tensors, tmp_path / "stored")
    (tmp_path / "link").symlink_to("stored")
    assert check_plain(tmp_path / "link") == (tmp_path / "stored").stat().st_size
    found = read_file(tmp_path / "link", allow_pickle=False)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("reader", [name for name in READERS if name != "plain"])
def test_a_pointer_of_git_lfs_is_named(reader: str, tmp_path: Path) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 12345\n"
    (tmp_path / "a").write_text(text)
    with pytest.raises(LoraFxError, match=r"a: a git-lfs pointer, .* git lfs pull"):
        READERS[reader](tmp_path / "a")


def test_what_is_not_there_can_be(tmp_path: Path) -> None:
    assert check_path(tmp_path / "no" / "file", AdapterError) == tmp_path / "no" / "file"
    assert check_path(tmp_path, AdapterError) == tmp_path
