"""Safetensors files, and what every tensor of an adapter must be, whatever file it comes from.

They are read memory-mapped, after a header check stricter than the library's, and written one
tensor after the other, none of which is kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from lora_fx.errors import AdapterError, within
from lora_fx.io.plain_file import check_plain
from lora_fx.io.strict_json import parse_object

MAX_HEADER = 16 << 20
MAX_TENSORS = 100_000
MAX_DIMS = 8
MAX_NAME = 512
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
INTEGER_SIZES = {"I64": 8, "I32": 4, "I16": 2, "U8": 1, "BOOL": 1}

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Of one byte, which nothing here computes with: float16 has every value that they have.
NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)
# How files of other kinds begin -> what they are, and what to do.
_OTHERS = {
    b"PK\3\4": "PyTorch's own, of another ending: call it .pt, and pass allow_pickle=True",
    b"GGUF": "llama.cpp's, which is made of a PEFT directory: give that directory",
}
LISTED = ".lora_invocation"
# The axis of the rank, of what AdaLoRA may have pruned to nothing.
_PRUNED = {".lora_A": 0, ".lora_B": 1, ".lora_E": 0}
INTEGERS = (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64)
_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads every tensor of an adapter's safetensors file, memory-mapped, in its own dtype.

    Floats of one byte are widened to float16, and so are not mapped.

    Raises:
        AdapterError: names the file, the tensor and what is wrong with it.
    """
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 no dict
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a safetensors file: {error}") from error
    tensors = widened(tensors)
    with within(path):
        check_tensors(tensors)
    return tensors


def read_names(path: Path) -> list[str]:
    """The names of the tensors of a file, from its header alone.

    Raises:
        AdapterError: names the file and what is wrong with its header.
    """
    return list(_checked(path)[0])


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a file holds beside its tensors.

    Raises:
        AdapterError: names the file and what is wrong with its header.
    """
    return _checked(path)[1]


def check_header(path: Path) -> None:
    """Refuses a file whose header the safetensors library would reject or, wrongly, accept."""
    _checked(path)


def _checked(path: Path) -> tuple[dict[str, object], dict[str, str]]:
    """The entries of the tensors and the metadata of a header that was found good."""
    size = check_plain(path)
    with within(path):
        if path.suffix != ".safetensors" and header_size(path) is None:
            raise AdapterError(
                _OTHERS.get(start_of(path, 4))
                or f"{size} bytes that hold no tensors, so it is no adapter: give the directory "
                "that PEFT saved, or a .safetensors, .bin, .pt, .pth, .ckpt or .onnx_adapter file"
            )
        return _parsed(*_read_header(path, size))


def header_size(path: Path) -> int | None:
    """Bytes of a header, if a file begins as one of safetensors, whatever it is called.

    Raises:
        AdapterError: it cannot be read.
    """
    start = start_of(path, 9)
    length = int.from_bytes(start[:8], "little")
    return length if start[8:] == b"{" and length <= MAX_HEADER else None


def start_of(path: Path, size: int) -> bytes:
    """The first bytes of a file.

    Raises:
        AdapterError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise AdapterError(f"cannot be read: {error.strerror}") from error


def _parsed(header: dict[str, object], data_size: int) -> tuple[dict[str, object], dict[str, str]]:
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null where it has none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterError(f"__metadata__ is {metadata!r:.200}, expected names to strings")
    if len(header) > MAX_TENSORS:
        raise AdapterError(f"{len(header)} tensors, expected at most {MAX_TENSORS}")
    ranges = sorted((*_check_entry(name, entry), name) for name, entry in header.items())
    _check_layout(ranges, data_size)
    return header, metadata


def _read_header(path: Path, size: int) -> tuple[dict[str, object], int]:
    """The header, and how many bytes of tensors follow it."""
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            data = file.read(length) if length <= min(MAX_HEADER, size) else b""
    except OSError as error:
        raise AdapterError(f"cannot be read: {error.strerror}") from error
    if len(prefix) < 8:
        raise AdapterError(f"{size} bytes, expected a safetensors file of at least 8")
    if length > MAX_HEADER:
        raise AdapterError(
            f"header of {length} bytes, expected at most {MAX_HEADER}: a file that begins with "
            f"{prefix!r} is of another kind than safetensors"
        )
    if length > size - 8:
        raise AdapterError(f"header of {length} bytes, but only {size - 8} follow")
    count = data.count(b'"data_offsets"')
    if count > MAX_TENSORS:  # before each is made a value of
        raise AdapterError(f"{count} tensors, expected at most {MAX_TENSORS}")
    if not data.startswith(b"{"):
        raise AdapterError(f"the header starts with {data[:1]!r}, expected an object")
    with within("header"):
        return parse_object(data), size - 8 - length


