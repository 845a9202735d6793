"""Which masks are proved to hide what stands behind a query, and that those which are do."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lora_fx.export.spelling.causal import hides_what_follows
from tests.export.spelling.conftest import HEAD

TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}
GRAPH = """
g (float[b, 2, past, 4] pk, int64[b, n] ids, int64[b, all] given, bool[n, all] other)
    => (float[b, 1, n, all] mask)
<int64 zero = {{0}}, int64 one = {{1}}, int64 window = {{3}}, int64[2] rows = {{0, 1}},
 int64[3] left = {{0, 1, 2}}, int64[3] ends = {{0, 1, 3}}, int64[2] middle = {{1, 2}},
 int64[1] last = {{-1}}, int64[1] first = {{0}}, float nothing = {{0.0}}, float least = {{{least}}},
 int64[n] q0, int64[n] q1, int64[all] k0, int64[1, 1, n, 1] q, int64[1, 1, 1, all] k,
 int64[1, 1, 1, all] k1, int64[n, 1] q2, bool[1, 1, n, all] causal, bool[b, 1, n, all] both,
 float[b, 1, n, all] m, bool[n, all] flat, bool[1, 1, n, all] lifted>
{{
    ps = Shape <start = 2, end = 3> (pk)
    past = Squeeze(ps)
    ns = Shape <start = 1, end = 2> (ids)
    n = Squeeze(ns)
    whole = Add(past, n)
    q0 = Range(zero, n, one)
    q1 = Add({query})
    q = Unsqueeze(q1, ends)
    k0 = Range(zero, whole, one)
    k = Unsqueeze(k0, left)
    bg = Cast <to = 9> (given)
    kept = Unsqueeze(bg, middle)
    {causal}
    {both}
    mask = {mask}
}}
"""
PLAIN = {
    "query": "q0, past",
    "causal": "causal = LessOrEqual(k, q)",
    "both": "both = And(causal, kept)",
    "mask": "Where(both, nothing, least)",
    "least": "-3.4e38",
}
LIFT = "\n q2 = Unsqueeze(q1, last)\n flat = LessOrEqual(k0, q2)\n causal = Unsqueeze(flat, rows)"


def model(**changed: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(HEAD + GRAPH.format(**PLAIN | changed)))


def proved(**changed: str) -> bool:
    graph = model(**changed).graph
    return hides_what_follows(graph.outputs[0], graph.inputs[0])


def is_causal(**changed: str) -> bool:
    """What the graph itself gives, wherever a key stands behind its query."""
    found = []
    for past, new in ((0, 4), (3, 2), (2, 1)):
        sizes = {"b": 2, "past": past, "n": new, "all": past + new}
        session = ort.InferenceSession(ir.to_proto(model(**changed)).SerializeToString())
        feeds = {
            each.name: np.ones([sizes.get(size, size) for size in each.shape], TYPES[each.type])
            for each in session.get_inputs()
        }
        (mask,) = session.run(None, feeds)
        behind = np.arange(past + new) > past + np.arange(new)[:, None]
        found.append(mask[:, :, behind].max(initial=-np.inf) < -1e9)
    return all(found)


CAUSAL = {
    "as transformers says it": {},
    "the other way round": {"causal": "causal = GreaterOrEqual(q, k)"},
    "by its contrary": {"causal": "later = Greater(k, q)\n causal = Not(later)"},
    "by the contrary of another": {"causal": "later = Less(q, k)\n causal = Not(later)"},
    "with a window": {
        "both": "w = Sub(q, window)\n near = Greater(k, w)\n c = And(near, causal)\n"
        "both = And(kept, c)"
    },
    "less than the query's own place": {"causal": "causal = Less(k, q)"},
    "of two axes at first": {"causal": LIFT},
    "offset by nothing": {"causal": "k1 = Add(k, zero)\n causal = LessOrEqual(k1, q)"},
    "the past first": {"query": "past, q0"},
    "what is hidden first": {
        "both": "later = Not(causal)\n pad = Not(kept)\n both = Or(later, pad)",
        "mask": "Where(both, least, nothing)",
    },
    "as numbers": {
        "mask": "Mul(m, least)",
        "both": "both = And(causal, kept)\n no = Not(both)\n m = Cast <to = 1> (no)",
    },
}
NOT_CAUSAL = {
    "of padding alone": {"mask": "Where(kept2, nothing, least)",
                         "both": "both = And(causal, kept)\n kept2 = Or(kept, both)"},
    "or what somebody else says": {"both": "both = Or(causal, other)"},
    "of queries from nothing on": {"query": "q0, one"},
    "the wrong way": {"causal": "causal = GreaterOrEqual(k, q)"},
    "not one that hides": {"least": "-100.0"},
    "and its contrary": {"mask": "Where(both, least, nothing)"},
    "turned": {
        "causal": "square = LessOrEqual(k, q)\n rows4 = Shape(square)\n"
        "turned = Transpose <perm = [0, 1, 3, 2]> (square)\n causal = Reshape(turned, rows4)",
    },
    "its rows in another order": {
        "causal": "square = LessOrEqual(k, q)\n back = Sub(n, one)\n order = Sub(back, q0)\n"
        "causal = Gather <axis = 2> (square, order)",
    },
    "of what is not counted": {
        "causal": "kk = Mul(k, zero)\n causal = LessOrEqual(kk, q)",
    },
}  # fmt: skip


@pytest.mark.parametrize("changed", CAUSAL.values(), ids=list(CAUSAL))
def test_a_mask_that_hides_what_follows_is_known(changed: dict[str, str]) -> None:
    assert proved(**changed)
    assert is_causal(**changed)


@pytest.mark.parametrize("changed", NOT_CAUSAL.values(), ids=list(NOT_CAUSAL))
def test_one_that_does_not_is_not(changed: dict[str, str]) -> None:
    assert not proved(**changed)
    assert not is_causal(**changed)
