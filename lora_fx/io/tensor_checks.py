"""What every tensor of an adapter must be, whatever file it comes from or goes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lora_fx.errors import AdapterError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Of one byte, which nothing here computes with: float16 has every value that they have.
NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)
LISTED = ".lora_invocation"
INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def check_gathered(name: str, shape: Sequence[int]) -> None:
    """Refuses a tensor of a file that has no values.

    Raises:
        AdapterError: names it, and what leaves such tensors.
    """
    if 0 in shape and not name.endswith(LISTED):  # no tokens: everywhere
        raise AdapterError(
            f"tensor {name!r:.80}: shape {list(shape)!r:.80}: it is empty, which is what DeepSpeed "
            "ZeRO-3 and FSDP leave of a model that is saved while its tensors are spread over "
            "processes: save it with stage3_gather_16bit_weights_on_model_save, or take the "
            "adapter out of the checkpoint, as zero_to_fp32.py does"
        )


def may_be_integer(name: str, count: int) -> bool:
    """Whether a tensor is one number (alpha, a flag, a count of batches), or places or tokens."""
    is_number = name.endswith((".alpha", ".on_input", ".num_batches_tracked")) and count == 1
    is_listed = name.endswith(LISTED)
    return is_number or is_listed or "_indices" in name or "_s_size" in name


def widened(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, those of a byte a number as float16, with the same values."""
    return {n: t.to(torch.float16) if t.dtype in NARROW else t for n, t in tensors.items()}


def check_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuses a tensor that is not dense, of a floating dtype, and finite.

    Raises:
        AdapterError: names the first such tensor.
    """
    for name, tensor in tensors.items():
        what = f"tensor {name!r}"
        is_dense = tensor.layout == torch.strided and not tensor.is_nested  # which has no shape
        if not is_dense or tensor.is_meta:
            raise AdapterError(f"{what} is sparse, nested or without data, expected dense")
        if _overlaps(tensor):
            raise AdapterError(
                f"{what} is expanded: fewer values are stored than its shape "
                f"{tuple(tensor.shape)} shows, expected one for each; save a contiguous copy"
            )
        is_integer = tensor.dtype in INTEGERS and may_be_integer(name, tensor.numel())
        if tensor.dtype not in DTYPES and not is_integer:
            raise AdapterError(
                f"{what} has dtype {tensor.dtype}, expected float16, bfloat16, float32 or float64"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{what} holds NaN or infinity; the adapter is damaged")


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether two places of a tensor may be one in memory: a step shorter than what it skips."""
    if not tensor.numel():  # strides mean nothing: some readers give zeros
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False
