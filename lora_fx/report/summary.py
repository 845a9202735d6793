"""An export's report as sections of HTML, made of the plain values that `report.json` holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lora_fx.branch_lowering.cost import Cost
from lora_fx.errors import shorten
from lora_fx.report.heat_map import heat_maps
from lora_fx.report.svg import bars, drawn
from lora_fx.tables import Html, element, number, size, table

Values = Mapping[str, Any]
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


def sections(report: Values) -> Iterator[Section]:
    """What an export was, by what a reader asks.

    Args:
        report: `ExportReport.to_dict()`.
    """
    yield Section("What was done", _done(report))
    layers = report.get("layers", [])
    if layers:
        yield Section("Layers", table(_LAYER, map(_layer, layers)))
        yield Section("How much each layer changes", heat_maps(layers))
    if pictures := report.get("pictures", []):
        yield Section("Around a layer", element("div", *map(_picture, pictures)))
    yield Section("Verification", _verification(report))
    yield Section("Sizes", _sizes(report))
    rows = [*_left(report.get("left", {})), *(["", note] for note in report["notes"])]
    if rows:
        yield Section("What was left, and what to know", table(["layers", "why"], rows))


def tables(report: Values) -> Iterator[str]:
    """The sections as a notebook shows them."""
    for section in sections(report):
        yield element("h4", section.title) + section.body


def verdict(report: Values) -> str:
    """In a few words."""
    if report["verified"]:
        return "verified"
    return "not verified" if not report["checks"] else "without a control that failed"


def _done(report: Values) -> Html:
    names = {"mode": "mode", "task": "task", "dtype": "dtype", "opset": "opset"}
    rows = [["file", report["path"]], ["result", verdict(report)]]
    rows += [[shown, str(report[name])] for name, shown in names.items() if report.get(name)]
    rows += [[name, ", ".join(report[name])] for name in ("inputs", "outputs", "slots")]
    forms = [fact["form"] for fact in report.get("layers", [])]
    rows.append(["layers", "; ".join(f"{forms.count(f)} {f}" for f in dict.fromkeys(forms))])
    for one in report["coverage"]:
        off = "" if one["off"] is None else f", outputs off the base by {number(one['off'])}"
        used = f"{one['used']} of {one['tensors']} tensors used, {one['layers']} layers changed"
        rows.append([f"adapter {one['adapter']}", f"{used}{off}"])
    rows.append(["time", ", ".join(f"{n} {taken:.1f} s" for n, taken in report["seconds"].items())])
    return table(["", ""], [row for row in rows if row[1] not in ("", None)])


def _layer(fact: Values) -> list[object]:
    values, rank = fact["singular_values"], fact["effective_rank"]
    out, *into = fact["shape"]
    said = f"{len(values)} singular values of ΔW at {fact['path']}, the largest {values[:1]}"
    cost = None if fact["cost"] is None else Cost(**fact["cost"])
    told = None if cost is None else f"+{cost}" if cost.calls or cost.work else "nothing"
    return [
        fact["path"], fact["adapter"], fact["kind"],
        f"{', '.join(map(str, into))} → {out}" if into else str(out),
        fact["rank"], fact["scale"], fact["change"], rank, bars(values, said), fact["error"],
        fact["form"], told,
    ]  # fmt: skip


def _picture(picture: Values) -> Html:
    stages = picture["stages"]
    shown = []
    for one in stages:
        boxes = [(box["text"], box["kind"], box["reads"]) for box in one["boxes"]]
        caption = element("figcaption", one["title"])
        shown.append(element("figure", drawn(one["title"], boxes), caption))
    head = element("h3", f"{picture['title']}: {picture['path']}")
    return element("div", head, element("div", *shown, class_="stages"))


def _verification(report: Values) -> Html:
    checks = sorted(report["checks"], key=_badness, reverse=True)
    controls = report["controls"]
    if not checks:
        return element("p", "Nothing was held against eager: it was left out.")
    worst = checks[0]
    said = (
        f"{sum(row['ok'] for row in checks)} of {len(checks)} comparisons with the eager model "
        f"agree; the farthest is off by {_told(worst['relative'])}, {_told(worst['tolerance'])} is "
        "allowed. The control has to disagree, or the comparisons prove nothing: "
    )
    failed = [row for row in controls if row["ok"]]
    said += f"it does, by {_told(failed[0]['relative'])}." if failed else "there is none that did."
    shown = table(_CHECK, map(_check, checks[:_SHOWN]), "has to agree")
    parts = [element("p", said), shown]
    if more := checks[_SHOWN:]:
        rest = table(_CHECK, map(_check, more))
        parts.append(element("details", element("summary", f"{len(more)} more"), rest))
    if controls:
        parts.append(table(_CHECK, map(_check, controls), "has to disagree"))
    return element("div", *parts)


def _left(left: Mapping[str, str]) -> Iterator[list[str]]:
    """The layers that have a reason in common."""
    for reason in dict.fromkeys(left.values()):
        paths = [path for path, own in left.items() if own == reason]
        yield [f"{len(paths)}: {shorten(paths)}", reason]


def _badness(row: Values) -> tuple[bool, float]:
    return not row["ok"], float(row["relative"]) / (row["tolerance"] or 1.0)


def _check(row: Values) -> list[object]:
    mark = "ok" if row["ok"] else "WRONG"
    names = ("what", "output", "shape", "optimisation")
    numbers = (row["relative"], row["tolerance"], row["max_abs"])
    return [mark, *(row[name] for name in names), *map(_told, numbers)]


def _told(value: float | str) -> str:
    """A number, or the name of one that JSON cannot hold."""
    return f"{float(value):.1e}"


def _sizes(report: Values) -> Html:
    files: Mapping[str, int] = report["files"]
    rows: Sequence[list[object]] = [[name, size(count)] for name, count in files.items()]
    return table(["file", "size"], [*rows, ["all", size(sum(files.values()))]])
