from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from lora_fx import inject
from lora_fx.export import Session, export_adapter, merge_onnx, to_onnx
from lora_fx.export.spelling.attention import FuseAttention
from lora_fx.frontend.trace import trace
from lora_fx.testing import make_adapter, relative

GRAPH = """
g (float[b, n, 12] q, float[b, n, 12] k, float[b, n, 12] v, float[b, 1, n, n] m)
    => (float[b, n, 12] y)
<float c = {0.5}, float d = {2.0}, int64[4] apart = {0, -1, 3, 4}, int64[3] joined = {0, -1, 12}>
{
    q4 = Reshape(q, apart)
    qh = Transpose <perm = [0, 2, 1, 3]> (q4)
    k4 = Reshape(k, apart)
    kt = Transpose <perm = [0, 2, 3, 1]> (k4)
    v4 = Reshape(v, apart)
    vh = Transpose <perm = [0, 2, 1, 3]> (v4)
    qs = Mul(qh, c)
    qk = MatMul(qs, kt)
    z = Add(qk, m)
    p = Softmax <axis = -1> (z)
    yh = MatMul(p, vh)
    yt = Transpose <perm = [0, 2, 1, 3]> (yh)
    y = Reshape(yt, joined)
}
"""
SHAPES = """
    <float[b, n, 3, 4] q4, float[b, 3, n, 4] qh, float[b, n, 3, 4] k4, float[b, 3, 4, n] kt,
     float[b, n, 3, 4] v4, float[b, 3, n, 4] vh, float[b, 3, n, 4] yh, float[b, n, 3, 4] yt>
"""
SIZES = "float[b, 3, n, 4] qh"
LEAST = "-3.4028234663852886e38"
WHOLE = "y = Attention(q, k, v, m_raised)"
CAP = "qd = Div(qk, d)\n qt = Tanh(qd)\n qc = Mul(qt, {cap})\n z ="


def graph(*changes: tuple[str, str]) -> str:
    values = SHAPES.strip()[1:-1]
    text = GRAPH.replace("12}>", "12}, " + values + ">")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (("z = Add(qk, m)", "z = Add(m, qk)"),),
        (("qs = Mul(qh, c)", "qs = Div(qh, d)"),),
        (("qs = Mul(qh, c)", "qs = Identity(qh)"), ("(qs, kt)", "(qh, kt)")),
        (("Add(qk, m)", "Add(qd, m)"), ("z =", "qd = Div(qk, d)\n z =")),
        (("(qs, kt)", "(qs, ks)"), ("qk =", "ks = Mul(kt, c)\n qk =")),
        (("Add(qk, m)", "Add(qc, m)"), ("z =", CAP.format(cap="d"))),
        (("Add(qk, m)", "Add(m, qc)"), ("z =", CAP.format(cap="c"))),
        (("Add(qk, m)", "Add(qt, m)"), ("z =", CAP.format(cap="c"))),
    ],
)
def test_attention_becomes_one_operator(changes: Any, spelled: Callable[..., Any]) -> None:
    found = spelled(FuseAttention, graph(*changes), b=2, n=5)
    assert found.count == 1
    assert found.text[1:] == [WHOLE]
    assert found.off < 1e-6


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_axes_are_told_apart_where_their_sizes_are_equal(
    name: str, spelled: Callable[..., Any]
) -> None:
    """Four tokens, heads of four: what is turned another way has the same sizes."""
    old = f"Transpose <perm = [0, 2, {'3, 1' if name == 'k' else '1, 3'}]> ({name}4)"
    new = f"Transpose <perm = [0, 2, {'1, 3' if name == 'k' else '3, 1'}]> ({name}4)"
    found = spelled(FuseAttention, graph((old, new), ("n,", "4,"), (", n]", ", 4]")), b=2)
    assert found.off < 1e-6


