"""An ONNX file with its base in a few bits, by no more than the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_fx.choices import Bits, takes
from lora_fx.errors import ExportError, shorten
from lora_fx.export.onnx_model.changed_file import check_digests
from lora_fx.export.onnx_model.external_data import check_external_data
from lora_fx.export.onnx_model.model_file import INLINE_LIMIT, load_proto, manifest_in, write_model
from lora_fx.export.quantization.numbers import of_whole_x, packed_in, with_numbers_of
from lora_fx.export.quantization.pack_file import NOT_QUANTISED, outputs_off, pack_file
from lora_fx.export.quantization.schemes import scheme_of
from lora_fx.export.report import Clock, ExportReport, Verification, file_sizes
from lora_fx.export.runtime.ort import unreadable
from lora_fx.export.slots.adapter_file import export_adapter
from lora_fx.export.slots.foreign import ForeignSlot
from lora_fx.export.slots.manifest import Manifest
from lora_fx.export.slots.probe import TRIED_RANKS, probe
from lora_fx.export.verification.file_run import Feeds, Run
from lora_fx.export.verification.made_inputs import feeds_for
from lora_fx.export.verification.negative_controls import FACTOR, NO_ADAPTER
from lora_fx.export.verification.side_by_side import Pair, coarsest_named, held_against
from lora_fx.export.verification.verify_onnx import mode_of
from lora_fx.io.atomic import refuse_existing, scratch, staged
from lora_fx.io.output_place import keeping
from lora_fx.io.plain_file import models_in


@takes(ExportError, unreadable)
def quantize_onnx(
    model_path: str | Path,
    out_path: str | Path,
    *,
    bits: Bits = 4,
    block_size: int | None = None,
    accuracy_level: int = 0,
    symmetric: bool = False,
    layers: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    tables: Sequence[str] = (),
    inputs: Mapping[str, Any] | None = None,
    check: bool = True,
    verify: bool = True,
    external_data_above: int = INLINE_LIMIT,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Writes a file with the weights of its linear layers in a few bits, merged or swappable.

    Adapters, slots, norms and biases stay as they are, heads and embeddings unless they are named.
    A swappable file is of another base afterwards: adapters are exported for it anew. The file is
    held against the same with the numbers that the bits stand for as plain weights, and how far
    these are off is in the report: of each weight, and of the outputs.

    Args:
        model_path: the file, or a directory that holds one.
        out_path: the ``.onnx`` file to write.
        bits: 4 or 8, whole numbers as onnxruntime's MatMulNBits takes them; or ``"nf4"`` or
            ``"fp4"``, bitsandbytes' tables, as its MatMulBnb4 does.
        block_size: weights that share a scale: 16, 32, 64, 128 or 256. By default 32, of tables 64.
        accuracy_level: 4 lets onnxruntime round x to 8 bits too, which is several times as fast at
            one row; the file is then verified without that, and the outputs' error is with it.
        symmetric: no zero points of blocks, as onnxruntime-genai's builder rounds: a little faster,
            and a little further off.
        layers: paths of linear layers, where ``*`` stands for any part; by default all but heads.
        keep: paths of those that are left as they are.
        tables: paths of embeddings to quantise too, in 4 or 8 bits, of rows of whole blocks. What a
            quantised head shares is stored once. onnxruntime's lookup in bits gives zeros for an id
            that the table has not, where a plain one is an error.
        inputs: by name, to compare the files on; made by what the file says of them if None.
        check: read all weights of a file of ours once, and refuse one that was changed.
        verify: run the files in onnxruntime, with a random adapter in all slots too.
        external_data_above: bytes of weights from which they go to ``<path>.data``.
        force: replace files that exist.
        progress: told the name of each stage as it starts.

    Raises:
        ExportError: no layer of a name, or none that can be quantised, or the output exists.
        VerificationError: the files disagree, or a control agrees.
    """
    path, out, clock = model_in(Path(model_path)), Path(out_path), Clock(progress)
    scheme = scheme_of(bits, block_size, accuracy_level, symmetric)
    with keeping(path):
        refuse_existing(out, force=force)
    proto = load_proto(path)
    manifest = manifest_in(proto, path)
    check_external_data(proto, path)
    if check:
        with clock.stage("check"):
            check_digests(proto, path)
    with staged(out, force=force) as draft:
        with clock.stage("quantise"):
            quantised = pack_file(
                path,
                draft,
                scheme,
                layers=layers,
                keep=keep,
                tables=tables,
                above=external_data_above,
            )
        evidence = Verification.left_out()
        if verify:
            with clock.stage("verify"):
                source = Run(path, None, manifest)
                feeds = feeds_for(source, proto, inputs)
                with of_whole_x(draft) as exact:
                    evidence = _evidence(exact, source, manifest, feeds)
                evidence.judge(str(out))
                off = outputs_off(Run(draft, None, manifest), source, feeds)
                quantised = replace(quantised, outputs=off)
        files, mode = file_sizes(draft.parent), mode_of(load_proto(draft), manifest)
    slots = () if manifest is None else manifest.slots
    fed = {name for slot in slots for name in slot.names}
    return ExportReport.of(
        out,
        evidence,
        clock,
        mode=mode,
        files=files,
        opset=next(entry.version for entry in proto.opset_import if not entry.domain),
        inputs=[value.name for value in proto.graph.input if value.name not in fed],
        outputs=[value.name for value in proto.graph.output],
        slots=[slot.path for slot in slots],
        quantised=quantised,
    )


