"""Rows in Crello's columns: generated, written, and rendered as layers."""

import io
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from layerloop.components.layers.crello import (
    class_labels,
    design_of,
    generate_design,
    render_design,
    render_elements,
    with_labels,
    write_designs_parquet,
)
from layerloop.components.layers.designs import draw_sketch
from layerloop.components.layers.paint import render_sketch
from layerloop.components.layers.stack import flatten
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.images import decode_image

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def solid(colour, size=(8, 8), alpha=255):
    image = Image.new("RGBA", size, (*colour, alpha))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def row(canvas, *elements):
    """A row with the columns that rendering needs; elements are (left, top, width, height, angle, opacity, image)."""
    names = ("left", "top", "width", "height", "angle", "opacity", "image")
    columns = {name: list(values) for name, values in zip(names, zip(*elements, strict=True), strict=True)}
    return {"id": "a", "length": len(elements), "canvas_width": canvas[0], "canvas_height": canvas[1], **columns}


def test_the_same_seed_gives_the_same_design_and_another_seed_another():
    first, again, other = (generate_design(np.random.default_rng(seed), layers=4) for seed in (3, 3, 4))
    assert first == again
    assert first["image"] != other["image"]


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 7])
def test_a_design_has_as_many_layers_as_asked_for_in_every_column(layers):
    design = generate_design(np.random.default_rng(layers), layers=layers)
    assert design["length"] == layers
    lists = {name: value for name, value in design.items() if isinstance(value, list)}
    assert {len(value) for value in lists.values()} == {layers}
    assert {"type", "left", "opacity", "image", "text", "font", "text_color"} <= lists.keys()


@pytest.mark.parametrize("layers", [0, -1])
def test_a_design_without_a_background_is_refused(layers):
    with pytest.raises(ValueError, match="choose 1 or more"):
        generate_design(np.random.default_rng(0), layers=layers)


def test_parquet_keeps_every_field(tmp_path):
    designs = [generate_design(np.random.default_rng(seed), layers=2 + seed, canvas=(96, 64)) for seed in range(3)]
    write_designs_parquet(tmp_path / "designs.parquet", designs)
    read = pq.read_table(tmp_path / "designs.parquet").to_pylist()
    assert [{**row, "image": [image["bytes"] for image in row["image"]]} for row in read] == designs
    assert (render_design(read[2]) == render_design(designs[2])).all()  # images as Crello's structs, or as bytes


def test_parquet_stores_images_as_crello_does(tmp_path):
    write_designs_parquet(tmp_path / "designs.parquet", [generate_design(np.random.default_rng(0), layers=2)])
    image = pq.read_table(tmp_path / "designs.parquet").to_pylist()[0]["image"][0]
    assert image.keys() == {"bytes", "path"}
    assert Image.open(io.BytesIO(image["bytes"])).mode == "RGBA"


def test_an_element_lands_on_its_place_and_nowhere_else():
    layers = render_design(row((32, 16), (0, 0, 32, 16, 0, 1, solid(RED)), (4, 2, 8, 6, 0, 1, solid(GREEN))))
    assert layers.shape == (2, 16, 32, 4)
    assert (layers[0] == (255, 0, 0, 255)).all()
    expected = np.zeros((16, 32), bool)
    expected[2:8, 4:12] = True
    assert (layers[1, ..., 3] == np.where(expected, 255, 0)).all()
    assert (layers[1][expected][:, :3] == GREEN).all()


def test_layers_composite_as_alpha_over_and_upper_ones_occlude():
    layers = render_design(
        row(
            (16, 16),
            (0, 0, 16, 16, 0, 1, solid(RED)),
            (0, 0, 8, 16, 0, 1, solid(GREEN)),
            (0, 0, 16, 8, 0, 0.5, solid(BLUE)),
        )
    )
    out = flatten(layers, "black")
    half = 128 / 255  # opacity 0.5 in 8 bits
    assert out[12, 4].tolist() == list(GREEN)
    assert out[12, 12].tolist() == list(RED)
    assert out[4, 12].tolist() == [round(255 * (1 - half)), 0, 128]
    assert out[4, 4].tolist() == [0, round(255 * (1 - half)), 128]