@pytest.mark.parametrize("sizes", ["1, 1, n, n", "1, 3, n, n", "b, 3, n, n"])
def test_a_mask_of_some_rows_and_heads(sizes: str, spelled: Callable[..., Any]) -> None:
    text = graph(("float[b, 1, n, n] m", f"float[{sizes}] m"))
    found = spelled(FuseAttention, text, b=2, n=5)
    assert found.text[1:] == [WHOLE]
    assert found.off < 1e-6


@pytest.mark.parametrize("names", ["q", "qkv", "qm"])
def test_one_row_that_is_stretched_stays(names: str, spelled: Callable[..., Any]) -> None:
    """As of queries that a model has learned, or of all but the mask: the operator takes none."""
    made = {"q": "3, n, 4] qh", "k": "3, 4, n] kt", "v": "3, n, 4] vh", "m": "1, n, n] m"}
    sizes = [f"{size} {n}" for n in names if n != "m" for size in ("n, 12]", "n, 3, 4]")]
    old = [size if "12" in size else f"{size}4" for size in sizes] + [made[n] for n in names]
    text = graph(*((f"float[b, {one}", f"float[1, {one}") for one in old))
    found = spelled(FuseAttention, text, b=2, n=5)
    assert (found.count, found.off) == (0, 0)


def test_one_head_of_keys_is_every_query_s(spelled: Callable[..., Any]) -> None:
    """As in Falcon, where a product stretches it over those of the queries."""
    one = [(f"float[b, n, 12] {name}", f"float[b, n, 4] {name}") for name in ("k", "v")]
    one += [
        (f"{name}4 = Reshape({name}, apart)", f"{name}4 = Reshape({name}, one)") for name in "kv"
    ]
    one += [(f"float[b, n, 3, 4] {name}4", f"float[b, n, 1, 4] {name}4") for name in "kv"]
    one += [
        ("float[b, 3, 4, n] kt", "float[b, 1, 4, n] kt"),
        ("float[b, 3, n, 4] vh", "float[b, 1, n, 4] vh"),
    ]
    text = graph(*one, ("int64[3] joined", "int64[4] one = {0, -1, 1, 4}, int64[3] joined"))
    found = spelled(FuseAttention, text, b=2, n=5)
    assert found.text[-1] == WHOLE
    assert found.off < 1e-6


@pytest.mark.parametrize(("hidden", "is_mean"), [(LEAST, True), ("-1e9", False), ("-inf", False)])
def test_a_row_of_the_least_number_stays_a_mean(
    hidden: str, is_mean: bool, spelled: Callable[..., Any]
) -> None:
    made = f"float z0 = {{0.0}}, float low = {{{hidden}}}, float c"
    text = graph(("float[b, 1, n, n] m", "bool[b, 1, n, n] kept"), ("float c", made))
    text = text.replace("z = Add", "m = Where(kept, z0, low)\n    z = Add")
    found = spelled(FuseAttention, text.replace(SIZES, f"{SIZES}, float[b, 1, n, n] m"), b=2, n=5)
    assert found.text[-1] == (WHOLE if is_mean else WHOLE.replace("_raised", ""))
    if hidden != "-inf":  # of which the graph before makes NaN
        assert found.off < 1e-6


def test_without_a_mask(spelled: Callable[..., Any]) -> None:
    found = spelled(FuseAttention, graph(("Softmax <axis = -1> (z)", "Softmax (qk)")), b=2, n=5)
    assert found.text == ["y = Attention(q, k, v)"]
    assert found.off < 1e-6


def test_heads_that_are_not_joined_again_stay_apart(spelled: Callable[..., Any]) -> None:
    text = graph(
        (
            "yt = Transpose <perm = [0, 2, 1, 3]> (yh)",
            "ya = Relu(yh)\n yt = Transpose <perm = [0, 2, 1, 3]> (ya)",
        )
    )
    found = spelled(FuseAttention, text, b=2, n=5)
    assert "yh = Attention(qh, " in " ".join(found.text)
    assert not any("Softmax" in row for row in found.text)
    assert found.off < 1e-6


