"""LoRA's tensors in the forms that formats have, against the product written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_fx.errors import AdapterError
from lora_fx.kinds import lora
from lora_fx.kinds.lora import BIAS, DOWN, MAGNITUDE, MID, UP, Form
from lora_fx.testing import means, relative

Shapes = dict[str, tuple[int, ...]]
OPEN, GROUPED = Form(is_exact=False), Form(is_grouped=True)
TURNED, COLUMN = Form(("in", "r"), ("r", "out")), Form(is_exact=False, is_column=True)
MATRICES = Form(down=("r", "in"))


def roles_of(shapes: Shapes) -> lora.Roles:
    make = torch.Generator().manual_seed(3)
    drawn = {role: torch.randn(shape, generator=make) for role, shape in shapes.items()}
    return {role: (f"fc.{role}", tensor) for role, tensor in drawn.items()}


def pair(
    down: tuple[int, ...] = (2, 3), up: tuple[int, ...] = (5, 2), **more: tuple[int, ...]
) -> Shapes:
    return {DOWN: down, UP: up, **more}


@pytest.mark.parametrize(
    ("form", "shapes"),
    [
        (Form(), pair()),
        (Form(), pair((2, 3, 4), (5, 2, 1))),
        (Form(), pair((2, 3, 4, 3), (5, 2, 1, 1))),
        (Form(), pair((2, 3, 4, 3, 2), (5, 2, 1, 1, 1))),
        (OPEN, pair((2, 3, 4, 3), (5, 2))),
        (TURNED, pair((3, 2), (2, 5))),
    ],
)
def test_is_a_product_of_two_factors(form: Form, shapes: Shapes) -> None:
    roles = roles_of(shapes)
    down, up = (roles[role][1].double() for role in (DOWN, UP))
    down, up = (down.T, up.T) if form is TURNED else (down, up.flatten(1))
    product = torch.einsum("or,r...->o...", up, down)
    base = torch.randn(product.shape)
    whole = base.double() + 1.5 * product
    for settings in ({"scale": 1.5}, {"alpha": 3.0}, {"scale": 1.5, "rank": (2, "r")}):
        update = lora.read(roles, form, **settings)
        means(update, base, whole, base.double() + 1.65 * product)
    assert (update.rank, update.kind) == (2, "lora")
    assert lora.read(roles, form).scale == 1


def test_a_core_joins_the_factors() -> None:
    roles = roles_of(pair((2, 3, 1, 1), (5, 2, 1, 1), mid=(2, 2, 4, 3)))
    down, up, core = (roles[role][1].double() for role in (DOWN, UP, MID))
    product = torch.einsum("or,rqkl,qi->oikl", up.flatten(1), core, down.flatten(1))
    update = lora.read(roles, OPEN, alpha=3.0)
    assert relative(update.delta(), 1.5 * product) <= 1e-6
    assert relative(update.delta(), product) > 1e-2


@pytest.mark.parametrize(
    ("form", "kernel", "shape"),
    [
        (Form(), (), (5,)), (Form(), (4,), (1, 5, 1)), (Form(), (4, 3), (1, 5, 1, 1)),
        (OPEN, (4, 3), (5,)), (COLUMN, (), (5, 1)), (COLUMN, (4, 3), (5, 1, 1, 1)),
    ],
)  # fmt: skip
def test_vectors_are_of_the_outputs_and_are_stored_as_they_were(
    form: Form, kernel: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    points = (1,) * len(kernel)
    roles = roles_of(pair((2, 3, *kernel), (5, 2, *points), bias=(5,), magnitude=shape))
    update = lora.read(roles, form, scale=1.5)
    assert update.kind == "dora"
    assert update.magnitude is not None
    assert torch.equal(update.magnitude, roles[MAGNITUDE][1].flatten())
    stored = lora.stored(update, form)
    assert stored.keys() == roles.keys()
    exact = form is not OPEN
    assert all(torch.equal(stored[r], t) for r, (_, t) in roles.items() if exact or r != MAGNITUDE)


def test_the_kind_is_what_the_settings_and_the_tensors_say() -> None:
    plain, with_magnitude = roles_of(pair()), roles_of(pair(magnitude=(5,)))
    assert lora.read(plain, Form(), use_rslora=True).kind == "rslora"
    both = lora.read(with_magnitude, Form(), use_rslora=True)
    assert (both.kind, both.stored_settings) == ("dora", {"use_rslora": True})
    assert lora.read(plain, Form(), invocation=(3, 4)).invocation == (3, 4)
    table = lora.read(plain, MATRICES, is_table=True)
    assert table.stored_settings == {"layer": "embedding"}


def test_beside_groups_the_up_projection_has_a_part_of_the_rank() -> None:
    update = lora.read(roles_of(pair((4, 3, 4, 3), (6, 2, 1, 1))), GROUPED)
    assert (update.rank, update.groups) == (4, 2)


@pytest.mark.parametrize(
    ("form", "shapes", "message"),
    [
        (Form(), {DOWN: (2, 3)}, r"half of a pair, up is missing beside \['fc.down'\]"),
        (Form(), {UP: (5, 2), BIAS: (5,)}, r"down is missing beside \['fc.bias', 'fc.up'\]"),
        (OPEN, pair(up=(5,)), r"fc.up is \(5,\), expected \(out, r\) with r = 2"),
        (OPEN, pair((2,)), r"fc.down is \(2,\), expected \(r, in, \*kernel\)"),
        (OPEN, pair((2, 3, 1, 1), (5, 2, 1)), r"fc.up is \(5, 2, 1\), expected \(out, r, 1, 1\)"),
        (OPEN, pair((2, 3, 3, 3), (5, 2, 3, 3)), r"fc.up is \(5, 2, 3, 3\), expected"),
        (OPEN, pair((4, 3)), r"fc.up is \(5, 2\), expected \(out, r\) with r = 4"),
        (OPEN, pair((4, 3, 3), (5, 2, 1)), "with r = 4"),
        (Form(), pair((2, 3, 4), (5, 2)), r"fc.up is \(5, 2\), expected \(out, r, 1\)"),
        # only the convolution of groups divides its rank
        (GROUPED, pair((4, 3)), "with r = 4"),
        (GROUPED, pair((3, 3, 3), (5, 2, 1)), "with r = 3: the ranks differ"),
        *[
            (form, pair(down, up), f"{name} is .*, expected {expected}")
            for form, expected in ((MATRICES, r"\((r, in|out, r)\)"), (TURNED, r"\((in, r|r, out)"))
            for down, up, name in (
                ((2, 2, 1), (2, 2, 1), "down"), ((2, 2, 1), (2, 2), "down"),
                ((2, 2), (2, 2, 1), "up"),
            )
        ],
        (Form(), pair((2, 3, 1, 1, 1, 1), (5, 2, 1, 1, 1, 1)), "a kernel of more than 3"),
        (Form(), pair(bias=(3,)), r"fc.bias is \(3,\), expected \(out,\) with out = 5"),
        (Form(), pair(magnitude=(3,)), r"fc.magnitude is \(3,\), expected \(5,\)"),
        (Form(), pair(magnitude=(5, 1)), r"fc.magnitude is \(5, 1\), expected \(5,\)"),
        (OPEN, pair(magnitude=(5, 5)), r"fc.magnitude is \(5, 5\), expected \(5,\)"),
        (OPEN, pair(mid=(2, 2)), r"fc.mid is \(2, 2\), expected \(r, r, k, \*kernel\)"),
        (OPEN, pair((2, 3, 1), (5, 2), mid=(2, 3, 4)), r"fc.mid is \(2, 3, 4\)"),
        (OPEN, pair((2, 3, 4), (5, 2), mid=(2, 2, 4)), r"fc.down is .*, expected \(r, in, 1\)"),
        (OPEN, pair((2, 3, 1), (5, 2), mid=(2, 2, 4, 4)), r"fc.down .*, expected \(r, in, 1, 1\)"),
    ],
)  # fmt: skip
def test_refuses(form: Form, shapes: Shapes, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        lora.read(roles_of(shapes), form)


@pytest.mark.parametrize(("form", "shapes"), [(Form(), pair()), (TURNED, pair((3, 2), (2, 5)))])
def test_refuses_another_rank_than_a_config_says(form: Form, shapes: Shapes) -> None:
    settings: dict[str, Any] = {"rank": (3, "the field r")}
    with pytest.raises(AdapterError, match=r"fc.down .* should be of rank 3 by the field r"):
        lora.read(roles_of(shapes), form, **settings)
