"""Directories and files that appear complete or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from lora_fx.errors import AdapterError

# What a forced write may delete; anything else in the target is somebody's work.
REPLACEABLE = frozenset(
    {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"}
)


def publish(target: Path, files: Mapping[str, bytes], force: bool) -> None:
    """Writes files into a hidden sibling of the target, then renames it to the target.

    Args:
        target: the directory to create.
        files: file name -> content.
        force: replace a target that is an adapter's directory.

    Raises:
        AdapterError: the target exists, or it cannot be written.
    """
    _check_target(target, force)
    stage = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    try:
        stage.mkdir(parents=True)
        for name, content in files.items():
            (stage / name).write_bytes(content)
        _swap(stage, target)
    except OSError as error:
        raise AdapterError(f"{target}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def publish_file(target: Path, content: bytes, force: bool) -> None:
    """Writes a hidden sibling of the target, then renames it to the target.

    Args:
        target: the file to create.
        content: its bytes.
        force: replace a file that is there.

    Raises:
        AdapterError: the target exists, or it cannot be written.
    """
    if os.path.lexists(target) and not force:
        raise AdapterError(f"{target}: exists already; choose another path, or pass force=True")
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise AdapterError(f"{target}: is no plain file, so it is not replaced")
    stage = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage.write_bytes(content)
        stage.replace(target)
    except OSError as error:
        raise AdapterError(f"{target}: cannot be written: {error.strerror}") from error
    finally:
        stage.unlink(missing_ok=True)


def _check_target(target: Path, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if not force:
        raise AdapterError(f"{target}: exists already; choose another path, or pass force=True")
    if target.is_symlink() or not target.is_dir():
        raise AdapterError(f"{target}: is no plain directory, so it is not replaced")
    others = sorted(entry.name for entry in target.iterdir() if entry.name not in REPLACEABLE)
    if others:
        raise AdapterError(f"{target}: holds more than an adapter, so it is not replaced: {others}")


def _swap(stage: Path, target: Path) -> None:
    """Puts the stage in the target's place; what was there is kept until the new one stands."""
    if not target.exists():
        stage.rename(target)
        return
    old = stage.with_name(stage.name + ".old")
    target.rename(old)
    try:
        stage.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)
