"""Texts of Crello rows drawn from font files: where their ink is, how dark, and from which file."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest

from layerloop.components.layers.crello import generate_design, render_elements
from layerloop.components.layers.text import FontFiles, Text, draw_text
from layerloop.components.schema.errors import LayerloopError

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # DejaVu, in four styles


@pytest.fixture(scope="module")
def fonts():
    return FontFiles(FONTS)


def text(words="HHH", **changes):
    each = len(words)
    values = {
        "text": words, "width": 200.0, "size": 20.0, "line_height": 1.5, "letter_spacing": 0.0, "align": "left",
        "bold": [False] * each, "italic": [False] * each, "colours": ["rgba(200,30,30,1)"] * each, "lines": [],
    }  # fmt: skip
    return Text(**{**values, **changes})


def ink(drawn):
    """(left, top, right, bottom) of the ink in design pixels, the mean alpha times area, and the image."""
    image, box = drawn
    alpha = np.asarray(image)[..., 3] / 255
    zoom = alpha.shape[1] / (box[2] - box[0])
    rows, columns = np.nonzero(alpha > 0.5)
    sides = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return [box[side % 2] + value / zoom for side, value in enumerate(sides)], alpha.sum() / zoom**2


@pytest.mark.parametrize(("align", "edge", "at"), [("left", 0, 0.0), ("right", 2, 200.0), ("center", None, 100.0)])
def test_lines_are_aligned_in_the_elements_box(fonts, align, edge, at):
    box, _ = ink(draw_text(text(align=align), fonts.face("DejaVu Sans"), 4.0))
    found = (box[0] + box[2]) / 2 if edge is None else box[edge]
    assert found == pytest.approx(at, abs=2.5)  # but for an H's side bearings


def test_the_next_line_is_one_line_height_lower_and_breaks_are_not_drawn(fonts):
    face = fonts.face("DejaVu Sans")
    (one, area), (two, both) = (
        ink(draw_text(text(words, lines=lines), face, 4.0)) for words, lines in (("H", []), ("H\nH", [0, 0, 1]))
    )
    assert two[3] - one[3] == pytest.approx(30, abs=0.5) and both == pytest.approx(2 * area, rel=0.02)


def test_letter_spacing_and_capitals_and_zoom(fonts):
    face = fonts.face("DejaVu Sans")
    plain, spaced = (ink(draw_text(text(letter_spacing=gap), face, 4.0))[0] for gap in (0.0, 5.0))
    assert spaced[2] - plain[2] == pytest.approx(10, abs=0.3)
    small, large = (ink(draw_text(text(), face, zoom)) for zoom in (2.0, 8.0))
    assert small[0] == pytest.approx(large[0], abs=0.6) and small[1] == pytest.approx(large[1], rel=0.05)


def test_bold_characters_come_from_the_bold_file(fonts):
    face = fonts.face("dejavu_sans")
    thin, half, thick = (
        ink(draw_text(text(bold=bold), face, 4.0))[1] for bold in ([False] * 3, [False, True, True], [True] * 3)
    )
    assert thin * 1.15 < half < thick
    assert ink(draw_text(text(), fonts.face("DejaVu Sans Bold"), 4.0))[1] == pytest.approx(thick, rel=0.01)


def test_a_colour_has_its_own_alpha_and_no_dark_rim(fonts):
    image, _ = draw_text(text(colours=["rgba(200, 30, 30, 0.5)"] * 3), fonts.face("DejaVu Sans"), 4.0)
    pixels = np.asarray(image)
    assert pixels[..., 3].max() == 128
    assert (pixels[pixels[..., 3] > 0][:, :3] == (200, 30, 30)).all()
    two, _ = draw_text(text(colours=["#00f", "#00f", "rgb(0, 255, 0)"]), fonts.face("DejaVu Sans"), 4.0)
    colours = {tuple(pixel[:3]) for pixel in np.asarray(two).reshape(-1, 4) if pixel[3] == 255}
    assert colours == {(0, 0, 255), (0, 255, 0)}


def test_what_cannot_be_drawn_is_one_line(fonts, tmp_path):
    face = fonts.face("DejaVu Sans")
    assert draw_text(text(""), face, 4.0) is None and fonts.face("Montserrat") is None
    with pytest.raises(LayerloopError, match="text_color is 'reddish', which is no colour"):
        draw_text(text(colours=["reddish"] * 3), face, 4.0)
    with pytest.raises(LayerloopError, match="too large to draw"):
        draw_text(text(size=9000.0), face, 4.0)
    with pytest.raises(LayerloopError, match="has no font files"):
        FontFiles(tmp_path)
    (tmp_path / "a.ttf").write_bytes(b"none")
    with pytest.raises(LayerloopError, match=r"font .*a\.ttf cannot be read"):
        FontFiles(tmp_path)


def written(**changes):
    design = generate_design(np.random.default_rng(1), canvas=(200, 100), layers=1, every_kind=True)
    for name, value in changes.items():
        design[name][-1] = value
    return design


def last(design, **options):
    return list(render_elements(design, size=(200, 100), **options))[-1]


def test_a_text_is_its_preview_unless_its_family_is_there(fonts):
    preview, drawn = last(written(), fonts=fonts), last(written(font="DejaVu Sans"), fonts=fonts)
    assert (preview.text, drawn.text) == ("preview", "fonts")
    assert last(written(font="DejaVu Sans")).text == "preview"
    rows, columns = np.nonzero(drawn.layer[..., 3] > 64)
    centre = (written()["left"][-1] + written()["width"][-1] / 2, written()["top"][-1])
    assert (columns.min() + columns.max()) / 2 == pytest.approx(centre[0], abs=2)  # centred in its box
    assert centre[1] <= rows.min() < centre[1] + 8


@pytest.mark.parametrize("family", ["Montserrat", "DejaVu Sans"])
def test_the_opacity_of_a_text_is_that_of_its_colour(fonts, family):
    """Its column repeats what its colour says; LayerD does not look at it."""
    faint, full = (last(written(font=family, opacity=value), fonts=fonts) for value in (0.5, 1.0))
    assert np.array_equal(faint.layer, full.layer)
    assert int(full.layer[..., 3].max()) == pytest.approx(128, abs=4)  # Lanczos overshoots by a little


def test_a_text_is_turned_about_the_centre_of_its_box(fonts):
    flat, turned = (
        last(written(font="DejaVu Sans", angle=angle, left=60.0, width=80.0, top=40.0, height=20.0), fonts=fonts).layer[
            ..., 3
        ]
        for angle in (0.0, 180.0)
    )
    # the box's centre is (100, 50): half a turn maps pixel (x, y) to (199 - x, 99 - y)
    assert np.abs(flat[::-1, ::-1].astype(int) - turned).mean() < 1.0
