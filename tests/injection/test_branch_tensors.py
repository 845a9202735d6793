"""What stands beside a layer, and the update that says the same."""

from __future__ import annotations

import pytest
import torch

from lora_fx.adapters.source_record import is_embedding
from lora_fx.injection.branch_tensors import BranchTensors, branch_tensors, update_of
from lora_fx.layers.layer import Layer
from lora_fx.testing import relative

# down, up and what broadcasts over outputs and inputs, as the calls of each kind read them.
SIZES: dict[str, tuple[tuple[int, ...], ...]] = {
    "linear": ((3, 2), (2, 5), (5,), (3,)),
    "linear_transposed": ((3, 2), (2, 5), (5,), (3,)),
    "embedding": ((3, 2), (2, 5), (5,), (3,)),
    "conv1d": ((2, 3, 4), (5, 2, 1), (5, 1), (3, 1)),
}
VECTORS = ("gain", "bias", "col")


def drawn(kind: str, vectors: tuple[str, ...]) -> BranchTensors:
    draw = torch.Generator().manual_seed(0)
    down, up, out, into = (torch.rand(size, generator=draw) + 0.5 for size in SIZES[kind])
    whole = {"gain": out, "bias": out + 1, "col": into}
    return BranchTensors(down, up, **{name: whole[name] for name in vectors})


@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("vectors", [(), *((name,) for name in VECTORS), VECTORS])
@pytest.mark.parametrize("kind", SIZES)
def test_what_is_beside_a_layer_is_read_back(
    kind: str, vectors: tuple[str, ...], scale: float
) -> None:
    terms = drawn(kind, vectors)
    site = Layer(path="fc", kind=kind, shape=(5, 3, 4)[: 2 + (kind == "conv1d")], dtype=torch.float)
    update = update_of(terms, site, scale)
    assert (update.scale, update.shape, update.rank) == (scale, site.shape, 2)
    assert is_embedding(update.stored) == (kind == "embedding")
    base = torch.rand(site.stored_shape)
    again = branch_tensors(update, site, lambda: base, lambda: None).each()
    assert again.keys() == terms.each().keys() == {"down", "up", *vectors}
    for name, value in terms.each().items():
        wanted = value * scale if name == "up" else value  # which the branch multiplies it by
        assert again[name].shape == value.shape
        assert relative(again[name], wanted) <= 1e-6, name


def test_outputs_that_are_cut_off_have_no_factors_to_read() -> None:
    terms = drawn("linear", ("gain",))
    assert terms.gain is not None
    assert terms.up is not None
    terms.gain[1], terms.up[:, 1] = -1.0, 0.0  # a row of zeros: W' is zero there
    site = Layer(path="fc", kind="linear", shape=(5, 3), dtype=torch.float)
    update = update_of(terms, site)
    assert update.row is not None
    assert float(update.row[1]) == 0
    assert not update.up[1].any()
    assert bool(update.up.isfinite().all())
    assert not update.weight(torch.rand(5, 3))[1].any()
