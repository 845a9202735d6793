"""Convolutions: linear on patches, or on channels where the kernel has one place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lora_fx.testing import analyse_function, check_case, check_reason

FRONTENDS = ["symbolic", "export"]


def image(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, m.kernel, m.b, stride=(2, 1), padding=(1, 0), dilation=(1, 2))


def other_image(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, m.other_kernel, m.gain, stride=(2, 1), padding=(1, 0), dilation=(1, 2))


def back(m: Any, x: torch.Tensor, kernel: torch.Tensor | None = None) -> torch.Tensor:
    weight = (m.kernel if kernel is None else kernel).transpose(0, 1)
    return F.conv_transpose2d(x, weight, m.b, (3, 2), (1, 0), (2, 0), dilation=(1, 2))


# name -> (function, input, the frontends that see enough; all by default)
CASES: dict[str, tuple[Any, ...]] = {
    "conv1d": (lambda m, x: F.conv1d(x, m.kernel_long, m.b, 2, 1, 3), "long"),
    "conv1d without bias": (lambda m, x: F.conv1d(x, m.kernel_long), "long"),
    "conv1d of no batch": (lambda m, x: F.conv1d(x[0], m.kernel_long, m.b), "long"),
    "conv1d of kernel one": (lambda m, x: F.conv1d(x, m.kernel1, m.b), "long"),
    "conv1d of kernel one, with a stride": (lambda m, x: F.conv1d(x, m.kernel1, m.b, 2), "long"),
    "conv1d of kernel one, dilated": (
        lambda m, x: F.conv1d(x, m.kernel1, m.b, dilation=4),
        "long",
    ),
    "conv1d of kernel one, padded": (lambda m, x: F.conv1d(x, m.kernel1, m.b, padding=1), "long"),
    "conv1d of kernel one, in groups": (
        lambda m, x: F.conv1d(
            F.conv1d(x, torch.cat((m.kernel1, m.kernel1))[:6], m.b6), m.grouped1, groups=2
        ),
        "long",
    ),
    "conv1d around a transposed linear": (
        lambda m, x: F.conv1d(F.linear(x, m.six, m.b6).transpose(-2, -1), m.grouped1, groups=2),
        "batch",
    ),
    "conv2d": (image, "image"),
    "conv2d named": (
        lambda m, x: F.conv2d(x, m.kernel, m.b, padding="valid", dilation=(2, 1)),
        "image",
    ),
    "conv2d padded to the same size": (
        lambda m, x: F.conv2d(x, m.kernel, m.b, padding="same", dilation=2),
        "image",
    ),
    "conv2d of a linear of kernels": (
        lambda m, x: F.conv2d(x, (m.up @ m.down.T.T @ m.square).reshape(5, 3, 1, 1), m.b),
        "image",
    ),
    "conv2d then a pointwise one": (
        lambda m, x: F.conv2d(image(m, x), m.pointwise, m.b6),
        "image",
    ),
    "a sum of convolutions": (lambda m, x: image(m, x) + other_image(m, x), "image"),
    "a difference of convolutions": (lambda m, x: image(m, x) - 3 * other_image(m, x), "image"),
    "a convolution scaled by channels": (
        lambda m, x: image(m, x) * m.gain.reshape(5, 1, 1) + m.b.reshape(1, 5, 1, 1),
        "image",
        "export",
    ),
    "conv_transpose1d": (
        lambda m, x: F.conv_transpose1d(x, m.kernel_long.transpose(0, 1), m.b, 2, 1, 0, 1, 3),
        "long",
    ),
    "conv_transpose1d padded at the end": (
        lambda m, x: F.conv_transpose1d(x, m.back_long, stride=3, output_padding=2),
        "long",
    ),
    "conv_transpose1d of no batch": (
        lambda m, x: F.conv_transpose1d(x[0], m.back_long, m.b, 2),
        "long",
    ),
    "conv_transpose1d of kernel one": (
        lambda m, x: F.conv_transpose1d(x, m.kernel1.transpose(0, 1), m.b),
        "long",
    ),
    "conv_transpose1d of kernel one, with a stride": (
        lambda m, x: F.conv_transpose1d(x, m.kernel1.transpose(0, 1), m.b, 2),
        "long",
    ),
    "conv_transpose1d of kernel one, in groups": (
        lambda m, x: F.conv_transpose1d(
            F.conv1d(x, torch.cat((m.kernel1, m.kernel1))[:6], m.b6),
            m.grouped1.reshape(6, 2, 1),
            groups=2,
        ),
        "long",
    ),
    "conv_transpose2d": (back, "image"),
    "conv_transpose2d of a square kernel": (
        lambda m, x: F.conv_transpose2d(x, m.square.reshape(3, 3, 1, 1).expand(3, 3, 2, 1), m.b3),
        "image",
    ),
    "conv_transpose2d then a pointwise one": (
        lambda m, x: F.conv2d(back(m, x), m.pointwise, m.b6),
        "image",
    ),
    "conv_transpose2d of what channels scale": (
        lambda m, x: back(m, x * m.gain3.reshape(3, 1, 1)),
        "image",
    ),
    "a sum of transposed convolutions": (
        lambda m, x: back(m, x) - 3 * back(m, x, m.other_kernel),
        "image",
    ),
    "conv_transpose3d": (
        lambda m, x: F.conv_transpose3d(
            x, m.kernel_volume.transpose(0, 1), m.b, (1, 2, 1), (0, 1, 2), (0, 1, 0), 1, (2, 1, 1)
        ),
        "volume",
    ),
    "conv3d": (
        lambda m, x: F.conv3d(x, m.kernel_volume, m.b, (1, 2, 1), (0, 1, 2), (2, 1, 1)),
        "volume",
    ),
}

OPAQUE: dict[str, tuple[Any, ...]] = {
    "pads one side more": (
        lambda m, x: F.conv1d(x, m.kernel_long, padding="same"),
        "long",
        "one side more",
    ),
    "a kernel from data": (
        lambda m, x: F.conv1d(x, m.kernel_long * x.sum()),
        "long",
        "no constant",
    ),
    "a bias from data": (
        lambda m, x: F.conv1d(x, m.kernel_long, m.b * x.sum()),
        "long",
        "no constant",
    ),
    "a bias from data, kernel one": (
        lambda m, x: F.conv1d(x, m.kernel1, m.b * x.sum()),
        "long",
        "no constant",
    ),
    "two geometries": (
        lambda m, x: (
            image(m, x) + F.conv2d(x, m.kernel, m.b, stride=(2, 1), padding=(1, 1), dilation=(1, 4))
        ),
        "image",
        "in two ways",
    ),
    "a transposed kernel from data": (
        lambda m, x: F.conv_transpose1d(x, m.back_long * x.sum()),
        "long",
        "no constant",
    ),
    "a convolution and a transposed one": (
        lambda m, x: F.conv1d(x, m.kernel_long, padding=1) + F.conv_transpose1d(x, m.back_long),
        "long",
        "in two ways",
    ),
    "a kernel onto a convolution": (
        lambda m, x: torch.relu(F.conv2d(x, m.kernel)),
        "image",
        "not known to be affine",
    ),
    "scaled along the width": (
        lambda m, x: F.conv1d(x, m.kernel_long) * torch.cat((m.gain, m.gain))[:7],
        "long",
        "no constant of the features",
    ),
}


@pytest.mark.parametrize(
    ("name", "frontend"), [(n, f) for n, c in CASES.items() for f in c[2:] or FRONTENDS]
)
def test_a_convolution_computes_what_the_graph_does(name: str, frontend: str) -> None:
    check_case(CASES[name], frontend)


@pytest.mark.parametrize(
    ("name", "frontend"), [(n, f) for n, c in OPAQUE.items() for f in c[3:] or FRONTENDS]
)
def test_what_is_no_layer_says_why(name: str, frontend: str) -> None:
    check_reason(OPAQUE[name], frontend)


def test_a_convolution_onto_a_convolution_is_a_function_of_the_first() -> None:
    analysis, node = analyse_function(
        lambda m, x: F.conv2d(image(m, x), m.kernel.transpose(0, 1).contiguous()), "image"
    )
    value = analysis.map_of(node)
    assert value.parent.parent is None
    assert value.parent.node.name == "conv2d"
