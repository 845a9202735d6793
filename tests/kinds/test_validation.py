import pytest
import torch

from lora_fx import AdapterError
from lora_fx.kinds.validation import flag, layer_shape, measure, number, unflatten
from lora_fx.numerics import widened


def zeros(**shapes):
    return {leaf: torch.zeros(shape) for leaf, shape in shapes.items()}


def test_sizes_are_found_by_name():
    expected = {"up": ("out", "r"), "down": ("r", "in", "*kernel"), "one": ("out", "1")}
    found = measure(zeros(up=(5, 2), down=(2, 3, 4, 4), one=(5, 1)), expected)
    assert {name: found[name] for name in ("out", "r", "in")} == {"out": 5, "r": 2, "in": 3}
    measure(zeros(up=(5, 2), down=(2, 3), one=(5, 1)), expected)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (zeros(up=(5, 2)), r"down is missing beside \['up'\]"),
        (zeros(up=(5, 2), down=(2, 3), mid=(2, 2)), "mid is not used"),
        (
            zeros(up=(5, 2), down=(3, 2)),
            r"down is \(3, 2\), expected \(r, in, \*kernel\) with r = 2",
        ),
        (zeros(up=(5,), down=(2, 3)), r"up is \(5,\), expected \(out, r\)"),
        (zeros(up=(5, 2, 1), down=(2, 3)), "up is"),
        (zeros(up=(5, 2), down=(2,)), "down is"),
        (zeros(up=(5, 2)) | {"down": torch.zeros(2, 3).int()}, "down is torch.int32"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(tensors, message):
    with pytest.raises(AdapterError, match=f"^{message}"):
        measure(tensors, {"up": ("out", "r"), "down": ("r", "in", "*kernel")})


def test_a_name_twice_in_one_shape_is_one_size():
    measure(zeros(blocks=(3, 2, 2)), {"blocks": ("n", "b", "b")})
    with pytest.raises(AdapterError, match=r"blocks is \(3, 2, 4\)"):
        measure(zeros(blocks=(3, 2, 4)), {"blocks": ("n", "b", "b")})


def test_settings_are_read():
    settings = {"scale": 2, "coft": False, "shape": [5, 3, 2]}
    assert number(settings, "scale") == 2.0
    assert number(settings, "eps", 0.5) == 0.5
    assert flag(settings, "coft") is False
    assert flag(settings, "block_share", True) is True
    assert layer_shape(settings) == (5, 3, 2)
    assert layer_shape({"shape": (5, 3)}) == (5, 3)
    assert layer_shape({}) is None


@pytest.mark.parametrize("value", [None, True, "1", float("nan"), float("inf"), [1]])
def test_a_number_is_finite(value):
    with pytest.raises(AdapterError, match=r"^setting scale is .*expected a finite number"):
        number({"scale": value}, "scale")


@pytest.mark.parametrize("value", [None, 1, "true"])
def test_a_flag_is_true_or_false(value):
    with pytest.raises(AdapterError, match=r"^setting coft is .*expected true or false"):
        flag({"coft": value}, "coft")


@pytest.mark.parametrize("value", [5, (5,), (5, 0), (5, 3.0), (5, True), "53"])
def test_a_shape_is_of_a_layer(value):
    with pytest.raises(AdapterError, match=r"^setting shape is .*expected \(out, in"):
        layer_shape({"shape": value})


def test_a_matrix_takes_the_axes_of_its_layer():
    down = torch.arange(24.0).reshape(2, 12)
    assert torch.equal(unflatten("A", down, (5, 3, 2, 2)), down.reshape(2, 3, 2, 2))
    assert unflatten("A", down, None) is down
    with pytest.raises(AdapterError, match=r"^A gives columns \(12,\), the layer is \(5, 3\)"):
        unflatten("A", down, (5, 3))
    assert unflatten("A", torch.zeros(0, 12), (5, 3, 4)).shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_widened_is_no_half(dtype, expected):
    assert widened(torch.zeros(2, dtype=dtype)).dtype == expected
