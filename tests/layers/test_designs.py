import io

import numpy as np
import pytest
from PIL import Image

from layerloop.components.layers.designs import (
    PHOTOS,
    SHAPES,
    Element,
    Fill,
    Sketch,
    composite,
    design_of,
    draw_sketch,
    generate_design,
    photo_crops,
    read_designs_parquet,
    render_design,
    render_sketch,
    render_sketches,
    write_designs_parquet,
)


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


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def test_the_same_seed_gives_the_same_design_and_another_seed_another():
    first, again, other = (generate_design(np.random.default_rng(seed), layers=4) for seed in (3, 3, 4))
    assert first == again
    assert first["image"] != other["image"]


def test_the_same_seed_gives_the_same_batch():
    first, again = (render_sketches(np.random.default_rng(5), count=3, layers=3, size=(64, 48)) for _ in range(2))
    assert first.shape == (3, 3, 48, 64, 4)
    assert (first == again).all()


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


def test_the_background_is_opaque_and_every_element_is_well_visible():
    for seed in range(60):
        layers = 2 + seed % 4
        stack = render_sketches(np.random.default_rng(seed), count=1, layers=layers, size=(64, 64))[0]
        alpha = stack[..., 3] / 255
        assert (alpha[0] == 1).all()
        for index in range(1, layers):
            hidden = 1 - np.prod(1 - alpha[index + 1 :], axis=0)
            assert (alpha[index] * (1 - hidden)).sum() > 25, (seed, index)  # of 4096 pixels


def test_elements_differ_in_colour_from_the_background():
    for seed in range(40):
        sketch = draw_sketch(np.random.default_rng(seed), canvas=(64, 64), layers=3, photo_share=0)
        background = sketch.elements[0].fill.mean()
        for element in sketch.elements[1:]:
            assert np.abs(element.fill.mean() - background).mean() > 0.1, seed


def test_the_larger_element_lies_lower():
    """The order that a model is to read off the picture."""
    falling = []
    for seed in range(60):
        alpha = render_sketches(np.random.default_rng(seed), count=1, layers=3, size=(64, 64), photo_share=0)[
            0, 1:, ..., 3
        ]
        falling.append(alpha[0].sum() > alpha[1].sum())
    assert np.mean(falling) > 0.8


def test_every_shape_is_drawn_inside_its_box_and_covers_some_of_it():
    for name, shape in SHAPES.items():
        aspect, _, params = shape.draw(np.random.default_rng(1))
        fill = Fill("flat", (1, 0, 0), (1, 0, 0))
        width, height = 40 * aspect**0.5, 40 / aspect**0.5
        element = Element(name, 60 - width / 2, 60 - height / 2, width, height, 0.0, 1.0, fill, params)
        alpha = render_sketch(Sketch(120, 120, (element,)), (120, 120))[0, ..., 3] / 255
        rows, columns = np.nonzero(alpha > 0.5)
        assert columns.min() >= 60 - width / 2 - 1 and columns.max() <= 60 + width / 2, name
        assert rows.min() >= 60 - height / 2 - 1 and rows.max() <= 60 + height / 2, name
        assert 0.2 < alpha.sum() / (width * height) <= 1.01, name


def test_a_disc_has_the_area_of_a_disc():
    element = Element("disc", 10, 10, 40, 40, 0.0, 1.0, Fill("flat", (1, 1, 1), (1, 1, 1)))
    alpha = render_sketch(Sketch(64, 64, (element,)), (64, 64))[0, ..., 3] / 255
    assert alpha.sum() == pytest.approx(np.pi * 400, rel=0.005)


def test_parquet_keeps_every_field(tmp_path):
    designs = [generate_design(np.random.default_rng(seed), layers=2 + seed, canvas=(96, 64)) for seed in range(3)]
    write_designs_parquet(tmp_path / "designs.parquet", designs)
    read = read_designs_parquet(tmp_path / "designs.parquet")
    assert read == designs
    assert (render_design(read[2]) == render_design(designs[2])).all()


def test_parquet_stores_images_as_crello_does(tmp_path):
    import pyarrow.parquet as pq

    write_designs_parquet(tmp_path / "designs.parquet", [generate_design(np.random.default_rng(0), layers=2)])
    image = pq.read_table(tmp_path / "designs.parquet").to_pylist()[0]["image"][0]
    assert image.keys() == {"bytes", "path"}
    assert Image.open(io.BytesIO(image["bytes"])).mode == "RGBA"


def test_a_table_of_something_else_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": ["a"], "image": [None]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="lacks the columns length, canvas_width"):
        read_designs_parquet(tmp_path / "other.parquet")


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
    out = composite(layers)
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
    with pytest.raises(ValueError, match=r"element 1 \(TextElement\) of design a has no image"):
        render_design(design)


@pytest.mark.parametrize("seed", range(6))
def test_the_fast_painter_and_the_renderer_of_rows_agree(seed):
    sketch = draw_sketch(np.random.default_rng(seed), canvas=(320, 240), layers=2 + seed % 4)
    fast, slow = render_sketch(sketch, (64, 48)), render_design(design_of(sketch, "a"), longest_side=64)
    assert np.abs(fast[..., 3].astype(float) - slow[..., 3]).mean() < 1.0
    assert np.abs(composite(fast).astype(float) - composite(slow)).mean() < 2.5


def test_photographs_come_from_installed_packages():
    crops = photo_crops(np.random.default_rng(0), count=2 * len(PHOTOS), size=(32, 48))
    assert crops.shape == (2 * len(PHOTOS), 48, 32, 3)
    assert crops.std() > 30
