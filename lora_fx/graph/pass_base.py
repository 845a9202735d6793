"""What every pass is: a callable from graph to graph that reports its edits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self, cast

from torch import fx
from torch.fx.passes.infra import pass_base as torch_passes

from lora_fx.choices import takes
from lora_fx.errors import PassError
from lora_fx.graph.editor import Edit, Editor
from lora_fx.tables import table


class PassResult(torch_passes.PassResult):
    """torch's own PassResult, plus the edits that the pass recorded.

    Attributes:
        graph_module: the new graph.
        modified: whether it differs from the one that went in.
        edits: what was done, and what was skipped and why.
    """

    graph_module: fx.GraphModule
    modified: bool
    edits: tuple[Edit, ...]

    def __new__(
        cls, graph_module: fx.GraphModule, modified: bool, edits: Sequence[Edit] = ()
    ) -> Self:
        """Makes the pair that torch expects and hangs the edits on it."""
        result = cast(Self, super().__new__(cls, graph_module, modified))
        result.edits = tuple(edits)
        return result

    def _repr_html_(self) -> str:
        did = "modified" if self.modified else "not modified"
        rows = ([edit.action, edit.path, edit.text] for edit in self.edits)
        return table(["edit", "where", "what"], rows, f"{did}, {len(self.edits)} edits")


class Pass:
    """A rewrite of a graph. Subclasses are frozen dataclasses that define `rewrite`.

    Calling it copies the graph, shares the tensors, rewrites, sweeps and lints once; the result
    compiles when it is first called.
    The graph that went in, and every tensor of it, stay as they are.
    """

    def rewrite(self, editor: Editor) -> None:
        """Changes the graph through the editor; the whole of a pass's own work."""
        raise PassError(f"{type(self).__name__} defines no rewrite(self, editor)")

    @takes(PassError)
    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Applies the pass.

        Raises:
            PassError: ``gm`` is not a GraphModule, or what `rewrite` itself refuses.
        """
        _check_graph(self, gm)
        editor = Editor(gm)
        self.rewrite(editor)
        return PassResult(editor.finish(), editor.modified, editor.edits)


def _check_graph(step: object, gm: object) -> None:
    if not isinstance(gm, fx.GraphModule):
        raise PassError(
            f"{type(step).__name__} works on a GraphModule, not on {type(gm).__name__}: "
            "trace the model first, gm = lora_fx.trace(model, args)"
        )


AnyPass = Callable[[fx.GraphModule], PassResult]


_GIVE = "give passes, such as lora_fx.passes.FoldLora()"


class Pipeline:
    """Runs passes in order; it is a pass itself.

    Args:
        passes: callables from GraphModule to PassResult.
    """

    @takes(PassError)
    def __init__(self, passes: Iterable[AnyPass]) -> None:
        self.passes = tuple(passes)
        for step in self.passes:
            if not callable(step):
                raise PassError(f"Pipeline: {step!r:.80} is no pass: {_GIVE}")

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Applies every pass to the result of the one before.

        Returns:
            The last graph, whether any pass modified it, and all edits in order.

        Raises:
            PassError: ``gm`` is no GraphModule, a pass gives no PassResult, or what it refuses
                itself.
        """
        _check_graph(self, gm)
        result = PassResult(gm, False)
        for step in self.passes:
            after: Any = step(result.graph_module)
            if not isinstance(after, PassResult):
                found = type(after).__name__
                raise PassError(f"Pipeline: {step!r:.80} gave a {found}, no PassResult: {_GIVE}")
            edits = (*result.edits, *after.edits)
            result = PassResult(after.graph_module, result.modified or after.modified, edits)
        return result

    def __repr__(self) -> str:
        """Lists the passes."""
        return f"Pipeline([{', '.join(map(repr, self.passes))}])"
