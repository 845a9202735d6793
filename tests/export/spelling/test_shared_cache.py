"""A cache that is written in place: the same numbers, copied or not, from what room there is."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from lora_fx.errors import ExportError
from lora_fx.export.runtime.in_place import AXES, writes_in_place
from lora_fx.export.spelling.shared_cache import share_caches
from lora_fx.testing import relative
from tests.export.spelling.conftest import HEAD

BATCH, PAST, NEW = 2, 5, 1
GRAPH = """
g ({given}, int64[b, all] attention_mask, float[b, 2, past, 8] pk,
   float[b, 2, past, {size}] pv{more})
    => (float[b, n, 32] y, float[b, 2, all, 8] ak,
        float[b, 2, all, {size}] av{outputs})
<int64 one = {{1}}, int64 zero = {{0}}, int64[3] left = {{0, 1, 2}}, int64[3] ends = {{0, 1, 3}},
 int64[2] middle = {{1, 2}}, float nothing = {{0.0}}, float least = {{-3.4e38}},
 int64[3] joined = {{0, 0, 32}}, int64[1] first = {{0}}, int64[1] second = {{1}},
 int64[n] q0, int64[n] q1, int64[all] k0, int64[1, 1, n, 1] qs,
 int64[1, 1, 1, all] ks, float[b, 1, n, all] m, float[b, 4, n, 8] heads, float[b, n, 4, 8] turned>
{{
    sizes = Shape <start = 2, end = 3> (pk)
    past = Squeeze(sizes)
    news = Shape <start = {axis}> (k)
    new = Slice(news, first, second)
    n = Squeeze(new)
    whole = Add(past, n)
    q0 = Range(zero, n, one)
    q1 = Add(q0, past)
    qs = Unsqueeze(q1, ends)
    k0 = Range(zero, whole, one)
    ks = Unsqueeze(k0, left)
    causal = LessOrEqual(ks, {query})
    truth = Cast <to = 9> (attention_mask)
    kept = Unsqueeze(truth, middle)
    both = And(causal, kept)
    m = Where(both, nothing, least)
    {attention}
}}
"""
NAMES = {  # which the text of a graph has no room for
    "pk": "past_key_values.0.key", "pv": "past_key_values.0.value",
    "ak": "present.0.key", "av": "present.0.value",
}  # fmt: skip
ROWS = "float[b, n, 32] x, float[b, n, 16] k, float[b, n, 16] v"
HEADS = "float[b, 4, n, 8] x, float[b, 2, n, 8] k, float[b, 2, n, 8] v"
PASTS = "pk, pv"
PRESENTS = "ak, av"
ATTENTION = (
    f"y, {PRESENTS} = Attention <q_num_heads = 4, kv_num_heads = 2, scale = 0.25> "
    f"(x, k, v, m, {PASTS})"
)
OF_HEADS = f"heads, {PRESENTS} = Attention <scale = 0.25> (x, k, v, m, {PASTS})"
PLAIN = {
    "given": ROWS, "size": "8", "more": "", "outputs": "", "query": "qs", "attention": ATTENTION,
    "axis": "1",
}  # fmt: skip
APART = {"given": HEADS, "axis": "2"}
JOINED = APART | {
    "attention": OF_HEADS + "\n turned = Transpose <perm = [0, 2, 1, 3]> (heads)\n"
    "y = Reshape(turned, joined)",
}


def model(**changed: str) -> ir.Model:
    found = ir.from_proto(onnx.parser.parse_model(HEAD + GRAPH.format(**PLAIN | changed)))
    for value in (*found.graph.inputs, *found.graph.outputs):
        value.name = NAMES.get(str(value.name), value.name)
    return found


def feeds(past: int, new: int, heads: bool = False) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    shapes = {
        name: (BATCH, count, new, 8) if heads else (BATCH, new, count * 8)
        for name, count in (("x", 4), ("k", 2), ("v", 2))
    }
    caches = {f"past_key_values.0.{part}": (BATCH, 2, past, 8) for part in ("key", "value")}
    mask = np.ones((BATCH, past + new), np.int64)
    mask[1, : past // 2] = 0
    found = {n: draw.standard_normal(s).astype("f4") for n, s in (shapes | caches).items()}
    return found | {"attention_mask": mask}


def session(model: ir.Model) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)


def tensors(values: Any) -> list[torch.Tensor]:
    return [torch.from_numpy(np.asarray(value)) for value in values]


@pytest.mark.parametrize("changed", [{}, JOINED], ids=["rows", "heads"])
@pytest.mark.parametrize(("past", "new"), [(PAST, NEW), (0, 4)])
def test_a_cache_that_is_copied_gives_the_same(
    changed: dict[str, str], past: int, new: int
) -> None:
    given = feeds(past, new, heads=bool(changed))
    wanted = tensors(session(model(**changed)).run(None, given))
    shared = model(**changed)
    assert share_caches(shared) == {"caches that can be written in place, GroupQueryAttention of "
                                    "onnxruntime": 1}  # fmt: skip
    assert shared.metadata_props[AXES] == "b, n"
    found = tensors(session(shared).run(None, given))
    assert relative(found, wanted) < 1e-6
    other = tensors(session(shared).run(None, given | {"x": -given["x"]}))
    assert relative(other[:1], wanted[:1]) > 0.1


def test_a_cache_with_room_is_written_in_place() -> None:
    """Whatever stands where nothing was written yet."""
    given, room = feeds(PAST, NEW), 9
    wanted = session(model()).run(None, given)
    shared = model()
    share_caches(shared)
    assert writes_in_place(ir.to_proto(shared))
    assert not writes_in_place(ir.to_proto(model()))
    read_besides = ir.to_proto(shared)
    read_besides.graph.node.add(op_type="Neg", input=["past_key_values.0.key"], output=["other"])
    assert not writes_in_place(read_besides)
    opened = session(shared)
    binding, buffers = opened.io_binding(), {}
    for name, value in given.items():
        if name.startswith("past"):
            buffer = np.full((BATCH, 2, room, 8), np.nan, np.float32)
            buffer[:, :, :PAST] = value
            buffers[name] = ort.OrtValue.ortvalue_from_numpy(buffer)
            binding.bind_ortvalue_input(name, buffers[name])
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffers[name])
        else:
            binding.bind_cpu_input(name, value)
    binding.bind_output("y")
    opened.run_with_iobinding(binding)
    written = [buffer.numpy()[:, :, : PAST + NEW] for buffer in buffers.values()]
    found = tensors([binding.get_outputs()[-1].numpy(), *written])
    assert relative(found, tensors(wanted)) < 1e-6


def test_heads_that_nobody_puts_side_by_side_are_taken_apart_again() -> None:
    changed = APART | {"attention": OF_HEADS + "\n more = Neg(heads)\n y = Identity(x0)",
               "more": ", float[b, n, 32] x0", "outputs": ", float[b, 4, n, 8] more"}  # fmt: skip
    given = feeds(PAST, NEW, heads=True) | {"x0": np.zeros((BATCH, NEW, 32), np.float32)}
    wanted = tensors(session(model(**changed)).run(None, given))
    shared = model(**changed)
    share_caches(shared)
    assert relative(tensors(session(shared).run(None, given)), wanted) < 1e-6


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attention": "y = Identity(x)\n ak = Identity(pk)\n"
          "av = Identity(pv)"},
         "no attention in float32 appends to a cache that is an input"),
        ({"query": "zero"}, "key: nothing shows that its mask hides what stands behind a query"),
        ({"outputs": ", float[b, 2, past, 8] z",
          "attention": ATTENTION + "\n z = Neg(pk)"},
         r"past_key_values\.0\.key is not of one attention alone"),
        ({"outputs": ", float[b, 2, all, 8] z", "attention": ATTENTION + "\n z = Neg(ak)"},
         r"past_key_values\.0\.key is not of one attention alone"),
        ({"more": ", float[b, past] z"}, "z is as long as a cache, and no attention appends to it"),
        ({"size": "16", "given": ROWS.replace("16] v", "32] v")},
         "its heads are of 8, those of values of 16"),
    ],
)  # fmt: skip
def test_a_cache_that_cannot_be_shared_is_refused(changed: dict[str, str], message: str) -> None:
    refused = model(**changed)
    before = ir.to_proto(refused).SerializeToString()
    with pytest.raises(ExportError, match=f"shared_cache: .*{message}.*Leave it out"):
        share_caches(refused)
    assert ir.to_proto(refused).SerializeToString() == before
