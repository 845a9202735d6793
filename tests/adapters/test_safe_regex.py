"""Regexes out of a file: they mean what PEFT's do, and end soon."""

from __future__ import annotations

import re
import resource
import time
import warnings
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fx.adapters.safe_regex import SlowRegexError, compile_bounded
from lora_fx.adapters.scaling import checked_ranks
from lora_fx.adapters.target_rule import TargetRule, pattern_matches, pattern_value
from lora_fx.errors import AdapterError

LAYER = "model.layers.11.self_attn.q_proj"
LONG = ".".join(["layers"] * 57)  # 398 characters
USUAL = [
    "q_proj",
    r".*\.(q|k|v)_proj",
    r"model\.layers\.\d+\.self_attn\.(q_proj|v_proj)",
    r"^(?!.*visual).*(?:q_proj|v_proj).*",
    r".*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?",
    r"layers\.(1[0-9]|2[0-3])\..*",
    r"encoder\.layer\.[0-9]{1,2}\.attention",
    r"^transformer\.h\.0\.attn\.c_attn",
    r"(model\.)?(layers\.\d+\.)+self_attn\.[qkv]_proj",
    r"(?:model|\.|layers|\d+|self_attn|q_proj)*",
    r"a[)(*+]b",
    r"a\(\*\+b",
    r"[]*+]x",
    r"(?i:Q_PROJ)",
    r"(?i).*Q_PROJ",
    r"(?x) .* q _ proj  # the query",
    r"(?P<layer>.*)q_proj",
    r"(fc)?",
    r".*(?#hidden)q_proj",
    "|".join(f"model.layers.{i}.self_attn.q_proj" for i in range(500)),
    rf"(?:.*?(?:{'vision|image|visual|patch|language|text'}).*?(?:self_attn|mlp).*?)|(?:\bmodel"
    r"\.layers\.[\d]{1,}\.(?:self_attn|attention|mlp)\.(?:(?:q_proj|k_proj)))",
]
# What `regex` would read otherwise than `re`.
OWN = {
    "(q_prox){e<=1}": ("q_proj", "q_prox{e<=1}"),
    "q{i}": ("q", "q{i}"),
    "q{,}": ("", "qqq", "q{,}"),
    "q{,2}": ("qq", "qqq"),
    "q{2,}x{}": ("qqx{}", "qqx"),
    "[[:alpha:]]": ("a", "a]", ":]", "[]"),
    "[^[:alpha:]]": ("q", "q]", "a]"),
    "[[q]": ("[", "q"),
    r"[\[q{e}]{2}": ("q{", "e["),
    "(?#[)q{e<=1}]": ("q{e<=1}]", "q]"),
    r"\{e\}": ("{e}",),
    "[--a]": ("b", "-", "a", ","),
    "[a&&b]": ("&", "a", "b"),
    "[]{]{e}": ("]{e}", "{{e}", "]"),
}
SLOW = [
    ".?" * 200 + "X",
    "(?:.|.)" * 300 + "X",
    ".*.*.*.*.*X",
    ".*" * 12 + "X",
    "(.*)*X",
    "(a+)+$",
    "(l|l)*[^l]X",
    r"(?:(?:[^.]*)*\.?)*X",
    r"([a-z]+\.?)+\d",
    r"(\w*\.?)*(?=X)X",
    r"(.*?)(.*?)(.*?)(.*?)(.*?)(.*?)\1\2\3\4\5\6[^s]",
    r"(?:(?:l|la|lay|layers|\.|a|y|e|r|s)*)+[A-Z0-9]",
    r"(?=(.*)*[AB])x?",
    r"(x?.?){300}[AB]",
    # `regex` writes these out when it compiles them: into gigabytes.
    "(?:(?:(?:l{99}){99}){99}){99}",
    "l{99999999}",
    "(?:l{9999}|.{9999}){999,}",
    "(?:" * 60 + "l" + ")+" * 60 + "X",
    "(?:" * 60 + "l" + "){1,2}" * 60 + "X",
    "(?<=(?:ls){9999999})X",
    "(?x)(l{999} # )\n){999}",
]


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_regexes_match_as_python_does(pattern: str) -> None:
    found = compile_bounded(pattern, "target_modules")
    assert found.pattern == pattern
    for path in (LAYER, "q_proj", "fc", "a)b", "a*b", "", "*x", "visual.q_proj", "a(*+b"):
        assert bool(found.fullmatch(path)) == bool(re.fullmatch(pattern, path)), path
        assert bool(found.match(path)) == bool(re.match(pattern, path)), path


