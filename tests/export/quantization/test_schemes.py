"""What a weight becomes in a few bits, read back by the operators' definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from lora_fx.errors import ExportError, VerificationError
from lora_fx.export.quantization.quantise import error_of
from lora_fx.export.quantization.schemes import Blocks, Packed, Table, scheme_of, scheme_wanted
from lora_fx.export.rewriting.dequantize import weight_and_step
from lora_fx.graph.example import STORED

SCHEMES = [
    *(Blocks(bits, block) for bits in (4, 8) for block in (16, 32, 128)),
    *(Table(kind, block) for kind in ("nf4", "fp4") for block in (16, 64)),
]


def weight(into: int = 72, out: int = 50) -> Any:
    return np.random.default_rng(0).standard_normal((into, out)).astype(np.float32) / 5


def node_of(packed: Packed) -> ir.Node:
    values = [
        ir.Value(name=end, const_value=ir.tensor(array)) for end, array in packed.tensors.items()
    ]
    return ir.node(packed.operator, [None, *values], packed.attributes, domain="com.microsoft")


def by_onnxruntime(packed: Packed, x: Any) -> Any:
    names = ["x", *packed.tensors]
    node = helper.make_node(
        packed.operator, names, ["y"], domain="com.microsoft", **packed.attributes
    )
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", x.shape), ("y", None))
    ]
    constants = [numpy_helper.from_array(a, n) for n, a in packed.tensors.items()]
    graph = helper.make_graph([node], "g", values[:1], values[1:], constants)
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_numbers_are_those_that_onnxruntime_multiplies_with(scheme: Any, rows: int) -> None:
    own = weight()
    packed = scheme.pack(own)
    numbers, step = weight_and_step(node_of(packed))
    x = np.random.default_rng(rows).standard_normal((rows, len(own))).astype(np.float32)
    found, expected = by_onnxruntime(packed, x), x @ numbers
    assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)
    assert np.linalg.norm(found - x @ own) > 1e-3 * np.linalg.norm(expected)  # the control
    assert 1e-3 < error_of("w", own, numbers, step) < 0.2


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_other_weights_are_off_by_more_than_a_step(scheme: Any) -> None:
    own = weight()
    numbers, step = weight_and_step(node_of(scheme.pack(own)))
    for wrong in (np.roll(own, 1, 1), own * 1.5, np.where(own == own[3, 4], np.nan, own)):
        with pytest.raises(VerificationError, match="are off by more than"):
            error_of("w", wrong, numbers, step)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (17, 1), (1, 7)])
def test_small_and_ragged_weights(scheme: Any, shape: tuple[int, int]) -> None:
    own = weight(*shape)
    numbers, step = weight_and_step(node_of(scheme.pack(own)))
    assert numbers.shape == own.shape
    assert error_of("w", own, numbers, step) < 0.25


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zeros_stay_zeros(scheme: Any) -> None:
    own = np.zeros((40, 6), np.float32)
    numbers, step = weight_and_step(node_of(scheme.pack(own)))
    assert not numbers.any()
    assert error_of("w", own, numbers, step) == 0.0


def test_what_is_asked_for_comes_before_what_a_base_was_stored_in() -> None:
    noted = {STORED: "nf4:128"}
    assert scheme_wanted(None, {}) is None
    assert scheme_wanted(None, noted) == Table("nf4", 128, is_exact=True)
    assert scheme_wanted("float", noted) is None
    assert scheme_wanted(8, noted) == Blocks(8)
    assert scheme_wanted("fp4", noted) == Table("fp4")


@pytest.mark.parametrize("said", ["nf4", "nf4:4096", "int3:64", "nf4:٦٤", ""])
def test_a_base_stored_in_a_way_that_onnxruntime_has_not_is_refused(said: str) -> None:
    with pytest.raises(ExportError, match='quantize="float" keeps'):
        scheme_wanted(None, {STORED: said})


@pytest.mark.parametrize("bits", [3, True, 4.0, "4", "int4", None])
def test_what_is_no_number_of_bits_is_refused(bits: Any) -> None:
    with pytest.raises(ExportError, match="expected 4 or 8 bits"):
        scheme_of(bits)


def test_int4_layers_with_quantised_adapters_have_no_kernel_here() -> None:
    """MatMulNBitsQLoRA of onnxruntime 1.32 is a schema; the CPU provider does not run it."""
    base, down, up = weight(64, 48), weight(64, 8), weight(8, 48)
    parts = [Blocks(bits, 16).pack(w) for bits, w in ((4, base), (8, down), (8, up))]
    tensors = {
        f"{place}{end}": array
        for place, packed in enumerate(parts)
        for end, array in list(packed.tensors.items())[:2]
    }
    sizes = {"K": 64, "N": 48, "bits": 4, "block_size": 16, "lora_bits": 8, "lora_block_size": 16}
    x = np.ones((2, 64), np.float32)
    with pytest.raises(Exception, match=r"Could not find an implementation|not a registered"):
        by_onnxruntime(Packed("MatMulNBitsQLoRA", sizes, tensors), x)
