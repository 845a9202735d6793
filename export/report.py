"""What an export did and how it was checked, as data."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import fx

from lora_fx.choices import Mode
from lora_fx.errors import ExportError, VerificationError, memory_told
from lora_fx.io.records import read_record
from lora_fx.io.strict_json import to_json
from lora_fx.reference.reference_run import WeightForm
from lora_fx.report.layer_facts import LayerFacts
from lora_fx.report.look import Look, Picture
from lora_fx.report.summary import in_notebook, verdict
from lora_fx.tables import size


@dataclass(frozen=True)
class Check:
    """One output of one run, compared with eager.

    Attributes:
        what: which model was compared: ``"base"``, ``"adapted"``, or what a control left out.
        shape: the sizes of the dynamic dimensions, ``"batch=2, sequence=7"``.
        optimisation: onnxruntime's graph optimisations, ``"off"`` or ``"all"``.
        output: name of the graph output.
        max_abs: largest absolute difference.
        relative: norm of the difference over the norm of what eager gave.
        tolerance: the relative difference that counts as agreement.
        ok: whether the row says what it must: agreement, or for a control, disagreement.
    """

    what: str
    shape: str
    optimisation: str
    output: str
    max_abs: float
    relative: float
    tolerance: float
    ok: bool

    def __str__(self) -> str:
        """One line of the table."""
        return (
            f"{'ok  ' if self.ok else 'FAIL'} {self.what:<24} {self.output:<20} {self.shape:<24} "
            f"optimiser {self.optimisation:<4} relative {self.relative:.1e}  max {self.max_abs:.1e}"
        )


@dataclass(frozen=True)
class Coverage:
    """How much of an adapter came into the model that the file was held against.

    Attributes:
        adapter: its name; several that are summed are joined by ``+``.
        tensors: how many it was given with.
        used: how many of them act somewhere.
        layers: how many weights and biases they change.
        off: how far the outputs are from those of the base, relative; None if it was not measured.
    """

    adapter: str
    tensors: int
    used: int
    layers: int
    off: float | None = None

    def __str__(self) -> str:
        """One line of the table."""
        line = f"{self.used} of {self.tensors} adapter tensors, {self.layers} layers changed"
        return (
            line
            if self.off is None
            else f"{line}, output off the base by {self.off:.2g} (relative)"
        )


@dataclass(frozen=True)
class Quantisation:
    """Which weights a file stores in a few bits, and how far that is off the plain numbers.

    Attributes:
        scheme: ``"4 bits in blocks of 32"``.
        weights: path of a layer -> the norm of what its weight is off over its own.
        outputs: the same of each output of the file, on the inputs that it was verified with.
        left: path of a linear layer -> why its weight stays as it is.
    """

    scheme: str
    weights: dict[str, float]
    outputs: dict[str, float] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """A line for each of the weights and outputs that are farthest off, and what is left."""
        rows = [*_off("weight", self.weights), *_off("output", self.outputs)]
        rows += [f"as it is: {path}: {why}" for path, why in self.left.items()]
        return "\n".join([f"{len(self.weights)} weights in {self.scheme}", *rows])


@dataclass(frozen=True)
class ExportReport:
    """What `to_onnx` wrote and measured.

    Attributes:
        path: the model file.
        mode: ``"merged"``, ``"unmerged"`` (some of an adapter is computed beside its layer),
            ``"swappable"``, or ``"required"`` (swappable, and fed at each run).
        files: name -> size in bytes of each file written.
        opset: version of the ONNX operator set.
        seconds: stage -> wall time.
        checks: rows that had to agree with eager; empty under ``verify=False``.
        controls: rows that had to disagree.
        notes: what could not be checked, and why.
        inputs: names of the graph inputs.
        outputs: names of the graph outputs.
        slots: module paths that an adapter can act on; empty if it is one of the first two.
        coverage: how much of the adapters was used: of their sum, or of each if they swap.
        task: what the model was exported for, as `lora_fx.tasks` has it.
        dtype: what the model was cast to, if it was.
        quantised: which weights are stored in a few bits, if any, and what that costs.
        spellings: what is said in operators that run faster -> how often.
        layers: under ``measure=True``, what adapters do to each layer, and how well it is held.
        pictures: likewise, the graph around one layer of each kind.
        left: likewise, layers that are not merged -> why.
    """

    path: str
    mode: Mode
    files: dict[str, int]
    opset: int
    seconds: dict[str, float]
    checks: list[Check] = field(default_factory=list)
    controls: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    slots: list[str] = field(default_factory=list)
    coverage: list[Coverage] = field(default_factory=list)
    task: str | None = None
    dtype: str | None = None
    quantised: Quantisation | None = None
    spellings: dict[str, int] = field(default_factory=dict)
    layers: list[LayerFacts] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, path: Path, evidence: Verification, clock: Clock, *, notes: Sequence[str] = (),
        **facts: Any,
    ) -> ExportReport:  # fmt: skip
        """What was found of a file, how long it took, and the facts that the rest are."""
        return cls(
            path=str(path),
            seconds=clock.seconds,
            checks=evidence.checks,
            controls=evidence.controls,
            coverage=evidence.coverage,
            notes=[*notes, *evidence.notes],
            **facts,
        )

    @property
    def verified(self) -> bool:
        """Whether every check agreed, and the control did not on at least one output."""
        agreed = bool(self.checks) and all(row.ok for row in self.checks)
        return agreed and any(row.ok for row in self.controls)

    def with_evidence(self, evidence: Verification) -> ExportReport:
        """The report, and what was seen since."""
        return replace(
            self,
            checks=[*self.checks, *evidence.checks],
            controls=[*self.controls, *evidence.controls],
            notes=[*self.notes, *evidence.notes],
            coverage=[*self.coverage, *evidence.coverage],
        )

    def with_look(self, seen: Look) -> ExportReport:
        """The report, and what was seen of the graph."""
        return replace(
            self,
            layers=[*self.layers, *seen.layers],
            pictures=[*self.pictures, *seen.pictures],
            left=self.left | seen.left,
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values; a number that JSON cannot hold becomes its name."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain | {"verified": self.verified}

    @classmethod
    def from_dict(cls, values: Any) -> ExportReport:
        """Reads what `to_dict` gave.

        Raises:
            ExportError: it is no report; says what is wrong with it.
        """
        return read_record(cls, values, ExportError)

    def save_json(self, path: str | Path) -> None:
        """Writes the report as JSON."""
        Path(path).write_text(to_json(self.to_dict()) + "\n")

    def __str__(self) -> str:
        """A short table: files, of checks and controls the row of each that is farthest, notes."""
        sizes = ", ".join(f"{name} {size(count)}" for name, count in self.files.items())
        lines = [f"{self.path}  {self.mode}  opset {self.opset}  {sizes}", self._verdict()]
        if self.task:
            lines.append(f"task {self.task}")
        if self.dtype:
            lines.append(f"dtype {self.dtype}")
        if self.slots:
            lines.append(f"slots {len(self.slots)}")
        for one in self.coverage:
            name = f"{one.adapter}: " if len(self.coverage) > 1 or self.slots else ""
            lines.append(f"coverage {name}{one}")
        if self.quantised is not None:
            lines += [f"quantised {row}" for row in str(self.quantised).split("\n")]
        lines += [f"spelling {count} x {what}" for what, count in self.spellings.items()]
        lines += [f"check    {row}" for row in _farthest(self.checks, False)]
        controls = _farthest(self.controls, True)
        lines += [f"control  {row.replace('FAIL', 'same', 1)}" for row in controls]
        lines += [f"note     {note}" for note in self.notes]
        times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items())
        return "\n".join([*lines, times])

    def _verdict(self) -> str:
        """One line that answers whether it worked; a control need not differ on every output."""
        if not self.checks:
            return verdict(self)
        agree, differ = (sum(row.ok for row in rows) for rows in (self.checks, self.controls))
        return (
            f"{verdict(self)}: {agree} of {len(self.checks)} checks agree, "
            f"{differ} of {len(self.controls)} controls differ"
        )

    def _repr_html_(self) -> str:
        return in_notebook(self)


class Clock:
    """Wall time by stage, told to whoever watches.

    Attributes:
        seconds: stage -> wall time so far.
    """

    def __init__(self, watch: Any = None) -> None:
        self.seconds: dict[str, float] = {}
        self._watch = watch

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the body under a name."""
        if self._watch is not None:
            try:
                self._watch(name)
            except (TypeError, AttributeError) as error:
                if not callable(self._watch):
                    raise
                told = f"progress={self._watch!r:.80} was told {name!r} and failed: {error}"
                raise ExportError(f"{told}: give what takes the name of a stage") from error
        start = time.perf_counter()
        try:
            with memory_told(name, ExportError):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def _off(what: str, distances: Mapping[str, float]) -> Iterator[str]:
    """The farthest by name, and how far the others are at most."""
    ordered = sorted(distances.items(), key=lambda one: -one[1])
    for name, off in ordered[:_SHOWN_OFF]:
        yield f"{what} {name:<40} off by {off:.2g}"
    if rest := ordered[_SHOWN_OFF:]:
        yield f"{what} {f'and {len(rest)} more':<40} off by {rest[0][1]:.2g} at most"


