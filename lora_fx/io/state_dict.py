"""Named tensors, in one file or several: safetensors, or PyTorch's for those who trust theirs."""

from __future__ import annotations

import io
import json
import pickletools
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors.torch import save

from lora_fx.errors import AdapterError, LoraFxError, shorten, within
from lora_fx.io.atomic import publish
from lora_fx.io.gguf_file import is_gguf, read_gguf_names, read_gguf_tensors, read_gguf_values
from lora_fx.io.plain_file import check_plain
from lora_fx.io.safetensors_file import (
    check_gathered,
    check_tensors,
    read_metadata,
    read_names,
    read_tensors,
    widened,
)
from lora_fx.io.strict_json import read_json

SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
INDEX = ".index.json"  # which says in which of several files each tensor is
_INDEX = re.compile(r".+\.index(\.[^.]+)?\.json", re.DOTALL)  # of a variant: .index.fp16.json
_MAX_STREAM = 16 << 20
_MOST_STEPS = 1 << 20  # of its stream: a tensor takes 32
_MOST_SHARED = 16  # times that a value may be shown
# All that a state dict calls. torch allows more, such as bytearray and Tensor, which take any size.
_CALLED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v[23]|parameter)"
    r"|torch(\.storage)? [A-Za-z0-9]+Storage"
    r"|torch b?(uint|int|float|complex|bool)[a-z0-9_]*|torch Size"
)


def is_pickle(path: Path) -> bool:
    """Whether a file's name is one that PyTorch's own files have."""
    return path.suffix.lower() in PICKLES


def read_file(path: Path, allow_pickle: bool) -> dict[str, torch.Tensor]:
    """Reads every tensor of a file, or of the files of an index, in its own dtype.

    Raises:
        AdapterError: it is a pickle and that was not allowed, or it is damaged.
    """
    if path.is_dir():
        raise AdapterError(f"{path}: a directory, expected one file of tensors")
    if is_index(path):
        return _read_shards(path, allow_pickle)
    return _read_one(path, allow_pickle)


def _read_one(path: Path, allow_pickle: bool) -> dict[str, torch.Tensor]:
    if not is_pickle(path):
        return read_gguf_tensors(path) if is_gguf(path) else read_tensors(path)
    if not allow_pickle:
        raise AdapterError(
            f"{path}: a pickle can run code when it is opened; save the adapter as safetensors, "
            "or pass allow_pickle=True if you trust the file"
        )
    tensors = {key: tensor.detach() for key, tensor in read_pickle(path).items()}
    with within(path):
        for name, tensor in tensors.items():
            check_gathered(name, tensor.shape)
    return tensors


def _read_shards(index: Path, allow_pickle: bool) -> dict[str, torch.Tensor]:
    """The tensors of all files of an index, which has to name just those that they hold."""
    places = shards_of(index, AdapterError)
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(places.values())):
        held = _read_one(shard, allow_pickle)
        named = {name for name, file in places.items() if file == shard}
        if odd := held.keys() ^ named:
            raise AdapterError(
                f"{index}: does not agree with {shard.name} about {shorten(sorted(odd))}, expected "
                "each tensor in the file that it names: download or save them again"
            )
        tensors |= held
    return tensors


def names_in(path: Path, allow_pickle: bool) -> Collection[str]:
    """The names of the tensors in a file, without reading a safetensors file's values."""
    if is_index(path):
        return shards_of(path, AdapterError).keys()
    if is_pickle(path):
        return read_file(path, allow_pickle).keys()
    return read_gguf_names(path) if is_gguf(path) else read_names(path)


def metadata_of(path: Path) -> dict[str, str]:
    """The texts that a file has beside its tensors; a pickle and an index have none."""
    if is_pickle(path) or is_index(path):
        return {}
    return read_gguf_values(path) if is_gguf(path) else read_metadata(path)


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
    with within(path):
        copies = _copies(tensors)
    if path.suffix == SAFETENSORS:
        publish(path, _reproducible(save(copies, {"format": "pt", **metadata})), force)
        return
    buffer = io.BytesIO()
    torch.save(copies, buffer)
    publish(path, buffer.getvalue(), force)


