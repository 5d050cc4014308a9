"""Designs with their true layers: Crello's column layout in parquet, or folders of numbered images."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image

from layerloop.components.layers.crello import (
    NEEDED_COLUMNS,
    REVISION,
    check_row,
    class_labels,
    render_elements,
    with_labels,
)
from layerloop.components.layers.normalise import target_size, upright_srgb
from layerloop.components.layers.stack import resize
from layerloop.components.layers.text import FontFiles
from layerloop.components.layers.truth import Truth, ground_truth
from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.messages import printable
from layerloop.components.schema.recipe import DataRecipe
from layerloop.components.shard_dataset.files import Files, InputError, Passed, suffix_of
from layerloop.components.shard_dataset.inputs import Inputs, find_inputs
from layerloop.components.shard_dataset.items import IMAGE_SUFFIXES, one_line
from layerloop.components.shard_dataset.tables import Table, open_parquet, parquet_rows
from layerloop.components.storage.folders import local_folder
from layerloop.components.storage.images import decode_image

_REMEDY = "give parquet in Crello's columns, or a folder with a subfolder of numbered PNG layers for each design"

# What a folder of layers holds besides them, numbered or not.
_FLAT = re.compile(
    r"(?:composite|preview|flat|flattened|merged|thumb|thumbnail|full|original|result|render|rendered)(?![a-z])",
    re.IGNORECASE,
)
_LEADING, _TRAILING = re.compile(r"(\d+)(?!\d)"), re.compile(r"(.*?)(\d+)", re.DOTALL)
_SMALLEST = 16  # pixels of a canvas's side
_NORMALISED = 2.0  # design pixels; no element's box is so small, unless it is a share of the canvas


@dataclass(frozen=True)
class DesignItem:
    """One design: its origin (printable), how to get what it is made of, and of that its ground truth at the recipe's
    size."""

    origin: str
    load: Callable[[], Any]
    render: Callable[[Any], Truth]


def find_designs(uri: str) -> Inputs:
    """List the files of layered designs.

    Raises:
        LayerloopError: nothing there, or neither parquet nor numbered layers.
    """
    found = find_inputs(uri, what="designs", suffixes=IMAGE_SUFFIXES, remedy=_REMEDY)
    images = [name for name in found.sizes if suffix_of(name) in IMAGE_SUFFIXES]
    folders = {folder: list(names) for folder, names in groupby(images, key=_folder_of)}
    layers = {name for folder, names in folders.items() if folder for name in layer_order(names)}
    if not layers and len(alone := layer_order(folders.get("", []))) > 1:
        layers = set(alone)  # the folder is itself one design
    useful = {name: size for name, size in found.sizes.items() if suffix_of(name) == "parquet" or name in layers}
    if not useful:
        raise LayerloopError(f"designs {printable(without_secrets(uri))} has no designs: {_REMEDY}")
    rest = [name for name in found.sizes if name not in useful]
    passed = [Passed(printable(name), f".{suffix_of(name)}", "not a layer of a design") for name in rest]
    return Inputs(found.uri, found.store, useful, [*found.passed, *passed])


def layer_order(names: Sequence[str]) -> list[str]:
    """Of one folder's images the layers, bottom first: by the number that their names begin with (`0-background.png`),
    else by the one that they end with (`layer_10.png`).

    Flat images (`composite_512.png`) are none, nor is what stands outside a row of numbers with a name of its own.
    """
    stems = {name: name.rpartition("/")[2].rpartition(".")[0] for name in names}
    named = {name: stem for name, stem in stems.items() if not _FLAT.match(stem)} or stems
    for leading in (True, False):
        numbers = {name: number for name, stem in named.items() if (number := _number(stem, leading)) is not None}
        if len(set(numbers.values())) == len(numbers):
            break
    ordered = sorted(numbers, key=lambda name: (numbers[name], name))
    if not ordered or numbers[ordered[-1]] - numbers[ordered[0]] < len(ordered):
        return ordered  # one row of numbers (or numbers given twice, which is told when the design is read)
    prefixes = {name: _prefix(named[name]) for name in ordered}
    most, count = Counter(prefixes.values()).most_common(1)[0]
    row = [name for name in ordered if prefixes[name] == most]
    whole = numbers[row[-1]] - numbers[row[0]] == len(row) - 1
    return row if whole and count > 1 else ordered


def read_designs(inputs: Inputs, data: DataRecipe) -> Iterator[DesignItem]:
    """All designs, in the order of their names.

    Raises:
        LayerloopError: a parquet file without the columns of designs, or of an older revision of Crello; no fonts where
            the recipe says.
    """
    fonts = FontFiles(local_folder(data.designs.fonts)) if data.designs.fonts else None
    for name in inputs.sizes:
        if suffix_of(name) == "parquet":
            yield from _parquet_designs(inputs.store, name, data, fonts)
    layers = [name for name in inputs.sizes if suffix_of(name) != "parquet"]
    for folder, names in groupby(layers, key=_folder_of):
        yield _folder_design(inputs.store, folder or inputs.uri.rpartition("/")[2], layer_order(list(names)), data)


def _folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def _number(stem: str, leading: bool) -> int | None:
    match = (_LEADING.match(stem) if leading else None) or _TRAILING.fullmatch(stem)
    return int(match[match.re.groups]) if match else None


def _prefix(stem: str) -> str:
    """What a layer's name says besides its number."""
    if _LEADING.match(stem):
        return ""
    match = _TRAILING.fullmatch(stem)
    return match[1] if match else stem


