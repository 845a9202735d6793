import pytest

from lora_fx.kinds import KINDS


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_has_leaves_and_its_name(name: str) -> None:
    assert KINDS[name].name == name
    assert KINDS[name].leaves