def test_keys_that_are_turned_back_have_a_type_where_none_is_noted(
    spelled: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    apart = (
        "yt = Transpose <perm = [0, 2, 1, 3]> (yh)",
        "ya = Relu(yh)\n yt = Transpose <perm = [0, 2, 1, 3]> (ya)",
    )
    text = graph(apart).replace("float[b, 3, 4, n] kt,", "")
    assert spelled(FuseAttention, text, b=2, n=5).count == 1
    said = capfd.readouterr()
    assert "not known" not in said.out + said.err  # onnx_ir tells of a shape without a type


@pytest.mark.parametrize(
    "changes",
    [
        (("Softmax <axis = -1>", "Softmax <axis = 2>"),),
        (("(p, vh)", "(pp, vh)"), ("yh =", "pp = Abs(p)\n yh =")),
        (("z = Add(qk, m)", "z = Sub(qk, m)"),),
        (("z = Add(qk, m)", "w = Add(qk, m)\n z = Tanh(w)"),),
        (("float[b, 1, n, n] m", "float[b, 1, 1, n] m"),),
        (("float[b, n, 12] y)", "float[b, n, 12] y, float[b, 3, n, n] p)"),),
    ],
)
def test_what_is_something_else_stays(changes: Any, spelled: Callable[..., Any]) -> None:
    found = spelled(FuseAttention, graph(*changes), b=2, n=5)
    assert found.count == 0
    assert any("Softmax" in row for row in found.text)


class Block(nn.Module):
    """Self-attention with a norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))
        self.norm = nn.LayerNorm(12)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (fc(x).unflatten(-1, (3, 4)).transpose(1, 2) for fc in (self.q, self.k, self.v))
        whole = mask[:, None, None].expand(-1, 1, x.shape[1], -1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, whole)
        return self.norm(self.out(y.transpose(1, 2).flatten(-2)) + x)


@pytest.fixture(scope="module")
def block() -> Any:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 12)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    axes = {0: "batch", 1: "length"}
    return trace(Block().eval(), (x, mask), dynamic_shapes=(axes, axes)), x, mask


def test_slots_stay_beside_their_layers(block: Any, tmp_path: Path) -> None:
    gm, x, mask = block
    adapter = make_adapter(dict.fromkeys(("q", "k", "v", "out"), (12, 12)))
    report = to_onnx(inject(gm, adapter), tmp_path / "model.onnx", adapters="input")
    assert report.verified
    assert report.spellings[FuseAttention.what] == 1
    assert report.opset == 23
    model = onnx.load(tmp_path / "model.onnx")
    names = {node.op_type: node.name for node in model.graph.node}
    assert not {"Softmax", "IsNaN"} & set(names)
    export_adapter(adapter, tmp_path / "model.onnx", tmp_path / "a.onnx_adapter")
    merge_onnx(tmp_path / "model.onnx", adapter, tmp_path / "merged.onnx")
    feeds = {"x": x[:1, :5], "mask": mask[1:, :5]}
    (found,) = Session(tmp_path / "merged.onnx").run(feeds).values()
    (base,) = Session(tmp_path / "model.onnx").run(feeds).values()
    wanted = inject(gm, adapter)(feeds["x"], feeds["mask"])
    assert relative(torch.from_numpy(found), wanted) < 1e-5
    assert relative(torch.from_numpy(base), wanted) > 1e-2


@pytest.mark.parametrize("options", [{"opset": 20}, {"portable": True}])
def test_an_opset_that_is_asked_for_stays(block: Any, options: Any, tmp_path: Path) -> None:
    report = to_onnx(block[0], tmp_path / "model.onnx", **options)
    assert report.verified
    assert FuseAttention.what not in report.spellings
    assert report.opset == 20
