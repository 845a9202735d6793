from __future__ import annotations

import pytest
from torch import nn

from lora_fx.trace_errors import explain_failure


class Inner(nn.Module):
    def forward(self, x: int) -> float:
        return 1 / x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: int) -> float:
        return self.inner(x)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_the_innermost_module_and_line_are_named(frontend: str) -> None:
    model = Outer()
    with pytest.raises(ZeroDivisionError) as caught:
        model(0)
    message = explain_failure(model, frontend, caught.value)
    assert "Outer cannot be traced" in message
    assert "at inner, " in message
    assert "return 1 / x" in message
    assert "ZeroDivisionError: division by zero" in message
    assert "Try: " in message


def test_an_error_from_nowhere_in_the_model_has_no_place() -> None:
    message = explain_failure(nn.Linear(3, 5), "export", ValueError("no"))
    assert message.startswith("Linear cannot be traced (export):\n")
