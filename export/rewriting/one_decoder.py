"""Both steps of a decoder in one file, as Transformers.js and optimum load them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from lora_fx.choices import takes
from lora_fx.errors import ExportError, shorten
from lora_fx.export.onnx_model.changed_file import check_digests, tensor_digests
from lora_fx.export.onnx_model.digests import KEY
from lora_fx.export.onnx_model.external_data import check_external_data
from lora_fx.export.onnx_model.model_file import INLINE_LIMIT, load_proto, manifest_in, write_model
from lora_fx.export.onnx_model.parsed import parsed_file
from lora_fx.export.onnx_model.tensors import add_constant
from lora_fx.export.report import Clock, ExportReport, file_sizes
from lora_fx.export.rewriting.file_layers import types_of_numbers
from lora_fx.export.verification.file_run import Feeds, Run
from lora_fx.export.verification.made_inputs import feeds_for
from lora_fx.export.verification.side_by_side import Pair, coarsest_named, held_against
from lora_fx.graph.example import TASK
from lora_fx.io.atomic import refuse_existing, staged
from lora_fx.io.output_place import keeping

FLAG = "use_cache_branch"  # as optimum calls it
_CONTROL = "control: the other step"


@takes(ExportError)
def join_decoders(
    first_path: str | Path,
    later_path: str | Path,
    out_path: str | Path,
    *,
    check: bool = True,
    external_data_above: int = INLINE_LIMIT,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Writes one file that is the first step of a decoder or a later one, as a flag says.

    A flag ``use_cache_branch`` (1,) chooses a branch of an ``If``; weights of one name that are
    equal stand there once. What the later step does not give, as keys and values of the encoder,
    is empty behind it, (0, heads, 1, size): who calls it keeps those of the first. It is run beside
    both files, and as a control with the flag turned. Source: ``merge_decoders`` of optimum, and
    Transformers.js 4.3, which loads such files.

    Args:
        first_path: the file of the first step, ``decoder_model.onnx``.
        later_path: that of the others, which takes what the first gave:
            ``decoder_with_past_model.onnx``.
        out_path: the ``.onnx`` file to write: ``decoder_model_merged.onnx``.
        check: read all weights of files of ours once, and refuse one that was changed.
        external_data_above: bytes of weights from which they go to ``<path>.data``.
        force: replace files that exist.
        progress: told the name of each stage as it starts.

    Raises:
        ExportError: a file has slots or was changed, the two are no steps of one decoder, or the
            output exists.
        VerificationError: the file gives other numbers than the two, or the control agrees.
    """
    first, later, out, clock = Path(first_path), Path(later_path), Path(out_path), Clock(progress)
    with keeping(first, later):
        refuse_existing(out, force=force)
    with clock.stage("join"):
        read = [_read(path, check) for path in (first, later)]
        _refuse_others(first, later, *(model.graph for model, _ in read))
        taken = [{str(value.name) for value in model.graph.inputs} for model, _ in read]
        joined, known = _joined(*zip(*read, strict=True))
    with staged(out, force=force) as draft:
        with clock.stage("write"):
            write_model(joined, draft, external_data_above=external_data_above, known=known)
        with clock.stage("verify"):
            steps = {False: (Run(first), taken[0]), True: (Run(later), taken[1])}
            run, apart = Run(draft), _Apart(draft, steps=steps)
            feeds = feeds_for(run, load_proto(draft))
            dtype = coarsest_named(list(types_of_numbers(joined)))
            pair, control = Pair("joined", run, apart), {_CONTROL: _Turned(draft)}
            evidence = held_against([pair], control, feeds, dtype)
            evidence.judge(str(out))
        sizes = file_sizes(draft.parent)
    return ExportReport.of(
        out, evidence, clock, mode="merged", files=sizes, opset=joined.opset_imports[""],
        task=joined.metadata_props.get(TASK),
        inputs=[str(value.name) for value in joined.graph.inputs],
        outputs=[str(value.name) for value in joined.graph.outputs],
    )  # fmt: skip


def _read(path: Path, check: bool) -> tuple[ir.Model, Mapping[str, str]]:
    """A file without slots, and the digests of its weights, if it says them."""
    proto = load_proto(path)
    if manifest_in(proto, path) is not None:
        raise ExportError(f"{path}: has slots, which a branch has no place for: give it merged")
    check_external_data(proto, path)
    if check:
        check_digests(proto, path)
    return parsed_file(path), tensor_digests(proto, path)


def _refuse_others(first: Path, later: Path, one: ir.Graph, other: ir.Graph) -> None:
    """Refuses what is no pair of steps, the first one first."""
    inputs, outputs = ({v.name: v for v in values} for values in (one.inputs, one.outputs))
    if more := [str(value.name) for value in other.outputs if value.name not in outputs]:
        said = f"gives {shorten(more)}, which {first.name} does not"
    elif all(value.name in inputs for value in other.inputs):
        said = f"takes nothing that {first.name} does not, such as a cache"
    elif odd := [str(v.name) for v in other.inputs if v.type != inputs.get(v.name, v).type]:
        said = f"takes {shorten(odd)} in another type than {first.name}"
    else:
        return
    raise ExportError(f"{later}: {said}: give the first step's file, and then that of the others")


