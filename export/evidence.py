"""What a verification finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import fx

from lora_fx.errors import VerificationError
from lora_fx.export.report import Check

_SHOWN = 10


@dataclass(frozen=True)
class Subject:
    """An eager model that the file must agree with.

    Attributes:
        what: its name in the report.
        eager: the model, in eval mode.
        adapter: the adapter file to run with, or None.
    """

    what: str
    eager: fx.GraphModule
    adapter: Path | None = None


@dataclass
class Evidence:
    """What a verification found.

    Attributes:
        checks: rows that had to agree.
        controls: rows that had to disagree.
        notes: what could not be checked, and why.
    """

    checks: list[Check] = field(default_factory=list)
    controls: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def judge(self, path: str) -> None:
        """Raises VerificationError if a row does not say what it must."""
        wrong = [row for row in self.checks if not row.ok]
        if wrong:
            table = "\n".join(map(str, wrong[:_SHOWN]))
            raise VerificationError(
                f"{path}: {len(wrong)} of {len(self.checks)} checks disagree with eager:\n{table}"
            )
        if self.controls and not any(row.ok for row in self.controls):
            table = "\n".join(map(str, self.controls[:_SHOWN]))
            raise VerificationError(
                f"{path}: the control agrees with the file, so the checks prove nothing:\n{table}"
            )
