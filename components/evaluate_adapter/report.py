"""The report: one self-contained HTML page, light and dark, without scripts.

It formats numbers and pixels that were computed before; it shows nothing that is not in `metrics.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from string import Template
from typing import Any

from layerloop.components.evaluate_adapter import charts
from layerloop.components.evaluate_adapter.assess import Comparisons
from layerloop.components.evaluate_adapter.cases import Kind
from layerloop.components.evaluate_adapter.charts import Point
from layerloop.components.evaluate_adapter.gallery import ShownCase, article, gallery
from layerloop.components.evaluate_adapter.sheets import GAIN
from layerloop.components.evaluate_adapter.statistics import METHOD, Comparison
from layerloop.components.layers.columns import (
    DEFINITIONS,
    GROUPS,
    LAYERD,
    better_of,
    gives_verdict,
    quoted,
    slots_of,
    title_of,
)
from layerloop.components.layers.measure import MEASURES

TARGET_BYTES = 950_000  # Kubeflow's page shows reports of about a megabyte
HEADINGS: dict[Kind, str] = {"designs": "Held-out designs", "pictures": "Unlabelled images"}


@dataclass(frozen=True)
class Report:
    """Content of the page."""

    title: str
    campaign: str
    model: str  # human-readable name of the base
    counts: Mapping[Kind, int]
    comparisons: Comparisons
    reference: Mapping[str, float]  # means of the true layers themselves, by column
    judge: str  # who gave the rewards, in a sentence or two
    notices: Sequence[str] = ()
    ground_truth: Sequence[str] = ()  # how the true layers were made, in sentences
    curve: Sequence[Point] = ()
    shown: Sequence[ShownCase] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    max_edits: int = 5
    samplers: Mapping[str, Any] | None = None  # the table of samplers.py
    version: str = ""


def render(report: Report) -> bytes:
    """The page. When it would grow over `TARGET_BYTES` the gallery's last samples are left out, and it says so."""
    template = Template(resources.files(__package__).joinpath("template.html").read_text(encoding="utf-8"))
    fields = {
        "title": escape(report.title),
        "campaign": escape(report.campaign),
        "summary": summary(report),
        "judge": escape(report.judge),
        "notices": "".join(f'<p class="notice">{escape(text)}</p>' for text in report.notices),
        "cards": _cards(report),
        "tables": "".join(_measures_section(report, kind) for kind in report.comparisons.by_kind),
        "layerd": _layerd_section(report),
        "slots": _slots_section(report),
        "samplers": _samplers_section(report.samplers),
        "training": _training_section(report.curve),
        "method": escape(METHOD),
        "definitions": _definitions(report),
        "settings": "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in report.settings.items()),
        "version": escape(report.version),
    }
    room = TARGET_BYTES - sum(len(text.encode()) for text in (template.template, *fields.values()))
    kept = _articles_within(
        [article(shown) for shown in report.shown], [s.choice.case.kind for s in report.shown], room
    )
    fields["shown"] = escape(_gallery_note(report, len(kept)))
    fields["gallery"] = gallery(kept)
    return template.substitute(fields).encode()


def _articles_within(articles: Sequence[str], kinds: Sequence[Kind], room: int) -> list[str]:
    """The articles that fit in `room` bytes, one at least, in their order; the first of each kind have precedence."""
    rank = [kinds[:index].count(kind) for index, kind in enumerate(kinds)]
    kept: list[int] = []
    for index in sorted(range(len(articles)), key=lambda index: (rank[index], index)):
        if not kept or len(articles[index]) <= room:
            kept.append(index)
            room -= len(articles[index])
    return [articles[index] for index in sorted(kept)]


# -------------------------------------------------------------------------------------------------------------- words


def number(value: float | None, *, signed: bool = False, decimals: int = 3) -> str:
    """A number of a table: a typographic minus; a dash where it is undefined."""
    if value is None:
        return "–"
    text = f"{value:{'+' if signed else ''}.{decimals}f}"
    if float(text) == 0:
        text = f"{0:.{decimals}f}"
    return text.replace("-", "−")


def difference_of(c: Comparison) -> str:
    """A difference to the digits that its interval supports, and as a share of the base's value."""
    text = number(c.difference, signed=True, decimals=c.decimals)
    if c.relative is None or not 0.0005 <= abs(c.relative) < 10:
        return text
    share = f"{100 * c.relative:+.{0 if abs(c.relative) >= 0.095 else 1}f}"
    return f"{text} ({share.replace('-', '−')} %)"


