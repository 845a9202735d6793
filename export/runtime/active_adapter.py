"""An adapter as a session takes it: in the options of a run, or fed as inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch

from lora_fx.errors import AdapterError
from lora_fx.export.runtime.ort import FATAL, reason, to_ort_value
from lora_fx.export.slots.check_adapter import DAMAGE, read_stored, values_of
from lora_fx.export.slots.every_value import every_value
from lora_fx.export.slots.manifest import Manifest
from lora_fx.io.adapter_files import is_ort_adapter


class ActiveAdapter:
    """What the runs with one adapter get; it must live as long as they run.

    Attributes:
        feeds: values of inputs, by name.
        options: with the adapter in them, or None.
    """

    def __init__(
        self, values: Mapping[str, torch.Tensor], loaded: ort.LoraAdapter | None = None
    ) -> None:
        # Neither values nor options keep alive what they are made of.
        own = torch.contiguous_format
        self._memory = {name: v.clone(memory_format=own) for name, v in values.items()}
        self._loaded = loaded
        self.feeds = {name: to_ort_value(value) for name, value in self._memory.items()}
        self.options = None
        if loaded is not None:
            self.options = ort.RunOptions()
            self.options.add_active_adapter(loaded)

    def silenced(self) -> ActiveAdapter:
        """The same, for runs that may fail: onnxruntime writes nothing of it to the console."""
        self.options = self.options or ort.RunOptions()
        self.options.log_severity_level = FATAL
        return self


def activated(
    session: Any,
    model: Path,
    manifest: Manifest | None,
    adapter: Path | None,
    *,
    bound: bool = False,
) -> ActiveAdapter:
    """Makes an adapter active, or none.

    onnxruntime's own file is mapped, where it can be: for an input without a default it is refused
    in the options of a run, so there its values are fed, as those of safetensors are anywhere.

    Args:
        session: of the model.
        model: its file.
        manifest: its slots.
        adapter: a file that was checked; None: the base.
        bound: it runs with memory that is bound, where onnxruntime (1.32) overlooks the adapters
            of a run's options: values are fed.

    Raises:
        AdapterError: the file cannot be read.
    """
    inputs = {value.name for value in session.get_inputs()}
    is_fed = manifest is not None and not inputs.isdisjoint(manifest.names)
    if adapter is not None and not (is_fed or bound) and is_ort_adapter(adapter):
        return ActiveAdapter({}, _mapped(adapter))
    stored = None if adapter is None else read_stored(adapter)
    values = {} if stored is None else values_of(stored)
    if manifest is not None and is_fed:
        every = every_value(manifest, model, values)
        values = {n: v for n, v in every.items() if n in inputs or n in values}
    return ActiveAdapter(values)


def _mapped(path: Path) -> ort.LoraAdapter:
    adapter = ort.LoraAdapter()
    try:
        adapter.Load(str(path))
    except DAMAGE as error:
        raise AdapterError(f"{path}: not loaded by onnxruntime: {reason(error)}") from error
    return adapter
