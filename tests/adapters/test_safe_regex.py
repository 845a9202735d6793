"""Regexes out of a file: run only when matching is bounded."""

from __future__ import annotations

import time

import pytest

from lora_fx.adapters.safe_regex import MAX_LENGTH, compile_bounded
from lora_fx.errors import AdapterError

USUAL = [
    "q_proj",
    r".*\.(q|k|v)_proj",
    r"model\.layers\.\d+\.self_attn\.(q_proj|v_proj)",
    r"^(?!.*visual).*(?:q_proj|v_proj).*",
    r".*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?",
    r"layers\.(1[0-9]|2[0-3])\..*",
    r"encoder\.layer\.[0-9]{1,2}\.attention",
    r"^transformer\.h\.0\.attn\.c_attn",
    r"a[)(*+]b",
    r"a\(\*\+b",
    r"[]*+]x",
    r"(?i:fc)",
    r"(?P<layer>fc)",
    r"(fc)?",
    "a" * MAX_LENGTH,
]


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_regexes_are_compiled(pattern: str) -> None:
    assert compile_bounded(pattern, "target_modules").pattern == pattern


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(.*)*X", "repeats a group that itself"),
        ("(a+)+$", "repeats a group that itself"),
        ("(?:a+)+$", "repeats a group that itself"),
        ("((a+))+$", "repeats a group that itself"),
        ("(a|a)*$", "repeats a group that itself"),
        ("(a|aa)+$", "repeats a group that itself"),
        ("(a?)*$", "repeats a group that itself"),
        ("(a?){40}$", "repeats a group that itself"),
        ("(a{1,9}){1,9}$", "repeats a group that itself"),
        (r"([^.]*\.)*$", "repeats a group that itself"),
        ("(a+)(?#hidden)+$", "inline comment"),
        ("(?x)(a+) #)\n +", "verbose flag"),
        ("(?sx:a)", "verbose flag"),
        (".*.*.*.*.*.*X", "has 6 repeats, more than 5"),
        ("a" * (MAX_LENGTH + 1), "has 257 characters, at most 256"),
        ("(a", "is not a regex"),
        ("*a", "is not a regex"),
        ("a{99999999999}", "is not a regex"),
    ],
)
def test_a_regex_that_may_take_forever_is_refused_by_field(pattern: str, message: str) -> None:
    with pytest.raises(AdapterError, match=f"(?s)^target_modules: .*{message}"):
        compile_bounded(pattern, "target_modules")


def test_the_worst_that_is_run_ends_soon() -> None:
    path = ".".join(["layers"] * 12)
    begin = time.perf_counter()
    assert compile_bounded(".*.*.*.*.*X", "target_modules").fullmatch(path) is None
    assert time.perf_counter() - begin < 5
