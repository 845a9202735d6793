"""Damaged files of every format, by number: ``python tests/hostile/fuzz.py COUNT [FIRST]``.

Each is refused by a typed error, or read and put into a model; soon, and in little memory. What is
not is printed with its number, which makes it again: ``python tests/hostile/fuzz.py 1 NUMBER``.
"""

from __future__ import annotations

import functools
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft  # noqa: F401  # an unknown type asks for it, and its import is no file's time
import torch
from mutating import MUTATORS
from torch import nn

import lora_fx
from lora_fx.adapters.adapter import Adapter
from lora_fx.errors import LoraFxError
from lora_fx.formats import FORMATS, load_adapter, save_adapter
from lora_fx.testing import Between, LayerShape, update_of
from lora_fx.testing.updates import UPDATES

SECONDS, KILOBYTES = 2.0, 1 << 20
LAYERS: dict[str, tuple[Callable[[], nn.Module], LayerShape, Callable[[], torch.Tensor]]] = {
    "linear": (lambda: nn.Linear(4, 6), LayerShape((6, 4)), lambda: torch.randn(2, 7, 4)),
    "table": (
        lambda: nn.Embedding(10, 6),
        LayerShape((6, 10), is_table=True),
        lambda: torch.randint(0, 10, (2, 7)),
    ),
    "conv": (
        lambda: nn.Conv2d(4, 6, (3, 3)),
        LayerShape((6, 4, 3, 3)),
        lambda: torch.randn(2, 4, 7, 8),
    ),
}
HINTS: dict[str, dict[str, Any]] = {
    "kohya": {"component": "lycoris"}, "diffusers": {"component": "unet"},
}  # fmt: skip


class Original(NamedTuple):
    """A good file, or several, and what is done with it."""

    name: str
    files: dict[str, bytes]
    read: Callable[[Path], object]


@functools.cache
def graph(layer: str) -> Any:
    torch.manual_seed(0)
    make, _, inputs = LAYERS[layer]
    return lora_fx.trace(Between(make()).eval(), (inputs(),))


def adapters(home: Path) -> Iterator[Original]:
    """Every kind on every layer in every format that holds it."""
    for form in FORMATS:
        for kind in UPDATES:
            for layer, (_, shape, _) in LAYERS.items():
                for ending in ("", ".safetensors", ".pt"):
                    yield from _written(home, form, kind, layer, shape, ending)


def _written(
    home: Path, form: str, kind: str, layer: str, shape: LayerShape, ending: str
) -> Iterator[Original]:
    path = home / f"{form}-{kind}-{layer}{ending}"
    if (form == "peft") != (ending == "") or form == "onnx_adapter":
        return
    try:
        adapter = Adapter("a", {"layer": update_of(kind, shape)})
        save_adapter(adapter, path, format=form, **HINTS.get(form, {}))
    except (LoraFxError, ValueError, RuntimeError):  # not every kind is of every layer and format
        return
    held = sorted(path.iterdir()) if path.is_dir() else [path]
    hints: dict[str, Any] = {"component": "unet"} if form == "diffusers" else {}
    hints |= {"allow_pickle": True} if ending == ".pt" else {}

    def read(place: Path) -> None:
        source = place if form == "peft" else place / path.name
        found = load_adapter(source, format=form, base=graph(layer), **hints)
        for update in found.updates.values():
            assert all(bool(torch.isfinite(t).all()) for t in update.tensors()), "not finite"
        lora_fx.inject(graph(layer), found)

    yield Original(path.name, {file.name: file.read_bytes() for file in held}, read)


def models(home: Path) -> Iterator[Original]:
    """Swappable models, weights inside and beside, and an adapter of one."""
    gm, x = graph("linear"), np.ones((2, 7, 4), np.float32)
    update = update_of("lora", LAYERS["linear"][1])
    for name, above in (("inside", 1 << 30), ("beside", 0)):
        place = home / name
        place.mkdir()
        report = lora_fx.to_onnx(
            gm, place / "model.onnx", adapters="input", external_data_above=above, verify=False
        )
        lora_fx.export_adapter(Adapter("a", {"layer": update}), place / "model.onnx",
                               place / "a.onnx_adapter")  # fmt: skip

        def read(place: Path, inputs: str = report.inputs[0]) -> None:
            session = lora_fx.Session(place / "model.onnx")
            session.run({inputs: x})
            session.run({inputs: x}, adapter=place / "a.onnx_adapter")

        files = {file.name: file.read_bytes() for file in sorted(place.iterdir())}
        yield Original(name, files, read)

    def alone(place: Path) -> None:
        load_adapter(place / "a.onnx_adapter")

    yield Original("alone", {"a.onnx_adapter": files["a.onnx_adapter"]}, alone)


def originals(home: Path) -> list[Original]:
    found = [one for one in adapters(home) if _is_read(one, home)]
    rest = [*models(home)]
    assert all(_is_read(one, home) for one in rest)
    return found + rest * 12  # of models there are few


def _is_read(one: Original, home: Path) -> bool:
    """Whether what is undamaged is read: (IA)3 has no place in front of a table."""
    return problem(one, one.files, home / "check") == ("read", "")


def _placed(files: dict[str, bytes], place: Path) -> Path:
    place.mkdir(exist_ok=True)
    for known in place.iterdir():
        known.unlink()
    for name, content in files.items():
        (place / name).write_bytes(content)
    return place


def damaged(one: Original, draw: random.Random) -> dict[str, bytes]:
    """The files, one of them, sometimes two, damaged."""
    made = dict(one.files)
    for name in draw.choices(list(made), k=draw.choice((1, 1, 1, 2))):
        try:
            made[name] = MUTATORS[Path(name).suffix](made[name], draw)
        except Exception:
            made[name] = made[name][:-1]  # it was damaged before, and has that structure no more
    return made


def problem(one: Original, files: dict[str, bytes], place: Path) -> tuple[str, str]:
    """What came of a file, and what is wrong with that."""
    _placed(files, place)
    begin, before = time.process_time(), _most_memory()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one.read(place)
        end, wrong = "read", ""
    except LoraFxError as error:
        end, wrong = "refused", "" if str(error).strip() else "says nothing"
    except Exception as error:
        end, wrong = "raised", f"{type(error).__name__}: {error}"[:300]
        if "-t" in sys.argv:
            traceback.print_exc()
    took = time.process_time() - begin
    more = _most_memory() - before
    wrong = wrong or (f"took {took:.1f} s" if took > SECONDS else "")
    return end, wrong or (f"took {more >> 10} MB" if more > KILOBYTES // 4 else "")


def _most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(count: int, first: int) -> int:
    """Reads so many damaged files, and gives how many were not as they should be."""
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as home:
        known = originals(Path(home))
        place = Path(home) / "damaged"
        for number in range(first, first + count):
            draw = random.Random(number)
            one = draw.choice(known)
            files = damaged(one, draw)
            (Path(home) / "number").write_text(f"{number} {one.name}")  # of a crash
            end, wrong = problem(one, files, place)
            ends[end] += 1
            if wrong:
                ends["wrong"] += 1
                print(f"WRONG {number} {one.name}: {wrong}", flush=True)
            if count <= 3 and "-k" in sys.argv:
                _placed(files, Path("kept"))
    most = _most_memory()
    if most > KILOBYTES:
        ends["wrong"] += 1
        print(f"WRONG: {most} KB of memory")
    print(f"{count} files of {len(known)} originals: {dict(ends)}, {most >> 10} MB")
    return ends["wrong"]


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(bool(main(numbers[0], numbers[1] if len(numbers) > 1 else 0)))
