"""Pickles that a stranger wrote by hand: a typed error, soon, and no memory for what they ask."""

from __future__ import annotations

import pickle
import resource
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fx.errors import AdapterError
from lora_fx.io.state_dict import read_pickle


def stream(content: bytes) -> Callable[[Path], None]:
    """An archive that is right, but for its data.pkl."""

    def make(path: Path) -> None:
        torch.save({"a": torch.ones(2, 3)}, path.with_name("good"))
        with zipfile.ZipFile(path.with_name("good")) as good, zipfile.ZipFile(path, "w") as bad:
            for name in good.namelist():
                bad.writestr(name, content if name.endswith("data.pkl") else good.read(name))

    return make


def saved(content: Callable[[], Any]) -> Callable[[Path], None]:
    return lambda path: torch.save(content(), path)


def called(name: str, argument: int) -> bytes:
    """A stream that calls something with a number: {"a": name(number)}."""
    module, _, leaf = name.rpartition(".")
    number = b"\x8a\x08" + argument.to_bytes(8, "little")
    return b"\x80\x02}X\x01\0\0\0ac" + f"{module}\n{leaf}\n".encode() + number + b"\x85Rs."


def cut(path: Path) -> None:
    torch.save({"a": torch.ones(5000)}, path)
    path.write_bytes(path.read_bytes()[:-300])


def without_data(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/readme", b"hello")


GOOD = pickle.dumps({"a": 1}, protocol=2)
CASES = {
    "no stream": stream(b""),
    "pops an empty stack": stream(b"\x80\x02\x85R."),
    "sets without a mark": stream(b"\x80\x02}u."),
    "half a number": stream(b"\x80\x02J\x01."),
    "half a text": stream(b"\x80\x02X\x05\0\0\0ab"),
    "text of 4 GB": stream(b"\x80\x02X\xff\xff\xff\xffab."),
    "a memo that is not there": stream(b"\x80\x02h\x07."),
    "a storage that is no tuple": stream(b"\x80\x02K\x01Q."),
    "a storage of other things": stream(b"\x80\x02(K\x01K\x02K\x03tQ."),
    "unhashable key": stream(b"\x80\x02}}K\x01s."),
    "a key that is no text": stream(b"\x80\x02}K\x01K\x02s."),
    "protocol 9": stream(b"\x80\x09" + GOOD[2:]),
    "opcode of no kind": stream(b"\x80\x02\xff."),
    "no end": stream(GOOD[:-1]),
    "a global of one line": stream(b"\x80\x02ctorch\n"),
    "a rebuild without arguments": stream(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R."),
    "bytes on demand": stream(called("builtins.bytearray", 3 << 30)),
    "bytes by their old name": stream(called("__builtin__.bytearray", 3 << 30)),
    "a tensor on demand": stream(called("torch.Tensor", 1 << 33)),
    "a tensor of a kind": stream(called("torch.FloatTensor", 1 << 33)),
    "deep": stream(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
    "steps without end": stream(b"\x80\x02" + b"(" * 2_000_000 + b"."),
    "cut": cut,
    "no data.pkl": without_data,
    "nested": saved(lambda: {"a": torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)])}),
    "jagged": saved(
        lambda: {
            "a": torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
        }
    ),
    "sparse": saved(lambda: {"a": torch.eye(3).to_sparse()}),
    "meta": saved(lambda: {"a": torch.ones(3, device="meta")}),
    "overlap": saved(lambda: {"a": torch.arange(10.0).as_strided((4, 4), (2, 1))}),
    "windows": saved(lambda: {"a": torch.arange(10.0).unfold(0, 3, 1)}),
    "huge overlap": saved(lambda: {"a": torch.ones(200_000).as_strided((99_999, 99_999), (1, 1))}),
    "many views": saved(lambda: dict.fromkeys(map(str, range(500)), torch.ones(9)) | views(1000)),
    "a few whole views": saved(lambda: views(40)),
    "huge overlap of bytes": saved(
        lambda: {"a": torch.ones(9_999).to(torch.float8_e5m2).as_strided((99_999, 99_999), (0, 0))}
    ),
    "two models": saved(lambda: {key: {"a": torch.ones(2)} for key in ("model", "ema")}),
    "a tree": saved(lambda: {"model": {"encoder": {"a": torch.ones(2)}}}),
    "a network": saved(lambda: torch.nn.Linear(2, 3)),
}


def views(count: int) -> dict[str, torch.Tensor]:
    """So many views of one storage, each of nearly all of it, and none expanded."""
    whole = torch.ones(50_000)
    return {f"view{n}": whole[n:] for n in range(count)}


def test_tied_tensors_are_read(tmp_path: Path) -> None:
    torch.save(views(15), tmp_path / "a.bin")
    assert len(read_pickle(tmp_path / "a.bin")) == 15


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch, of prototypes and of protocols
@pytest.mark.parametrize("case", CASES)
def test_a_hostile_pickle_is_refused_soon(case: str, tmp_path: Path) -> None:
    CASES[case](tmp_path / "a.bin")
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterError, match=r"a\.bin: .*expected [^\n]*$"):
        read_pickle(tmp_path / "a.bin")
    assert time.perf_counter() - begin < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB


def test_what_does_not_overlap_is_read(tmp_path: Path) -> None:
    whole = torch.arange(60.0).reshape(3, 4, 5)
    kept = {
        "turned": whole.permute(2, 0, 1),
        "sliced": whole[:, 1:, ::2],
        "one row": whole[:1].expand(1, 4, 5),
        "parameter": torch.nn.Parameter(whole.clone()),
        "none": torch.ones(1).expand(0, 7),
        "number": torch.tensor(3.0),
        "half": whole.half(),
    }
    torch.save(kept, tmp_path / "a.bin")
    found = read_pickle(tmp_path / "a.bin")
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())


def test_a_stream_is_not_followed_for_longer_than_tensors_take(tmp_path: Path) -> None:
    CASES["steps without end"](tmp_path / "a.bin")
    with pytest.raises(AdapterError, match="more than 1048576 steps"):
        read_pickle(tmp_path / "a.bin")
