"""From a swappable file and an adapter to a plain merged file, by no more than the two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx

import lora_fx
from lora_fx.adapters.adapter import Adapter
from lora_fx.choices import takes
from lora_fx.errors import ExportError, shorten
from lora_fx.export.onnx_model.changed_file import check_digests, tensor_digests
from lora_fx.export.onnx_model.external_data import check_external_data
from lora_fx.export.onnx_model.model_file import INLINE_LIMIT, load_proto, manifest_in, write_model
from lora_fx.export.onnx_model.parsed import parsed_file
from lora_fx.export.report import Clock, ExportReport, Verification, file_sizes
from lora_fx.export.rewriting.file_layers import types_of_numbers
from lora_fx.export.rewriting.merging import merged_model
from lora_fx.export.runtime.ort import open_session, unreadable
from lora_fx.export.slots.adapter_file import ORT_ADAPTER, write_ort_adapter
from lora_fx.export.slots.check_adapter import (
    Stored,
    check_adapter_file,
    read_stored,
    values_of,
)
from lora_fx.export.slots.every_value import every_value
from lora_fx.export.slots.manifest import NO_SLOTS, Manifest
from lora_fx.export.slots.slot_values import values_of_adapter
from lora_fx.export.verification.file_run import Feeds, Run, first_of
from lora_fx.export.verification.made_inputs import feeds_for
from lora_fx.export.verification.negative_controls import NO_ADAPTER
from lora_fx.export.verification.side_by_side import Pair, coarsest_named, held_against
from lora_fx.graph.one_thread import one_thread
from lora_fx.io.adapter_files import is_slot_tensors
from lora_fx.io.atomic import refuse_existing, scratch, staged
from lora_fx.io.output_place import keeping


@takes(ExportError, unreadable)
def merge_onnx(
    model_path: str | Path,
    adapter: Adapter | str | Path,
    out_path: str | Path,
    *,
    inputs: Mapping[str, Any] | None = None,
    allow_unmerged: bool = False,
    check: bool = True,
    verify: bool = True,
    external_data_above: int = INLINE_LIMIT,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Writes a swappable file with an adapter in its weights, without its slots.

    Nothing is traced and no model is loaded: weights go from file to file, one after the other.

    Args:
        model_path: a file that takes adapters.
        adapter: an adapter, a path for `lora_fx.load_adapter`, or a file that `export_adapter`
            made for the model.
        out_path: the ``.onnx`` file to write.
        inputs: by name, to compare the two files on; made by what the file says of them if None.
        allow_unmerged: what no weight of the file can hold stays beside its layer, as constants.
        check: read all weights once, and refuse a file that is not what was exported.
        verify: run both files in onnxruntime, the swappable one with the adapter, and as a control
            without.
        external_data_above: bytes of weights from which they go to ``<path>.data``.
        force: replace files that exist.
        progress: told the name of each stage as it starts.

    Raises:
        ExportError: the file takes no adapter, was changed, a weight cannot take it, or the output
            exists.
        AdapterError: the adapter does not fit.
        VerificationError: the files disagree, or the control agrees.
    """
    path, out, clock = Path(model_path), Path(out_path), Clock(progress)
    with keeping(path, None if isinstance(adapter, Adapter) else adapter):
        refuse_existing(out, force=force)
    proto = load_proto(path)
    manifest = manifest_in(proto, path, strict=True)
    if manifest is None:
        raise ExportError(f"{path}: {NO_SLOTS}")
    check_external_data(proto, path)
    with scratch() as directory, ThreadPoolExecutor(1) as aside:
        checked = aside.submit(check_digests, proto, path) if check else None
        with clock.stage("adapter"), one_thread():  # the check has the other core
            file, stored = _taken(adapter, path, manifest, directory)
            del adapter  # its values are all that is needed
            values = values_of(stored)
            if manifest.required:  # the graph has no value for what the adapter leaves alone
                values = every_value(manifest, path, values)
        with clock.stage("merge"), one_thread():
            model, beside = merged_model(lambda: parsed_file(path), manifest, values)
        if beside and not allow_unmerged:
            raise ExportError(f"{path}: {_said(beside)}; allow_unmerged=True keeps it beside")
        bare, active = Run(path, None, manifest), Run(path, file, manifest)
        with staged(out, force=force) as draft:
            with clock.stage("write"):
                known = tensor_digests(proto, path)
                runs = aside.submit(_runs, bare, active, proto, inputs) if verify else None
                write_model(model, draft, external_data_above=external_data_above, known=known)
            types = types_of_numbers(model)
            said: dict[str, Any] = {
                "opset": model.opset_imports[""],
                "inputs": [str(value.name) for value in model.graph.inputs],
                "outputs": [str(value.name) for value in model.graph.outputs],
            }
            del model, values, stored  # as much memory as the adapter takes
            if checked is not None:
                checked.result()
            evidence = Verification.left_out()
            if runs is not None:
                with clock.stage("verify"):
                    dtype = coarsest_named([*types, *(slot.dtype for slot in manifest.slots)])
                    pair = Pair("merged", Run(draft), active)
                    evidence = held_against([pair], {NO_ADAPTER: bare}, runs.result(), dtype)
                    evidence.judge(str(out))
            files = file_sizes(draft.parent)
    if beside:
        evidence.notes.append(_said(beside))
    return ExportReport.of(
        out,
        evidence,
        clock,
        mode="unmerged" if beside else "merged",
        files=files,
        **said,
    )


def _taken(
    adapter: Adapter | str | Path, model: Path, manifest: Manifest, directory: Path
) -> tuple[Path, Stored]:
    """A file that onnxruntime takes an adapter from, and what is in it."""
    if not isinstance(adapter, Adapter):
        given = Path(adapter)
        if given.suffix == ORT_ADAPTER or is_slot_tensors(given):
            check_adapter_file(given, manifest, model)
            return given, read_stored(given)
        adapter = lora_fx.load_adapter(given)
    file, values = directory / f"merged{ORT_ADAPTER}", values_of_adapter(adapter, manifest, model)
    write_ort_adapter(file, values, manifest)
    return file, Stored(values, manifest.model_version)


def _runs(
    bare: Run, active: Run, model: onnx.ModelProto, inputs: Mapping[str, Any] | None
) -> dict[str, Feeds]:
    """The inputs that the swappable file is run on, which both runs remember the outputs of.

    The one without an adapter is a control, for which the first are enough as a rule.
    """
    session = open_session(active.path, threads=1, to_check=True)
    feeds = feeds_for(active, model, inputs, session)
    bare.outputs(first_of(feeds), session=session)
    return feeds


def _said(beside: Mapping[str, str]) -> str:
    return f"not merged: {shorten([f'{path}: {why}' for path, why in beside.items()])}"
