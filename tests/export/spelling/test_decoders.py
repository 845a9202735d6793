"""What decoders spell out: norms, rotary positions, shared heads and a cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from lora_fx.export.spelling.attention import FuseAttention
from lora_fx.export.spelling.rms_norm import FuseRmsNorm
from lora_fx.export.spelling.rotary import FuseRotary

NORM = """
g (float[b, n, 5] x) => (float[b, n, 5] y{more})
<float[5] w = {{1.0, -2.0, 0.5, 0.25, 3.0}}, float two = {{{power}.0}}, float eps = {{0.01}},
 int64[1] axis = {{{axis}}}, float[{sizes}] z>
{{
    p = Pow(x, two)
    m = ReduceMean <keepdims = 1> (p, axis)
    a = Add(m, eps)
    s = Sqrt(a)
    r = Reciprocal(s)
    z = Mul({of}, r)
    y = Mul({product})
}}
"""


def norm(**changed: str) -> str:
    plain = {"more": "", "power": "2", "axis": "-1", "of": "x", "product": "w, z"}
    return NORM.format(**({"sizes": "b, n, 5"} | plain | changed))


@pytest.mark.parametrize("changed", [{}, {"product": "z, w"}])
def test_a_norm_becomes_one_operator(changed: dict[str, str], spelled: Callable[..., Any]) -> None:
    found = spelled(FuseRmsNorm, norm(**changed), b=2, n=3)
    assert found.text == ["y = RMSNormalization(x, w)"]
    assert found.off < 1e-6


@pytest.mark.parametrize(
    "changed",
    [
        {"power": "3"},
        {"axis": "1"},
        {"of": "p"},
        {"product": "x, z"},
        {"more": ", float[b, n, 5] z"},
    ],
)
def test_what_is_no_norm_stays(changed: dict[str, str], spelled: Callable[..., Any]) -> None:
    found = spelled(FuseRmsNorm, norm(**changed), b=2, n=3)
    assert found.count == 0
    assert any("Reciprocal" in row for row in found.text)


ROTARY = """
g (float[b, n, 6] q, float[b, n, 2] f) => (float[b, 1, n, 6] y)
<int64[4] apart = {{0, -1, 1, 6}}, int64[1] zero = {{0}}, int64[1] half = {{{half}}},
 float c = {{{scale}}}, int64[1] end = {{9223372036854775807}},
 int64[1] last = {{3}}, int64[1] one = {{1}},
 float[b, n, 1, 6] q4, float[b, 1, n, 6] x, float[b, n, 6] cc, float[b, n, 6] cs>
{{
    q4 = Reshape(q, apart)
    x = Transpose <perm = [0, 2, 1, 3]> (q4)
    g3 = Concat <axis = -1> (f, f, f)
    h = Slice(g3, zero, three, axis2)
    angles = Concat <axis = -1> ({angles})
    ac = Cos(angles)
    cc = Mul(ac, c)
    as = Sin(angles)
    cs = Mul(as, c)
    cos = Unsqueeze(cc, one)
    sin = Unsqueeze(cs, one)
    first = Slice(x, zero, half, last)
    second = Slice(x, half, end, last)
    minus = Neg({minus})
    turned = Concat <axis = -1> ({turned})
    a = Mul(x, cos)
    s = Mul(turned, sin)
    y = Add(a, s)
}}
"""


def rotary(**changed: str) -> str:
    plain = {
        "half": "3",
        "scale": "1.5",
        "angles": "h, h",
        "minus": "second",
        "turned": "minus, first",
    }
    text = ROTARY.format(**(plain | changed))
    return text.replace("int64[1] one", "int64[1] three = {3}, int64[1] axis2 = {2}, int64[1] one")


@pytest.mark.parametrize(("scale", "scaled"), [("1.5", 2), ("1", 0)])
def test_rotary_positions_become_one_operator(
    scale: str, scaled: int, spelled: Callable[..., Any]
) -> None:
    """Its angles are no longer joined with themselves, nor what is made of them cut in half."""
    found = spelled(FuseRotary, rotary(scale=scale), b=2, n=5)
    called = Counter(row.partition("(")[0].split()[-1] for row in found.text)
    assert found.count == called["RotaryEmbedding"] == 1
    assert (called["Cos"], called["Sin"], called["Mul"]) == (1, 1, scaled)
    assert (called["Slice"], called["Concat"], called["Neg"]) == (1, 1, 0)  # of the input alone
    assert found.off < 1e-6


@pytest.mark.parametrize(
    "changed",
    [
        {"half": "2", "turned": "minus, first"},
        {"angles": "h, g3h"},
        {"minus": "first", "turned": "minus, second"},
        {"turned": "first, minus"},
    ],
)
def test_other_rotations_stay(changed: dict[str, str], spelled: Callable[..., Any]) -> None:
    text = rotary(**changed).replace("angles =", "g3h = Neg(h)\n angles =")
    found = spelled(FuseRotary, text, b=2, n=5)
    assert found.count == 0


CACHED = """
g (float[b, n, 16] q, float[b, n, 8] k, float[b, n, 8] v, float[b, 2, past, 4] pk,
   float[b, 2, past, 4] pv, float[b, 1, n, all] m) => (float[b, n, 16] y, float[b, 2, all, 4] ak,
   float[b, 2, all, 4] av)
