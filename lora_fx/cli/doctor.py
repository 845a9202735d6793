"""Whether an installation is what it promises: versions held against the package's own metadata."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import nn

from lora_fx.adapters.adapter import Adapter, Update
from lora_fx.api import inject
from lora_fx.errors import LoraFxError, VerificationError, shorten
from lora_fx.frontend.trace import trace
from lora_fx.numerics import compare

_PACKAGE = "lora-fx"
_REMEDY = f"install the versions that are promised: pip install -U {_PACKAGE}"


@dataclass(frozen=True)
class Found:
    """One package, or Python.

    Attributes:
        name: of the package.
        wanted: the versions that are promised to work, ``""``: any.
        version: what is installed, or None.
        extra: which extra wants it; ``""``: it is always needed.
    """

    name: str
    wanted: str
    version: str | None
    extra: str = ""

    @property
    def holds(self) -> bool:
        """Whether it is as promised; what only an extra wants may be missing."""
        if self.version is None:
            return bool(self.extra)
        return SpecifierSet(self.wanted).contains(Version(self.version), prereleases=True)

    def __str__(self) -> str:
        """One line."""
        mark = "ok   " if self.holds else "WRONG"
        mark = "none " if self.holds and self.version is None else mark
        extra = f"  for [{self.extra}]" if self.extra else ""
        return f"{mark}  {self.name} {self.version or 'not installed'}  {self.wanted}{extra}"


@dataclass(frozen=True)
class Health:
    """What `examined` found.

    Attributes:
        packages: Python and what the package wants.
        providers: of onnxruntime.
        checks: of the self-test: what -> the relative error, and whether it is as it must be.
        first: seconds that the self-test took, with the libraries that it loads.
        seconds: that it took once more.
        failure: why it could not be run, or None.
    """

    packages: tuple[Found, ...]
    providers: tuple[str, ...] = ()
    checks: Mapping[str, tuple[float, bool]] = field(default_factory=dict)
    first: float = 0.0
    seconds: float = 0.0
    failure: str | None = None

    @property
    def broken(self) -> list[str]:
        """What is not as promised, in words."""
        found = [one for one in self.packages if not one.holds]
        told = [f"{f.name} {f.version or 'is missing'}, {f.wanted} is promised" for f in found]
        return told + ([] if self.failure is None else [f"the self-test fails: {self.failure}"])

    def judge(self) -> None:
        """Raises if something is wrong.

        Raises:
            VerificationError: the self-test ran, and a number is not what it must be.
            LoraFxError: a version is not as promised, or the self-test does not run.
        """
        wrong = [what for what, (_, ok) in self.checks.items() if not ok]
        if wrong:
            raise VerificationError(f"the self-test is wrong: {shorten(wrong)}: {_REMEDY}")
        if self.broken:
            raise LoraFxError(f"not as promised: {'; '.join(self.broken)}: {_REMEDY}")

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        checks = {what: {"relative": far, "ok": ok} for what, (far, ok) in self.checks.items()}
        packages = [{**asdict(one), "holds": one.holds} for one in self.packages]
        return {
            "packages": packages, "providers": list(self.providers), "checks": checks,
            "first_seconds": self.first, "seconds": self.seconds, "broken": self.broken,
        }  # fmt: skip

    def __str__(self) -> str:
        """A line for each."""
        lines = [f"lora-fx {version(_PACKAGE)} on {platform.platform()}", *map(str, self.packages)]
        lines.append(f"providers {', '.join(self.providers)}")
        for what, (far, ok) in self.checks.items():
            lines.append(f"{'ok   ' if ok else 'WRONG'}  self-test: {what}  relative {far:.1e}")
        if self.checks:
            lines.append(f"self-test {self.seconds:.1f} s, at first {self.first:.1f} s: libraries")
        return "\n".join(lines)


def examined() -> Health:
    """Looks at what is installed, and exports and runs a tiny model."""
    found = tuple(packages())
    try:
        from lora_fx.export.runtime.ort import available_providers

        providers = tuple(available_providers())
        times, checks = [time.perf_counter()], {}
        for _ in range(2):
            checks = dict(_self_test())
            times.append(time.perf_counter())
    except (LoraFxError, ImportError, OSError, RuntimeError, AttributeError) as error:
        return Health(found, failure=f"{type(error).__name__}: {error}")
    return Health(found, providers, checks, times[1] - times[0], times[2] - times[1])


def packages() -> Iterator[Found]:
    """Python, and each package that this one wants, by its own metadata."""
    yield Found("python", metadata(_PACKAGE)["Requires-Python"], platform.python_version())
    extras = metadata(_PACKAGE).get_all("Provides-Extra") or []
    seen: set[str] = set()
    for line in requires(_PACKAGE) or []:
        wanted = Requirement(line)
        extra = next((e for e in extras if not _applies(wanted) and _applies(wanted, e)), "")
        if wanted.name not in seen and (extra or _applies(wanted)):
            seen.add(wanted.name)
            yield Found(wanted.name, str(wanted.specifier), _installed(wanted.name), extra)


def _applies(wanted: Requirement, extra: str = "") -> bool:
    return wanted.marker is None or wanted.marker.evaluate({"extra": extra})


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _self_test() -> Iterator[tuple[str, tuple[float, bool]]]:
    """A layer with a slot, run as it is and with an adapter, and a control: each held to eager."""
    from lora_fx.export import Session, export_adapter, to_onnx

    make = torch.Generator().manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4)).eval(), torch.randn(3, 6, generator=make)
    down, up = torch.randn(2, 6, generator=make), torch.randn(4, 2, generator=make)
    adapter = Adapter("doctor", {"0": Update(down, up, 1.0)})
    gm = trace(model, (x,))
    with TemporaryDirectory() as directory, torch.no_grad():
        file, swapped = Path(directory) / "model.onnx", Path(directory) / "doctor.onnx_adapter"
        to_onnx(gm, file, adapters="input", slots=["0"], verify=False)
        export_adapter(adapter, file, swapped)
        session = Session(file, threads=1)
        (base,) = session.run({"input": x}).values()
        (adapted,) = session.run({"input": x}, adapter=swapped).values()
        wanted = inject(gm, adapter)(x)
        yield "the base", _judged(base, model(x))
        yield "an adapter swapped in", _judged(adapted, wanted)
        far, agrees = _judged(base, wanted)
        yield "a control that must differ", (far, not agrees)


def _judged(found: Any, expected: torch.Tensor) -> tuple[float, bool]:
    seen = compare(found, expected)
    return seen.relative, seen.ok
