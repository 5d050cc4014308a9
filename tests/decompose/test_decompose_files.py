"""Pictures of all kinds in, files out, each opened again by another program's reader."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pptx import Presentation

from layerloop.components.decompose.pictures import find_pictures, look_at
from layerloop.components.decompose.slides import write_pptx
from layerloop.components.layers.export import read_psd
from layerloop.components.layers.stack import composite
from layerloop.components.schema.errors import LayerloopError

from .conftest import Ran


def record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "layers.json").read_text()))


def layers_of(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / layer["file"])) for layer in record(folder)["layers"]])


def test_links_that_lead_nowhere_are_said_and_the_rest_is_found(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    found = find_pictures([tmp_path])
    assert found == [f"{tmp_path}/gone.jpg", f"{tmp_path}/in/a.png", f"{tmp_path}/loop.png"]
    assert look_at(found[1]).width == 8
    for origin in (found[0], found[2]):
        with pytest.raises(LayerloopError, match=r"^the link leads nowhere: mend or delete it$"):
            look_at(origin)


def test_files_of_a_folder_that_are_no_pictures_by_their_names_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "b.PSD", "c.psd", "notes", ".hidden.txt", "done/layers.json", "done/0-background.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert find_pictures([tmp_path]) == [f"{tmp_path}/a.png"]
    said = "no pictures by suffix (2 .psd, 1 without suffix): name one to have it taken"
    captured = capsys.readouterr()
    assert f"passed over 3 files of {tmp_path}, {said}" in captured.out + captured.err


def test_everything_that_can_be_used_is_made_and_the_rest_fails_in_one_line(ran: Ran) -> None:
    made = {outcome.folder.name for outcome in ran.summary.outcomes if outcome.folder is not None}
    assert made == set(ran.pictures)
    failed = {Path(outcome.picture).name: outcome.reason for outcome in ran.summary.failed}
    assert set(failed) == set(ran.unusable)
    for name, words in ran.unusable.items():
        assert words in failed[name]
        assert "\n" not in failed[name] and "recipe" not in failed[name]
    assert re.match(r"13 pictures: 8 made, 5 failed; ", str(ran.summary))


def test_a_folder_has_the_pictures_folders_the_settings_and_nothing_half_written(ran: Ran) -> None:
    names = {path.name for path in ran.out.iterdir()}
    assert names == {*ran.pictures, "settings.json", ".lock"}
    assert json.loads((ran.out / "settings.json").read_text())["sampler"] == "euler"


@pytest.mark.parametrize("name", ["portrait", "turned", "sixteen", "print", "cut out", "dot", "strip", "moving"])
def test_the_written_layers_recompose_to_the_picture(ran: Ran, name: str) -> None:
    picture = ran.pictures[name]
    stack = layers_of(ran.out / name)
    assert stack.shape == (2, *picture.shape[:2], 4)
    again = composite(stack).astype(int)
    assert np.array_equal(again, np.asarray(Image.open(ran.out / name / "recomposition.png")))
    if picture.shape[2] == 3:
        assert (again[..., 3] == 255).all()
        assert np.abs(again[..., :3] - picture).max() <= (2 if name == "print" else 1)  # CMYK by another's converter
    else:
        assert np.abs(again[..., 3] - picture[..., 3]).max() <= 2
        strong = picture[..., 3] > 64
        assert np.abs(again[..., :3] - picture[..., :3])[strong].max() <= 3
    assert record(ran.out / name)["recomposition"]["largest_difference_levels"] <= 2


def test_a_document_has_the_same_layers_as_the_pngs(ran: Ran) -> None:
    for name in ("portrait", "cut out", "dot"):
        stack = layers_of(ran.out / name)
        assert np.array_equal(read_psd((ran.out / name / f"{name}.psd").read_bytes()), stack)
        archive = zipfile.ZipFile(ran.out / name / f"{name}.zip")
        first = np.asarray(Image.open(archive.open("0-background.png")))
        assert np.array_equal(first, stack[0])


def test_on_the_slide_every_layer_lies_where_it_was(ran: Ran) -> None:
    deck = Presentation(str(ran.out / "portrait" / "portrait.pptx"))
    (slide,) = deck.slides
    height, width = ran.pictures["portrait"].shape[:2]
    assert deck.slide_width / deck.slide_height == pytest.approx(width / height, rel=1e-4)
    found = record(ran.out / "portrait")["layers"]
    assert [shape.name for shape in slide.shapes] == [layer["name"] for layer in found if layer["box"]]
    scale = deck.slide_width / width
    stack = layers_of(ran.out / "portrait")
    for shape, layer in zip(slide.shapes, (layer for layer in found if layer["box"]), strict=True):
        left, top, right, bottom = layer["box"]
        assert (shape.left / scale, shape.top / scale) == pytest.approx((left, top), abs=0.01)
        assert shape.width / scale == pytest.approx(right - left, abs=0.01)
        image = np.asarray(Image.open(io.BytesIO(shape.image.blob)))
        assert np.array_equal(image, stack[layer["index"], top:bottom, left:right])


@pytest.mark.parametrize(("height", "width"), [(2, 900), (900, 2), (1, 1), (300, 400)])
def test_slides_keep_to_powerpoints_bounds(height: int, width: int) -> None:
    stack = np.full((1, height, width, 4), 255, np.uint8)
    deck = Presentation(io.BytesIO(write_pptx(stack, ["Background"], [(0, 0, width, height)])))
    assert min(deck.slide_width, deck.slide_height) >= 914_400
    assert max(deck.slide_width, deck.slide_height) <= 56 * 914_400
    (shape,) = deck.slides[0].shapes
    assert shape.width <= deck.slide_width and shape.height <= deck.slide_height
    assert shape.width / shape.height == pytest.approx(width / height, rel=1e-3)


def test_equal_layers_give_equal_slides() -> None:
    stack = np.random.default_rng(0).integers(0, 256, (2, 12, 9, 4), np.uint8)
    boxes = [(0, 0, 9, 12), None]
    data = write_pptx(stack, ["a", "b"], boxes)
    assert data == write_pptx(stack, ["a", "b"], boxes)
    assert {member.date_time for member in zipfile.ZipFile(io.BytesIO(data)).infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_boxes_bound_what_is_visible_and_order_is_said(ran: Ran) -> None:
    for name in ran.pictures:
        found = record(ran.out / name)
        assert found["order"] == "bottom first"
        for layer, pixels in zip(found["layers"], layers_of(ran.out / name), strict=True):
            if layer["box"] is None:
                assert not pixels[..., 3].any()
                continue
            left, top, right, bottom = layer["box"]
            shown = pixels[..., 3] > 0
            assert shown[top:bottom, left:right].sum() == shown.sum()
            assert shown[top, :].any() and shown[bottom - 1, :].any()
            assert shown[:, left].any() and shown[:, right - 1].any()


def test_the_record_lists_every_file_and_says_which_model_it_was(ran: Ran) -> None:
    for name in ran.pictures:
        found = record(ran.out / name)
        files = {path.name: path.stat().st_size for path in (ran.out / name).iterdir() if path.name != "layers.json"}
        assert found["files"] == files
        assert "a toy of 64 pixels" in found["model"]
        assert found["kept"]["layers"] == 2 and found["kept"]["recomposition_error"] > 0


def test_the_page_needs_no_other_file(ran: Ran) -> None:
    page = (ran.out / "cut out" / "index.html").read_text()
    assert not re.search(r"""(?:src|href)=["']?https?:""", page)
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', page))
    links = re.findall(r'href="([^"]*)"', page)
    assert "cut%20out.psd" in links and "0-background.png" in links
    assert f"<h1>{record(ran.out / 'cut out')['source']['file']}</h1>" in page, "as its maker called the picture"
    assert len(re.findall('<img class="layer"', page)) == 2
    assert "$" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