<int64[4] q_apart = {{0, -1, 4, 4}}, int64[4] apart = {{0, -1, 2, 4}},
 int64[3] joined = {{0, -1, 16}}, int64[1] two = {{2}},
 int64[5] times = {{1, 1, 2, 1, 1}}, int64[4] again = {{0, 4, -1, 4}},
 float[b, n, 4, 4] q4, float[b, 4, n, 4] qh, float[b, n, 2, 4] k4, float[b, 2, n, 4] kh,
 float[b, n, 2, 4] v4, float[b, 2, n, 4] vh, float[b, 2, 2, all, 4] ek, float[b, 2, 2, all, 4] ev,
 float[b, 4, all, 4] rk, float[b, 4, all, 4] rv, float[b, 4, n, 4] yh, float[b, n, 4, 4] yt>
{{
    q4 = Reshape(q, q_apart)
    qh = Transpose <perm = [0, 2, 1, 3]> (q4)
    k4 = Reshape(k, apart)
    kh = Transpose <perm = [0, 2, 1, 3]> (k4)
    v4 = Reshape(v, apart)
    vh = Transpose <perm = [0, 2, 1, 3]> (v4)
    ak = Concat <axis = -2> ({k_cache})
    av = Concat <axis = -2> (pv, vh)
    uk = Unsqueeze(ak, two)
    ek = Expand(uk, times)
    rk = Reshape(ek, again)
    uv = Unsqueeze({v_read}, two)
    ev = Expand(uv, times)
    rv = Reshape(ev, again)
    kt = Transpose <perm = [0, 1, 3, 2]> (rk)
    qk = MatMul(qh, kt)
    z = Add(qk, m)
    p = Softmax <axis = -1> (z)
    yh = MatMul(p, rv)
    yt = Transpose <perm = [0, 2, 1, 3]> (yh)
    y = Reshape(yt, joined)
}}
"""
SIZES = {"b": 2, "n": 5, "past": 3, "all": 8}


def test_a_cache_and_shared_heads_go_into_attention(spelled: Callable[..., Any]) -> None:
    text = CACHED.format(k_cache="pk, kh", v_read="av")
    found = spelled(FuseAttention, text, **SIZES)
    assert found.text[1:] == ["y = Attention(q, k, v, m_raised, pk, pv)"]
    assert found.off < 1e-6


def test_a_cache_that_is_read_elsewhere_stays_apart(spelled: Callable[..., Any]) -> None:
    text = CACHED.format(k_cache="pk, kh", v_read="tv")
    text = text.replace("uv =", "tv = Tanh(av)\n uv =")
    found = spelled(FuseAttention, text, **SIZES)
    assert found.count == 1
    assert "ak = Concat(pk, kh)" in found.text
    assert "av = Concat(pv, vh)" in found.text
    assert found.off < 1e-6


def test_a_cache_that_is_read_before_attention_stays_apart(spelled: Callable[..., Any]) -> None:
    text = CACHED.format(k_cache="pk, kh", v_read="av")
    text = text.replace(
        "float[b, 2, all, 4] av)", "float[b, 2, all, 4] av, float[b, 2, all, 4] nk)"
    )
    text = text.replace("uk =", "nk = Neg(ak)\n uk =")
    found = spelled(FuseAttention, text, **SIZES)
    assert found.count == 1
    assert "ak = Concat(pk, kh)" in found.text
    assert found.off < 1e-6


REPEATED = """
g (float[b, 2, n, 4] q, float[b, 2, t, 4] k, float[b, 2, t, 4] v, float[b, 1, n, twice] m) =>
  (float[b, 2, n, 4] y)
<int64[1] two = {2}, int64[5] times = {1, 1, 2, 1, 1}, int64[4] again = {0, 2, -1, 4},
 float[b, 2, 2, t, 4] ek, float[b, 2, 2, t, 4] ev, float[b, 2, twice, 4] rk,
 float[b, 2, twice, 4] rv>
{
    uk = Unsqueeze(k, two)
    ek = Expand(uk, times)
    rk = Reshape(ek, again)
    uv = Unsqueeze(v, two)
    ev = Expand(uv, times)
    rv = Reshape(ev, again)
    kt = Transpose <perm = [0, 1, 3, 2]> (rk)
    qk = MatMul(q, kt)
    z = Add(qk, m)
    p = Softmax <axis = -1> (z)
    y = MatMul(p, rv)
}
"""


def test_keys_that_are_repeated_for_one_head_stay_so(spelled: Callable[..., Any]) -> None:
    found = spelled(FuseAttention, REPEATED, b=2, n=5, t=3, twice=6)
    assert found.text[-1] == "y = Attention(q, rk, rv, m_raised)"
    assert found.off < 1e-6
