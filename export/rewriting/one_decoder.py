"""Both steps of a decoder in one file, as Transformers.js and optimum load them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from lora_fx.export.onnx_model.changed_file import tensor_digests
from lora_fx.export.onnx_model.digests import KEY
from lora_fx.export.onnx_model.model_file import INLINE_LIMIT, load_proto, write_model
from lora_fx.export.onnx_model.parsed import parsed_file
from lora_fx.export.onnx_model.tensors import add_constant
from lora_fx.export.report import Clock, ExportReport, file_sizes
from lora_fx.export.rewriting.file_layers import types_of_numbers
from lora_fx.export.verification.file_run import Feeds, Run
from lora_fx.export.verification.made_inputs import feeds_for
from lora_fx.export.verification.side_by_side import Pair, coarsest_named, held_against
from lora_fx.graph.example import TASK
from lora_fx.io.atomic import staged

FLAG = "use_cache_branch"  # as optimum calls it
_CONTROL = "control: the other step"


def join_decoders(
    first: Path, later: Path, out: Path, progress: Callable[[str], None] | None = None
) -> ExportReport:
    """Writes one file that is the first step of a decoder or a later one, as a flag says.

    A flag ``use_cache_branch`` (1,) chooses a branch of an ``If``; both share their weights. What
    comes of the encoder, a later step gives no values of, shape (0, heads, 1, size): who calls it
    keeps those of the first. Source: optimum's ``merge_decoders``, and Transformers.js 4.3.

    Args:
        first: the file of the first step, without slots.
        later: that of the others: with a cache among its inputs.
        out: the ``.onnx`` file to write.
        progress: told the name of each stage as it starts.

    Raises:
        ExportError: it exists.
        VerificationError: it gives other numbers than the two.
    """
    clock, files = Clock(progress), (first, later)
    with clock.stage("join"):
        models = [parsed_file(path) for path in files]
        said = [tensor_digests(load_proto(path), path) for path in files]
        model, known = _joined(models, said)
    with staged(out, force=False) as draft:
        with clock.stage("write"):
            write_model(model, draft, external_data_above=INLINE_LIMIT, known=known)
        with clock.stage("verify"):
            feeds = feeds_for(joined := Run(draft), load_proto(draft))
            apart = _Apart(draft, steps={False: Run(first), True: Run(later)})
            dtype = coarsest_named(list(types_of_numbers(model)))
            pair, control = Pair("joined", joined, apart), _Turned(draft)
            evidence = held_against([pair], {_CONTROL: control}, feeds, dtype)
            evidence.judge(str(out))
        sizes = file_sizes(draft.parent)
    return ExportReport.of(
        out, evidence, clock, mode="merged", files=sizes, opset=model.opset_imports[""],
        task=model.metadata_props.get(TASK),
        inputs=[str(value.name) for value in model.graph.inputs],
        outputs=[str(value.name) for value in model.graph.outputs],
    )  # fmt: skip


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
                weights[own] = add_constant(joined, name, tensor)
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
    common.NameFixPass()(joined)  # both branches have values of one name
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
            assert result.shape is not None, "our files say the shapes of their outputs"
            sizes = [0, *(size if isinstance(size, int) else 1 for size in result.shape[1:])]
            empty = ir.tensor(np.zeros(sizes, result.dtype and result.dtype.numpy()))
            graph.append(node := ir.node("Constant", [], {"value": empty}))
            value = node.outputs[0]
            value.shape, value.type = ir.Shape(sizes), result.type
        elif value.producer() is None:  # it stands around the branch
            graph.append(node := ir.node("Identity", [value]))
            value = node.outputs[0]
        graph.outputs.append(value)


@dataclass(frozen=True)
class _Apart(Run):
    """The two files as one: the flag says which runs.

    Attributes:
        steps: the later one's by True.
    """

    steps: Mapping[bool, Run] = field(default_factory=dict)

    def outputs(
        self, feeds: Mapping[str, Feeds], *, optimise: bool = True, session: Any = None
    ) -> dict[str, Feeds]:
        """What the file of each gives."""
        found: dict[str, Feeds] = {}
        for step, run in self.steps.items():
            names = {value.name for value in load_proto(run.path).graph.input}
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
