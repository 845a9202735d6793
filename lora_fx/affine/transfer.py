"""What each operator does to a value: the table of transfer functions."""

from __future__ import annotations

from torch import fx

from lora_fx.affine import convs, einsums, features, joins, layers, moves, sums
from lora_fx.affine.analysis import Analysis, Rule


def analyse(gm: fx.GraphModule) -> Analysis:
    """Finds the value of every node of a graph in normal form."""
    return Analysis(gm, TRANSFER)


TRANSFER: dict[str, Rule] = {
    "linear": layers.linear,
    "addmm": layers.addmm,
    "baddbmm": layers.addmm,
    "matmul": layers.matmul,
    "mm": layers.matmul,
    "bmm": layers.matmul,
    "tensordot": layers.matmul,
    "embedding": layers.embedding,
    "einsum": einsums.einsum,
    "conv1d": convs.conv,
    "conv2d": convs.conv,
    "conv3d": convs.conv,
    "add": sums.add,
    "sub": sums.sub,
    "rsub": sums.rsub,
    "mul": sums.mul,
    "div": sums.div,
    "truediv": sums.div,
    "neg": sums.neg,
    "dropout": moves.dropout,
    "identity": moves.identity,
    "alias": moves.identity,
    "clone": moves.identity,
    "contiguous": moves.identity,
    "detach": moves.identity,
    "lift_fresh_copy": moves.identity,
    "to": moves.cast,
    "_to_copy": moves.cast,
    "type_as": moves.cast,
    "float": moves.cast,
    "double": moves.cast,
    "half": moves.cast,
    "bfloat16": moves.cast,
    "view": moves.reshape,
    "reshape": moves.reshape,
    "_unsafe_view": moves.reshape,
    "view_as": moves.reshape,
    "reshape_as": moves.reshape,
    "flatten": moves.reshape,
    "unflatten": moves.reshape,
    "squeeze": moves.reshape,
    "unsqueeze": moves.reshape,
    "transpose": moves.transpose,
    "swapaxes": moves.transpose,
    "permute": moves.permute,
    "t": moves.turn,
    "mT": moves.turn,
    "slice": features.slice_,
    "narrow": features.narrow,
    "select": features.select,
    "index_select": features.index_select,
    "split": features.split,
    "split_with_sizes": features.split,
    "chunk": features.split,
    "getitem": features.getitem,
    "cat": joins.cat,
    "concat": joins.cat,
    "pad": joins.pad,
    "constant_pad_nd": joins.pad,
    "index_put": joins.index_put,
    "slice_scatter": joins.slice_scatter,
    "zeros": joins.uniform,
    "ones": joins.uniform,
    "zeros_like": joins.uniform,
    "ones_like": joins.uniform,
    "new_zeros": joins.uniform,
    "new_ones": joins.uniform,
}
