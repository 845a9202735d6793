"""Running an exported model, with an adapter or without."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lora_fx.choices import takes
from lora_fx.errors import AdapterError, ExportError, shorten
from lora_fx.export.onnx_model.changed_file import check_digests
from lora_fx.export.onnx_model.digests import metadata
from lora_fx.export.onnx_model.external_data import check_external_data
from lora_fx.export.onnx_model.model_file import load_proto, manifest_in
from lora_fx.export.runtime.active_adapter import ActiveAdapter, activated
from lora_fx.export.runtime.generation import (
    IDS,
    MASK,
    PAST,
    bound_run,
    empty_cache,
    generated,
    prompt,
    steps,
)
from lora_fx.export.runtime.in_place import axes_in_place, run_in_place, writes_in_place
from lora_fx.export.runtime.ort import call, check_names, check_types, open_session, to_array
from lora_fx.export.runtime.sampling import Ends, Sampling, genai_model
from lora_fx.export.slots.check_adapter import check_adapter_file
from lora_fx.export.slots.manifest import NO_SLOTS
from lora_fx.graph.example import NEW_CACHE
from lora_fx.io.plain_file import check_path
from lora_fx.tables import table

Stamp = tuple[int, int, int]


class Session:
    """An exported model, ready to run.

    Adapters are loaded once and stay loaded; a file that was replaced is loaded anew.

    Args:
        path: the ``.onnx`` file.
        threads: threads for one operator; onnxruntime's choice by default.
        providers: onnxruntime execution providers; the CPU by default.
        check: read all weights once, and refuse a file that is not what was exported. Files of
            other tools have nothing to be held against. It takes the time of one SHA-256 of the
            file: about a second for each 1 to 2 GB.

    Raises:
        ExportError: the file is missing, damaged, changed, or onnxruntime cannot run it.
    """

    @takes(ExportError)
    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        providers: Sequence[str] | None = None,
        *,
        check: bool = True,
    ) -> None:
        self._path = Path(path)
        self._again = partial(Session, self._path.absolute(), threads, providers, check=check)
        proto = load_proto(self._path)
        self._manifest = manifest_in(proto, self._path)
        check_external_data(proto, self._path)
        if check:
            check_digests(proto, self._path)
        self._in_place = writes_in_place(proto)
        self._counts_mask = self._in_place and not axes_in_place(proto)
        self._new_cache = _count(metadata(proto), NEW_CACHE, self._path)
        del proto
        self._session = open_session(self._path, threads=threads, providers=providers)
        self._adapters: dict[Path | None, tuple[Stamp | None, ActiveAdapter]] = {}

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs that `run` takes."""
        slots = self._manifest.names if self._manifest else []
        return [value.name for value in self._session.get_inputs() if value.name not in slots]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs that `run` gives."""
        return [value.name for value in self._session.get_outputs()]

    @property
    def slots(self) -> list[str]:
        """Module paths that an adapter acts on; empty for a model without slots."""
        return [slot.path for slot in self._manifest.slots] if self._manifest else []

    def __repr__(self) -> str:
        """One line: the file, what it takes and gives, and how many slots it has."""
        names = f"{shorten(self.inputs)} -> {shorten(self.outputs)}"
        return f"Session({str(self._path)!r}): {names}, {len(self.slots)} slots"

    def __reduce__(self) -> tuple[Callable[[], Session], tuple[()]]:
        """A copy, or what another process gets, opens the file again."""
        return self._again, ()

    def _repr_html_(self) -> str:
        slots = self._manifest.names if self._manifest else []
        given = [v for v in self._session.get_inputs() if v.name not in slots]
        rows = [["input", v.name, v.type, _axes(v.shape)] for v in given]
        rows += [["output", v.name, v.type, _axes(v.shape)] for v in self._session.get_outputs()]
        for one in self._manifest.slots if self._manifest else ():
            rows += [[f"slot {one.path}", n, one.dtype, _axes(s)] for n, s in one.inputs.values()]
        providers = ", ".join(self._session.get_providers())
        return table(["", "name", "type", "shape"], rows, f"{self._path}: {providers}")

    @takes(ExportError)
    def run(
        self, inputs: Mapping[str, Any], adapter: str | Path | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Runs the model once.

        Args:
            inputs: input name -> tensor or array.
            adapter: a file made by `export_adapter` for this model, or None for the base.

        Returns:
            Output name -> array.

        Raises:
            ExportError: an input is missing, unknown, or of the wrong type or shape.
            AdapterError: the adapter is missing, damaged, or made for another model.
        """
        check_names(self._path, inputs, self.inputs)
        feeds = {name: to_array(name, value) for name, value in inputs.items()}
        check_types(self._path, self._session, feeds)
        active = self._active(adapter)
        return call(self._session, feeds | active.feeds, active.options)

    @takes(ExportError)
    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int = 20,
        *,
        attention_mask: Any = None,
        adapter: str | Path | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        streamer: Any = None,
    ) -> np.ndarray[Any, Any]:
        """Generates text with a decoder that was exported with its cache.

        The cache stays in onnxruntime's memory from one token to the next, in one buffer for all
        tokens where the file was exported with ``shared_cache=True``.

        Args:
            input_ids: the prompt, (batch, sequence), padded on the left.
            max_new_tokens: at most so many.
            attention_mask: 0 where the prompt is padded.
            adapter: as for `run`.
            temperature: divides the logits; 0, the default, takes the likeliest token.
            top_k: of how many of the likeliest tokens one is drawn; 0: of all.
            top_p: the fewest of the likeliest whose probabilities reach this are left.
            seed: of the random numbers; None: other ones each time.
            eos_token_id: what ends a text. By default what the ``generation_config.json`` beside
                the file says, or nothing.
            pad_token_id: what follows an end where other rows go on; by default the first end.
            streamer: of transformers' kind: gets the prompt and each token by ``put``, then
                ``end``.

        Returns:
            (batch, sequence + new tokens), int64.

        Raises:
            ExportError: the model is no decoder with a cache, or an argument is out of its range.
            AdapterError: as for `run`.
        """
        self._check_decoder()
        ids, mask = prompt(input_ids, attention_mask)
        if self._counts_mask and not mask.all():
            raise ExportError(
                f"{self._path}: of another exporter's, it reads how much came before off the mask, "
                "so padding on the left is none to it: give each prompt alone"
            )
        genai = genai_model(self._path)
        ends = Ends.of(self._path, eos_token_id, pad_token_id, genai)
        choose = Sampling(temperature, top_k, top_p, seed).chooser()
        room = ids.shape[1] + max_new_tokens if self._in_place else 0
        start = empty_cache(self._session, genai, len(ids), room)
        run = (run_in_place if self._in_place else bound_run)(self._session, self._active(adapter))
        logits = steps(run, ids, mask, start, self._new_cache)
        every = generated(logits, ids, choose, max_new_tokens, ends, streamer)
        return np.concatenate([ids, every], axis=1)

    def _check_decoder(self) -> None:
        names = {*self.inputs}
        if not {IDS, MASK} <= names or not any(name.startswith(PAST) for name in names):
            raise ExportError(
                f"{self._path}: no decoder with a cache: it takes {shorten(self.inputs)}; export "
                "it for the task text-generation-with-past"
            )

    def _active(self, adapter: str | Path | None) -> ActiveAdapter:
        path, stamp = (None, None) if adapter is None else self._stamped(adapter)
        key = path and path.resolve()
        known = self._adapters.get(key)
        if known is None or known[0] != stamp:
            if path is not None and self._manifest is not None:
                check_adapter_file(path, self._manifest, self._path)
            known = stamp, self._activated(path)
            self._adapters[key] = known
        return known[1]

    def _activated(self, path: Path | None) -> ActiveAdapter:
        model = self._session, self._path, self._manifest
        return activated(*model, path, bound=self._in_place)

    def _stamped(self, adapter: str | Path) -> tuple[Path, Stamp]:
        """The path of an adapter file, and what tells its content from a later one's."""
        if not isinstance(adapter, str | Path):
            raise AdapterError(
                f"adapter is a {type(adapter).__name__}, expected the path of one .onnx_adapter: "
                "lora_fx.combine makes one adapter of several, lora_fx.export_adapter its file"
            )
        path = Path(adapter)
        if self._manifest is None:
            raise AdapterError(f"{path}: {self._path} {NO_SLOTS}")
        if not check_path(path, AdapterError).is_file():
            found = "is a directory" if path.is_dir() else "no such adapter file"
            raise AdapterError(
                f"{path}: {found}; a session runs what lora_fx.export_adapter(adapter, "
                f"{str(self._path)!r}, ...) wrote"
            )
        status = path.stat()
        return path, (status.st_mtime_ns, status.st_size, status.st_ino)


def _count(noted: Mapping[str, str], key: str, path: Path) -> int | None:
    """A number that a file notes of itself, or None if it has none."""
    value = noted.get(key)
    if value is not None and not re.fullmatch("[1-9][0-9]{0,17}", value):
        raise ExportError(f"{path}: {key} is {value!r:.80}, expected a number: export it again")
    return None if value is None else int(value)


def _axes(shape: Sequence[Any]) -> str:
    """Sizes; an axis that may change by its name, that of a rank as r."""
    return f"({', '.join('r' if size is None else str(size) for size in shape)})"
