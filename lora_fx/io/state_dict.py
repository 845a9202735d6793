"""One file of named tensors: safetensors, or PyTorch's for those who trust theirs."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from lora_fx.errors import AdapterError, within
from lora_fx.formats.hints import Hints
from lora_fx.io.pickle_file import read_pickle
from lora_fx.io.safetensors_reader import read_metadata, read_names, read_tensors
from lora_fx.io.staging import publish_file
from lora_fx.io.tensor_checks import check_tensors

SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def is_pickle(path: Path) -> bool:
    """Whether a file's name is one that PyTorch's own files have."""
    return path.suffix.lower() in PICKLES


def read_file(path: Path, hints: Hints) -> dict[str, torch.Tensor]:
    """Reads every tensor of a file, in its own dtype.

    Raises:
        AdapterError: it is a pickle and that was not allowed, or it is damaged.
    """
    if path.is_dir():
        raise AdapterError(f"{path}: a directory, expected one file of tensors")
    if not is_pickle(path):
        return read_tensors(path)
    if not hints.allow_pickle:
        raise AdapterError(
            f"{path}: a pickle can run code when it is opened; save the adapter as safetensors, "
            "or pass allow_pickle=True if you trust the file"
        )
    return {key: tensor.detach() for key, tensor in read_pickle(path).items()}


def names_in(path: Path, hints: Hints) -> Collection[str]:
    """The names of the tensors in a file, without reading a safetensors file's values."""
    return read_file(path, hints).keys() if is_pickle(path) else read_names(path)


def metadata_of(path: Path) -> dict[str, str]:
    """The texts that a safetensors file has beside its tensors; a pickle has none."""
    return {} if is_pickle(path) else read_metadata(path)


def write_file(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    force: bool,
    pickles: tuple[str, ...] = (),
) -> None:
    """Writes tensors as one file, completely or not at all.

    Args:
        path: ends in ``.safetensors``, or in one of ``pickles``.
        tensors: name -> tensor; each is copied, for one may share memory with another.
        metadata: texts for a safetensors file.
        force: replace a file that is there.
        pickles: endings for which PyTorch's own file is written, which holds no metadata.

    Raises:
        AdapterError: another ending, a tensor that no reader should accept, or a target that
            exists.
    """
    endings = (SAFETENSORS, *pickles)
    if path.suffix not in endings:
        raise AdapterError(f"{path}: expected a file name that ends in {' or '.join(endings)}")
    copies = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    with within(path):
        check_tensors(copies)
    if path.suffix == SAFETENSORS:
        content = save(copies, metadata={"format": "pt", **metadata})
        publish_file(path, _reproducible(content), force)
        return
    buffer = io.BytesIO()
    torch.save(copies, buffer)
    publish_file(path, buffer.getvalue(), force)


def _reproducible(content: bytes) -> bytes:
    """The same file with its metadata in order: the library writes it in one that varies."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]
