"""What the model writes in place, recorded as it is under symbolic tracing.

torch.fx records ``y += x`` as ``y + x``, which leaves other names of y as they were, and has no
way to record ``y[..., :2] = x``.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from lora_fx.graph.graph_module import shallow_clone
from lora_fx.graph.ops import aten


def iadd(x: Any, other: Any) -> Any:
    """What ``x += other`` leaves in x.

    A function of our own: torch.fx writes ``operator.iadd`` as a statement, which changes the
    variable, and so what others read of a number that is never written to.
    """
    return operator.iadd(x, other)  # type: ignore[no-untyped-call]


def isub(x: Any, other: Any) -> Any:
    """What ``x -= other`` leaves in x."""
    return operator.isub(x, other)  # type: ignore[no-untyped-call]


def imul(x: Any, other: Any) -> Any:
    """What ``x *= other`` leaves in x."""
    return operator.imul(x, other)  # type: ignore[no-untyped-call]


def itruediv(x: Any, other: Any) -> Any:
    """What ``x /= other`` leaves in x."""
    return operator.itruediv(x, other)  # type: ignore[no-untyped-call]


class WritingProxy(fx.Proxy):
    """A value to which the model may assign."""

    def __setitem__(self, places: Any, value: Any) -> None:
        """Records ``self[places] = value``."""
        self.tracer.create_proxy("call_function", operator.setitem, (self, places, value), {})

    def __iadd__(self, other: Any) -> Any:
        """Records ``self += other``."""
        return self._write(iadd, other)

    def __isub__(self, other: Any) -> Any:
        """Records ``self -= other``."""
        return self._write(isub, other)

    def __imul__(self, other: Any) -> Any:
        """Records ``self *= other``."""
        return self._write(imul, other)

    def __itruediv__(self, other: Any) -> Any:
        """Records ``self /= other``."""
        return self._write(itruediv, other)

    def _write(self, function: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


def works_in_place(module: nn.Module) -> bool:
    """Whether a module writes into what it is given."""
    return bool(getattr(module, "inplace", False))


def copied_back(graph: fx.Graph, call: fx.Node) -> fx.Node:
    """Writes a call of a module that works in place as one that does not, and a copy."""
    return graph.call_function(aten.copy_.default, (call.args[0], call))


def with_new_results(module: nn.Module) -> nn.Module:
    """A shell of a module that works in place, which does not."""
    other = shallow_clone(module)
    other.inplace = False  # type: ignore[assignment]
    return other
