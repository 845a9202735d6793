"""An export's report as sections of HTML: what a page and a notebook show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from lora_fx.errors import shorten
from lora_fx.report.heat_map import heat_maps
from lora_fx.report.layer_facts import LayerFacts
from lora_fx.report.look import Picture
from lora_fx.report.svg import bars
from lora_fx.tables import Html, element, size, table

if TYPE_CHECKING:
    from lora_fx.export import ExportReport
    from lora_fx.export.report import Check

_UNMEASURED = "The layers were not measured: lora-fx export --measure does."
_SHOWN = 20  # checks that are shown at once, the worst first
_CHECK = ["", "what", "output", "shape", "optimised", "relative", "allowed", "largest"]
_LAYER = [
    *("layer", "adapter", "kind", "size", "rank", "scale", "‖ΔW‖ / ‖W‖"),
    *("effective rank", "spectrum of ΔW", "error of ΔW", "form", "cost over merged"),
]


class Section(NamedTuple):
    """A part of a report.

    Attributes:
        title: in words.
        body: HTML.
    """

    title: str
    body: Html


def sections(report: ExportReport) -> Iterator[Section]:
    """What an export was, by what a reader asks."""
    yield Section("What was done", _done(report))
    if report.layers:
        yield Section("Layers", table(_LAYER, map(_layer, report.layers)))
        yield Section("How much each layer changes", heat_maps(report.layers))
    if report.pictures:
        yield Section("Around a layer", element("div", *map(_picture, report.pictures)))
    yield Section("Verification", _verification(report))
    yield Section("Sizes", _sizes(report.files))
    rows = [*_left(report.left), *(["", note] for note in report.notes)]
    if report.coverage and not report.layers:
        rows.append(["", _UNMEASURED])
    if rows:
        yield Section("What was left, and what to know", table(["layers", "why"], rows))


def in_notebook(report: ExportReport) -> str:
    """The sections one after the other."""
    shown = ([element("h4", section.title), section.body] for section in sections(report))
    return element("div", *(part for parts in shown for part in parts))


def verdict(report: ExportReport) -> str:
    """In a few words."""
    if report.verified:
        return "verified"
    return "not verified" if not report.checks else "without a control that failed"


def _done(report: ExportReport) -> Html:
    forms = [fact.form for fact in report.layers]
    covered: list[list[str | None]] = [[f"adapter {c.adapter}", str(c)] for c in report.coverage]
    rows: list[list[str | None]] = [
        ["file", report.path],
        ["result", verdict(report)],
        ["mode", report.mode],
        ["task", report.task],
        ["dtype", report.dtype],
        ["opset", str(report.opset)],
        ["inputs", ", ".join(report.inputs)],
        ["outputs", ", ".join(report.outputs)],
        ["slots", ", ".join(report.slots)],
        ["layers", "; ".join(f"{forms.count(form)} {form}" for form in dict.fromkeys(forms))],
        ["spelling", "; ".join(f"{count} x {what}" for what, count in report.spellings.items())],
        *covered,
        ["time", ", ".join(f"{stage} {taken:.1f} s" for stage, taken in report.seconds.items())],
    ]
    return table(["", ""], [row for row in rows if row[1]])


def _layer(fact: LayerFacts) -> list[object]:
    values = fact.singular_values
    most = max(values, default=0.0)
    said = f"{len(values)} singular values of ΔW at {fact.path}, the largest {most:.3g}"
    out, into = fact.shape[:1], fact.shape[1:]
    told = None
    if fact.cost is not None:
        told = f"+{fact.cost}" if fact.cost.calls else "nothing"
    return [
        fact.path, fact.adapter, fact.kind,
        " → ".join(", ".join(map(str, sizes)) for sizes in (into, out) if sizes),
        fact.rank, fact.scale, fact.change, fact.effective_rank, bars(values, said), fact.error,
        fact.form, told,
    ]  # fmt: skip


def _picture(picture: Picture) -> Html:
    shown = [
        element("figure", drawing.picture(), element("figcaption", drawing.title))
        for drawing in picture.stages
    ]
    head = element("h3", f"{picture.title}: {picture.path}")
    return element("div", head, element("div", *shown, class_="stages"))


def _verification(report: ExportReport) -> Html:
    checks = sorted(report.checks, key=_badness, reverse=True)
    if not checks:
        return element("p", "Nothing was held against eager: it was left out.")
    worst = checks[0]
    said = (
        f"{sum(row.ok for row in checks)} of {len(checks)} comparisons with the eager model "
        f"agree; the farthest is off by {worst.relative:.1e}, {worst.tolerance:.1e} is allowed. "
        "The control has to disagree, or the comparisons prove nothing: "
    )
    failed = [row for row in report.controls if row.ok]
    said += f"it does, by {failed[0].relative:.1e}." if failed else "there is none that did."
    parts = [
        element("p", said),
        table(_CHECK, map(_check, checks[:_SHOWN]), "has to agree"),
    ]
    if more := checks[_SHOWN:]:
        rest = table(_CHECK, map(_check, more))
        parts.append(element("details", element("summary", f"{len(more)} more"), rest))
    if report.controls:
        parts.append(table(_CHECK, map(_check, report.controls), "has to disagree"))
    return element("div", *parts)


def _badness(row: Check) -> tuple[bool, float]:
    return not row.ok, row.relative / (row.tolerance or 1.0)


def _check(row: Check) -> list[object]:
    numbers = (row.relative, row.tolerance, row.max_abs)
    mark = "ok" if row.ok else "WRONG"
    return [mark, row.what, row.output, row.shape, row.optimisation, *(f"{n:.1e}" for n in numbers)]


def _left(left: Mapping[str, str]) -> Iterator[list[str]]:
    """The layers that have a reason in common."""
    for reason in dict.fromkeys(left.values()):
        paths = [path for path, own in left.items() if own == reason]
        yield [f"{len(paths)}: {shorten(paths)}", reason]


def _sizes(files: Mapping[str, int]) -> Html:
    rows = [[name, size(count)] for name, count in files.items()]
    return table(["file", "size"], [*rows, ["all", size(sum(files.values()))]])
