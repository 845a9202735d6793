"""A file with its weights in a few bits, and how far what it gives is off the file that it was."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path

from lora_fx.export.onnx_model.changed_file import tensor_digests
from lora_fx.export.onnx_model.model_file import load_proto, write_model
from lora_fx.export.onnx_model.parsed import parsed_file
from lora_fx.export.quantization.choose_layers import choose_layers
from lora_fx.export.quantization.quantise import quantise
from lora_fx.export.quantization.schemes import Scheme
from lora_fx.export.report import Quantisation
from lora_fx.export.verification.file_run import Feeds, Run
from lora_fx.numerics import compare

NOT_QUANTISED = "control: not quantised"


def pack_file(
    source: Path,
    draft: Path,
    scheme: Scheme,
    *,
    layers: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    tables: Sequence[str] = (),
    own: Set[str] | None = None,
    above: int,
) -> Quantisation:
    """Writes a file with the weights of some layers in a few bits.

    Args:
        source: the file.
        draft: the file to write.
        scheme: how they are stored.
        layers: which; by default all but heads.
        keep: which not.
        tables: which embeddings.
        own: paths and names of the model's weights, if it is known.
        above: bytes of weights from which they go to a file of their own.

    Raises:
        ExportError: a layer is not there, or none can be quantised.
        VerificationError: a weight is off by more than what lies between two of its numbers.
    """
    model = parsed_file(source)
    errors, left = quantise(model, scheme, choose_layers(model, layers, keep, tables, own))
    known = tensor_digests(load_proto(source), source)
    write_model(model, draft, external_data_above=above, known=known)
    return Quantisation(str(scheme), errors, left=left)


@contextmanager
def plain_place(draft: Path, scheme: Scheme | None) -> Iterator[Path]:
    """Where the file with plain weights is written: beside what is made of it, and then gone."""
    if scheme is None:
        yield draft
        return
    with tempfile.TemporaryDirectory(dir=draft.parent) as directory:
        yield Path(directory) / draft.name


def outputs_off(found: Run, plain: Run, feeds: Mapping[str, Feeds]) -> dict[str, float]:
    """How far each output is off that of plain weights, relative: the farthest of some runs."""
    farthest: dict[str, float] = {}
    expected = plain.outputs(feeds)
    for label, outputs in found.outputs(feeds).items():
        for name, value in outputs.items():
            off = compare(value, expected[label][name]).relative
            farthest[name] = max(off, farthest.get(name, 0.0))
    return farthest
