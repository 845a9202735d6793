"""Safetensors files that must be refused, each by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_fx.errors import AdapterError
from lora_fx.io.safetensors_file import (
    DTYPES,
    MAX_HEADER,
    MAX_TENSORS,
    TensorToWrite,
    check_header,
    check_tensors,
    read_metadata,
    read_names,
    read_tensors,
    write_tensors,
)

A = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}


def file_of(path: Path, header: object, data: bytes = b"\0" * 12) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = path / "adapter.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return file


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**A, **changes}}


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_tensors_are_read_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    file = tmp_path / "a.safetensors"
    tensors = {"x.b": torch.randn(5, 3).to(dtype), "x.a": torch.randn(2, 5).to(dtype)}
    save_file(tensors, file, metadata={"format": "pt"})
    found = read_tensors(file)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_floats_of_a_byte_are_widened_with_every_value(tmp_path: Path, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = every[torch.isfinite(every.float())]
    save_file({"x": finite}, tmp_path / "a.safetensors")
    found = read_tensors(tmp_path / "a.safetensors")["x"]
    assert found.dtype == torch.float16
    assert torch.equal(found.float(), finite.float())


def test_tensors_are_memory_mapped(tmp_path: Path) -> None:
    file = tmp_path / "big.safetensors"
    save_file({"a": torch.zeros(1 << 20)}, file)
    tensor = read_tensors(file)["a"]
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if file.name in line]
    spans = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in maps]
    assert any(begin <= tensor.data_ptr() < end for begin, end in spans)


def test_a_tensor_without_dimensions_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"alpha": torch.tensor(3.0)}, file)
    assert read_tensors(file)["alpha"].shape == ()


def test_names_and_metadata_are_read_from_the_header(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"x.a": torch.ones(2), "x.b": torch.ones(3)}, file, metadata={"key": "text"})
    assert sorted(read_names(file)) == ["x.a", "x.b"]
    assert read_metadata(file) == {"key": "text"}
    save_file({"x.a": torch.ones(2)}, file)
    assert read_metadata(file) == {}


def test_metadata_may_be_null(tmp_path: Path) -> None:
    file = file_of(tmp_path, {"__metadata__": None, **entry()}, b"\0" * 12)
    assert read_metadata(file) == {}
    assert read_tensors(file)["a"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"GGUF\3\0\0\0", "a.bytes: llama.cpp's, which is made of a PEFT directory: give that"),
        (b"PK\3\4\0\0\0\0", "a.bytes: PyTorch's own, of another ending: call it .pt"),
        (b"RIFF\3\0\0\0", "a.bytes: 24 bytes that hold no tensors"),
    ],
)
def test_what_another_file_is_is_told_by_its_start(
    tmp_path: Path, start: bytes, message: str
) -> None:
    file = tmp_path / "a.bytes"
    file.write_bytes(start + b"\1" * 16)
    with pytest.raises(AdapterError, match=message):
        read_tensors(file)


def test_the_alpha_of_a_layer_may_be_a_whole_number(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"x.alpha": torch.tensor(3), "y.alpha": torch.tensor([4], dtype=torch.int32)}, file)
    assert [read_tensors(file)[key].item() for key in ("x.alpha", "y.alpha")] == [3, 4]
    for name, value in {"alpha": torch.tensor(3), "x.alpha": torch.tensor([3, 4])}.items():
        save_file({name: value}, file)
        with pytest.raises(AdapterError, match=f"'{name}': dtype 'I64'"):
            read_tensors(file)


TWO = {"a": A, "b": {"dtype": "F32", "shape": [3], "data_offsets": [12, 24]}}


def at(begin: int, end: int) -> dict[str, Any]:
    return {"a": A, "b": {"dtype": "F32", "shape": [3], "data_offsets": [begin, end]}}


BAD_HEADERS: dict[str, tuple[object, bytes, str]] = {
    "5 not UTF-8": (b'{"\xff": 1}', b"", "not UTF-8"),
    "5 not JSON": (b"{nonsense}", b"", "not strict JSON"),
    "5 not an object": (b"[]", b"", "starts with b'\\['"),
    "6 leading whitespace": (b"  " + json.dumps(entry()).encode(), b"\0" * 12, "starts with b' '"),
    "7 duplicate key": (
        b'{"a": %b, "a": %b}' % ((json.dumps(A).encode(),) * 2),
        b"\0" * 12,
        "the key 'a' appears twice",
    ),
    "8 unknown dtype": (entry(dtype="F31"), b"\0" * 12, "'a': dtype 'F31'"),
    "8 dtype that is no string": (entry(dtype=["F32"]), b"\0" * 12, "'a': dtype"),
    "9 float dim": (entry(shape=[3.0]), b"\0" * 12, r"'a': shape \[3.0\]"),
    "9 negative dim": (entry(shape=[-3]), b"\0" * 12, r"'a': shape \[-3\]"),
    "9 bool dim": (entry(shape=[True, 3]), b"\0" * 12, r"'a': shape \[True, 3\]"),
    "9 shape that is no list": (entry(shape=3), b"\0" * 12, "'a': shape 3"),
    "10 fewer values than bytes": (entry(shape=[2]), b"\0" * 12, "8 bytes, offsets give 12"),
    "10 overflow": (entry(shape=[1 << 62, 4]), b"\0" * 12, "offsets give 12"),
    "11 zero dim": (entry(shape=[0, 1 << 60]), b"\0" * 12, r"'a': shape \[0, "),
    "12 nine dims": (entry(shape=[1] * 8 + [3]), b"\0" * 12, "'a': shape .* at most 8 sizes"),
    "13 overlap": (at(8, 20), b"\0" * 20, "'b' overlaps the one before: begins at 8, expected 12"),
    "13 the same bytes": (at(0, 12), b"\0" * 12, "'b' overlaps the one before"),
    "14 hole": (at(16, 28), b"\0" * 28, "'b' leaves a hole before it"),
    "14 hole at the start": (entry(data_offsets=[4, 16]), b"\0" * 16, "'a' leaves a hole"),
    "15 trailing bytes": (TWO, b"\0" * 25, "trailing bytes: 25 bytes of data, expected 24"),
    "16 truncated": (TWO, b"\0" * 23, "truncated: 23 bytes of data, expected 24"),
    "17 empty name": ({"": A}, b"\0" * 12, "name is empty"),
    "17 NUL": ({"a\0b": A}, b"\0" * 12, r"'a\\x00b': the name .* not printable"),
    "17 control character": ({"a\nb": A}, b"\0" * 12, "not printable"),
    "17 path": ({"../../x": A}, b"\0" * 12, "'../../x': the name looks like a file path"),
    "17 backslash": ({"a\\b": A}, b"\0" * 12, "looks like a file path"),
    "17 over 512 characters": ({"a" * 513: A}, b"\0" * 12, "over 512 long"),
    "18 metadata value": (
        {"__metadata__": {"format": 1}, **entry()},
        b"\0" * 12,
        "__metadata__ is {'format': 1}",
    ),
    "18 metadata list": ({"__metadata__": [], **entry()}, b"\0" * 12, r"__metadata__ is \[\]"),
    "20 integer": (entry(dtype="I32"), b"\0" * 12, "'a': dtype 'I32', expected one of F64, F32"),
    "20 bool": (entry(dtype="BOOL", shape=[12]), b"\0" * 12, "'a': dtype 'BOOL'"),
    "20 fp8": (entry(dtype="F8_E8M0", shape=[12]), b"\0" * 12, "'a': dtype 'F8_E8M0'"),
    "entry without offsets": ({"a": {"dtype": "F32", "shape": [3]}}, b"\0" * 12, "'a': found"),
    "entry with more": (entry(extra=1), b"\0" * 12, "'a': found"),
    "one offset": (entry(data_offsets=[0]), b"\0" * 12, r"'a': data_offsets \[0\]"),
    "reversed offsets": (entry(data_offsets=[12, 0]), b"\0" * 12, "offsets give -12"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_refused(tmp_path: Path, case: str) -> None:
    header, data, message = BAD_HEADERS[case]
    file = file_of(tmp_path, header, data)
    with pytest.raises(AdapterError, match=f"adapter.safetensors: .*{message}"):
        read_tensors(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, expected a safetensors file of at least 8"),
        (b"\0" * 7, "7 bytes"),
        ((100).to_bytes(8, "little") + b"{}", "header of 100 bytes, but only 2 follow"),
        ((3).to_bytes(8, "little") + b"{}", "header of 3 bytes, but only 2 follow"),
        ((MAX_HEADER + 1).to_bytes(8, "little"), "header of 16777217 bytes, expected at most"),
        ((1 << 63).to_bytes(8, "little"), "header of 9223372036854775808 bytes"),
        ((0).to_bytes(8, "little"), "the header starts with b''"),
    ],
)
def test_a_file_without_a_header_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(content)
    with pytest.raises(AdapterError, match=f"adapter.safetensors: .*{message}"):
        read_tensors(file)


def test_too_many_tensors_are_refused(tmp_path: Path) -> None:
    header = {f"t{i}": A for i in range(MAX_TENSORS + 1)}
    with pytest.raises(AdapterError, match="100001 tensors, expected at most 100000"):
        check_header(file_of(tmp_path, header))


@pytest.mark.parametrize("spelled", [b"{%b", b'{"a":{%b}}'])
def test_tensors_are_counted_before_a_header_is_parsed(tmp_path: Path, spelled: bytes) -> None:
    header = spelled % (b'"data_offsets":[' * (MAX_TENSORS + 1))
    with pytest.raises(AdapterError, match="100001 tensors, expected at most 100000"):
        check_header(file_of(tmp_path, header))


def test_tensors_are_counted_however_they_are_spelled(tmp_path: Path) -> None:
    header = json.dumps({f"t{i}": A for i in range(MAX_TENSORS + 1)})
    escaped = header.replace("data_offsets", "data\\u005foffsets").encode()
    with pytest.raises(AdapterError, match="100001 tensors, expected at most 100000"):
        check_header(file_of(tmp_path, escaped))


def test_trailing_spaces_of_a_header_are_padding(tmp_path: Path) -> None:
    check_header(file_of(tmp_path, json.dumps(entry()).encode() + b"   "))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    file = tmp_path / "adapter.safetensors"
    save_file({"good": torch.ones(3), "bad": torch.tensor([1.0, value])}, file)
    with pytest.raises(AdapterError, match="'bad' holds NaN or infinity"):
        read_tensors(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"gone\.safetensors: cannot be read: No such file"):
        read_tensors(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_finite_floats_pass(dtype: torch.dtype) -> None:
    check_tensors({"a": torch.ones(3, 2, dtype=dtype), "b": torch.ones((), dtype=dtype)})


@pytest.mark.parametrize("shape", [(3, 0), (0, 5), (4, 0, 3, 3)])
def test_the_strides_of_what_is_empty_mean_nothing(shape: tuple[int, ...]) -> None:
    check_tensors({"a": torch.empty(shape).as_strided(shape, [0] * len(shape))})


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(3, dtype=torch.int64), r"dtype torch\.int64"),
        (torch.ones(3, dtype=torch.bool), r"dtype torch\.bool"),
        (torch.ones(3).to(torch.float8_e4m3fn), r"dtype torch\.float8_e4m3fn"),
        (torch.ones(3, dtype=torch.complex64), r"dtype torch\.complex64"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.empty(3, device="meta"), "without data"),
        (torch.ones(1).expand(3), "expanded"),
        (torch.tensor([1.0, torch.nan]), "holds NaN or infinity"),
        (torch.tensor([1.0, -torch.inf], dtype=torch.bfloat16), "holds NaN or infinity"),
    ],
)
def test_others_are_refused_by_name(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(AdapterError, match=rf"^tensor 'bad' .*{message}"):
        check_tensors({"good": torch.ones(2), "bad": tensor})


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_torch_itself_quantised_is_refused() -> None:
    quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
    with pytest.raises(AdapterError, match=r"^tensor 'bad' has dtype torch\.quint8"):
        check_tensors({"bad": quantised})


WRITTEN = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]


def test_a_file_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    made = {str(d): (torch.randn(3, 5) * 4).to(d).T for d in WRITTEN} | {"one": torch.tensor(2.0)}
    made["none"] = torch.zeros(0, 4)
    entries = {n: TensorToWrite(tuple(t.shape), t.dtype, lambda t=t: t) for n, t in made.items()}  # type: ignore[misc]
    write_tensors(tmp_path / "a.safetensors", entries)
    found = load_file(tmp_path / "a.safetensors")
    assert list(found) == sorted(made) or found.keys() == made.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in made.items())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", ["a", "ab", "abc"])
def test_tensors_begin_where_numbers_of_8_bytes_may(name: str, tmp_path: Path) -> None:
    write_tensors(
        tmp_path / "a", {name: TensorToWrite((1,), torch.float64, lambda: torch.ones(1).double())}
    )
    data = (tmp_path / "a").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0
    assert len(data) == 8 + int.from_bytes(data[:8], "little") + 8


def test_what_is_not_of_its_shape_is_refused(tmp_path: Path) -> None:
    entry = {"a": TensorToWrite((2,), torch.float32, lambda: torch.zeros(3))}
    with pytest.raises(ValueError, match="shape"):
        write_tensors(tmp_path / "a.safetensors", entry)
