"""From a graph to an ONNX model in memory: the only caller of torch.onnx."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import fx

from lora_fx.errors import ExportError, advised
from lora_fx.export.onnx_model.complex_pairs import as_pairs, writes_complex
from lora_fx.export.onnx_model.known_values import without_known_calls
from lora_fx.export.onnx_model.static_masks import has_masks, without_masks
from lora_fx.export.program.decompose import LoweredProgram
from lora_fx.graph.aliasing import written
from lora_fx.graph.lean_tracing import lean_tracing
from lora_fx.graph.ops import aten

_CHATTER: dict[str, tuple[str, ...]] = {
    "torch.onnx._internal.exporter._registration": ("torchvision is not installed",),
    "onnx_ir._convenience": ("Attribute type is ambiguous because it is an empty",),
    "torch.onnx._internal.exporter._core": (
        "Output node output has None output",  # left out of the names too
        "Skipping constant argument",  # an argument that is no tensor is no graph input
    ),
}


# What is known of operators that ONNX lacks: part of their names -> what to do.
_HINTS = {
    "grouped_mm": "Of a model with experts, that transformers multiplies in groups: "
    'call model.set_experts_implementation("batched_mm") before it is traced',
}

# Older ones than torch.onnx translates to, and newer ones than onnxscript converts to, are passed
# over by both without a word.
OPSETS = range(18, 26)


def check_opset(opset: object) -> None:
    """Refuses what is no version of the ONNX operator set that can be written.

    Raises:
        ExportError: names what can.
    """
    if opset is not None and (type(opset) is not int or opset not in OPSETS):
        raise ExportError(
            f"opset={opset!r}: expected a whole number from {OPSETS[0]} to {OPSETS[-1]}, or None "
            "for the exporter's own choice"
        )


@lean_tracing()
@advised("write what it names in other operators of PyTorch")
def convert(program: torch.export.ExportedProgram, opset: int | None) -> ir.Model:
    """Translates a program operator by operator, unoptimised.

    Raises:
        ExportError: an operator has no translation, or none in this opset.
    """
    # The exporter takes 30 MB and a second to load, which nobody pays who exports nothing.
    from lora_fx.export.onnx_model.eager_numbers import (
        give_probabilities,
        give_wide_places,
        mark_masked,
        translations,
        widen_narrow_sums,
    )
    from lora_fx.export.onnx_model.idle_work import without_idle_work

    check_opset(opset)
    if not isinstance(program, LoweredProgram):
        _copy_before_reshape(program)
    _cast_before_rsub(program)
    with _quiet():
        try:
            masked = has_masks(program)
            if masked or writes_complex(program):
                program = program.run_decompositions({})  # writes become values
            as_pairs(program)
            if masked:
                without_masks(program)
            without_known_calls(program)
            with without_idle_work():
                onnx_program = torch.onnx.export(
                    program,
                    dynamo=True,
                    optimize=False,
                    verbose=False,
                    opset_version=opset,
                    custom_translation_table=translations(),
                )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(f"the graph has no ONNX form: {_told(_cause(error))}") from error
    if onnx_program is None:
        raise ExportError("the graph has no ONNX form: torch.onnx returned nothing")
    give_probabilities(onnx_program.model)
    widen_narrow_sums(onnx_program.model)
    give_wide_places(onnx_program.model)
    if onnx_program.exported_program is not None:
        mark_masked(onnx_program.model, onnx_program.exported_program)
    written = onnx_program.model.opset_imports[""]
    if opset is not None and written != opset:
        raise ExportError(
            f"opset={opset}: the graph could only be translated to opset {written}: ask for that"
        )
    return onnx_program.model


def _copy_before_reshape(program: torch.export.ExportedProgram) -> None:
    """Puts a contiguous copy before each reshape, and before each view of what is not written to.

    With symbolic sizes torch.onnx decomposes a reshape of a transposed tensor into a view, which
    then fails, and so does a view behind such a copy, which is laid out otherwise. The copy is an
    Identity in ONNX, and goes away again.
    """
    kept = written(program.graph)
    for node in list(program.graph.nodes):
        is_view = node.target is aten.view.default and node not in kept
        source = node.args[0] if is_view or node.target is aten.reshape.default else None
        if not isinstance(source, fx.Node):
            continue
        with program.graph.inserting_before(node):
            layout = {"memory_format": torch.contiguous_format}
            copy = program.graph.call_function(aten.clone.default, (source,), layout)
        copy.meta = {**source.meta, "val": source.meta["val"].clone(**layout)}
        node.replace_input_with(source, copy)
    program.graph_module.recompile()


def _cast_before_rsub(program: torch.export.ExportedProgram) -> None:
    """Casts whole numbers that are taken off a float: ``1.0 - mask`` -> ``1.0 - mask.to(float)``.

    torch.onnx makes a subtraction of it whose first input is a number, which it casts for none.
    """
    for node in program.graph.find_nodes(op="call_function", target=aten.rsub.Scalar):
        source, dtype = node.args[0], node.meta["val"].dtype
        if source.meta["val"].dtype is dtype:
            continue
        with program.graph.inserting_before(node):
            cast = program.graph.call_function(aten._to_copy.default, (source,), {"dtype": dtype})
        cast.meta = {**node.meta, "val": source.meta["val"].to(dtype)}
        node.replace_input_with(source, cast)
    program.graph_module.recompile()


def _told(cause: str) -> str:
    """The cause, and what to do about it where that is known."""
    return next((f"{cause}. {hint}" for name, hint in _HINTS.items() if name in cause), cause)


def _cause(error: BaseException) -> str:
    """The innermost two reasons: what failed, at which node."""
    reasons = []
    while error.__cause__ is not None:
        error = error.__cause__
        reasons.append(str(error).partition("\n")[0])
    return "; ".join(reasons[-2:][::-1]) or str(error).partition("\n")[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the exporter says about itself rather than about the model."""
    filters = []
    for name, starts in _CHATTER.items():

        def wanted(record: logging.LogRecord, starts: tuple[str, ...] = starts) -> bool:
            return not record.getMessage().startswith(starts)

        logging.getLogger(name).addFilter(wanted)
        filters.append((name, wanted))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        for name, wanted in filters:
            logging.getLogger(name).removeFilter(wanted)
