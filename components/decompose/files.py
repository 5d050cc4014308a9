"""The files of one picture: layers, recomposition, documents, the page, and the record that lists them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from layerloop.components.decompose.counts import Trial
from layerloop.components.decompose.page import Page, render
from layerloop.components.decompose.pictures import RECORD, Picture
from layerloop.components.decompose.slides import Box, write_pptx
from layerloop.components.layers.export import layer_names, write_png_zip, write_psd
from layerloop.components.layers.measure import measure_layers
from layerloop.components.layers.restore import difference
from layerloop.components.layers.stack import Pixels, composite
from layerloop.components.runtime.progress import log
from layerloop.components.schema.decomposition import Format
from layerloop.components.storage.images import encode_png
from layerloop.components.storage.stores import LocalStore

RECOMPOSITION, PAGE = "recomposition.png", "index.html"
PSD_SIDE = 30_000  # pixels; Photoshop's bound of a document that is not a large one (PSB)


@dataclass(frozen=True)
class Result:
    """A picture's layers `(L, H, W, 4)` at its own size, bottom first, and how they came about."""

    picture: Picture
    name: str  # of its folder
    source: Pixels  # (H, W, 3 or 4)
    stack: Pixels
    kept: Trial  # the model's own decomposition, at its own size
    trials: Sequence[Trial]  # all that were tried, this one among them
    settings: Mapping[str, Any]
    model: str  # one sentence


def write_files(result: Result, store: LocalStore, formats: Sequence[Format]) -> None:
    """Write the files of these formats and, last, the record.

    Raises:
        LayerloopError: a file cannot be written or made.
    """
    stack, names = result.stack, layer_names(len(result.stack))
    boxes = [box_of(layer) for layer in stack]
    files = [f"{index}-{name.lower().replace(' ', '-')}.png" for index, name in enumerate(names)]
    sizes: dict[str, int] = {}

    def write(name: str, data: bytes) -> None:
        store.write(name, data)
        sizes[name] = len(data)

    if "png" in formats:
        for file, layer in zip(files, stack, strict=True):
            write(file, encode_png(layer))
        write(RECOMPOSITION, encode_png(composite(stack)))
    makers: dict[str, Callable[[], bytes]] = {
        "psd": lambda: write_psd(stack, names),
        "pptx": lambda: write_pptx(stack, names, boxes),
        "zip": lambda: write_png_zip(stack, names),
    }
    documents = [kind for kind in makers if kind in formats]
    if "psd" in documents and max(stack.shape[1:3]) > PSD_SIDE:
        log(f"{result.name}: no PSD, which has sides of {PSD_SIDE} pixels at most")
        documents.remove("psd")
    for kind in documents:
        write(f"{result.name}.{kind}", makers[kind]())
    record = _record(result, names, boxes, files if "png" in formats else [])
    if "html" in formats:
        page = Page(
            record["source"]["file"], result.source, stack, record, tuple(f"{result.name}.{kind}" for kind in documents)
        )
        write(PAGE, render(page))
    record |= {"files": sizes, "formats": sorted(formats)}
    store.write(RECORD, (json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def box_of(layer: Pixels) -> Box | None:
    """(left, top, right, bottom) of the pixels of a layer `(H, W, 4)` that are not transparent; None without any."""
    shown = layer[..., 3] > 0
    rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _record(result: Result, names: Sequence[str], boxes: Sequence[Box | None], files: Sequence[str]) -> dict[str, Any]:
    """The JSON about a picture, but for the list of its files."""
    numbers = measure_layers(result.stack, result.source[..., :3])
    mean, most = difference(result.stack, result.source)
    return {
        "layerloop": version("layerloop"),
        "source": {
            "file": result.picture.origin.rpartition("/")[2].encode("utf-8", "backslashreplace").decode(),
            "sha256": result.picture.sha256,
        },
        "width": int(result.stack.shape[2]),
        "height": int(result.stack.shape[1]),
        "model": result.model,
        "settings": dict(result.settings),
        "order": "bottom first",
        "layers": [
            {
                "index": index,
                "name": name,
                "box": box,
                **({"file": files[index]} if files else {}),
                **{key: _rounded(value) for key, value in numbers[index].items()},
            }
            for index, (name, box) in enumerate(zip(names, boxes, strict=True))
        ],
        "recomposition": {"mean_difference_levels": round(mean, 4), "largest_difference_levels": most},
        "tried": [trial.record() for trial in result.trials],
        "kept": result.kept.record(),
    }


def _rounded(value: npt.ArrayLike) -> Any:
    return round(value, 5) if isinstance(value, float) else value
