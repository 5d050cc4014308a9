"""Systems in the shape of the paper's Tables 1, 2 and 4 (Stable-Layers, arXiv 2605.30257): layers by their number,
held-out quality, and the ablation's view of layer 0. The numbers are ours, by our definitions and on our images: the
paper publishes no formula of its measures, so they do not compare with its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerloop.components.evaluate_adapter.statistics import Comparison
from layerloop.components.evaluate_adapter.systems import BASE, Table, title_of_row
from layerloop.components.layers.columns import better_of, gives_verdict

NOTE = (
    "In the shape of the tables of Stable-Layers (arXiv 2605.30257), by the definitions of layerloop and on this "
    "campaign's images: they do not compare with the paper's numbers, whose formulas are not public. Bold: clearly "
    "better than the base. Per-slot RGB L1 gives no verdict, since it is blind to white content."
)
# (number in the paper, what it shows, rows of the comparison that are its columns)
_SHAPES: Sequence[tuple[int, str, Sequence[str]]] = (
    (
        1, "RGB L1 of the layers on designs, by the number of layers",
        ("designs.slot_l1", "designs.slot_l1.L2", "designs.slot_l1.L3", "designs.slot_l1.L4", "designs.slot_l1.L5"),
    ),
    (
        2, "Held-out quality",
        (
            "pictures.bad_layers", "pictures.residue", "pictures.evenness", "designs.bad_layers",
            "designs.inpainting_ssim", "designs.evenness_gap",
        ),
    ),
    (
        4, "Ablation: layer 0 against the true background, and the layers",
        ("designs.inpainting_ssim", "designs.inpainting_l1", "designs.layer_l1", "designs.bad_layers"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class PaperTable:
    """A row for the base and for each system; cells are (text, whether clearly better than the base)."""

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[tuple[str, bool]]]


def paper_tables(table: Table, systems: Sequence[str]) -> list[PaperTable]:
    """Those of the three tables for which there is a number."""
    found = []
    for number, what, wanted in _SHAPES:
        names = [name for name in wanted if name in table]
        if not names:
            continue
        arrows = ({"lower": " ↓", "higher": " ↑", None: ""}[better_of(name.split(".")[1])] for name in names)
        columns = [title_of_row(name) + arrow for name, arrow in zip(names, arrows, strict=True)]
        rows: dict[str, list[tuple[str, bool]]] = {
            BASE: [(_text(first := next(iter(table[name].values())).comparison, first.base), False) for name in names]
        }
        for system in systems:
            cells = [table[name].get(system) for name in names]
            rows[system] = [
                ("–", False)
                if cell is None
                else (_text(cell.comparison, cell.comparison.tuned), _better(name, cell.comparison))
                for name, cell in zip(names, cells, strict=True)
            ]
        found.append(PaperTable(f"As Table {number}: {what}", columns, rows))
    return found


def tables_markdown(tables: Sequence[PaperTable]) -> str:
    """The tables as Markdown, a heading each; "" without any."""
    lines = [NOTE, ""] if tables else []
    for table in tables:
        lines += [f"**{table.title}**", "", f"| system | {' | '.join(table.columns)} |"]
        lines.append("| --- |" + " ---: |" * len(table.columns))
        for system, cells in table.rows.items():
            lines.append(f"| {system} | {' | '.join(f'**{text}**' if good else text for text, good in cells)} |")
        lines.append("")
    return "\n".join(lines)


def _text(c: Comparison, value: float | None) -> str:
    return "–" if value is None else f"{value:.{c.decimals}f}"


def _better(row: str, c: Comparison) -> bool:
    column = row.split(".")[1]
    if not gives_verdict(column) or not c.clear or c.difference is None:
        return False
    return (c.difference < 0) == (better_of(column) == "lower")
