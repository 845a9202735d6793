"""What a static quantiser sees of a file with slots: its inputs, and adapters in half the runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import CalibrationDataReader

from lora_fx.choices import takes
from lora_fx.errors import ExportError
from lora_fx.export.onnx_model.model_file import load_proto, manifest_in
from lora_fx.export.onnx_model.tensors import to_numpy
from lora_fx.export.runtime.ort import check_names, to_array, unreadable
from lora_fx.export.slots.check_adapter import check_adapter_file, read_stored, values_of
from lora_fx.export.slots.every_value import every_value
from lora_fx.export.slots.manifest import Manifest

Feeds = dict[str, np.ndarray[Any, Any]]


class CalibrationReader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds a file's inputs and its slots, for onnxruntime's ``quantize_static``.

    Each input is fed as the base, with zeros in the slots, since nothing has a range at rank 0, and
    then with an adapter, each in its turn: ranges that were seen without one cut off what adapters
    add. All runs have the largest rank of the adapters, since histograms (``CalibrationMethod``'s
    Entropy, Percentile) are made of runs of one shape.

    Args:
        path: a swappable file, as it was exported.
        inputs: of each run, by name.
        adapters: files made by `export_adapter` for it, one at least.

    Raises:
        ExportError: the file has no slots or other inputs, or no adapter or no run is given.
        AdapterError: an adapter is damaged or of another file.
    """

    @takes(ExportError, unreadable)
    def __init__(
        self,
        path: str | Path,
        inputs: Iterable[Mapping[str, Any]],
        adapters: Sequence[str | Path],
    ) -> None:
        proto = load_proto(Path(path))
        manifest = manifest_in(proto, Path(path))
        if manifest is None or not adapters:
            what = "has no slots" if manifest is None else "is calibrated with no adapter"
            raise ExportError(f"{path}: {what}: give a swappable file, and one adapter at least")
        for adapter in adapters:
            check_adapter_file(Path(adapter), manifest, Path(path))
        held = {*manifest.names, *(tensor.name for tensor in proto.graph.initializer)}
        taken = [value.name for value in proto.graph.input if value.name not in held]
        self._inputs = []
        for each in inputs:
            check_names(Path(path), each, taken)
            self._inputs.append({name: to_array(name, each[name]) for name in taken})
        if not self._inputs:
            raise ExportError(f"{path}: is calibrated on no inputs: give those of one run at least")
        every = [None, *map(Path, adapters)]
        self._none, *self._slots = _of_one_rank([_fed(manifest, Path(path), one) for one in every])
        self.rewind()

    def __len__(self) -> int:
        """The number of runs."""
        return 2 * len(self._inputs)

    def get_next(self) -> Feeds | None:
        """What the next run is fed, or None when there is none."""
        return next(self._runs, None)

    def rewind(self) -> None:
        """Starts again."""
        self.set_range(0, len(self))

    def set_range(self, start_index: int, end_index: int) -> None:
        """Goes on with these runs alone, as ``CalibStridedMinMax`` asks."""
        self._runs = islice(self._each(), start_index, end_index)

    def _each(self) -> Iterator[Feeds]:
        for place, feeds in enumerate(self._inputs):
            yield feeds | self._none
            yield feeds | self._slots[place % len(self._slots)]


def _fed(manifest: Manifest, model: Path, adapter: Path | None) -> Feeds:
    """What the slots are fed with an adapter, or with none."""
    stored = None if adapter is None else read_stored(adapter)  # holds the memory of its values
    every = every_value(manifest, model, {} if stored is None else values_of(stored))
    return {name: to_numpy(value).copy() for name, value in every.items()}


def _of_one_rank(runs: list[Feeds]) -> list[Feeds]:
    """Zeros up to the largest rank, which change nothing; tokens stay as they are."""
    largest = {name: np.max([run[name].shape for run in runs], 0) for name in runs[0]}

    def widened(name: str, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if value.dtype == np.int64:
            return value
        return np.pad(value, [(0, n - m) for m, n in zip(value.shape, largest[name], strict=True)])

    return [{name: widened(name, value) for name, value in run.items()} for run in runs]