def test_rotation_is_clockwise_about_the_centre():
    """A 12x4 bar about (16, 16), left half red and right half blue, turned by 90 degrees: red on top, blue below."""
    bar = np.zeros((4, 12, 4), np.uint8)
    bar[:, :6], bar[:, 6:] = (*RED, 255), (*BLUE, 255)
    out = io.BytesIO()
    Image.fromarray(bar).save(out, "PNG")
    layer = render_design(row((32, 32), (10, 14, 12, 4, 90, 1, out.getvalue())))[0]
    rows, columns = np.nonzero(layer[..., 3] > 127)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 21, 14, 17)
    assert layer[12, 15].tolist() == [*RED, 255]
    assert layer[19, 15].tolist() == [*BLUE, 255]


def test_edges_are_anti_aliased_and_keep_their_colour():
    layer = render_design(row((32, 32), (8, 8, 16, 16, 45, 1, solid(GREEN))))[0]
    alpha = layer[..., 3]
    assert ((alpha > 20) & (alpha < 235)).sum() > 20
    assert alpha.sum() / 255 == pytest.approx(256, rel=0.02)
    assert (layer[alpha > 20][:, 1] >= 250).all() and (layer[alpha > 20][:, [0, 2]] == 0).all()


@pytest.mark.parametrize(("size", "angle"), [((8, 8), 0), ((90, 70), 0), ((8, 8), 30), ((40, 40), 75)])
def test_a_flat_element_stays_flat_however_it_is_resized_and_turned(size, angle):
    """Premultiplied in 8 bits and clipped before the division, grey 128 is off by up to 30 levels where alpha is small
    or a filter overshoots."""
    image = np.zeros((*size, 4), np.uint8)
    image[1:-1, 1:-1] = (128, 3, 250, 255)
    image[2:-2, 2:-2, 3] = 90
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    layer = render_design(row((32, 32), (5, 6, 21, 17, angle, 1, out.getvalue())))[0]
    assert (layer[..., 3] > 0).sum() > 200
    assert (layer[layer[..., 3] > 0][:, :3] == (128, 3, 250)).all()


def test_elements_may_reach_over_the_canvas():
    layer = render_design(row((16, 16), (-8, -8, 16, 16, 0, 1, solid(RED))))[0]
    assert (layer[:8, :8, 3] == 255).all() and layer[8:, :, 3].max() == 0 and layer[:, 8:, 3].max() == 0


def test_longest_side_and_size_scale_the_canvas():
    design = row((400, 200), (100, 50, 200, 100, 0, 1, solid(RED)))
    assert render_design(design, longest_side=64).shape == (1, 32, 64, 4)
    squeezed = render_design(design, size=(40, 40))[0]
    expected = np.zeros((40, 40), np.uint8)
    expected[10:30, 10:30] = 255
    assert (squeezed[..., 3] == expected).all()
    with pytest.raises(ValueError, match="not both"):
        render_design(design, size=(4, 4), longest_side=4)


def test_an_element_without_an_image_is_named():
    design = row((8, 8), (0, 0, 8, 8, 0, 1, solid(RED)), (0, 0, 8, 8, 0, 1, None)) | {
        "type": ["ImageElement", "TextElement"]
    }
    with pytest.raises(LayerloopError, match=r"element 1 \(TextElement\) of design a has no image"):
        render_design(design)


def test_an_element_whose_image_is_damaged_is_named():
    design = row((8, 8), (0, 0, 8, 8, 0, 1, solid(RED)), (0, 0, 8, 8, 0, 1, b"none"))

    def decode(encoded):
        return decode_image(encoded).convert("RGBA")

    with pytest.raises(LayerloopError, match=r"element 1 \(\w+\): image starts with b'none', not a known format"):
        list(render_elements(design, size=(8, 8), decode=decode))


