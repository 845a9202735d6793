from __future__ import annotations

import errno
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lora_fx.errors import (
    AdapterError,
    AdapterWarning,
    ExportError,
    LoraFxError,
    TraceError,
    VerificationError,
    advised,
    memory_told,
    says_what_to_do,
    shorten,
    within,
)
from lora_fx.frontend.check_trace import CallError
from lora_fx.graph.lazy_tensor import LazyTensor


def test_up_to_ten_names_are_shown_whole() -> None:
    names = [f"n{i}" for i in range(12)]
    assert shorten(names[:2]) == "n0, n1"
    assert shorten(names[:10]).endswith("n8, n9")
    assert shorten(names).endswith("n9, and 2 more")
    assert shorten([]) == ""


@pytest.mark.parametrize(
    "kind", [LoraFxError, AdapterError, TraceError, VerificationError, CallError]
)
def test_borders_name_where_the_outermost_first_each_once(kind: type[LoraFxError]) -> None:
    error = kind("rank is 0")
    with pytest.raises(kind) as caught, within(Path("a.file")), within("fc"), within("lora_A"):
        raise error
    assert str(caught.value) == "a.file: fc: lora_A: rank is 0"
    assert caught.value is error


def test_cause_and_traceback_stay() -> None:
    def parse() -> None:
        try:
            int("x")
        except ValueError as error:
            raise AdapterError("no number") from error

    with (
        pytest.raises(AdapterError, match=r"^a: b: no number$") as caught,
        within("a"),
        within("b"),
    ):
        parse()
    assert isinstance(caught.value.__cause__, ValueError)
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert frames[-1] == "parse"
    assert "within" not in frames


def test_what_is_caught_inside_of_a_border_gets_what_is_around_it() -> None:
    """An error that answers another has both, and only the new one is changed outside."""

    def answer() -> None:
        try:
            with within("b"):
                raise AdapterError("first")
        except AdapterError as error:
            raise AdapterError(f"second, after {error}") from error

    with pytest.raises(AdapterError) as caught, within("a"):
        answer()
    assert str(caught.value) == "a: second, after b: first"
    assert str(caught.value.__cause__) == "b: first"


@pytest.mark.parametrize("kind", [ValueError, KeyError, KeyboardInterrupt, StopIteration])
def test_other_errors_pass_as_they_are(kind: type[BaseException]) -> None:
    with pytest.raises(kind) as caught, within("fc"):
        raise kind("x")
    assert caught.value.args == ("x",)


def test_warnings_are_not_inside() -> None:
    with pytest.warns(AdapterWarning, match=r"^as it is$"), within("fc"):
        warnings.warn("as it is", AdapterWarning, stacklevel=1)


def test_what_a_generator_does_after_the_block_is_outside() -> None:
    def lines() -> Iterator[int]:
        yield 0
        raise AdapterError("read late")

    with within("fc"):
        found = lines()
        next(found)
    with pytest.raises(AdapterError, match=r"^read late$"):
        list(found)
    with pytest.raises(AdapterError, match=r"^fc: read late$"), within("fc"):
        list(lines())


def test_a_tensor_is_named_where_it_is_computed() -> None:
    """Who makes a lazy tensor puts a border in it, if it can fail."""

    def make() -> torch.Tensor:
        raise AdapterError("holds NaN")

    def named() -> torch.Tensor:
        with within("fc"):
            return make()

    with within("outside"):
        plain, own = (LazyTensor((5,), torch.float32, made, "key") for made in (make, named))
    with pytest.raises(AdapterError, match=r"^holds NaN$"):
        plain.materialize()
    for _ in range(2):  # each reading has an error of its own, so that none gathers prefixes
        with pytest.raises(AdapterError, match=r"^read: fc: holds NaN$"), within("read"):
            own.materialize()


@pytest.mark.parametrize(
    "raised",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_a_lack_of_memory_is_told_as_what_it_hinders(raised: Exception) -> None:
    with (
        pytest.raises(AdapterError, match="french: there is not enough memory: free some"),
        memory_told("french", AdapterError),
    ):
        raise raised


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), memory_told("french", AdapterError):
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x: no rank; save it again", True),
        ("a pickle can run code, or pass allow_pickle=True", True),
        ("x: no such file: give an adapter", True),
        ("The layers: a, b. Use another base", True),
        ("Leave it out", True),
        ("lora_A is (3,), the layer is (2, 4)", False),
        ("the file does not say how to use it", False),  # in the middle of a clause
        ("not a safetensors file: header of 9 bytes", False),
        ("reporting is off; savings are lost", False),
        ("no_such:make: cannot be imported", False),
        ("it has french.onnx_adapter, model.onnx, report.json", False),
    ],
)
def test_a_step_begins_a_clause(text: str, says: bool) -> None:
    assert says_what_to_do(text) is says


def test_a_border_says_what_to_do_where_nobody_did() -> None:
    def fails(text: str) -> None:
        with advised("save it again"), within("a file"):
            raise AdapterError(text)

    with pytest.raises(AdapterError, match=r"^a file: no rank; save it again$"):
        fails("no rank.")
    with pytest.raises(AdapterError, match=r"^a file: no rank; pass r=$"):
        fails("no rank; pass r=")
    with pytest.raises(ValueError, match=r"^no rank$"), advised("save it again"):
        raise ValueError("no rank")


def test_a_function_can_be_such_a_border() -> None:
    @advised("export it again")
    def reads() -> None:
        raise ExportError("cut off")

    for _ in range(2):
        with pytest.raises(ExportError, match=r"^cut off; export it again$"):
            reads()
