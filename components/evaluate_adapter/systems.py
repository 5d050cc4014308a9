"""Any number of systems side by side on one campaign's cases: adapters that were evaluated, and layers that other
programs made of the same pictures.

Every system is compared with the base on the cases that both have, paired by image, layer count and seed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layerloop.components.evaluate_adapter.assess import Row, assess
from layerloop.components.evaluate_adapter.cases import Case, Cases
from layerloop.components.evaluate_adapter.comparable import Evaluation, identity, parse_metrics
from layerloop.components.evaluate_adapter.statistics import Comparison, compare, holm
from layerloop.components.layers.columns import BY_SLOT, COLUMNS, better_of, gives_verdict, judged, title_of
from layerloop.components.layers.normalise import upright_srgb
from layerloop.components.layers.psd_reading import read_layers
from layerloop.components.layers.stack import Pixels, resize
from layerloop.components.runtime.progress import log
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.seeds import seed_for
from layerloop.components.storage.campaign import MANIFEST
from layerloop.components.storage.images import decode_image, encode_png
from layerloop.components.storage.stores import read_uri

BASE = "base"
_NUMBERED = re.compile(r"(?:(\d+)(?!\d).*|.*?(\d+))", re.DOTALL)
_MOST_BENT = 0.02  # of another aspect than the case's, what is still scaled to it


@dataclass(frozen=True)
class Cell:
    """One measure of one system against the base: the comparison, and the share of cases in which the system is better,
    ties counting half; None where the measure has no direction."""

    comparison: Comparison
    wins: float | None


Table = Mapping[str, Mapping[str, Cell]]  # row ("designs.bad_layers", "designs.slot_l1.L3") -> system -> cell


def read_evaluation(uri: str) -> Evaluation:
    """A committed evaluation, a campaign's folder `evaluations/NAME`.

    Raises:
        LayerloopError: there is none, or it is no table of samples, or nothing says how it was measured.
    """
    import pyarrow.parquet as pq

    uri = uri.rstrip("/")
    data = read_uri(_file_of(uri, "samples.parquet"))
    try:
        rows: list[Row] = pq.read_table(io.BytesIO(data)).to_pylist()
    except (OSError, ValueError) as error:  # Arrow's errors are among these
        raise LayerloopError(f"{uri}/samples.parquet is damaged ({error}): evaluate again") from None
    if not rows or not {"model", "kind", "key", "layers", "seed"} <= rows[0].keys():
        raise LayerloopError(f"{uri}/samples.parquet has no samples: give the folder of an evaluation")
    where = _file_of(uri, "metrics.json")
    base, tuned = ([row for row in rows if (row["model"] == BASE) == wanted] for wanted in (True, False))
    return Evaluation(base, tuned, *parse_metrics(read_uri(where), where=where))


def is_evaluation(uri: str) -> bool:
    """Whether it is a URI, or a local folder, of an evaluation."""
    return "://" in uri or any((Path(uri) / name).is_file() for name in (MANIFEST, "samples.parquet"))


def _file_of(uri: str, base_name: str) -> str:
    """Where an evaluation's file is: as its manifest names it, which is in the folder, or in the folder itself."""
    try:
        manifest = Manifest.from_json(read_uri(f"{uri}/{MANIFEST}"), where=f"{uri}/{MANIFEST}")
        name = manifest.file(base_name).name
    except (LayerloopError, KeyError):
        return f"{uri}/{base_name}"
    return f"{uri}/{name.split('/', 2)[2]}"  # evaluations/<its name>/...


