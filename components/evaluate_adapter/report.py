"""The report: one self-contained HTML page, light and dark, without scripts.

It formats numbers and pixels that were computed before; it shows nothing that is not in `metrics.json`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from string import Template
from typing import Any

from layerloop.components.evaluate_adapter import charts
from layerloop.components.evaluate_adapter.assess import Comparisons
from layerloop.components.evaluate_adapter.cases import Kind
from layerloop.components.evaluate_adapter.charts import Line, Point
from layerloop.components.evaluate_adapter.gallery import (
    ShownCase,
    article,
    gallery,
    removed_views,
    style,
    with_removed,
)
from layerloop.components.evaluate_adapter.history import Evaluated, headline_names, held_out_charts
from layerloop.components.evaluate_adapter.sheets import GAIN
from layerloop.components.evaluate_adapter.statistics import FEWEST, METHOD
from layerloop.components.evaluate_adapter.tables import (
    cards,
    headline,
    layerd_section,
    measures_section,
    number,
    samplers_section,
    slots_section,
    too_few,
    verdict,
)
from layerloop.components.layers.columns import DEFINITIONS, GROUPS, gives_verdict, title_of
from layerloop.components.layers.measure import MEASURES

TARGET_BYTES = 950_000  # Kubeflow's page shows reports of about a megabyte
_LINK = re.compile(rb'(<a\b[^>]*?) href="(?!#)[^"]*"')


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
    judged: str = ""  # who scored the unlabelled images, in a sentence or two; "" where nobody did
    notices: Sequence[str] = ()
    ground_truth: Sequence[str] = ()  # how the true layers were made, in sentences
    curve: Sequence[Point] = ()
    training: Sequence[tuple[str, Sequence[Line]]] = ()  # charts over iterations, (title, lines)
    earlier: Sequence[Evaluated] = ()  # evaluations of earlier iterations
    iteration: int = 0
    differences: Mapping[Kind, Mapping[str, Sequence[float]]] = field(default_factory=dict)  # of each image, by column
    shown: Sequence[ShownCase] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    max_edits: int = 5
    samplers: Mapping[str, Any] | None = None  # the table of samplers.py
    version: str = ""


def render(report: Report) -> bytes:
    """The page. When it would grow over `TARGET_BYTES` the gallery's last samples are left out, and it says so."""
    template = Template(resources.files(__package__).joinpath("template.html").read_text(encoding="utf-8"))
    by_kind = report.comparisons.by_kind
    fields = {
        "title": escape(report.title),
        "style": style(),
        "campaign": escape(report.campaign),
        "summary": summary(report),
        "judge": escape(report.judge),
        "notices": "".join(f'<p class="notice">{escape(text)}</p>' for text in report.notices),
        "cards": cards(report.comparisons, report.differences),
        "tables": "".join(
            measures_section(kind, table, report.reference if kind == "designs" else {})
            for kind, table in by_kind.items()
        ),
        "layerd": layerd_section(by_kind.get("designs", {}), report.max_edits),
        "slots": slots_section(report.comparisons.slots),
        "samplers": samplers_section(report.samplers),
        "iterations": _iterations_section(report),
        "training": _training_section(report),
        "method": escape(METHOD),
        "definitions": _definitions(report),
        "settings": "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in report.settings.items()),
        "version": escape(report.version),
    }
    room = TARGET_BYTES - sum(len(text.encode()) for text in (template.template, *fields.values()))
    kept = _articles_within(report.shown, room)
    fields["shown"] = escape(_gallery_note(report, len(kept)))
    fields["gallery"] = gallery(kept)
    return template.substitute(fields).encode()


def standalone(page: bytes) -> bytes:
    """The page without links to files beside it, for where it is shown alone."""
    return _LINK.sub(rb"\1", page)


def _articles_within(shown: Sequence[ShownCase], room: int) -> list[str]:
    """The articles that fit in `room` bytes, one at least, in their order; the first of each kind have precedence.
    What room is left is for views with a layer removed, in the same precedence."""
    articles = [article(item) for item in shown]
    kinds = [item.choice.case.kind for item in shown]
    rank = [kinds[:index].count(kind) for index, kind in enumerate(kinds)]
    order = sorted(range(len(articles)), key=lambda index: (rank[index], index))
    kept: list[int] = []
    for index in order:
        if not kept or len(articles[index].encode()) <= room:
            kept.append(index)
            room -= len(articles[index].encode())
    for index in kept:
        removed = removed_views(shown[index])
        if len(removed.encode()) <= room:
            articles[index] = with_removed(articles[index], removed)
            room -= len(removed.encode())
    return [articles[index] for index in sorted(kept)]


