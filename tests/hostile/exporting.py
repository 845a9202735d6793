"""Exports in a process of its own: killed, short of disk or memory, and compared byte by byte.

``python tests/hostile/exporting.py HOME kills=1000 faults digests``, or some of these.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_fx
from lora_fx.testing import make_adapter, update_of


def made(seed: int, width: int = 24) -> Any:
    """A graph whose file has weights beside it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, 30), nn.ReLU(), nn.Linear(30, 40)).eval()
    return lora_fx.trace(model, (torch.randn(2, width),))


def export(gm: Any, home: Path) -> None:
    lora_fx.to_onnx(
        gm, home / "model.onnx", adapters="input", external_data_above=0, force=True, verify=False
    )


def contents(home: Path) -> dict[str, str]:
    files = (file for file in sorted(home.rglob("*")) if file.is_file())
    return {
        str(file.relative_to(home)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def in_child(work: Callable[[], object]) -> int:
    """A process that does something and ends: 0 done, 1 a typed error, 2 another."""
    child = os.fork()
    if child:
        return child
    code = 2
    try:
        work()
        code = 0
    except lora_fx.LoraFxError as error:
        print(f"typed {str(error)[:300]!r}", flush=True)
        code = 1
    except BaseException as error:
        print(f"raw {type(error).__name__} {str(error)[:300]!r}", flush=True)
    finally:
        sys.stdout.flush()
        os._exit(code)


def kills(home: Path, count: int) -> None:
    """Kills an export at random times; each time one set of files is there, whole."""
    graphs, sets = [made(0), made(1)], []
    for number, gm in enumerate(graphs):
        (home / f"{number}").mkdir()
        begin = time.perf_counter()
        os.waitpid(in_child(lambda gm=gm, number=number: export(gm, home / f"{number}")), 0)
        took = time.perf_counter() - begin
        sets.append(contents(home / f"{number}"))
    place, draw = home / "0", random.Random(count)
    died = mixed = 0
    for number in itertools.count():
        if number >= count and (died or number > 20 * count):
            break  # a machine that is faster now than a moment ago is tried again
        child = in_child(lambda gm=graphs[number % 2]: export(gm, place))
        time.sleep(draw.uniform(0.2, 1.1) * took)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        died += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        shown = {n: d for n, d in contents(place).items() if not n.startswith(".")}
        mixed += shown not in sets
    os.waitpid(in_child(lambda: export(graphs[0], place)), 0)
    print("KILLS", json.dumps({"died": died, "mixed": mixed, "left": contents(place) != sets[0]}))


def full_disk(home: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def read_only(home: Path) -> None:
    home.chmod(0o555)
    if os.getuid() == 0:
        os.setuid(65534)


def little_memory(home: Path) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + (8 << 20),) * 2)


def faults(home: Path) -> None:
    """Every writer under every fault: a typed error, and what was there is there."""
    gm = made(0)
    one = make_adapter({"0": (30, 24), "2": (40, 30)})
    tall = make_adapter({"0": (3_000_000, 24)}, rank=4)
    (home / "kept").mkdir()
    export(gm, home / "kept")
    kept = home / "kept" / "model.onnx"
    writers: dict[str, Callable[[Path], object]] = {
        "model": lambda out: lora_fx.to_onnx(gm, out / "m.onnx", verify=False, force=True),
        "data": lambda out: export(gm, out),
        "adapter file": lambda out: lora_fx.export_adapter(one, kept, out / "a.onnx_adapter"),
    } | {
        form: lambda out, form=form, hints=hints: lora_fx.save_adapter(
            one, out / f"{form}{'' if form == 'peft' else '.safetensors'}", format=form, **hints
        )
        for form, hints in {
            "peft": {}, "peft_file": {}, "kohya": {"component": "lycoris"}, "loralib": {},
            "diffusers": {"component": "unet"},
        }.items()
    }  # fmt: skip
    large: dict[str, Callable[[Path], object]] = {
        "peft": lambda out: lora_fx.save_adapter(tall, out / "a"),
        "loralib": lambda out: lora_fx.save_adapter(tall, out / "a.pt", format="loralib"),
    }
    for fault, own in ((full_disk, writers), (read_only, writers), (little_memory, large)):
        for name, write in own.items():
            out = home / f"{fault.__name__}-{name}"
            out.mkdir()
            (out / "model.onnx").write_text("old")

            def work(out: Path = out, write: Any = write, fault: Any = fault) -> None:
                fault(out)
                write(out)

            code = os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1])
            old = {"model.onnx": hashlib.sha256(b"old").hexdigest()}
            print(f"FAULT {json.dumps([fault.__name__, name, code, contents(out) == old])}")


def digests(home: Path) -> None:
    """What is written of one graph and one adapter."""
    gm = made(0)
    one = make_adapter({"0": (30, 24), "2": (40, 30)})
    export(gm, home)
    lora_fx.export_adapter(one, home / "model.onnx", home / "a.onnx_adapter")
    lora_fx.to_onnx(lora_fx.fold(lora_fx.inject(gm, one)), home / "merged.onnx", verify=False)
    for form, hints in (("peft_file", {}), ("kohya", {"component": "lycoris"}), ("loralib", {})):
        lora_fx.save_adapter(one, home / f"{form}.safetensors", format=form, **hints)
    lora_fx.save_adapter(one, home / "peft")
    dora = lora_fx.Adapter("d", {"0": update_of("dora", (30, 24))})
    lora_fx.save_adapter(dora, home / "dora")
    print("DIGESTS", json.dumps(contents(home)))


def main(home: Path, kinds: list[str]) -> None:
    """Does each in a directory of its own."""
    for kind in kinds:
        place = home / kind.partition("=")[0]
        place.mkdir(parents=True)
        if kind.startswith("kills="):
            kills(place, int(kind.partition("=")[2]))
        else:
            {"faults": faults, "digests": digests}[kind](place)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