def write_sources(cases: Cases, folder: Path) -> int:
    """Write the picture of every case as `<case>.png`, for other programs to decompose; their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases.cases:
        (folder / f"{case.name}.png").write_bytes(encode_png(case.source))
    return len(cases.cases)


def measure_folder(folder: Path, cases: Cases, *, max_edits: int) -> list[Row]:
    """Numbers of the layers that another program made: of each case `<folder>/<case>.psd`, or a subfolder `<case>` of
    numbered images, bottom first. Cases that it has not are left out.

    Raises:
        LayerloopError: no case is there, or one cannot be read.
    """
    if not folder.is_dir():
        raise LayerloopError(
            f"{folder} is no folder: give an evaluation, an adapter or a folder of layers; a repository of the hub is "
            "hf://owner/name where a folder here is called as its owner"
        )
    rows: list[Row] = []
    hidden: list[str] = []
    for case in cases.cases:
        layers = _layers_of(folder, case, hidden)
        if layers is not None:
            rows.append(assess(case, layers, max_edits=max_edits))
    if not rows:
        example = cases.cases[0].name
        raise LayerloopError(
            f"{folder} has layers of none of the {len(cases.cases)} cases: give a subfolder of numbered PNGs or a PSD "
            f"for each, such as {example}/0.png or {example}.psd"
        )
    if hidden:
        log(f"{folder}: {len(hidden)} hidden layers are left out, such as {hidden[0]}")
    if len(rows) < len(cases.cases):
        log(f"{folder} has layers of {len(rows)} of the {len(cases.cases)} cases")
    return rows


def compare_systems(base: Sequence[Row], systems: Mapping[str, Sequence[Row]], *, seed: int) -> Table:
    """Every measure of every system against the base: the columns of the report's tables by kind of case, and the
    per-slot L1 by layer count. P-values are adjusted over the whole table (Holm).

    Raises:
        LayerloopError: a system has no case in common with the base.
    """
    found: dict[tuple[str, str], Cell] = {}
    earlier = {identity(row): row for row in base}
    for name, rows in systems.items():
        pairs = [(earlier[key], row) for row in rows if (key := identity(row)) in earlier]
        if not pairs:
            raise LayerloopError(
                f"{name} has no case in common with the base: evaluate it on the same images, layers and seed"
            )
        for row, column, chosen in _rows_of(pairs):
            cell = _cell(column, chosen, seed_for(seed, "sign flips"))
            if cell is not None:
                found[row, name] = cell
    family = [key for key, cell in found.items() if cell.wins is not None]
    adjusted = holm({key: cell.comparison for key, cell in found.items()}, family)
    table: dict[str, dict[str, Cell]] = {}
    for (row, name), cell in found.items():
        table.setdefault(row, {})[name] = Cell(adjusted[row, name], cell.wins)
    return table


def as_markdown(table: Table, systems: Sequence[str]) -> str:
    """The table as Markdown: base and systems, each with its change, and with its share of wins where it has one; bold
    where the difference is clear. A system of fewer cases than another has the number of its own beside, with the
    base's on them."""
    lines = [f"| measure | n | base | {' | '.join(systems)} |", "| --- |" + " ---: |" * (len(systems) + 2)]
    for row, cells in table.items():
        first = max((cell.comparison for cell in cells.values()), key=lambda comparison: comparison.n)
        arrow = {"lower": " ↓", "higher": " ↑", None: ""}[better_of(column_of_row(row))]
        numbers = [_text(cells[name]) + _own_cases(cells[name], first) if name in cells else "–" for name in systems]
        lines.append(f"| {title_of_row(row)}{arrow} | {first.n} | {_base(first)} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def _base(comparison: Comparison) -> str:
    """The base's mean, and of how many images it has none."""
    value = f"{comparison.base:.{comparison.decimals}f}" if comparison.base is not None else "–"
    return value + undefined_text(comparison.base_undefined)


def undefined_text(count: int) -> str:
    """What stands behind a mean of a measure that has no value for some images; "" for none."""
    return f" [undefined: {count}]" if count else ""


def _own_cases(cell: Cell, first: Comparison) -> str:
    """What a system is compared with that counts on fewer cases than another: the base's number on these, where it is
    of fewer cases than the column's."""
    own = cell.comparison
    if own.n == first.n:
        return ""
    base = _base(own)
    return f" [n {own.n}]" if base == _base(first) else f" [n {own.n}, base {base}]"


def as_json(table: Table) -> dict[str, Any]:
    """The table by row and system: the fields of the comparison and `wins`."""
    return {
        row: {name: {**cell.comparison.as_json(), "wins": cell.wins} for name, cell in cells.items()}
        for row, cells in table.items()
    }


def _rows_of(pairs: Sequence[tuple[Row, Row]]) -> list[tuple[str, str, list[tuple[Row, Row]]]]:
    """(row of the table, column of the samples, the pairs that it is about)."""
    rows = []
    for kind in ("designs", "pictures"):
        chosen = [(b, t) for b, t in pairs if b["kind"] == kind]
        columns = [*COLUMNS, *judged(dict.fromkeys(name for _, row in chosen for name in row))]
        rows += [(f"{kind}.{column}", column, chosen) for column in columns]
        counts = sorted({b["layers"] for b, _ in chosen}) if kind == "designs" else []
        rows += [
            (f"{kind}.{column}.L{count}", column, [(b, t) for b, t in chosen if b["layers"] == count])
            for column in BY_SLOT
            for count in counts
        ]
    return rows


def _cell(column: str, pairs: Sequence[tuple[Row, Row]], seed: int) -> Cell | None:
    base, tuned = [b.get(column) for b, _ in pairs], [t.get(column) for _, t in pairs]
    comparison = compare(base, tuned, seed=seed)
    if comparison.base is None and comparison.tuned is None:
        return None
    if not gives_verdict(column) or not comparison.n:
        return Cell(comparison, None)
    sign = -1 if better_of(column) == "lower" else 1
    gains = [sign * np.sign(t - b) for b, t in zip(base, tuned, strict=True) if b is not None and t is not None]
    return Cell(comparison, float(np.mean([(1 + gain) / 2 for gain in gains])))


def _text(cell: Cell) -> str:
    c = cell.comparison
    text = "–" if c.tuned is None else f"{c.tuned:.{c.decimals}f}"
    if c.difference is not None:
        difference = f"{c.difference:+.{c.decimals}f}"
        text += f" ({difference if float(difference) else difference[1:]}"
        text += f", wins {100 * cell.wins:.0f} %)" if cell.wins is not None else ")"
    clear = c.clear and cell.wins is not None
    return (f"**{text}**" if clear else text) + undefined_text(c.tuned_undefined)


def column_of_row(row: str) -> str:
    """The column of the samples that a row of the table is about."""
    return row.split(".")[1]


def title_of_row(row: str) -> str:
    """A row's human-readable name."""
    kind, column, *count = row.split(".")
    by_count = f", {count[0].removeprefix('L')} layers" if count else ""
    return f"{kind}: {title_of(column)}{by_count}"


# --------------------------------------------------------------------------------------------- layers of other programs


def _layers_of(folder: Path, case: Case, hidden: list[str]) -> Pixels | None:
    """The layers of a case, bottom first, at its size; None where the folder has none of it. `hidden` takes the names
    of layers that a document hides."""
    size = (case.size[1], case.size[0])
    images = folder / case.name
    documents = [path for suffix in (".psd", ".psb") if (path := folder / f"{case.name}{suffix}").is_file()]
    unseen: list[str] = []
    found: Iterable[Pixels]
    if documents:
        found = read_layers(documents[0], unseen)
    elif images.is_dir():
        found = map(_decoded, _numbered(images))
    else:
        return None
    scaled = []
    for layer in found:
        height, width = layer.shape[:2]
        if abs(width / height / (size[0] / size[1]) - 1) > _MOST_BENT:
            raise LayerloopError(
                f"{folder}/{case.name} has a layer of {width} x {height}, the picture is {size[0]} x {size[1]}: give "
                "layers of the picture's shape"
            )
        scaled.append(resize(layer, size))
    if not scaled:
        raise LayerloopError(f"{folder}/{case.name} has no layers: give numbered PNGs or a PSD with pixel layers")
    hidden += [f"{name!r} of {documents[0].name}" for name in unseen]
    return np.stack(scaled)


def _numbered(folder: Path) -> list[Path]:
    """Images by the number that their names begin or end with; those without one are none."""
    numbers: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = _NUMBERED.fullmatch(path.stem)
        if path.suffix.lower() not in (".png", ".webp") or match is None or path.name.startswith("."):
            continue
        number = int(match[1] or match[2])
        if number in numbers:
            raise LayerloopError(f"{path} and {numbers[number].name} have one number: number the layers bottom to top")
        numbers[number] = path
    return [numbers[number] for number in sorted(numbers)]


def _decoded(path: Path) -> Pixels:
    try:
        return np.asarray(upright_srgb(decode_image(path.read_bytes())).convert("RGBA"))
    except LayerloopError as error:
        raise LayerloopError(f"layer {path}: {error}") from None