def _check_entry(name: str, entry: object) -> tuple[int, int]:
    """Checks one tensor's entry and returns where its bytes begin and end."""
    where = f"tensor {name!r:.80}"
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise AdapterError(f"{where}: the name is empty, over {MAX_NAME} long, or not printable")
    if "/" in name or "\\" in name or ".." in name:
        raise AdapterError(f"{where}: the name looks like a file path, expected a module path")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise AdapterError(f"{where}: found {entry!r:.80}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _is_counts(shape) or len(shape) > MAX_DIMS:
        raise AdapterError(f"{where}: shape {shape!r:.80}, expected at most {MAX_DIMS} sizes")
    check_gathered(name, shape)
    is_integer = may_be_integer(name, math.prod(shape))
    sizes = ITEM_SIZES | INTEGER_SIZES if is_integer else ITEM_SIZES
    if not isinstance(dtype, str) or dtype not in sizes:
        raise AdapterError(f"{where}: dtype {dtype!r}, expected one of {', '.join(sizes)}")
    if not _is_counts(offsets) or len(offsets) != 2:
        raise AdapterError(f"{where}: data_offsets {offsets!r:.80}, expected [begin, end]")
    begin, end = offsets
    needed, found = math.prod(shape) * sizes[dtype], end - begin
    if found != needed:
        raise AdapterError(f"{where}: {dtype} {shape} is {needed} bytes, offsets give {found}")
    return begin, end


def _check_layout(ranges: list[tuple[int, int, str]], data_size: int) -> None:
    """Refuses overlaps, holes, a truncated payload and trailing bytes."""
    expected = 0
    for begin, end, name in ranges:
        if begin != expected:
            problem = "overlaps the one before" if begin < expected else "leaves a hole before it"
            raise AdapterError(f"tensor {name!r} {problem}: begins at {begin}, expected {expected}")
        expected = end
    if expected != data_size:
        problem = "truncated" if expected > data_size else "trailing bytes"
        raise AdapterError(f"{problem}: {data_size} bytes of data, expected {expected}")


def _is_counts(value: object) -> bool:
    """Whether a value is a list of plain integers, none negative."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def check_gathered(name: str, shape: Sequence[int]) -> None:
    """Refuses a tensor of a file that has no values.

    Raises:
        AdapterError: names it, and what leaves such tensors.
    """
    axis = _PRUNED.get(name[-7:])
    is_pruned = axis is not None and len(shape) == 2 and shape[axis] == 0 != shape[1 - axis]
    if 0 in shape and not is_pruned and not name.endswith(LISTED):  # no tokens: everywhere
        raise AdapterError(
            f"tensor {name!r:.80}: shape {list(shape)!r:.80}: it is empty, which is what DeepSpeed "
            "ZeRO-3 and FSDP leave of a model that is saved while its tensors are spread over "
            "processes: save it with stage3_gather_16bit_weights_on_model_save, or take the "
            "adapter out of the checkpoint, as zero_to_fp32.py does"
        )


def may_be_integer(name: str, count: int) -> bool:
    """Whether a tensor is one number (alpha, a flag, a count of batches), or places or tokens."""
    flags = (".alpha", ".on_input", ".num_batches_tracked", ".scaled_oft")
    is_number = name.endswith(flags) and count == 1
    is_listed = name.endswith(LISTED)
    return is_number or is_listed or "_indices" in name or "_s_size" in name


def widened(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, those of a byte a number as float16, with the same values."""
    return {n: t.to(torch.float16) if t.dtype in NARROW else t for n, t in tensors.items()}


def check_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuses a tensor that is not dense, of a floating dtype, and finite.

    Raises:
        AdapterError: names the first such tensor.
    """
    for name, tensor in tensors.items():
        what = f"tensor {name!r}"
        is_dense = tensor.layout == torch.strided and not tensor.is_nested  # which has no shape
        if not is_dense or tensor.is_meta:
            raise AdapterError(f"{what} is sparse, nested or without data, expected dense")
        if _overlaps(tensor):
            raise AdapterError(
                f"{what} is expanded: fewer values are stored than its shape "
                f"{tuple(tensor.shape)} shows, expected one for each; save a contiguous copy"
            )
        is_integer = tensor.dtype in INTEGERS and may_be_integer(name, tensor.numel())
        if tensor.dtype not in DTYPES and not is_integer:
            raise AdapterError(
                f"{what} has dtype {tensor.dtype}, expected float16, bfloat16, float32 or float64"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{what} holds NaN or infinity; the adapter is damaged")


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether two places of a tensor may be one in memory: a step shorter than what it skips."""
    if not tensor.numel():  # strides mean nothing: some readers give zeros
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


class TensorToWrite(NamedTuple):
    """A tensor to be written.

    Attributes:
        shape: of it.
        dtype: of it.
        make: gives it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


def write_tensors(path: Path, tensors: Mapping[str, TensorToWrite]) -> None:
    """Writes tensors in their order.

    Raises:
        ValueError: one is not what was said of it.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, made in tensors.items():
        start, end = end, end + math.prod(made.shape) * made.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[made.dtype],
            "shape": list(made.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, made in tensors.items():
            found = made.make()
            if (tuple(found.shape), found.dtype) != (made.shape, made.dtype):
                raise ValueError(f"{name}: shape {tuple(found.shape)}, expected {made.shape}")
            values: Any = found.contiguous().flatten().view(torch.uint8).numpy()
            file.write(values.data)
