import pytest

from lora_fx.kinds import KINDS, kind_of


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_found_by_its_leaves(name):
    kind = KINDS[name]
    assert kind.name == name
    assert kind.marks <= kind.leaves
    assert kind_of(kind.leaves) is kind
    assert all(kind_of({mark}) is kind for mark in kind.marks)
    assert kind_of(kind.leaves | {"lora_up.weight"}) is None


@pytest.mark.parametrize(
    "leaves",
    [
        [],
        ["lora_A", "lora_B"],
        ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"],
        ["alpha"],
        ["dora_scale", "alpha"],
        ["hada_w1_a", "lokr_w1"],
        ["boft_R", "boft_s"],
    ],
)
def test_plain_lora_and_what_is_not_known_is_no_kind(leaves):
    assert kind_of(leaves) is None
