"""Tensors that no adapter may hold."""

from __future__ import annotations

import pytest
import torch

from lora_fx.errors import AdapterError
from lora_fx.io.tensor_checks import DTYPES, check_tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_finite_floats_pass(dtype: torch.dtype) -> None:
    check_tensors({"a": torch.ones(3, 2, dtype=dtype), "b": torch.ones((), dtype=dtype)})


@pytest.mark.parametrize("shape", [(3, 0), (0, 5), (4, 0, 3, 3)])
def test_the_strides_of_what_is_empty_mean_nothing(shape: tuple[int, ...]) -> None:
    check_tensors({"a": torch.empty(shape).as_strided(shape, [0] * len(shape))})


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(3, dtype=torch.int64), r"dtype torch\.int64"),
        (torch.ones(3, dtype=torch.bool), r"dtype torch\.bool"),
        (torch.ones(3).to(torch.float8_e4m3fn), r"dtype torch\.float8_e4m3fn"),
        (torch.ones(3, dtype=torch.complex64), r"dtype torch\.complex64"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.empty(3, device="meta"), "without data"),
        (torch.ones(1).expand(3), "expanded"),
        (torch.tensor([1.0, torch.nan]), "holds NaN or infinity"),
        (torch.tensor([1.0, -torch.inf], dtype=torch.bfloat16), "holds NaN or infinity"),
    ],
)
def test_others_are_refused_by_name(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(AdapterError, match=rf"^tensor 'bad' .*{message}"):
        check_tensors({"good": torch.ones(2), "bad": tensor})


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_torch_itself_quantised_is_refused() -> None:
    quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
    with pytest.raises(AdapterError, match=r"^tensor 'bad' has dtype torch\.quint8"):
        check_tensors({"bad": quantised})
