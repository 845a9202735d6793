"""What a verification finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import fx

from lora_fx.errors import VerificationError
from lora_fx.export.report import Check, Coverage
from lora_fx.reference.reference_run import WeightForm

_SHOWN = 10


@dataclass(frozen=True)
class Subject:
    """An eager model that the file must agree with.

    Attributes:
        what: its name in the report.
        eager: the model, in eval mode: the module with its weight form, or a graph.
        adapter: the adapter file to run with, or None.
        like: the graph whose precision counts, where ``eager`` is none.
        coverage: how much of an adapter it holds; the distance to the base is found later.
        once: at the traced shape alone.
        notes: what the reader of a report should know of it.
    """

    what: str
    eager: fx.GraphModule | WeightForm
    adapter: Path | None = None
    like: fx.GraphModule | None = None
    coverage: Coverage | None = None
    once: bool = False
    notes: tuple[str, ...] = ()

    @property
    def graph(self) -> fx.GraphModule:
        """A graph of the same precision."""
        graph = self.like if self.like is not None else self.eager
        assert isinstance(graph, fx.GraphModule)
        return graph


@dataclass
class Evidence:
    """What a verification found.

    Attributes:
        checks: rows that had to agree.
        controls: rows that had to disagree.
        notes: what could not be checked, and why.
        coverage: how much of each adapter was used.
        suspects: after a failure, what seems to be lost.
    """

    checks: list[Check] = field(default_factory=list)
    controls: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    coverage: list[Coverage] = field(default_factory=list)
    suspects: list[str] = field(default_factory=list)

    def judge(self, path: str) -> None:
        """Raises VerificationError if a row does not say what it must."""
        wrong = [row for row in self.checks if not row.ok]
        if wrong:
            table = "\n".join([*map(str, wrong[:_SHOWN]), *self.suspects])
            raise VerificationError(
                f"{path}: {len(wrong)} of {len(self.checks)} checks disagree with eager:\n{table}"
            )
        if self.controls and not any(row.ok for row in self.controls):
            table = "\n".join(map(str, self.controls[:_SHOWN]))
            raise VerificationError(
                f"{path}: the control agrees with the file, so the checks prove nothing:\n{table}"
            )
