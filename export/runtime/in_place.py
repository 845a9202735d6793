"""Caches that are written in place: which files have them, and how these are run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx

from lora_fx.export.onnx_model.digests import metadata
from lora_fx.export.runtime.active_adapter import ActiveAdapter
from lora_fx.export.runtime.generation import LOGITS, PAST, PRESENT, Values, ort_value
from lora_fx.export.runtime.ort import failures_told

OPERATOR = "GroupQueryAttention"
AXES = "lora_fx.shared_cache"  # in a file's metadata: "batch, new"


def writes_in_place(model: onnx.ModelProto) -> bool:
    """Whether a decoder takes a cache with room for more, and writes what is new into it.

    So does GroupQueryAttention of onnxruntime, as in files of onnxruntime-genai's builder, if
    nothing else reads the cache.
    """
    pasts = {value.name for value in model.graph.input if value.name.startswith(PAST)}
    nodes = model.graph.node
    read = {name for node in nodes if node.op_type != OPERATOR for name in node.input}
    written = {name for node in nodes if node.op_type == OPERATOR for name in node.input[3:5]}
    return bool(pasts) and pasts <= written - read


def axes_in_place(model: onnx.ModelProto) -> list[str]:
    """The axes of the batch and of what is new: behind a cache in place one of them is 1.

    Empty for a file that does not say so.
    """
    noted = metadata(model).get(AXES)
    return [] if noted is None else noted.split(", ")


def run_in_place(session: Any, active: ActiveAdapter) -> Callable[[Values], Values]:
    """One step of a session that writes what is new into the cache that it is given.

    Args:
        session: of a model that `writes_in_place`.
        active: the adapter to run with, whose values are fed.
    """
    binding = session.io_binding()
    given = dict(active.feeds)  # what is bound must live
    for name, value in given.items():
        binding.bind_ortvalue_input(name, value)

    def run(feeds: Values) -> Values:
        for name in [name for name, value in feeds.items() if given.get(name) is not value]:
            given[name] = ort_value(feeds[name])
            binding.bind_ortvalue_input(name, given[name])
            if name.startswith(PAST):
                binding.bind_ortvalue_output(name.replace(PAST, PRESENT, 1), given[name])
        binding.bind_output(LOGITS)
        with failures_told(RuntimeError):  # bound, a kernel's own error is a plain one
            session.run_with_iobinding(binding)
        written = {n.replace(PAST, PRESENT, 1): v for n, v in given.items() if n.startswith(PAST)}
        return written | {LOGITS: binding.get_outputs()[-1].numpy()}

    return run