def _parquet_designs(store: Files, name: str, data: DataRecipe, fonts: FontFiles | None) -> Iterator[DesignItem]:
    where = f"{store.uri}/{printable(name)}"
    with store.open(name) as file:
        table = open_parquet(file)
        if isinstance(table, str):
            raise LayerloopError(f"{where}: {table}; {_REMEDY}")
        missing = [column for column in NEEDED_COLUMNS if column not in table.schema.names]
        if missing:
            raise LayerloopError(f"{where} lacks the columns {', '.join(missing)}: {_REMEDY}")
        labels = class_labels(table.schema.metadata)
        _refuse_old_revision(table, labels, where)
        for number, row in parquet_rows(table, None, batch=4):
            if isinstance(row, str):
                yield DesignItem(f"{printable(name)}:{number}", lambda row=row: _unreadable(row), _nothing)  # type: ignore[misc]
            else:
                yield DesignItem(
                    f"{printable(name)}:{printable(str(row['id']))}",
                    lambda row=row: with_labels(row, labels),  # type: ignore[misc]
                    lambda row: _render_row(row, data, fonts),
                )


def _unreadable(problem: str) -> Any:
    raise InputError(problem)


def _nothing(_: Any) -> Truth:
    raise AssertionError("what cannot be loaded is not rendered")


def _refuse_old_revision(table: Table, labels: Mapping[str, Any], where: str) -> None:
    """Refuse a table of Crello's revisions 3 and 4: the canvas is the index of a class, boxes are shares of the canvas
    and angles radians, in columns of the same names.

    Raises:
        LayerloopError: it is one.
    """
    if classes := [name for name in ("canvas_width", "canvas_height") if name in labels]:
        raise LayerloopError(
            f"{where} has class indices as {' and '.join(classes)}, revision 3 or 4 of Crello: take revision "
            f"{REVISION} of cyberagent/crello"
        )
    columns = ["canvas_width", "canvas_height", "left", "top", "width", "height"]
    rows = [row for _, row in parquet_rows(table, columns, batch=1024) if isinstance(row, dict)]
    boxed = [row for row in rows if _values(row)]
    if boxed and all(_has_shares(row) for row in boxed):
        first = boxed[0]
        raise LayerloopError(
            f"{where} has boxes within 0..1 on a canvas of {first['canvas_width']} x {first['canvas_height']}, shares "
            f"and not pixels, revision 3 or 4 of Crello: take revision {REVISION} of cyberagent/crello"
        )


def _values(row: Mapping[str, Any]) -> list[float]:
    cells = (row.get(name) for name in ("left", "top", "width", "height"))
    return [float(v) for cell in cells for v in (cell if isinstance(cell, list) else ()) if _is_number(v)]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _has_shares(row: Mapping[str, Any]) -> bool:
    return max(map(abs, _values(row)), default=math.inf) <= _NORMALISED


def _render_row(row: dict[str, Any], data: DataRecipe, fonts: FontFiles | None) -> Truth:
    if _values(row) and _has_shares(row):
        raise LayerloopError(f"design has boxes within 0..1, of revision 3 or 4 of Crello: take revision {REVISION}")
    limit = int(data.max_megapixels * 1e6)
    check_row(row)
    if min(row["canvas_width"], row["canvas_height"]) < _SMALLEST:
        raise LayerloopError(
            f"canvas is {row['canvas_width']} x {row['canvas_height']} pixels, too small for a design: take revision "
            f"{REVISION} of Crello, whose canvas is in pixels"
        )
    size = target_size(int(row["canvas_width"]), int(row["canvas_height"]), data)
    try:
        rendered = list(render_elements(row, size=size, decode=lambda encoded: _layer(encoded, limit), fonts=fonts))
    except (ValueError, TypeError, KeyError, IndexError) as error:  # of text columns that are missing or odd
        raise LayerloopError(one_line(error, most=300)) from None
    stack = np.stack([element.layer for element in rendered])
    truth = ground_truth(stack, data.designs, [element.transparent for element in rendered])
    texts = Counter(element.text for element in rendered)
    return Truth(truth.layers, {**truth.facts, "text_previews": texts["preview"], "text_fonts": texts["fonts"]})


def _layer(encoded: bytes, limit: int) -> Image.Image:
    return upright_srgb(decode_image(encoded, max_pixels=limit)).convert("RGBA")


def _folder_design(store: Files, folder: str, names: list[str], data: DataRecipe) -> DesignItem:
    origin = printable(folder)

    def load() -> dict[str, bytes]:
        return {name: store.read(name) for name in names}

    def render(files: dict[str, bytes]) -> Truth:
        limit = int(data.max_megapixels * 1e6)
        layers: list[Image.Image] = []
        numbers: dict[int | None, str] = {}
        for name, encoded in files.items():
            try:
                image = _layer(encoded, limit)
            except LayerloopError as error:
                raise LayerloopError(f"layer {printable(name)}: {error}") from None
            if layers and image.size != layers[0].size:
                raise LayerloopError(
                    f"layer {printable(name)} is {image.size}, the first is {layers[0].size}: give one size"
                )
            layers.append(image)
        stems = [name.rpartition("/")[2].rpartition(".")[0] for name in names]
        for leading in (True, False):
            numbers = {_number(stem, leading): stem for stem in stems}
            if len(numbers) == len(stems):
                break
        else:
            raise LayerloopError(f"folder {origin} has two layers of one number: number them bottom to top")
        size = target_size(*layers[0].size, data)
        return ground_truth(np.stack([resize(np.asarray(layer), size) for layer in layers]), data.designs)

    return DesignItem(origin, load, render)
