"""Good files of every kind, and how to spoil them; nothing here is damaged by chance."""

from __future__ import annotations

import json
import os
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from safetensors.torch import save
from torch import nn

Make = Callable[[Path], object]
KEY = "base_model.model.fc.lora_{}.weight"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"]}
WEIGHTS, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


class Case(NamedTuple):
    """One line of the corpus.

    Attributes:
        row: of the list of refusals that it is of.
        name: of the case, and of its directory.
        how: what a reader does with it: see `reading.py`.
        make: writes its files into a directory.
        file: that a refusal names.
        message: a regular expression that a refusal holds: the field or tensor, what was found.
        warns: it is told by a warning, and not refused.
    """

    row: int
    name: str
    how: str
    make: Make
    file: str
    message: str
    warns: bool = False

    def line(self) -> dict[str, Any]:
        """What the corpus says of it."""
        return {field: value for field, value in self._asdict().items() if field != "make"}


class Net(nn.Module):
    """What the adapters are for: one layer that they change, and one that they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last, self.tail = nn.Linear(3, 5), nn.Linear(5, 40), nn.Linear(40, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(torch.relu(self.last(torch.relu(self.fc(x)))))


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        KEY.format("A"): torch.randn(2, 3, generator=draw),
        KEY.format("B"): torch.randn(5, 2, generator=draw),
    }


def adapter(
    config: object = CONFIG, weights: dict[str, torch.Tensor] | bytes | None = None
) -> Make:
    """A directory of PEFT's: bytes are written as they are."""

    def make(home: Path) -> None:
        text = config if isinstance(config, bytes) else json.dumps(config).encode()
        (home / CONFIG_FILE).write_bytes(text)
        held = tensors() if weights is None else weights
        (home / WEIGHTS).write_bytes(held if isinstance(held, bytes) else save(held))

    return make


def with_fields(**fields: Any) -> Make:
    """A config with other fields; ``...`` leaves one out."""
    return adapter({k: v for k, v in {**CONFIG, **fields}.items() if v is not ...})


def with_tensors(**parts: Any) -> Make:
    """Other values of A or B; None leaves one out."""
    named = {KEY.format(part): value for part, value in parts.items()}
    return adapter(weights={k: v for k, v in {**tensors(), **named}.items() if v is not None})


def header(header: object, data: int = 12, length: int | None = None) -> Make:
    """A safetensors file of a header, as it is, and so many bytes behind."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(raw) if length is None else length
    return adapter(weights=struct.pack("<Q", size) + raw + bytes(data))


def entry(name: str = "a", **changes: Any) -> dict[str, Any]:
    return {name: {"dtype": "F32", "shape": [3], "data_offsets": [0, 12], **changes}}


def pickled(content: Any, change: Callable[[Path], object] | None = None) -> Make:
    """PEFT's older file, of whatever torch.save takes."""

    def make(home: Path) -> None:
        (home / CONFIG_FILE).write_text(json.dumps(CONFIG))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(content() if callable(content) else content, home / "adapter_model.bin")
        if change is not None:
            change(home / "adapter_model.bin")

    return make


def archive(*members: tuple[str, bytes], compressed: bool = False) -> Callable[[Path], None]:
    """Replaces a file by a zip archive of these."""

    def change(file: Path) -> None:
        kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
        with warnings.catch_warnings(), zipfile.ZipFile(file, "w", kind) as zipped:
            warnings.simplefilter("ignore")  # that a name is there already
            for name, content in members:
                zipped.writestr(name, content)

    return change


class Models:
    """Exported models to spoil, made once: with weights inside, and beside."""

    def __init__(self, home: Path) -> None:
        import lora_fx

        self.home = home
        torch.manual_seed(0)
        gm = lora_fx.trace(Net().eval(), (torch.randn(2, 3),))
        for name, above in (("inside", 1 << 30), ("beside", 0)):
            (home / name).mkdir(parents=True)
            lora_fx.to_onnx(
                gm, home / name / "model.onnx", adapters="input", external_data_above=above
            )
        with torch.no_grad():
            gm = lora_fx.trace(Net().eval(), (torch.randn(2, 3),))
        (home / "other").mkdir()
        lora_fx.to_onnx(gm, home / "other" / "model.onnx", adapters="input", verify=False)

    def model(
        self, change: Callable[[onnx.ModelProto], object] | None = None, kind: str = "inside"
    ) -> Make:
        def make(home: Path) -> None:
            shutil.copytree(self.home / kind, home, dirs_exist_ok=True)
            if change is not None:
                proto = onnx.load(home / "model.onnx", load_external_data=False)
                change(proto)
                (home / "model.onnx").write_bytes(proto.SerializeToString())

        return make

    def beside(self, change: Callable[[Path], object]) -> Make:
        """Changes the file of external data."""

        def make(home: Path) -> None:
            self.model(kind="beside")(home)
            change(home / "model.onnx.data")

        return make

    def placed(self, **fields: str) -> Make:
        """Other fields of the first external tensor."""

        def change(proto: onnx.ModelProto) -> None:
            held = next(t for t in proto.graph.initializer if t.external_data)
            for key, value in fields.items():
                known = [e for e in held.external_data if e.key == key]
                (known[0] if known else held.external_data.add(key=key)).value = value

        return self.model(change, "beside")

    def for_model(self, change: Callable[[Path], object], kind: str = "inside") -> Make:
        """A good adapter of a model of its own, or of another, that is then changed."""
        import lora_fx
        from lora_fx.adapters.adapter import Adapter, Update

        def make(home: Path) -> None:
            self.model()(home)
            held = tensors()
            update = Update(held[KEY.format("A")], held[KEY.format("B")], 2.0)
            model = self.home / kind / "model.onnx"
            lora_fx.export_adapter(Adapter("a", {"fc": update}), model, home / "a.onnx_adapter")
            change(home / "a.onnx_adapter")

        return make


def rewritten(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    """An adapter file with other values, by onnxruntime's own hand."""
    import onnxruntime as ort

    def apply(file: Path) -> None:
        read = ort.AdapterFormat.read_adapter(str(file))
        held = {name: value.numpy().copy() for name, value in read.get_parameters().items()}
        held = change(held)
        made = ort.AdapterFormat()
        made.set_adapter_version(1)
        made.set_model_version(read.get_model_version())
        values = {
            n: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for n, a in held.items()
        }
        made.set_parameters(values)
        made.export_adapter(str(file))

    return apply


def sparse_file(path: Path, size: int) -> None:
    """A file of holes, after what it has."""
    path.touch()
    os.truncate(path, size)