def interval_of(c: Comparison, otherwise: str = "–") -> str:
    """The interval of a difference; `otherwise` where there is none."""
    if c.low is None or c.high is None:
        return otherwise
    low, high = (number(end, signed=True, decimals=c.decimals) for end in (c.low, c.high))
    return f"{low} … {high}"


def verdict(column: str, comparison: Comparison) -> str:
    """ "good" or "bad" where the difference is clear and one direction is better, else ""."""
    if not comparison.clear or not gives_verdict(column) or comparison.difference is None:
        return ""
    return "good" if (comparison.difference < 0) == (better_of(column) == "lower") else "bad"


def summary(report: Report) -> str:
    """The headline in one paragraph of HTML."""
    counts = [
        f"<strong>{n}</strong> {what}"
        for n, what in (
            (report.counts.get("designs", 0), "held-out designs with known layers"),
            (report.counts.get("pictures", 0), "unlabelled images"),
        )
        if n
    ]
    kind: Kind = "designs" if "designs" in report.comparisons.by_kind else "pictures"
    table = report.comparisons.by_kind[kind]
    columns = [column for group in GROUPS.values() for column in group if column in table]
    by_verdict: dict[str, list[str]] = {"good": [], "bad": [], "": []}
    for column in columns:
        if gives_verdict(column):
            by_verdict[verdict(column, table[column])].append(column)

    def listed(some: Sequence[str]) -> str:
        named = [
            f"{_lower(title_of(name))} ({number(c.base, decimals=c.decimals)} → "
            f"<strong>{number(c.tuned, decimals=c.decimals)}</strong>)"
            for name in some[:4]
            for c in (table[name],)
        ]
        more = f" and {len(some) - 4} more" if len(some) > 4 else ""
        return ", ".join(named) + more

    text = f"The adapter and its base, {escape(report.model)}, decomposed {' and '.join(counts)} from the same noise."
    on = f"On the {'designs' if kind == 'designs' else 'images'}, the adapter"
    if by_verdict["good"]:
        text += f" {on} is clearly better in {listed(by_verdict['good'])}."
        on = "It"
    if by_verdict["bad"]:
        text += f" {on} is clearly worse in {listed(by_verdict['bad'])}."
        on = "It"
    rest = len(by_verdict[""])
    if rest == sum(len(some) for some in by_verdict.values()):
        return f"{text} {on} does not differ from the base by more than chance in any of {rest} measures."
    if rest == 1:
        return f"{text} The one other measure shows no clear difference."
    return f"{text} The other {rest} measures show no clear difference." if rest else text


def _lower(title: str) -> str:
    return title if title.startswith("LayerD") else title[0].lower() + title[1:]


def _gallery_note(report: Report, kept: int) -> str:
    total = sum(report.counts.values())
    text = (
        f"{kept} of {total} cases: best, median and worst by difference, then some drawn at random from a fixed seed; "
        f"none was picked by eye. |Difference| is between source and recomposition, times {GAIN}. Small images are "
        "shown pixel by pixel, large ones reduced."
    )
    if kept < len(report.shown):
        text += f" {len(report.shown) - kept} more are among the sheets, left out here to keep the page small."
    return text


# ------------------------------------------------------------------------------------------------------------- tables


def _cards(report: Report) -> str:
    kind: Kind = "designs" if "designs" in report.comparisons.by_kind else "pictures"
    table = report.comparisons.by_kind[kind]
    cards = []
    for column in quoted("designs headline" if kind == "designs" else "pictures headline"):
        if column not in table:
            continue
        c = table[column]
        wish = {"lower": "↓ lower is better", "higher": "↑ higher is better", None: ""}[better_of(column)]
        cards.append(
            f'<div class="card"><p class="what">{escape(title_of(column))}<span class="wish">{wish}</span></p>'
            '<div class="value">'
            f'<span class="from">{number(c.base, decimals=c.decimals)}</span><span class="arrow">→</span>'
            f"{number(c.tuned, decimals=c.decimals)}</div>"
            f'<div class="delta"><span class="chip {verdict(column, c)}">{difference_of(c)}</span> '
            f'<span class="small">{interval_of(c, "one image")}</span></div></div>'
        )
    return "".join(cards)


