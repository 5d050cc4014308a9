"""The page's cards and tables, as HTML: numbers to the digits that their intervals support, and what may be said of
them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from layerloop.components.evaluate_adapter import charts
from layerloop.components.evaluate_adapter.assess import Comparisons
from layerloop.components.evaluate_adapter.cases import Kind
from layerloop.components.evaluate_adapter.statistics import FEWEST, Comparison
from layerloop.components.layers.columns import (
    GROUPS,
    LAYERD,
    better_of,
    gives_verdict,
    judged,
    quoted,
    slots_of,
    title_of,
)
from layerloop.components.schema.messages import counted

HEADINGS: dict[Kind, str] = {"designs": "Held-out designs", "pictures": "Unlabelled images"}


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
    if c.relative is None or not 0.0005 <= abs(c.relative) < 10 or text == number(0, decimals=c.decimals):
        return text
    share = f"{100 * c.relative:+.{0 if abs(c.relative) >= 0.095 else 1}f}"
    return f"{text} ({share.replace('-', '−')}\u00a0%)"


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


def headline(comparisons: Comparisons) -> tuple[Kind, list[str]]:
    """The kind of case that a page is about first, and the columns of its cards."""
    kind: Kind = "designs" if "designs" in comparisons.by_kind else "pictures"
    columns = quoted("designs headline" if kind == "designs" else "pictures headline")
    return kind, [column for column in columns if column in comparisons.by_kind[kind]]


def cards(comparisons: Comparisons, differences: Mapping[Kind, Mapping[str, Sequence[float]]]) -> str:
    """A card for each headline measure, with the distribution of its differences, image by image."""
    kind, columns = headline(comparisons)
    return "".join(
        _card(column, comparisons.by_kind[kind][column], differences.get(kind, {}).get(column, ()))
        for column in columns
    )


def _card(column: str, c: Comparison, differences: Sequence[float]) -> str:
    wish = {"lower": "↓ lower is better", "higher": "↑ higher is better", None: ""}[better_of(column)]
    few = f'<p class="spread">{too_few(c.n)}</p>' if c.n < FEWEST else ""
    return (
        f'<div class="card"><p class="what">{escape(title_of(column))}<span class="wish">{wish}</span></p>'
        '<div class="value">'
        f'<span class="from">{number(c.base, decimals=c.decimals)}</span><span class="arrow">→</span>'
        f"{number(c.tuned, decimals=c.decimals)}</div>"
        f'<div class="delta"><span class="chip {verdict(column, c)}">{difference_of(c)}</span> '
        f'<span class="small">{interval_of(c, "one image")}</span></div>{few}{_distribution(column, differences)}</div>'
    )


def too_few(n: int) -> str:
    """What is said where a verdict cannot be given."""
    return f"{n} image{' is' if n == 1 else 's are'} too few to tell ({FEWEST} are needed)"


def _distribution(column: str, differences: Sequence[float]) -> str:
    """How many images are better, alike and worse, and the histogram of their differences; "" of one or none."""
    better = better_of(column)
    if len(differences) < 2 or better is None:
        return ""
    gains = [-d if better == "lower" else d for d in differences]
    good, bad = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    alike = len(gains) - good - bad
    words = f"better on {good}, worse on {bad}" + (f", alike on {alike}" if alike else "")
    return (
        f'<div class="spread">{charts.histogram(gains, f"{title_of(column)} by image: {words}")}'
        f"worse ← by image → better<br>{words}</div>"
    )


def measures_section(kind: Kind, table: Mapping[str, Comparison], reference: Mapping[str, float]) -> str:
    """All measures of a kind of case; `reference` are the true layers' own values, {} for none."""
    groups: list[tuple[str, Sequence[str]]] = [*GROUPS.items(), ("By the judge, 0 to 1", judged(table))]
    reach = charts.common_reach(table[name] for _, group in groups for name in group if name in table)
    width = 8 if reference else 7
    rows = []
    for heading, columns in groups:
        group = [_row(column, table[column], reference, reach) for column in columns if column in table]
        if group:
            rows += [f'<tr class="heading"><th colspan="{width}">{escape(heading)}</th></tr>', *group]
    what = {
        "designs": "Images composed of known layers, each decomposed at its own layer count.",
        "pictures": "Images without known layers, measured without a reference.",
    }[kind]
    truth = " The column “true layers” has the known layers' own scores." if reference else ""
    most = max((c.n for c in table.values()), default=0)
    few = f" {too_few(most)[0].upper()}{too_few(most)[1:]}." if most < FEWEST else ""
    scale = f"±{100 * reach:.0f} %"
    lacking = any(c.base_undefined or c.tuned_undefined for c in table.values())
    some = " A mean is over all images where it is defined, a difference over the n where both are." if lacking else ""
    return (
        f'<h2>{HEADINGS[kind]}</h2><p class="note">{what}{truth}{few} ↓ lower is better, ↑ higher is better. In the '
        "small chart of each row the middle line is 0, the dot the difference and the bar its 95 % interval, as shares "
        f"of the larger of the two means; all rows have one scale, {scale}, and an arrow goes on beyond it.{some}</p>"
        '<div class="panel measures"><table><thead><tr><th>Measure</th>'
        + ("<th>true layers</th>" if reference else "")
        + f"<th>base</th><th>adapter</th><th>difference</th><th>95 % interval</th><th>{scale}</th><th>n</th></tr>"
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(column: str, c: Comparison, reference: Mapping[str, float], reach: float) -> str:
    wish = {"lower": "↓", "higher": "↑", None: ""}[better_of(column)]
    true = f'<td class="dim last" data-label="true layers">{number(reference.get(column), decimals=c.decimals)}</td>'
    return (
        f'<tr><th scope="row">{escape(title_of(column))}<span class="wish">{wish}</span></th>'
        + (true if reference else "")
        + f'<td data-label="base">{number(c.base, decimals=c.decimals)}</td>'
        f'<td data-label="adapter">{number(c.tuned, decimals=c.decimals)}</td>'
        f'<td class="{verdict(column, c)}" data-label="difference">{difference_of(c)}</td>'
        f'<td class="dim" data-label="95 % interval">{interval_of(c)}</td>'
        f'<td data-label="±{100 * reach:.0f} %">{charts.whisker(c, verdict(column, c), reach)}</td>'
        f'<td class="dim count" data-label="images">{count_of(c)}</td></tr>'
    )


def count_of(c: Comparison, compared: str = "adapter") -> str:
    """How many images were compared, and for how many the measure was undefined."""
    undefined = [
        f"{count} of {who}" for who, count in (("base", c.base_undefined), (compared, c.tuned_undefined)) if count
    ]
    return f"{c.n}<br><small>undefined: {', '.join(undefined)}</small>" if undefined else str(c.n)


def layerd_section(table: Mapping[str, Comparison], max_edits: int) -> str:
    """LayerD's scores by number of edits; "" where they were not computed."""
    if "layerd_cost_0" not in table:
        return ""
    return (
        '<h2>LayerD’s protocol by number of edits</h2><p class="note">Merges allowed before scoring, as in LayerD and '
        "Qwen-Image-Layered. Cost and RGB L1: lower is better; alpha IoU: higher is better. These numbers belong to "
        "this test set and cannot be compared with a paper’s.</p>"
        + _levels_table(table, "layerd", max_edits)
        + "<details><summary>The same after clearing alpha of 2/255 and less</summary>"
        '<p class="small">The protocol takes any alpha above 0 for overlap, so a decoder’s noise of one level regroups '
        "the layers. Here such alpha is set to 0 first, for both models alike.</p>"
        + _levels_table(table, "layerd_clean", max_edits)
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


def slots_section(slots: Mapping[int, Mapping[str, Comparison]]) -> str:
    """Layers by layer count and slot; "" without designs."""
    if not slots:
        return ""
    return (
        '<h2>Layers by layer count</h2><p class="note">Each predicted slot against the true layer it is matched to, '
        "one to one, laid on black and on white; base → adapter. Lower is better. Slot k of both models may be matched "
        "to different true layers.</p>"
        + _slots_table(slots, "layer_l1")
        + "<details><summary>Per-slot RGB L1, as the paper shows layers: on white only</summary>"
        '<p class="small">White content is nothing on white, so no verdict follows from these.</p>'
        + _slots_table(slots, "slot_l1")
        + "</details>"
    )


def _slots_table(slots: Mapping[int, Mapping[str, Comparison]], column: str) -> str:
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
        count = f'<th scope="row">{counted(layers, "layers")}</th><td class="dim">{table[column].n}</td>'
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


def samplers_section(table: Mapping[str, Any] | None) -> str:
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
