import peft
import pytest
import torch
from torch import nn

from lora_fx import AdapterError
from lora_fx.kinds import oft
from lora_fx.testing import by_lycoris, by_peft, means, read_kind

LAYERS = {
    "linear": lambda: nn.Linear(12, 5),
    "pointwise": lambda: nn.Conv2d(12, 5, 1),
    "table": lambda: nn.Embedding(7, 12),
}
SETTINGS = {
    "series": {},
    "two terms": {"num_cayley_neumann_terms": 2},
    "exact": {"use_cayley_neumann": False},
    "shared": {"block_share": True},
    "constrained": {"coft": True, "eps": 0.5, "use_cayley_neumann": False},
}


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.filterwarnings("ignore:.*COFT.*")
def test_means_what_peft_means(layer, settings, is_known):
    changes = SETTINGS[settings]
    config = peft.OFTConfig(r=0, oft_block_size=4, target_modules=["layer"], **changes)
    foreign = by_peft(LAYERS[layer](), config)
    base, merged = foreign.base, foreign.merged
    if layer == "table":
        base, merged = base.T, merged.T
    known = {"shape": tuple(base.shape)} if is_known else {}
    update = read_kind("oft", foreign.tensors, **changes, **known)
    means(update, base, merged, base + 1.1 * (merged - base))


@pytest.mark.parametrize("layer", LAYERS)
def test_means_what_peft_computes_unmerged(layer):
    config = peft.OFTConfig(r=3, oft_block_size=0, target_modules=["layer"])
    foreign = by_peft(LAYERS[layer](), config)
    base, plain = foreign.base, foreign.layer.base_layer
    shape = {"linear": (4, 12), "pointwise": (4, 12, 3, 2)}.get(layer)
    x = torch.arange(7) if shape is None else torch.randn(shape, dtype=torch.float64)
    update = read_kind("oft", foreign.tensors)
    weight = update.weight(base) if shape else update.weight(base.T).T
    expected, before = foreign.layer(x), plain(x)
    plain.weight.data.copy_(weight)
    assert torch.allclose(plain(x), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(before, expected, rtol=1e-2)


LYCORIS = {
    "linear": lambda: nn.Linear(5, 12),
    "conv1d": lambda: nn.Conv1d(5, 12, 3),
    "conv2d": lambda: nn.Conv2d(5, 12, (3, 2)),
    "conv3d": lambda: nn.Conv3d(5, 12, (1, 2, 3)),
}


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("constraint", [0, 0.1])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("layer", LYCORIS)
def test_means_what_lycoris_means(layer, rescaled, constraint, is_known):
    options = {"lora_dim": 4, "rescaled": rescaled, "constraint": constraint}
    # LyCORIS inverts in float32, and its forward adds a difference to what the layer gave.
    options |= {"dtype": torch.float32}
    foreign = by_lycoris("DiagOFTModule", LYCORIS[layer](), **options)
    known = {"shape": tuple(foreign.base.shape)} if is_known else {}
    alpha = float(foreign.tensors["alpha"])
    update = read_kind("oft", foreign.tensors, constraint=alpha, **known)
    base, merged = foreign.base, foreign.merged
    means(update, base, merged, base + 1.1 * (merged - base), within=1e-5)


def test_rotates_in_any_dtype(noise, dtype):
    blocks, base = noise(2, 3, 3, dtype=dtype), noise(6, 5)
    skew = blocks.double() - blocks.double().mT
    eye = torch.eye(3, dtype=torch.float64)
    whole = torch.block_diag(*(((eye + q) @ (eye - q).inverse()).mT for q in skew))
    expected = whole @ base.double()
    means(read_kind("oft", {"oft_blocks": blocks}), base, expected, expected * 1.1)


@pytest.mark.parametrize(
    ("settings", "shape"),
    [({}, (None, 12)), ({"shape": (5, 12)}, (5, 12)), ({"block_share": True}, (None, None))],
)
def test_knows_the_axis_that_it_rotates(settings, shape, noise):
    rows = 1 if "block_share" in settings else 3
    assert read_kind("oft", {"oft_R.weight": noise(rows, 6)}, **settings).shape == shape


@pytest.mark.parametrize(
    ("leaf", "shape", "stacks"),
    [
        ("oft_R.weight", (3, 6), "inputs first"),
        ("oft_embedding_R.weight", (3, 6), "on any"),
        ("oft_blocks", (3, 4, 4), "on any"),
    ],
)
def test_the_later_of_two_comes_first_where_it_rotates_inputs(leaf, shape, stacks, noise):
    assert read_kind("oft", {leaf: noise(*shape)}).stacks == stacks


PEFT = {"oft_R.weight": (3, 6)}


@pytest.mark.parametrize(
    ("shapes", "settings", "message"),
    [
        ({}, {}, "oft_R.weight is missing"),
        ({"oft_R.weight": (3, 5)}, {}, r"oft_R.weight is \(3, 5\), expected .*b \(b - 1\) / 2"),
        ({"oft_R.weight": (0, 6)}, {}, "oft_R.weight"),
        ({"oft_R.weight": (6,)}, {}, "oft_R.weight"),
        ({**PEFT, "oft_blocks": (3, 4, 4)}, {}, "is not used"),
        (PEFT, {"block_share": True}, "has 3 blocks, expected 1 that is shared"),
        (PEFT, {"coft": "no"}, "coft is 'no'"),
        (PEFT, {"coft": True, "eps": None}, "eps is None"),
        (PEFT, {"num_cayley_neumann_terms": 2.5}, "num_cayley_neumann_terms is 2.5"),
        (PEFT, {"num_cayley_neumann_terms": 1 << 40}, "an integer of at most 1000"),
        (PEFT, {"shape": (5, 8)}, r"rotates 3 blocks of 4, the layer is \(5, 8\)"),
        (PEFT, {"shape": (5, 12, 3, 3)}, "OFT of PEFT on a convolution"),
        ({"oft_R.weight": (1, 6)}, {"block_share": True, "shape": (5, 6)}, "1 blocks of 4"),
        ({"oft_embedding_R.weight": (3, 6)}, {"shape": (5, 12)}, "rotates 3 blocks of 4"),
        ({"oft_blocks": (3, 4, 2)}, {}, r"oft_blocks is \(3, 4, 2\)"),
        ({"oft_blocks": (3, 3, 4, 4)}, {}, r"\(3, 3, 4, 4\), which is no BOFT of a layer \(12,\)"),
        ({"oft_blocks": (1, 4, 3, 3)}, {}, "which is no BOFT"),
        ({"oft_blocks": (2, 2, 4, 4)}, {"shape": (9, 5)}, r"no BOFT of a layer \(9, 5\)"),
        ({"oft_blocks": (2, 2, 4, 4), "rescale": (6, 1)}, {}, r"rescale is \(6, 1\), expected \(8"),
        ({"oft_blocks": (3, 4, 4), "rescale": (6, 1)}, {}, r"rescale is \(6, 1\), expected \(12"),
        ({"oft_blocks": (3, 4, 4), "rescale": (12, 2)}, {}, "rescale is"),
        ({"oft_blocks": (3, 4, 4)}, {"constraint": "0"}, "constraint is '0'"),
        ({"oft_blocks": (3, 4, 4)}, {"shape": (5, 12)}, "rotates 3 blocks of 4"),
    ],
)
def test_refuses(shapes, settings, message, noise):
    tensors = {leaf: noise(*shape) for leaf, shape in shapes.items()}
    with pytest.raises(AdapterError, match=message):
        oft.read(tensors, settings)