def model_in(path: Path) -> Path:
    """The model file that a path means: itself, or the only one of a directory.

    Raises:
        ExportError: a directory holds none, or several.
    """
    if not path.is_dir():
        return path
    found = models_in(path)
    if len(found) != 1:
        names = [str(file.relative_to(path)) for file in found]
        raise ExportError(f"{path}: holds {shorten(names) or 'no .onnx file'}: name one file")
    return found[0]


def _evidence(
    draft: Path, source: Run, manifest: Manifest | None, feeds: Mapping[str, Feeds]
) -> Verification:
    """The file against the one that it was made of, with the numbers of its bits as weights."""
    packed = packed_in(draft)
    dtype = coarsest_named([layer.dtype for layer in packed.values()])
    with scratch() as directory:
        plain, scaled = (directory / name for name in ("plain.onnx", "scaled.onnx"))
        write_model(with_numbers_of(source.path, packed), plain, external_data_above=INLINE_LIMIT)
        bare = Run(draft, None, manifest)
        pairs = [Pair("base", bare, Run(plain, None, manifest))]
        controls = {NOT_QUANTISED: source}
        if manifest is not None and manifest.slots:
            file = directory / "probe.onnx_adapter"
            export_adapter(probe(manifest.slots, _ranks(manifest)), draft, file, check=False)
            pairs.append(Pair("adapted", *(Run(f, file, manifest) for f in (draft, plain))))
            controls = {NOT_QUANTISED: Run(source.path, file, manifest)}
            controls[NO_ADAPTER] = bare
        evidence = held_against(pairs, controls, feeds, dtype)
        if not any(row.ok for row in evidence.controls):  # the numbers were those before
            model = with_numbers_of(source.path, packed, FACTOR)
            write_model(model, scaled, external_data_above=INLINE_LIMIT)
            control = {f"control: weights x {FACTOR}": Run(scaled, None, manifest)}
            evidence.controls += held_against(pairs[:1], control, feeds, dtype).controls
    return evidence


def _ranks(manifest: Manifest) -> tuple[int, ...]:
    """What adapters are tried with: in a file of another exporter's all have to be of one rank."""
    taken = [slot.rank for slot in manifest.slots if isinstance(slot, ForeignSlot) and slot.rank]
    return TRIED_RANKS if manifest.is_ours else (min(taken, default=TRIED_RANKS[1]),)
