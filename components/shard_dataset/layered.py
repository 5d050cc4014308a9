"""Designs with their true layers: Crello's column layout in parquet, or folders of numbered PNGs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from PIL import Image

from layerloop.components.layers.stack import Pixels, composite, resize
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import DataRecipe
from layerloop.components.shard_dataset.inputs import Inputs, find_inputs
from layerloop.components.shard_dataset.normalise import target_size
from layerloop.components.storage.images import decode_image, open_image
from layerloop.components.storage.stores import Store

_NUMBER = re.compile(r"(?:.*\D)?(\d+)\.png", re.IGNORECASE)
_REMEDY = "give parquet in Crello's columns, or a folder with a subfolder of numbered PNG layers for each design"


@dataclass(frozen=True)
class DesignItem:
    """One design: its origin, and how to get its layers `(L, H, W, 4)` uint8 at the recipe's size."""

    origin: str
    render: Callable[[], Pixels]


def find_designs(uri: str) -> Inputs:
    """List the files of layered designs.

    Raises:
        LayerloopError: nothing there, or neither parquet nor numbered PNGs.
    """
    found = find_inputs(uri, what="designs", suffixes=frozenset({"png"}))
    useful = {n: s for n, s in found.sizes.items() if n.endswith(".parquet") or (_NUMBER.fullmatch(n) and "/" in n)}
    if not useful:
        raise LayerloopError(f"designs {uri} has no designs: {_REMEDY}")
    return Inputs(found.uri, found.store, useful)


def read_designs(inputs: Inputs, data: DataRecipe) -> Iterator[DesignItem]:
    """All designs, in the order of their names; `render` raises LayerloopError where a design is damaged.

    Raises:
        LayerloopError: a parquet file without the columns of designs.
    """
    for name in inputs.sizes:
        if name.endswith(".parquet"):
            yield from _parquet_designs(inputs.store, name, data)
    layers = [name for name in inputs.sizes if not name.endswith(".parquet")]
    for folder, names in groupby(layers, key=lambda name: name.rpartition("/")[0]):
        yield _folder_design(inputs.store, folder, list(names), data)


def complete(stack: Pixels) -> Pixels:
    """The stack as ground truth: layers without a visible pixel left out, white below a background that is not opaque.

    So the layers of a design always recompose to its image (LayerD's ground truth inserts the white likewise).

    Raises:
        LayerloopError: no layer has a visible pixel.
    """
    visible = stack[stack[..., 3].any(axis=(1, 2))]
    if not len(visible):
        raise LayerloopError("design has no visible layer: give one with pixels")
    if composite(visible)[..., 3].min() == 255:
        return visible
    return np.concatenate([np.full_like(visible[:1], 255), visible])


def _parquet_designs(store: Store, name: str, data: DataRecipe) -> Iterator[DesignItem]:
    import pyarrow
    import pyarrow.parquet

    from layerloop.components.layers.crello import NEEDED_COLUMNS

    where = f"{store.uri}/{name}"
    with store.open(name) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise LayerloopError(f"{where} is not parquet ({' '.join(str(error).split())[:120]}): {_REMEDY}") from None
        missing = [column for column in NEEDED_COLUMNS if column not in table.schema_arrow.names]
        if missing:
            raise LayerloopError(f"{where} lacks the columns {', '.join(missing)}: {_REMEDY}")
        for batch in table.iter_batches(batch_size=4):
            for row in batch.to_pylist():
                yield DesignItem(f"{name}:{row['id']}", lambda row=row: _render_row(row, data))  # type: ignore[misc]


def _render_row(row: dict[str, object], data: DataRecipe) -> Pixels:
    from layerloop.components.layers.crello import render_design

    limit = int(data.max_megapixels * 1e6)
    try:
        for cell in row["image"]:  # type: ignore[attr-defined]
            encoded = cell.get("bytes") if isinstance(cell, dict) else cell
            if encoded:
                open_image(encoded, max_pixels=limit)
        size = target_size(int(row["canvas_width"]), int(row["canvas_height"]), data)  # type: ignore[call-overload]
        return complete(render_design(row, size=size))
    except (ValueError, TypeError, KeyError, IndexError, OSError, ZeroDivisionError) as error:
        raise LayerloopError(" ".join(str(error).split())[:300]) from None


def _folder_design(store: Store, folder: str, names: list[str], data: DataRecipe) -> DesignItem:
    def number(name: str) -> int:
        match = _NUMBER.fullmatch(name)
        assert match is not None  # `find_designs` took no other
        return int(match[1])

    def render() -> Pixels:
        limit = int(data.max_megapixels * 1e6)
        layers: list[Image.Image] = []
        for name in sorted(names, key=number):
            image = decode_image(store.read(name), max_pixels=limit).convert("RGBA")
            if layers and image.size != layers[0].size:
                raise LayerloopError(f"layer {name} is {image.size}, the first is {layers[0].size}: give one size")
            layers.append(image)
        numbers = [number(name) for name in names]
        if len(set(numbers)) != len(numbers):
            raise LayerloopError(f"folder {folder} has two layers of one number: number them bottom to top")
        size = target_size(*layers[0].size, data)
        return complete(np.stack([resize(np.asarray(layer), size) for layer in layers]))

    return DesignItem(folder, render)
