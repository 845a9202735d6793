"""Opening and calling onnxruntime."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from google.protobuf.message import DecodeError
from onnxruntime.capi import onnxruntime_pybind11_state as state

from lora_fx.errors import NO_MEMORY, ExportError, advised, is_out_of_memory, shorten
from lora_fx.export.onnx_model.tensor_protos import every_node
from lora_fx.export.onnx_model.tensors import to_numpy

ERRORS: tuple[Any, ...] = tuple(
    kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)
)
_ERRORS_ONLY = 3
_MOST_THREADS = 1024
FATAL = 4  # of what onnxruntime writes to the console, as the above
_WHOLE = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
NUMPY = {"tensor(float)": "float32", "tensor(double)": "float64"} | {
    f"tensor({name})": name for name in ("float16", "bool", *_WHOLE)
}
PACKED = ("MatMulNBits", "MatMulBnb4")


def available_providers() -> list[str]:
    """The execution providers that onnxruntime has here."""
    return list(ort.get_available_providers())


def open_session(
    path: Path,
    *,
    threads: int | None = None,
    providers: Sequence[str] | None = None,
    optimise: bool = True,
    to_check: bool = False,
) -> Any:
    """Opens a model.

    Args:
        path: the model file.
        threads: threads for one operator; onnxruntime's choice by default.
        providers: onnxruntime execution providers; the CPU by default.
        optimise: rewrite the graph for speed.
        to_check: hold no copy of a weight in the layout that its kernels like best, and no memory
            between runs: weights in a file beside the model are read where they lie. Those of a
            few bits are laid out all the same: without that, other kernels would run than a user's.
            What a file quantises stays as its graph says: products of 8 bits, which other operators
            around them make or unmake, would differ by their rounding alone.

    Raises:
        ExportError: onnxruntime refuses the file, or has no kernel for it.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY  # each overridable initializer is worth a warning
    if threads is not None and not 0 <= threads <= _MOST_THREADS:
        raise ExportError(
            f"threads is {threads}: give a number from 1 to {_MOST_THREADS}, or 0 or None for "
            "onnxruntime's choice"
        )
    if threads is not None:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    if to_check:
        kept = "0" if _is_packed(path) else "1"
        options.add_session_config_entry("session.disable_prepacking", kept)
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    own = [providers] if isinstance(providers, str) else providers
    chosen = ["CPUExecutionProvider"] if own is None else list(own)
    available = ort.get_available_providers()
    if not set(chosen) <= set(available):
        raise ExportError(f"providers {shorten(chosen)}: this onnxruntime has {shorten(available)}")
    try:
        return ort.InferenceSession(str(path), options, providers=chosen)
    except state.NotImplemented as error:
        why = reason(error)
        raise ExportError(
            f"{path.name}: {', '.join(chosen)} has no kernel for this model ({why}): "
            "convert the model to float32 or float16 before tracing, or name other providers"
        ) from error
    except (*ERRORS, ValueError) as error:
        if is_out_of_memory(error):
            raise ExportError(f"{path.name}: {NO_MEMORY}") from error
        raise ExportError(f"{path.name}: not loaded by onnxruntime: {reason(error)}") from error


def unreadable(arguments: Mapping[str, Any]) -> str | None:
    """What onnxruntime has against the file that a call was given, for `takes`; None if nothing."""
    path = Path(arguments["model_path" if "model_path" in arguments else "path"])
    try:
        with advised("give the file as it was exported, or export it again"):
            open_session(path)
    except ExportError as error:
        return str(error)
    return None


def _is_packed(path: Path) -> bool:
    """Whether a model multiplies with weights of a few bits."""
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError, ValueError):  # onnxruntime says so better
        return False
    return any(node.op_type in PACKED for node in every_node(model))


def call(
    session: Any,
    feeds: Mapping[str, Any],
    options: ort.RunOptions | None = None,
) -> dict[str, np.ndarray[Any, Any]]:
    """Runs a session on arrays or values of its own, and gives its outputs by name.

    Raises:
        ExportError: onnxruntime refused an input or failed in the middle, or an output has no
            numpy form.
    """
    outputs = session.get_outputs()
    names = [output.name for output in outputs]
    unread = [output.name for output in outputs if output.type == "tensor(bfloat16)"]
    if unread:
        raise ExportError(
            f"outputs {shorten(unread)} are bfloat16, which numpy lacks: let the model return "
            "float32 or float16"
        )
    with failures_told():
        values = session.run(names, dict(feeds), options)
    return dict(zip(names, values, strict=True))


@contextmanager
def failures_told(*more: type[Exception]) -> Iterator[None]:
    """Says what onnxruntime said when a run failed.

    Args:
        more: types of errors that it raises there too.

    Raises:
        ExportError: that.
    """
    try:
        yield
    except (*ERRORS, UnicodeDecodeError, *more) as error:  # which words of a model's may be none of
        said = NO_MEMORY if is_out_of_memory(error) else reason(error)
        raise ExportError(f"onnxruntime: {said}") from error


def check_names(path: Path, given: Iterable[str], wanted: Sequence[str]) -> None:
    """Wants each input of a model once, by its name, and no others.

    Raises:
        ExportError: names what is missing, what is unknown, and what the model takes.
    """
    names = list(given)
    missing = [name for name in wanted if name not in names]
    unknown = [name for name in names if name not in wanted]
    if missing or unknown:
        raise ExportError(
            f"{path}: missing inputs: {shorten(missing) or 'none'}; unknown inputs: "
            f"{shorten(unknown) or 'none'}; the model takes {shorten(list(wanted))}"
        )


def check_types(path: Path, session: Any, feeds: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Wants numbers of the type that each input has: onnxruntime does not say which input differs.

    Raises:
        ExportError: names the input, its type and the model's.
    """
    types = {value.name: value.type for value in session.get_inputs()}
    for name, array in feeds.items():
        wanted = NUMPY.get(types[name])
        if wanted not in (None, array.dtype.name):
            raise ExportError(
                f"{path}: input {name!r} is {array.dtype.name}, and the model takes {wanted}: "
                "give it converted"
            )


def to_array(name: str, value: Any) -> np.ndarray[Any, Any]:
    """An input as onnxruntime takes it, which reads any bytes in the order of this machine.

    Raises:
        ExportError: it is neither a tensor nor an array, or its dtype has no numpy form.
    """
    if isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16:
        raise ExportError(f"input {name!r} is bfloat16, which numpy lacks: give float32 or float16")
    is_tensor = isinstance(value, torch.Tensor)
    try:
        array = value.detach().cpu().numpy() if is_tensor else np.asarray(value)
    except (RuntimeError, TypeError, ValueError) as error:  # sparse, nested, on meta, ragged
        raise ExportError(f"input {name!r} is no plain tensor: {error}") from error
    if array.dtype.kind == "c":
        raise ExportError(
            f"input {name!r} is {array.dtype}, and onnxruntime takes no complex numbers: give its "
            "parts, as torch.view_as_real does, and let the model join them"
        )
    if array.dtype == object:
        found = type(value).__name__
        raise ExportError(f"input {name!r} is a {found}: give a tensor or an array of numbers")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def to_ort_value(tensor: torch.Tensor) -> ort.OrtValue:
    """A tensor's memory, which the caller must keep, as onnxruntime takes it; also of bfloat16."""
    array = to_numpy(tensor)
    if tensor.dtype is torch.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, onnx.TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def reason(error: Exception) -> str:
    """What onnxruntime said, on one line: not that it could not load, which sounds like advice."""
    said = " ".join(line.strip() for line in str(error).splitlines()[:3])
    return re.sub("Load model from .*? failed: ?", "", said)
