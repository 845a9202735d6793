"""What a static quantiser sees of a file with slots: its inputs, and adapters in half the runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import CalibrationDataReader

from lora_fx.errors import ExportError
from lora_fx.export.onnx_model.model_file import load_proto, manifest_in
from lora_fx.export.onnx_model.tensors import to_numpy
from lora_fx.export.runtime.ort import to_array
from lora_fx.export.slots.check_adapter import check_adapter_file, read_adapter, values_of
from lora_fx.export.slots.manifest import Manifest

Feeds = dict[str, np.ndarray[Any, Any]]


class CalibrationReader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds a file's inputs and its slots, for onnxruntime's ``quantize_static``.

    Each input is fed as the base, with zeros of rank 1 in the slots, since nothing has a range at
    rank 0, and then with an adapter, each in its turn: ranges that were seen without one cut off
    what adapters add.

    Args:
        path: a swappable file, as it was exported.
        inputs: of each run, by name.
        adapters: files made by `export_adapter` for it, one at least.

    Raises:
        ExportError: the file has no slots, or no adapter is given.
        AdapterError: an adapter is damaged or of another file.
    """

    def __init__(
        self,
        path: str | Path,
        inputs: Iterable[Mapping[str, Any]],
        adapters: Sequence[str | Path],
    ) -> None:
        manifest = manifest_in(load_proto(Path(path)), Path(path))
        if manifest is None or not adapters:
            what = "has no slots" if manifest is None else "is calibrated with no adapter"
            raise ExportError(f"{path}: {what}: give a swappable file, and one adapter at least")
        for adapter in adapters:
            check_adapter_file(Path(adapter), manifest, Path(path))
        self._inputs = [{n: to_array(n, v) for n, v in each.items()} for each in inputs]
        self._slots = [_values(Path(adapter)) for adapter in adapters]
        self._none = _zeros(manifest)
        self.rewind()

    def get_next(self) -> Feeds | None:
        """What the next run is fed, or None when there is none."""
        return next(self._runs, None)

    def rewind(self) -> None:
        """Starts again."""
        self._runs = self._each()

    def _each(self) -> Iterator[Feeds]:
        for place, feeds in enumerate(self._inputs):
            yield feeds | self._none
            yield feeds | self._slots[place % len(self._slots)]


def _values(adapter: Path) -> Feeds:
    stored = read_adapter(adapter)  # holds the memory until it is copied
    return {name: to_numpy(value).copy() for name, value in values_of(stored).items()}


def _zeros(manifest: Manifest) -> Feeds:
    """What has no effect, of rank 1 where it would have none."""
    found: Feeds = {}
    for slot in manifest.slots:
        for given in slot.inputs.values():
            neutral = slot.neutral().get(given.name)
            if neutral is not None:
                full = to_numpy(neutral)
                found[given.name] = full if full.size else np.zeros(given.sized(1), full.dtype)
    return found
