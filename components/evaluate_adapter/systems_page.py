"""The page of `layerloop compare`: any number of systems against the base, a section each and one table of all."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from layerloop.components.evaluate_adapter.gallery import style
from layerloop.components.evaluate_adapter.paper_tables import NOTE, PaperTable
from layerloop.components.evaluate_adapter.statistics import METHOD, Comparison
from layerloop.components.evaluate_adapter.systems import Cell, Table, column_of_row, title_of_row, undefined_text
from layerloop.components.evaluate_adapter.tables import count_of, difference_of, interval_of, number, verdict
from layerloop.components.layers.columns import better_of
from layerloop.components.schema.messages import counted


def as_html(table: Table, systems: Sequence[str], shaped: Sequence[PaperTable], *, campaign: str) -> bytes:
    """A self-contained page. Every number is against the base on the cases that system and base have in common."""
    sections = "".join(_section(table, name) for name in systems)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>Systems · layerloop</title>'
        f"<style>{style()}</style></head>"
        f'<body><main><p class="eyebrow">layerloop · {escape(campaign)}</p><h1>Systems side by side</h1>'
        f"{_shaped(shaped)}{sections}"
        '<h2>All measures</h2><p class="note">↓ lower is better, ↑ higher is better. A row is of the images '
        "that system and base have in common; n is the number of the system that has most of them.</p>"
        f'{_all(table, systems)}<h2>Method</h2><p class="note">{escape(METHOD)}</p></main></body></html>\n'
    ).encode()


def _shaped(tables: Sequence[PaperTable]) -> str:
    """The tables in the shape of the paper's."""
    if not tables:
        return ""
    parts = [f'<p class="note">{escape(NOTE.replace("Bold", "Coloured"))}</p>']
    for table in tables:
        heads = "".join(
            f"<th>{escape(name).replace(' ↓', '&nbsp;↓').replace(' ↑', '&nbsp;↑')}</th>" for name in table.columns
        )
        rows = "".join(
            f'<tr><th scope="row">{escape(system)}</th>'
            + "".join(f"<td{' class=good' if good else ''}>{text}</td>" for text, good in cells)
            + "</tr>"
            for system, cells in table.rows.items()
        )
        parts.append(
            f"<h2>{escape(table.title)}</h2>"
            f'<div class="panel systems"><table><thead><tr><th>System</th>{heads}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    return "".join(parts)


def _section(table: Table, name: str) -> str:
    """What is clear of one system."""
    found: dict[str, list[str]] = {"good": [], "bad": [], "": []}
    for row, cells in table.items():
        if name in cells and cells[name].wins is not None:
            found[_verdict(row, cells[name])].append(row)
    rows = "".join(_clear_row(row, table[row][name]) for row in (*found["good"], *found["bad"]))
    words = (
        f"Clearly better than the base in {counted(len(found['good']), 'measures')}, clearly worse in "
        f"{len(found['bad'])}, not clearly different in {len(found[''])}."
    )
    heads = "<th>base</th><th>system</th><th>difference</th><th>95 % interval</th><th>cases won</th><th>n</th>"
    shown = (
        f'<div class="panel measures"><table><thead><tr><th>Measure</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    return f'<h2>{escape(name)}</h2><p class="note">{words}</p>{shown if rows else ""}'


def _clear_row(row: str, cell: Cell) -> str:
    c = cell.comparison
    return (
        f'<tr><th scope="row">{escape(title_of_row(row))}<span class="wish">{_arrow(row)}</span></th>'
        f'<td data-label="base">{number(c.base, decimals=c.decimals)}</td>'
        f'<td data-label="system">{number(c.tuned, decimals=c.decimals)}</td>'
        f'<td class="{_verdict(row, cell)}" data-label="difference">{difference_of(c)}</td>'
        f'<td class="dim" data-label="95 % interval">{interval_of(c)}</td>'
        f'<td data-label="cases won">{100 * (cell.wins or 0):.0f} %</td>'
        f'<td class="dim count" data-label="images">{count_of(c, "system")}</td></tr>'
    )


def _all(table: Table, systems: Sequence[str]) -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in systems)
    rows = []
    for row, cells in table.items():
        first = max((cell.comparison for cell in cells.values()), key=lambda comparison: comparison.n)
        numbers = "".join(
            f'<td class="{_verdict(row, cells[name])}">{_mean_of(cells[name].comparison, first.n)}</td>'
            if name in cells
            else "<td>–</td>"
            for name in systems
        )
        base = number(first.base, decimals=first.decimals) + _small(undefined_text(first.base_undefined))
        rows.append(
            f'<tr><th scope="row">{escape(title_of_row(row))}<span class="wish">{_arrow(row)}</span></th>'
            f'<td class="dim">{first.n}</td><td>{base}</td>{numbers}</tr>'
        )
    return (
        f'<div class="panel systems"><table><thead><tr><th>Measure</th><th>n</th><th>base</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _mean_of(c: Comparison, count: int) -> str:
    """A system's mean; beside it the images for which it has none, and those it counts on where others have more."""
    few = f" [n {c.n}]" if c.n != count else ""
    return number(c.tuned, decimals=c.decimals) + _small(few + undefined_text(c.tuned_undefined))


def _small(text: str) -> str:
    return f"<br><small>{text.strip()}</small>" if text else ""


def _verdict(row: str, cell: Cell) -> str:
    return verdict(column_of_row(row), cell.comparison)


def _arrow(row: str) -> str:
    return {"lower": "↓", "higher": "↑", None: ""}[better_of(column_of_row(row))]