def safetensors_of(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The bytes of a safetensors file that has no texts of ours.

    Raises:
        AdapterError: a tensor that no reader should accept.
    """
    return save(_copies(tensors), {"format": "pt"})


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of their own, which may have shared memory, and that a reader accepts."""
    copies = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    check_tensors(copies)
    return copies


def _reproducible(content: bytes) -> bytes:
    """The same file with its metadata in order: the library writes it in one that varies."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Reads a state dict with ``torch.load(weights_only=True)``, and nothing weaker.

    Raises:
        AdapterError: not a zip archive of plain members, or not names to dense float tensors.
    """
    check_plain(path)
    with within(path):
        _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler does what the stream says, and fails as it likes
        raise AdapterError(
            f"{path}: not a file of plain tensors, expected what torch.save writes of a state "
            f"dict: {_first_line(error)}; save it again, as safetensors"
        ) from error
    with within(path):
        tensors = _state_dict(content)
        _check_shared(tensors, path.stat().st_size)
        tensors = widened(tensors)
        check_tensors(tensors)
    return tensors


def _state_dict(content: object) -> dict[str, torch.Tensor]:
    """The names and tensors of what was saved, or those of its one entry that is of such.

    A trainer's checkpoint has its state dict beside counters and an optimizer's state.
    """
    if _is_state_dict(content):
        return dict(content)
    entries = content if isinstance(content, dict) else {}
    found = {str(key): entry for key, entry in entries.items() if _is_state_dict(entry) and entry}
    if len(found) == 1:
        [entry] = found.values()
        return dict(entry)
    told = f": it has {shorten([*found])}, save the one that is meant by itself" if found else ""
    raise AdapterError(f"holds no state dict, expected names to tensors{told}")


def _is_state_dict(content: object) -> TypeGuard[dict[str, torch.Tensor]]:
    return isinstance(content, dict) and all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()
    )


def _check_shared(tensors: Mapping[str, torch.Tensor], stored: int) -> None:
    """Refuses many views of few values: tied tensors are some, and each is read."""
    shown = sum(t.numel() * t.element_size() for t in tensors.values() if not t.is_nested)
    if shown > _MOST_SHARED * stored:
        raise AdapterError(
            f"tensors of {shown} bytes in a file of {stored}, expected values of its own for each: "
            "save contiguous copies"
        )


def _check_archive(path: Path) -> None:
    """Refuses another container than a zip archive with stored, distinct, plain names."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(members)
            for member in (m for m in members if m.filename.rpartition("/")[2] == "data.pkl"):
                _check_stream(archive, member)
    except AdapterError:
        raise
    except Exception as error:  # zipfile meets a damaged archive with errors of any kind
        raise AdapterError(
            f"not a PyTorch archive: {_first_line(error)}; expected what torch.save writes"
        ) from error


def _check_members(members: Sequence[zipfile.ZipInfo]) -> None:
    names = [member.filename for member in members]
    if len(set(names)) < len(names):
        raise AdapterError("the archive holds two members of one name")
    for member in members:
        if ".." in member.filename.split("/") or member.filename.startswith("/"):
            raise AdapterError(f"the archive's member {member.filename!r:.80} leaves it")
        if member.compress_type != zipfile.ZIP_STORED:
            raise AdapterError(
                f"the archive's member {member.filename!r:.80} is compressed; PyTorch stores "
                "members as they are"
            )


def _check_stream(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Refuses a stream that calls more than a state dict does: some of it takes any memory."""
    if member.file_size > _MAX_STREAM:
        raise AdapterError(f"data.pkl of {member.file_size} bytes, expected at most {_MAX_STREAM}")
    for step, (opcode, argument, _) in enumerate(pickletools.genops(archive.read(member))):
        if step == _MOST_STEPS:
            raise AdapterError(
                f"data.pkl of more than {step} steps, expected tensors: save these alone"
            )
        if opcode.name == "GLOBAL" and not _CALLED.fullmatch(str(argument)):
            raise AdapterError(
                f"not a file of plain tensors: it calls {argument!r:.80}, expected dense tensors "
                "by name alone, as torch.save writes them"
            )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__} {error}".partition("\n")[0][:200]


def is_index(path: Path) -> bool:
    """Whether a file's name is one that an index of shards has."""
    return _INDEX.fullmatch(path.name) is not None


def shards_of(index: Path, error: type[LoraFxError] = LoraFxError) -> Mapping[str, Path]:
    """Which file beside an index holds each tensor.

    Raises:
        LoraFxError: of the type ``error``: it is no index, names what does not lie beside it, or
            what is not there.
    """
    found = read_json(index, error)
    names = found.get("weight_map") if isinstance(found, dict) else found
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise error(
            f"{index}: weight_map is {names!r:.80}, expected names of tensors to names of files: "
            "save the model again"
        )
    files = sorted(set(names.values()))
    if odd := [repr(name)[:80] for name in files if not _is_name(name)]:
        raise error(
            f"{index}: the weights lie at {shorten(odd)}, expected names of files beside it: put "
            "them there, or save the model again"
        )
    if lost := [name[:80] for name in files if not index.with_name(name).is_file()]:
        raise error(
            f"{index}: names {shorten(lost)}, which are not there, expected every file of weights: "
            "download or save the model again"
        )
    return {tensor: index.with_name(name) for tensor, name in names.items()}


def _is_name(name: str) -> bool:
    plain = name == Path(name).name and name not in ("", ".", "..") and len(name) < 256
    return plain and not set(name) & set("\\:\0")