def _farthest(rows: list[Check], ok: bool) -> list[str]:
    """A line for each model that was compared: of its rows that are ``ok`` or not, if any is."""
    by_model: dict[str, list[Check]] = {}
    for row in sorted(rows, key=lambda row: (row.ok is not ok, -row.relative)):
        by_model.setdefault(row.what, []).append(row)
    lines = []
    for own in by_model.values():
        others = f"  the farthest of {len(own)}" if len(own) > 1 else ""
        lines.append(f"{own[0]}{others}")
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


_SHOWN, _SHOWN_OFF = 10, 5


@dataclass(frozen=True)
class Reference:
    """An eager model that the file must agree with.

    Attributes:
        what: its name in the report.
        eager: the model, in eval mode: the module with its weight form, or a graph.
        adapter: the adapter file to run with, or None.
        like: the graph whose precision counts, where ``eager`` is none.
        coverage: how much of an adapter it holds; the distance to the base is found later.
        once: at the traced shape alone.
        generates: whether a decoder's tokens are compared too.
        notes: what the reader of a report should know of it.
    """

    what: str
    eager: fx.GraphModule | WeightForm
    adapter: Path | None = None
    like: fx.GraphModule | None = None
    coverage: Coverage | None = None
    once: bool = False
    generates: bool = True
    notes: tuple[str, ...] = ()

    @property
    def graph(self) -> fx.GraphModule:
        """A graph of the same precision."""
        graph = self.like if self.like is not None else self.eager
        assert isinstance(graph, fx.GraphModule)
        return graph