@pytest.mark.parametrize("seed", range(6))
def test_the_fast_painter_and_the_renderer_of_rows_agree(seed):
    sketch = draw_sketch(np.random.default_rng(seed), canvas=(320, 240), layers=2 + seed % 4)
    fast, slow = render_sketch(sketch, (64, 48)), render_design(design_of(sketch, "a"), longest_side=64)
    assert np.abs(fast[..., 3].astype(float) - slow[..., 3]).mean() < 1.0
    assert np.abs(flatten(fast, "black").astype(float) - flatten(slow, "black")).mean() < 2.5


def test_the_generator_writes_every_kind_of_element_into_every_column():
    design = generate_design(np.random.default_rng(2), layers=3, photo_share=0, every_kind=True)
    assert design["length"] == 8
    assert {len(value) for value in design.values() if isinstance(value, list)} == {8}
    assert set(design["type"]) == {"ColoredBackground", "ImageElement", "SvgElement", "TextElement"}
    assert any(design["angle"]) and min(design["opacity"]) == 0.5 and design["text"][-1] == "Big sale"
    assert design == generate_design(np.random.default_rng(2), layers=3, photo_share=0, every_kind=True)


def test_elements_say_whether_their_own_image_is_nowhere_opaque():
    design = generate_design(np.random.default_rng(2), layers=1, every_kind=True)
    found = list(render_elements(design, size=(80, 80)))
    assert [element.transparent for element in found] == [False, False, False, False, True, True]
    assert [element.text for element in found] == ["", "", "", "", "", "preview"]


def test_a_text_preview_is_stretched_over_its_box_and_keeps_its_own_alpha():
    design = row((32, 16), (8, 4, 16, 8, 0, 0.5, solid(RED))) | {"type": ["TextElement"]}
    assert render_design(design)[0, 8, 16].tolist() == [*RED, 255]
    assert render_design(design | {"type": ["ImageElement"]})[0, 8, 16, 3] == 128
    assert render_design(design | {"type": [4], "text": ["words"]})[0, 8, 16, 3] == 255  # types without names
    assert render_design(design | {"type": None, "text": None})[0, 8, 16, 3] == 128  # of no type: an image


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"canvas_width": None}, "column canvas_width is null: give a number of 1 or more"),
        ({"length": None}, "column length is null"),
        ({"opacity": [None]}, "column opacity is null for element 0: give a number"),
        ({"left": None}, "column left is null, but length is 1: give a value for each element"),
        ({"top": []}, "column top is a list of 0, but length is 1"),
        ({"angle": [float("nan")]}, "column angle is nan for element 0"),
        ({"width": ["4"]}, "column width is '4' for element 0"),
        ({"image": None}, "column image is null, but length is 1"),
    ],
)
def test_nulls_are_named_by_column_and_element(change, line):
    with pytest.raises(LayerloopError, match="^" + re.escape(line)):
        render_design(row((8, 8), (0, 0, 8, 8, 0, 1, solid(RED))) | change)


def test_class_indices_become_the_names_that_the_datasets_library_keeps():
    features = {
        "type": {"feature": {"names": ["SvgElement", "TextElement"], "_type": "ClassLabel"}, "_type": "Sequence"},
        "canvas_width": {"names": ["1080", "600"], "_type": "ClassLabel"},
        "left": {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "Sequence"},
    }
    labels = class_labels({b"huggingface": json.dumps({"info": {"features": features}}).encode()})
    assert labels == {"type": ["SvgElement", "TextElement"], "canvas_width": ["1080", "600"]}
    row = with_labels({"type": [1, 0, 7], "left": [1.0], "canvas_width": 1}, labels)
    assert row == {"type": ["TextElement", "SvgElement", 7], "left": [1.0], "canvas_width": "600"}
    assert class_labels(None) == class_labels({b"huggingface": b"{"}) == {}
