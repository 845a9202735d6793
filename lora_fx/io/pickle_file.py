"""PyTorch's ``.bin`` files, for those who trust theirs."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch

from lora_fx.errors import AdapterError, within
from lora_fx.io.tensor_checks import check_tensors


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Reads a state dict with ``torch.load(weights_only=True)``, and nothing weaker.

    Raises:
        AdapterError: not a zip archive of plain members, or not names to dense float tensors.
    """
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise AdapterError(f"{path}: not a file of plain tensors: {error}") from error
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()
    ):
        raise AdapterError(f"{path}: holds no state dict, expected names to tensors")
    with within(path):
        check_tensors(content)
    return dict(content)


def _check_archive(path: Path) -> None:
    """Refuses another container than a zip archive with stored, distinct, plain names."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise AdapterError(f"{path}: not a PyTorch archive: {error}") from error
    names = [member.filename for member in members]
    if len(set(names)) < len(names):
        raise AdapterError(f"{path}: the archive holds two members of one name")
    for member in members:
        if ".." in member.filename.split("/") or member.filename.startswith("/"):
            raise AdapterError(f"{path}: the archive's member {member.filename!r} leaves it")
        if member.compress_type != zipfile.ZIP_STORED:
            raise AdapterError(
                f"{path}: the archive's member {member.filename!r} is compressed; PyTorch stores "
                "members as they are"
            )