@dataclass
class Verification:
    """What a verification found.

    Attributes:
        checks: rows that had to agree.
        controls: rows that had to disagree.
        notes: what could not be checked, and why.
        coverage: how much of each adapter was used.
        suspects: after a failure, what seems to be lost.
        against: what the rows were held against.
    """

    checks: list[Check] = field(default_factory=list)
    controls: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    coverage: list[Coverage] = field(default_factory=list)
    suspects: list[str] = field(default_factory=list)
    against: str = "eager"

    @classmethod
    def left_out(cls) -> Verification:
        """Of a file that nothing was held against."""
        return cls(notes=["not verified: verify=False"])

    def and_then(self, more: Verification) -> Verification:
        """This, and what was found next."""
        return Verification(
            [*self.checks, *more.checks],
            [*self.controls, *more.controls],
            [*self.notes, *more.notes],
            [*self.coverage, *more.coverage],
            [*self.suspects, *more.suspects],
            self.against,
        )

    def judge(self, path: str) -> None:
        """Raises VerificationError if a row does not say what it must."""
        wrong = [row for row in self.checks if not row.ok]
        if wrong:
            table = "\n".join([*map(str, wrong[:_SHOWN]), *self.suspects])
            raise VerificationError(
                f"{path}: {len(wrong)} of {len(self.checks)} checks disagree with "
                f"{self.against}:\n{table}\nExpected are the model and the adapters that the file "
                "was made of, in the same mode and dtype: give those; if they are, report it"
            )
        if self.controls and not any(row.ok for row in self.controls):
            table = "\n".join(map(str, self.controls[:_SHOWN]))
            raise VerificationError(
                f"{path}: the control agrees with the file, so the checks prove nothing:\n{table}\n"
                "Expected is an adapter that changes the outputs: inspect its norms, or give "
                "example inputs that reach it"
            )


def file_sizes(directory: Path) -> dict[str, int]:
    """Name -> bytes of each file that was written into a directory."""
    return {file.name: file.stat().st_size for file in sorted(directory.iterdir())}