def _measures_section(report: Report, kind: Kind) -> str:
    table = report.comparisons.by_kind[kind]
    reference = kind == "designs" and bool(report.reference)
    width = 8 if reference else 7
    rows = []
    for heading, columns in GROUPS.items():
        group = [_row(report, column, table[column], reference) for column in columns if column in table]
        if group:
            rows += [f'<tr class="heading"><th colspan="{width}">{escape(heading)}</th></tr>', *group]
    what = {
        "designs": "Images composed of known layers, each decomposed at its own layer count.",
        "pictures": "Images without known layers, measured without a reference.",
    }[kind]
    truth = " The column “true layers” has the known layers' own scores." if reference else ""
    return (
        f'<h2>{HEADINGS[kind]}</h2><p class="note">{what}{truth} ↓ lower is better, ↑ higher is better. In the small '
        "chart of each row the middle line is 0 and the bar the 95 % interval, on a scale of its own.</p>"
        '<div class="panel"><table><thead><tr><th>Measure</th>'
        + ("<th>true layers</th>" if reference else "")
        + "<th>base</th><th>adapter</th><th>difference</th><th>95 % interval</th><th></th><th>n</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(report: Report, column: str, c: Comparison, reference: bool) -> str:
    wish = {"lower": "↓", "higher": "↑", None: ""}[better_of(column)]
    return (
        f'<tr><th scope="row">{escape(title_of(column))}<span class="wish">{wish}</span></th>'
        + (f'<td class="dim">{number(report.reference.get(column), decimals=c.decimals)}</td>' if reference else "")
        + f"<td>{number(c.base, decimals=c.decimals)}</td><td>{number(c.tuned, decimals=c.decimals)}</td>"
        f'<td class="{verdict(column, c)}">{difference_of(c)}</td><td class="dim">{interval_of(c)}</td>'
        f'<td>{charts.whisker(c, verdict(column, c))}</td><td class="dim">{_count(c)}</td></tr>'
    )


def _count(c: Comparison) -> str:
    """How many images were compared, and for how many the measure was undefined."""
    undefined = [
        f"{count} of {who}" for who, count in (("base", c.base_undefined), ("adapter", c.tuned_undefined)) if count
    ]
    return f"{c.n}<br>undefined: {', '.join(undefined)}" if undefined else str(c.n)


def _layerd_section(report: Report) -> str:
    table = report.comparisons.by_kind.get("designs", {})
    if "layerd_cost_0" not in table:
        return ""
    return (
        '<h2>LayerD’s protocol by number of edits</h2><p class="note">Merges allowed before scoring, as in LayerD and '
        "Qwen-Image-Layered. Cost and RGB L1: lower is better; alpha IoU: higher is better. These numbers belong to "
        "this test set and cannot be compared with a paper’s.</p>"
        + _levels_table(table, "layerd", report.max_edits)
        + "<details><summary>The same after clearing alpha of 2/255 and less</summary>"
        '<p class="small">The protocol takes any alpha above 0 for overlap, so a decoder’s noise of one level regroups '
        "the layers. Here such alpha is set to 0 first, for both models alike.</p>"
        + _levels_table(table, "layerd_clean", report.max_edits)
        + "</details>"
    )


def _levels_table(table: Mapping[str, Comparison], prefix: str, max_edits: int) -> str:
    heads = "".join(f'<th class="group" colspan="3">{escape(score.title)}</th>' for score in LAYERD.values())
    names = '<th class="first">base</th><th>adapter</th><th>difference</th>' * len(LAYERD)
    rows = []
    for edits in range(max_edits + 1):
        cells = []
        for score in LAYERD:
            column = f"{prefix}_{score}_{edits}"
            cells.append(_base_adapter_difference(column, table[column]))
        rows.append(f'<tr><th scope="row">{edits}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="panel"><table><thead><tr><th>Edits</th>{heads}</tr><tr><th></th>{names}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _slots_section(report: Report) -> str:
    if not report.comparisons.slots:
        return ""
    return (
        '<h2>Layers by layer count</h2><p class="note">Each predicted slot against the true layer it is matched to, '
        "one to one, laid on black and on white; base → adapter. Lower is better. Slot k of both models may be matched "
        "to different true layers.</p>"
        + _slots_table(report, "layer_l1")
        + "<details><summary>Per-slot RGB L1, as the paper shows layers: on white only</summary>"
        '<p class="small">White content is nothing on white, so no verdict follows from these.</p>'
        + _slots_table(report, "slot_l1")
        + "</details>"
    )


def _slots_table(report: Report, column: str) -> str:
    slots = report.comparisons.slots
    most = max(slots)
    heads = "".join(f"<th>slot {slot}</th>" for slot in range(most))
    rows = []
    for layers, table in sorted(slots.items()):
        if column not in table:
            continue
        cells = [_base_adapter_difference(column, table[column])]
        for name in slots_of(column, most)[1:]:
            c = table.get(name)
            arrow = (
                f'{number(c.base, decimals=c.decimals)}<span class="dim"> → </span>'
                f"{number(c.tuned, decimals=c.decimals)}"
                if c
                else ""
            )
            cells.append(f'<td class="{verdict(name, c) if c else ""}">{arrow}</td>')
        count = f'<th scope="row">{layers} layers</th><td class="dim">{table[column].n}</td>'
        rows.append(f"<tr>{count}{''.join(cells)}</tr>")
    return (
        '<div class="panel"><table><thead><tr><th>Designs of</th><th>n</th><th class="first">mean, base</th>'
        f"<th>adapter</th><th>difference</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _base_adapter_difference(column: str, c: Comparison) -> str:
    return (
        f'<td class="first">{number(c.base, decimals=c.decimals)}</td><td>{number(c.tuned, decimals=c.decimals)}</td>'
        f'<td class="{verdict(column, c) or "dim"}">{number(c.difference, signed=True, decimals=c.decimals)}</td>'
    )


def _samplers_section(table: Mapping[str, Any] | None) -> str:
    """Base and adapter by every sampler, a row each."""
    if table is None:
        return ""
    columns = list(table["settings"][0]["measures"])
    heads = "".join(
        f'<th class="first">{escape(title_of(name))}, base</th><th>adapter</th><th>difference</th>' for name in columns
    )
    rows = []
    for setting in table["settings"]:
        cells = []
        for name in columns:
            cells.append(_base_adapter_difference(name, Comparison.from_json(setting["measures"][name])))
        guidance = "off" if setting["guidance"] == 1 else f"{setting['guidance']:g}"
        safe = {True: "yes", False: "no", None: "too few images"}[setting["safe"]]
        rows.append(
            f'<tr><th scope="row">{setting["sampler"].capitalize()}, {setting["steps"]} steps</th>'
            f'<td class="dim">{guidance}</td>{"".join(cells)}<td>{safe}</td></tr>'
        )
    return (
        f'<h2>By sampler</h2><p class="note">{table["images"]} of the images, from the same noise by every sampler. '
        "Safe: no interval says that the adapter is worse than the base by the same sampler, or than itself by "
        "Heun’s method with 50 steps without guidance. With three measures and two comparisons a sampler, chance alone "
        "calls some unsafe.</p>"
        '<div class="panel"><table><thead><tr><th>Sampler</th><th>guidance</th>'
        f"{heads}<th>safe</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _training_section(curve: Sequence[Point]) -> str:
    if not curve:
        return ""
    return (
        '<h2>Training</h2><p class="note">Mean reward of the candidates of each iteration; the band spans the middle '
        "80 % of them. Every iteration draws other images, so small changes may also be due to the images.</p>"
        f'<div class="panel"><figure>{charts.curve(curve)}</figure></div>'
    )


def _definitions(report: Report) -> str:
    """The definition of every measure that was computed, verbatim."""
    computed = {column for table in report.comparisons.by_kind.values() for column in table}
    entries = [(measure.title, DEFINITIONS[name]) for name, measure in MEASURES.items() if name in computed]
    entries += [
        ("Blank", DEFINITIONS["blank"]),
        ("Glazed", DEFINITIONS["glazed"]),
        ("Duplicate", DEFINITIONS["duplicate"]),
        ("Idle", DEFINITIONS["idle"]),
    ]
    if report.comparisons.slots:
        entries.append(("Slots", DEFINITIONS["slots"]))
    if any(column.startswith("layerd_") for column in computed):
        entries.append(("LayerD", DEFINITIONS["layerd"]))
    if report.ground_truth:
        entries.append(("True layers", " ".join(report.ground_truth)))
    return "".join(f"<dt>{escape(title)}</dt><dd>{escape(text)}</dd>" for title, text in entries)