@pytest.mark.parametrize("pattern", OWN)
def test_what_another_engine_reads_otherwise_is_read_as_python_does(pattern: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Python's, of sets in sets
        wanted = re.compile(pattern)
    for text in OWN[pattern]:
        found = compile_bounded(pattern, "x").fullmatch(text)
        assert bool(found) == bool(wanted.fullmatch(text)), text


PARTS = st.sampled_from(
    r"""q k . \. \d 1 { } {1} {,2} {e<=1} [ ] [^ : | ( (?: (?= (?! ) * + ? *? ^ $ \b [a-q] , # (?#
    (?x) (?i) \[ alpha - && \w""".split()  # noqa: SIM905 it is read better so
)


@settings(max_examples=600, deadline=None)
@given(st.lists(PARTS, max_size=9).map("".join), st.text("qk.1{}[]:aQ<=e,", max_size=6))
def test_any_regex_means_what_it_means_to_python(pattern: str, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            wanted = re.compile(pattern)
        except (re.error, OverflowError):
            with pytest.raises(AdapterError, match="is not a regex"):
                compile_bounded(pattern, "x")
            return
    try:
        found = compile_bounded(pattern, "x").fullmatch(text)
    except SlowRegexError:
        assert "(?x)" in pattern  # a comment in it may hold anything
        return
    assert (found and found.span()) == ((m := wanted.fullmatch(text)) and m.span())


@pytest.mark.parametrize("pattern", SLOW)
def test_whatever_is_run_ends_soon_on_a_thousand_paths(pattern: str) -> None:
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = compile_bounded(pattern, "target_modules")
    for place in range(1000):
        with suppress(SlowRegexError):
            assert not found.fullmatch(f"{LONG}.{'l' * (place % 50)}s")
    assert time.process_time() - begin < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:l{40}){40}",
        "l{2000,}",
        "(?:" * 11 + "l" + ")+" * 11,
        "(?:" * 11 + "l" + "){1,2}" * 11,
        r"(?:[ab]\+{30}){60}",
        "(?x)(l{300} # )\n){300}",
    ],
)
def test_what_repeats_too_much_is_not_tried(pattern: str) -> None:
    re.compile(pattern)
    with pytest.raises(SlowRegexError, match=r"the regex .* is not done with"):
        compile_bounded(pattern, "x").fullmatch("l")


@pytest.mark.parametrize(
    "pattern", ["l{900}", "(?:" * 6 + "l" + ")+" * 6, r"(?:l+\.?){,4000}", "(?:l{0,9999}){9}"]
)
def test_what_repeats_less_is(pattern: str) -> None:
    found = compile_bounded(pattern, "x")
    for count in (1, 12, 900, 901):
        assert bool(found.fullmatch("l" * count)) == bool(re.fullmatch(pattern, "l" * count))


HANGS = "(?:(?:l|la|lay|layers|.|a|y|e|r|s)*)+[AB]"


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules"])
def test_a_rule_says_that_its_regex_is_slow(name: str) -> None:
    rule = TargetRule(**{name: HANGS})
    with pytest.raises(
        SlowRegexError, match=rf"^{name}: the regex .* is not done with .* s, expected .*; give"
    ):
        rule.matches(LONG)


@pytest.mark.parametrize(
    "fields",
    [{"layers_to_transform": [1], "layers_pattern": [HANGS]}, {"saved_modules": [HANGS]}],
)
def test_a_slow_regex_in_the_frame_of_peft_ends_too(fields: dict[str, object]) -> None:
    rule = TargetRule(["layers"], **fields)  # type: ignore[arg-type]
    with pytest.raises(SlowRegexError, match=r"^as PEFT builds it: the regex"):
        rule.matches(LONG)


def test_a_slow_key_that_decides_a_number_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"the regex .* is not done with 'layers"):
        pattern_value({HANGS: 4}, LONG, 8)


@pytest.mark.parametrize("part", ["a|", "[a", "(?"])
def test_what_is_too_long_to_compile_is_not_tried(part: str) -> None:
    pattern = part * 100_000
    begin = time.process_time()
    with pytest.raises(SlowRegexError, match=r"\(200000 characters\) is not done"):
        compile_bounded(pattern, "x").fullmatch("a")
    assert time.process_time() - begin < 1


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a", "*a", "a{99999999999}", "(" * 5000 + ")" * 5000, r"\p{L}", "(?R)", "(?V1)a"),
        "a{" + "1" * 5000 + "}",
    ],
)
def test_what_is_no_regex_to_python_is_refused_by_field(pattern: str) -> None:
    with pytest.raises(AdapterError, match=r"^target_modules: .* is not a regex: .*; correct it"):
        compile_bounded(pattern, "target_modules")


KEYS = st.text("ab.", min_size=1, max_size=5).map(lambda name: name.replace("b.", r"b\."))


@settings(max_examples=500, deadline=None)
@given(KEYS, st.sampled_from(["", "^"]), st.sampled_from(["", "$"]), st.text("ab.", max_size=7))
def test_a_key_that_is_a_name_means_what_it_means_as_a_regex(
    name: str, start: str, end: str, path: str
) -> None:
    key = f"{start}{name}{end}"
    assert pattern_matches(key, path) == bool(re.match(rf"(.*\.)?({key})$", path))


def test_there_may_be_as_many_names_as_layers_and_fewer_regexes() -> None:
    begin = time.process_time()
    names = {f"^model.layers.{n}.q_proj": 4 for n in range(20_000)}
    assert pattern_value(checked_ranks(names), "model.layers.19999.q_proj", 8) == 4
    assert pattern_value(names, "layers.7.q_proj", 8) == 8
    assert time.process_time() - begin < 1
    for many in (
        {f"layers.{n}.*": 4 for n in range(2001)},
        {f"{n}.*" + "a" * 60_000: 4 for n in "12"},
    ):
        with pytest.raises(AdapterError, match=r"^rank_pattern: .* regexes of .* at most 2000 of"):
            checked_ranks(many)
