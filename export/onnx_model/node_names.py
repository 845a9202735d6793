"""Nodes called after the modules that they compute, so that tools can be told which to leave."""

from __future__ import annotations

import re
from ast import literal_eval

import onnx_ir as ir

_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<part>A|B|gain|bias|col)(_experts|t)?(\..+)?")
_PRODUCTS = {"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "Mul"}
_SCOPES = "pkg.torch.onnx.name_scopes"
_SUM = "lora"  # the part of a name behind the last factor
Label = tuple[str, str]  # path of a layer, and the part of its branch


def name_nodes(model: ir.Model) -> None:
    """Names nodes ``<module path>/<operator>``, those of a branch by its factor, in place.

    ``fc/MatMul``, ``fc/lora_A/MatMul``, ``fc/lora_B/MatMul``, ``fc/lora/Add``; another of one name
    gets a number. What no module holds keeps its name.
    """
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    labels = {value: (m["path"], f"lora_{m['part']}") for value in values if (m := _match(value))}
    taken: dict[str, int] = {}
    for node in model.graph:
        name = _of_branch(node, labels) or _of_module(node)
        if name is None:
            continue
        count = taken[name] = taken.get(name, -1) + 1
        node.name = f"{name}_{count}" if count else name


def _match(value: ir.Value) -> re.Match[str] | None:
    return _FACTOR.fullmatch(str(value.name))


def _of_branch(node: ir.Node, labels: dict[ir.Value, Label]) -> str | None:
    """The name of a node that a factor goes into, or what was made of one.

    What only hands a factor on hands on its name too; a product with B or a vector, and of A with
    B, is what is added to the layer.
    """
    found = [labels[value] for value in node.inputs if value in labels]
    if not found:
        return None
    path, part = found[-1]
    is_sum, is_whole = node.op_type in ("Add", "Sum"), len(found) == len(node.inputs)
    reads_x = part in ("lora_A", "lora_col") and not is_whole
    is_product = node.op_type in _PRODUCTS or (node.op_type == "Gather" and part == "lora_A")
    if (is_whole and (is_sum or is_product)) or (is_product and not reads_x):
        labels |= dict.fromkeys(node.outputs, (path, _SUM))
    elif not is_product and not is_sum:
        labels |= dict.fromkeys(node.outputs, (path, part))
    is_made = is_whole and is_product
    return f"{path}/{_SUM if is_sum or is_made else part}/{node.op_type}"


def _of_module(node: ir.Node) -> str | None:
    """By the module that torch.onnx notes."""
    scopes = literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return f"{scopes[-2]}/{node.op_type}" if len(scopes) > 1 and scopes[-2] else None


def tensors_of_constants(model: ir.Model) -> None:
    """Gives every Constant its ``value`` as a tensor: tools know no other attribute of it."""
    for node in model.graph.all_nodes():
        if node.op_type != "Constant" or "value" in node.attributes:
            continue
        tensor = ir.convenience.get_const_tensor(node.outputs[0])
        if tensor is not None:
            node.attributes.clear()
            node.attributes["value"] = ir.AttrTensor("value", tensor)
