"""The numbers that a file's weights of a few bits stand for, put where a model has its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import fx

from lora_fx.errors import VerificationError
from lora_fx.export.onnx_model.model_file import INLINE_LIMIT, write_model
from lora_fx.export.onnx_model.parsed import parsed_file
from lora_fx.export.onnx_model.tensors import add_constant, to_numpy
from lora_fx.export.quantization.quantise import error_of
from lora_fx.export.quantization.schemes import KINDS, LEVEL, Blocks, Table
from lora_fx.export.rewriting.dequantize import DEFAULT_BLOCK, in_few_bits, weight_and_step
from lora_fx.export.rewriting.file_layers import FileLayer, layers_in
from lora_fx.export.rewriting.layer_names import apart, paths_in
from lora_fx.export.rewriting.weight_reads import input_at
from lora_fx.graph.editor import FOLDED, Editor
from lora_fx.graph.example import forget_model
from lora_fx.graph.lazy_tensor import LazyTensor, evaluate, get_unevaluated
from lora_fx.injection.injected_adapters import remember
from lora_fx.io.atomic import scratch
from lora_fx.layers.sites import sites

_END = re.compile(r"_(Q\d+|Bnb4)(_\d+)?$")  # a number, where the file has another of the name
Array = np.ndarray[Any, Any]


def packed_in(path: Path) -> dict[str, FileLayer]:
    """The layers of a file whose weights are in a few bits, by path, or by the weight's name."""
    model = parsed_file(path)
    found = apart(in_few_bits(model), paths_in(layers_in(model)), weight_of)
    return {name: calls[0] for name, calls in found.items()}


def weight_of(layer: FileLayer) -> str:
    """What a weight in a few bits was called before."""
    return _END.sub("", str(layer.weight.name))


@contextmanager
def of_whole_x(path: Path) -> Iterator[Path]:
    """A file in which nothing rounds x: itself, or a copy that is held to more than it can hold."""
    model = parsed_file(path)
    nodes = [node for node in model.graph.all_nodes() if LEVEL in node.attributes]
    if not nodes:
        yield path
        return
    for node in nodes:
        del node.attributes[LEVEL]
    with scratch() as directory:
        copy = directory / path.name
        write_model(model, copy, external_data_above=INLINE_LIMIT)
        yield copy


def scheme_in(packed: Mapping[str, FileLayer]) -> str:
    """How the weights of some layers are stored, in words."""
    products = [layer for layer in packed.values() if layer.kind != "embedding"]
    return ", ".join(dict.fromkeys(map(_scheme, products or packed.values())))


def with_numbers(
    gm: fx.GraphModule, packed: Mapping[str, FileLayer]
) -> tuple[fx.GraphModule, dict[str, float]]:
    """A graph with the numbers of a file in place of its own weights, and how far they are off.

    Args:
        gm: the graph; it is not changed. One whose weights are these numbers is given back, else a
            copy that remembers no module, and no fold.
        packed: the file's layers. One whose path the graph does not have is known by the name of
            its weight; of a head and a table that share one either may be there.

    Raises:
        VerificationError: a weight is none of the graph's, or not the one that was quantised.
    """
    editor = Editor(gm)
    known = sites(editor.gm)
    tables = {site.node for site in known if site.is_table}
    layers = [site for site in known if site.is_linear or site.is_table]
    weights = {(site.is_table, site.path): str(site.weight.target) for site in layers}
    errors: dict[str, float] = {}
    read = set()
    for path, layer in packed.items():
        is_table = layer.kind == "embedding"
        name = weights.get((is_table, path), weight_of(layer))
        if (name, is_table) in read:  # by another path
            continue
        read.add((name, is_table))
        fetches = editor.gm.graph.find_nodes(op="get_attr", target=name)
        if not fetches:
            raise VerificationError(f"{name}: quantised, and no weight of the model's")
        own = get_unevaluated(gm, name)
        turned, errors[path] = _compared(name, evaluate(own), layer)
        for fetch in fetches if errors[path] else ():
            numbers = editor.constant(name, _lazily(layer, turned, own), before=fetch)
            others = set(fetch.users) - tables if is_table else tables
            editor.replace(fetch, numbers, keep=others)
    if not any(errors.values()):
        return gm, errors
    found = editor.finish()
    forget_model(found)
    remember(found, ())
    for node in found.graph.nodes:
        node.meta.pop(FOLDED, None)  # what was folded had other numbers
    return found, errors


def with_numbers_of(source: Path, packed: Mapping[str, FileLayer], factor: float = 1) -> ir.Model:
    """The file that was quantised, with the numbers in place of its weights, times a factor."""
    model = parsed_file(source)
    found = {(weight_of(layer), layer.kind): layer for layer in packed.values()}
    names = {name for name, _ in found}
    tables: dict[ir.Value, ir.Value] = {}  # a head may share a weight, and either changes alone
    for layer in [layer for layer in layers_in(model) if layer.weight.name in names]:
        weight, numbers = layer.weight, found.get((str(layer.weight.name), layer.kind))
        if layer.kind == "embedding":
            if weight not in tables:
                assert weight.const_value is not None
                name, table = f"{weight.name}_table", weight.const_value
                tables[weight] = add_constant(model.graph, name, table)
            layer.node.replace_input_with(0, weight := tables[weight])
        if numbers is not None:
            weight.const_value = _tensor(weight, numbers, not layer.turned, factor)
    common.NameFixPass()(model)  # a value of the file may be called as a copy is
    return model


def _scheme(layer: FileLayer) -> str:
    given = layer.node.attributes
    block = given.get_int("block_size", DEFAULT_BLOCK) or DEFAULT_BLOCK
    if layer.node.op_type == "MatMulBnb4":
        return str(Table(KINDS[given["quant_type"].as_int()], block))
    bits, level = given.get_int("bits", 4) or 4, given.get_int(LEVEL, 0) or 0
    return str(Blocks(bits, block, level, symmetric=input_at(layer.node, 3) is None))


def _tensor(value: ir.Value, packed: FileLayer, turned: bool, factor: float) -> ir.LazyTensor:
    def computed() -> ir.TensorProtocol:
        return ir.tensor(_numbers(packed, turned, factor), name=value.name)

    assert value.shape is not None
    assert value.dtype is not None
    return ir.LazyTensor(computed, dtype=value.dtype, shape=value.shape, name=value.name)


def _numbers(layer: FileLayer, turned: bool, factor: float = 1) -> Array:
    """W (in, out), or turned round (out, in)."""
    found = weight_and_step(layer.node)[0]
    made = np.ascontiguousarray(found.T if turned else found)
    return made if factor == 1 else (made * factor).astype(made.dtype)


def _compared(name: str, own: torch.Tensor, layer: FileLayer) -> tuple[bool, float]:
    """Whether a model stores a weight as (out, in), and how far its numbers are off."""
    problem: VerificationError | None = None
    numbers, step = weight_and_step(layer.node)
    for turned in (True, False):
        held = to_numpy(own.T if turned else own)
        if held.shape != numbers.shape:
            continue
        try:
            return turned, error_of(name, held, numbers, step)
        except VerificationError as error:
            problem = problem or error
    raise problem or VerificationError(
        f"{name}: {tuple(own.shape)} in the model, {layer.shape} in the file: is it another model?"
    )


def _lazily(layer: FileLayer, turned: bool, own: torch.Tensor | LazyTensor) -> LazyTensor:
    def made() -> torch.Tensor:
        return torch.from_numpy(_numbers(layer, turned)).to(own.dtype)

    return LazyTensor(tuple(own.shape), own.dtype, made, ("numbers", id(layer)), cache=False)
