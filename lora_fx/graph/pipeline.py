"""Several passes as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

from lora_fx.graph.pass_base import PassResult

AnyPass = Callable[[fx.GraphModule], PassResult]


class Pipeline:
    """Runs passes in order; it is a pass itself.

    Args:
        passes: callables from GraphModule to PassResult.
    """

    def __init__(self, passes: Iterable[AnyPass]) -> None:
        self.passes = tuple(passes)

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Applies every pass to the result of the one before.

        Returns:
            The last graph, whether any pass modified it, and all edits in order.
        """
        result = PassResult(gm, False)
        for step in self.passes:
            after = step(result.graph_module)
            edits = (*result.edits, *after.edits)
            result = PassResult(after.graph_module, result.modified or after.modified, edits)
        return result

    def __repr__(self) -> str:
        """Lists the passes."""
        return f"Pipeline([{', '.join(map(repr, self.passes))}])"
