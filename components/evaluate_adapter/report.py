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
from layerloop.components.evaluate_adapter.statistics import FEWEST, METHOD, Comparison
from layerloop.components.layers.columns import GROUPS, LAYERD, better_of, quoted, title_of
from layerloop.components.layers.layerd import PROTOCOL
from layerloop.components.layers.measure import DEFINITIONS, MEASURES

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
    curve: Sequence[Point] = ()
    shown: Sequence[ShownCase] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    max_edits: int = 5
    resamples: int = 2000
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
        "method": escape(METHOD.format(resamples=report.resamples, fewest=FEWEST)),
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


def number(value: float | None, *, signed: bool = False) -> str:
    """A number of a table: three decimals, a typographic minus; a dash where it is undefined."""
    if value is None:
        return "–"
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    if float(text) == 0:
        text = "0.000"
    return text.replace("-", "−")


def verdict(column: str, comparison: Comparison) -> str:
    """ "good" or "bad" where the interval excludes 0 and one direction is better, else ""."""
    better = better_of(column)
    if not comparison.clear or better is None or comparison.difference is None:
        return ""
    return "good" if (comparison.difference < 0) == (better == "lower") else "bad"


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
        if better_of(column) is not None:
            by_verdict[verdict(column, table[column])].append(column)

    def listed(some: Sequence[str]) -> str:
        named = [
            f"{_lower(title_of(c))} ({number(table[c].base)} → <strong>{number(table[c].tuned)}</strong>)"
            for c in some[:4]
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
        interval = f"{number(c.low, signed=True)} … {number(c.high, signed=True)}" if c.low is not None else "one image"
        wish = {"lower": "↓ lower is better", "higher": "↑ higher is better", None: ""}[better_of(column)]
        cards.append(
            f'<div class="card"><p class="what">{escape(title_of(column))}<span class="wish">{wish}</span></p>'
            '<div class="value">'
            f'<span class="from">{number(c.base)}</span><span class="arrow">→</span>{number(c.tuned)}</div>'
            f'<div class="delta"><span class="chip {verdict(column, c)}">{number(c.difference, signed=True)}</span> '
            f'<span class="small">{interval}</span></div></div>'
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
    interval = f"{number(c.low, signed=True)} … {number(c.high, signed=True)}" if c.low is not None else "–"
    return (
        f'<tr><th scope="row">{escape(title_of(column))}<span class="wish">{wish}</span></th>'
        + (f'<td class="dim">{number(report.reference.get(column))}</td>' if reference else "")
        + f"<td>{number(c.base)}</td><td>{number(c.tuned)}</td>"
        f'<td class="{verdict(column, c)}">{number(c.difference, signed=True)}</td><td class="dim">{interval}</td>'
        f'<td>{charts.whisker(c, verdict(column, c))}</td><td class="dim">{c.n}</td></tr>'
    )


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
    slots = report.comparisons.slots
    if not slots:
        return ""
    most = max(slots)
    heads = "".join(f"<th>slot {slot}</th>" for slot in range(most))
    rows = []
    for layers, table in sorted(slots.items()):
        cells = [_base_adapter_difference("slot_l1", table["slot_l1"])]
        for slot in range(most):
            c = table.get(f"slot_l1_{slot}")
            arrow = f'{number(c.base)}<span class="dim"> → </span>{number(c.tuned)}' if c else ""
            cells.append(f'<td class="{verdict("slot_l1", c) if c else ""}">{arrow}</td>')
        count = f'<th scope="row">{layers} layers</th><td class="dim">{table["slot_l1"].n}</td>'
        rows.append(f"<tr>{count}{''.join(cells)}</tr>")
    return (
        '<h2>Per-slot RGB L1 by layer count</h2><p class="note">Each predicted slot against the true layer it matches '
        "best, one to one; base → adapter. Slot 0 is the background. Lower is better.</p>"
        '<div class="panel"><table><thead><tr><th>Designs of</th><th>n</th><th class="first">mean, base</th>'
        f"<th>adapter</th><th>difference</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _base_adapter_difference(column: str, c: Comparison) -> str:
    return (
        f'<td class="first">{number(c.base)}</td><td>{number(c.tuned)}</td>'
        f'<td class="{verdict(column, c) or "dim"}">{number(c.difference, signed=True)}</td>'
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
            kept = {key: setting["measures"][name][key] for key in Comparison.__dataclass_fields__}
            cells.append(_base_adapter_difference(name, Comparison(**kept)))
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
    ]
    if report.comparisons.slots:
        entries.append(("Slots", DEFINITIONS["slots"]))
    if any(column.startswith("layerd_") for column in computed):
        entries.append(("LayerD", PROTOCOL))
    return "".join(f"<dt>{escape(title)}</dt><dd>{escape(text)}</dd>" for title, text in entries)