def _joined(
    models: Sequence[ir.Model], said: Sequence[Mapping[str, str]]
) -> tuple[ir.Model, dict[str, str]]:
    """The model of an If, and the digests of its weights."""
    first, later = (model.graph for model in models)
    results = [_like(value) for value in first.outputs]
    whole = ir.Graph([], [], nodes=[], opset_imports=first.opset_imports, name="decoder")
    joined = ir.Model(whole, ir_version=max(model.ir_version for model in models))
    joined.metadata_props.update({k: v for k, v in models[0].metadata_props.items() if k != KEY})
    inputs: dict[str, ir.Value] = {}
    weights: dict[tuple[str, str], ir.Value] = {}
    for model, digests in zip(models, said, strict=True):
        for value in model.graph.inputs:
            _read_outside(value, inputs.setdefault(str(value.name), _like(value)))
        for value in list(model.graph.initializers.values()):
            name, tensor = str(value.name), value.const_value
            assert tensor is not None, "a file's initializers have values"
            own = name, digests.get(name, f"of {model.graph.name} {len(weights)}")
            if own not in weights:
                weights[own] = add_constant(joined.graph, name, tensor)
            _read_outside(value, weights[own])
        model.graph.inputs.clear()
        model.graph.initializers.clear()
        _give(model.graph, results)
    flag = ir.Value(name=FLAG, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    whole.inputs.extend([*inputs.values(), flag])
    branches = [ir.AttrGraph("then_branch", later), ir.AttrGraph("else_branch", first)]
    choice = ir.Node("", "If", [flag], branches, num_outputs=len(results), name="decoder/If")
    for value, result, other in zip(choice.outputs, results, later.outputs, strict=True):
        value.name, value.type, value.shape = result.name, result.type, _either(result, other)
    whole.append(choice)
    whole.outputs.extend(choice.outputs)
    for value in (value for node in later for value in node.outputs):
        value.name = f"later/{value.name}"  # tools tell a file's values by name, in any branch
    common.NameFixPass()(joined)
    return joined, {str(value.name): digest for (_, digest), value in weights.items()}


def _like(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, shape=value.shape, type=value.type)


def _read_outside(value: ir.Value, outer: ir.Value) -> None:
    """What a branch reads stands around it."""
    value.replace_all_uses_with(outer, replace_graph_outputs=True)


def _either(one: ir.Value, other: ir.Value) -> ir.Shape | None:
    """The shape of what one or the other gives: a size of its own where they differ."""
    if one.shape is None or other.shape is None:
        return None
    pairs = enumerate(zip(one.shape, other.shape, strict=True))
    return ir.Shape([a if a == b else f"{one.name}.{axis}" for axis, (a, b) in pairs])


def _give(graph: ir.Graph, results: Sequence[ir.Value]) -> None:
    """Lets a branch give what the file does, in its order; what it has not, empty."""
    found = {value.name: value for value in graph.outputs}
    graph.outputs.clear()
    for result in results:
        value = found.get(result.name)
        if value is None:
            assert result.shape is not None, "parsed_file infers shapes that a file does not say"
            assert result.dtype is not None
            sizes = [0, *(size if isinstance(size, int) else 1 for size in result.shape[1:])]
            empty = ir.tensor(np.zeros(sizes, result.dtype.numpy()))
            graph.append(node := ir.node("Constant", [], {"value": empty}))
            value = node.outputs[0]
            value.name, value.shape, value.type = result.name, ir.Shape(sizes), result.type
        elif value.producer() is None:  # it stands around the branch
            graph.append(node := ir.node("Identity", [value]))
            value = node.outputs[0]
            value.name = result.name
        graph.outputs.append(value)


@dataclass(frozen=True)
class _Apart(Run):
    """The two files as one: the flag says which runs.

    Attributes:
        steps: by the flag, the file and the names of its inputs.
    """

    steps: Mapping[bool, tuple[Run, set[str]]] = field(default_factory=dict)

    def outputs(
        self, feeds: Mapping[str, Feeds], *, optimise: bool = True, session: Any = None
    ) -> dict[str, Feeds]:
        """What the file of each gives."""
        found: dict[str, Feeds] = {}
        for step, (run, names) in self.steps.items():
            own = {
                label: {name: value for name, value in each.items() if name in names}
                for label, each in feeds.items()
                if bool(each[FLAG].all()) is step
            }
            found |= run.outputs(own, optimise=optimise)
        return found


@dataclass(frozen=True)
class _Turned(Run):
    """A file that is asked for its other step."""

    def outputs(
        self, feeds: Mapping[str, Feeds], *, optimise: bool = True, session: Any = None
    ) -> dict[str, Feeds]:
        """What that gives."""
        other = {label: each | {FLAG: ~each[FLAG]} for label, each in feeds.items()}
        return super().outputs(other, optimise=optimise, session=session)