def summary(report: Report) -> str:
    """The headline in one paragraph of HTML."""
    counts = [
        f"<strong>{n}</strong> {one}{'' if n == 1 else 's'}{more}"
        for n, one, more in (
            (report.counts.get("designs", 0), "held-out design", " with known layers"),
            (report.counts.get("pictures", 0), "unlabelled image", ""),
        )
        if n
    ]
    kind: Kind = "designs" if "designs" in report.comparisons.by_kind else "pictures"
    table = report.comparisons.by_kind[kind]
    first = headline(report.comparisons)[1]  # parts of these, such as blank layers, are not the news
    columns = [*first, *(name for group in GROUPS.values() for name in group if name in table and name not in first)]
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
    words = {"good": "better", "bad": "worse"}
    for which in sorted(words, key=lambda name: -len(by_verdict[name])):  # what there is more of leads
        if by_verdict[which]:
            text += f" {on} is clearly {words[which]} in {listed(by_verdict[which])}."
            on = "It"
    rest = len(by_verdict[""])
    most = max((c.n for c in table.values()), default=0)
    if most < FEWEST:
        return f"{text} {too_few(most)[0].upper()}{too_few(most)[1:]}: this page shows what changed and judges nothing."
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
        "shown pixel by pixel, large ones reduced; where the page lies in its folder, a tile leads to its layer at "
        "full size, in gallery. Under a layer stand the share of the image that it covers, its mean alpha (α), how "
        "much of what it covers is semi-transparent, and in red what makes it a bad layer."
    )
    if kept < len(report.shown):
        text += f" {len(report.shown) - kept} more are in gallery, left out here to keep the page small."
    return text


def _iterations_section(report: Report) -> str:
    """The evaluated iterations with their headline measures, each leading to its report; "" for the first alone."""
    if not report.earlier:
        return ""
    now = _evaluated_here(report)
    columns = [name for name in headline_names() if name in now.tuned]
    heads = "".join(f"<th>{escape(_named(name))}</th>" for name in columns)
    rows = []
    for item in (*report.earlier, now):
        name = f"iteration {item.iteration}"
        link = f'<a href="{escape(item.link)}">{name}</a>' if item.link else f"<b>{name}, this page</b>"
        cells = "".join(f"<td>{number(item.tuned.get(column))}</td>" for column in columns)
        rows.append(f'<tr><th scope="row">{link}</th>{cells}</tr>')
    base = "".join(f'<td class="dim">{number(now.base.get(column))}</td>' for column in columns)
    lacking = any(column not in item.tuned for item in report.earlier for column in columns)
    dash = " –: undefined, or measured by another definition then." if lacking else ""
    figures = "".join(charts.lines(chart, title) for title, chart in held_out_charts([*report.earlier, now]))
    return (
        '<h2>Iterations</h2><p class="note">Adapters of this campaign that were evaluated before, on the same images '
        f"from the same noise.{dash}</p>"
        f'<div class="panel"><table><thead><tr><th>Adapter</th>{heads}</tr></thead><tbody>'
        f'<tr><th scope="row">base</th>{base}</tr>{"".join(rows)}</tbody></table></div>'
        f'<div class="charts">{figures}</div>'
    )


def _evaluated_here(report: Report) -> Evaluated:
    """This page's own numbers, as those of earlier pages are given."""
    flat = report.comparisons.flat()
    found = {name: flat[name] for name in headline_names() if name in flat}
    return Evaluated(
        report.iteration,
        "",
        {name: c.tuned for name, c in found.items() if c.tuned is not None},
        {name: c.base for name, c in found.items() if c.base is not None},
    )


def _named(name: str) -> str:
    kind, _, column = name.partition(".")
    return f"{title_of(column)}, {kind}"


def _training_section(report: Report) -> str:
    figures = "".join(charts.lines(chart, title) for title, chart in report.training)
    rewards = f'<div class="panel"><figure>{charts.curve(report.curve)}</figure></div>' if report.curve else ""
    if not figures and not rewards:
        return ""
    return (
        '<h2>Training</h2><p class="note">Mean reward of the candidates of each iteration; the band spans the middle '
        "80 % of them. A judge that holds the candidates of an image against each other may give much the same mean "
        "however good they all are, so a level line is no sign of standing still: whether decompositions became better "
        "is above. Every iteration draws other images, so small changes may also be due to the images.</p>"
        f'{rewards}<div class="charts">{figures}</div>'
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
    if report.judged:
        entries.append(("Judge", f"{report.judged} {DEFINITIONS['judge']}"))
    if report.ground_truth:
        entries.append(("True layers", " ".join(report.ground_truth)))
    return "".join(f"<dt>{escape(title)}</dt><dd>{escape(text)}</dd>" for title, text in entries)
