"""Photoshop documents, opened again by psd-tools, Pillow, and where they are installed by ImageMagick and GIMP."""

from __future__ import annotations

import io
import re
import shutil
import struct
import subprocess
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from psd_tools import PSDImage

from layerloop.components.layers.export import read_psd, write_psd
from layerloop.components.layers.psd import name_as_kept, save_psd
from layerloop.components.layers.stack import Pixels, composite, on_backdrop
from layerloop.components.schema.errors import LayerloopError

NAMES = ["Hintergrund", "日本", "Ω 🎨", "“quoted”"]


def odd_stack(layers: int = 4, height: int = 20, width: int = 31) -> Pixels:
    """Flat, gradient and noise, with every alpha, transparent margins and a blank layer; colour under alpha 0 is 0."""
    rng = np.random.default_rng(3)
    stack = np.zeros((layers, height, width, 4), np.uint8)
    stack[0] = (10, 200, 30, 255)
    stack[0, :, -1, 3] = np.linspace(0, 255, height)
    stack[-1] = rng.integers(0, 256, (height, width, 4))
    if layers > 2:
        stack[1, 2:9, 3:17] = rng.integers(0, 256, stack[1, 2:9, 3:17].shape)
    return np.where(stack[..., 3:] > 0, stack, 0).astype(np.uint8)


def kept(name: str) -> tuple[str, bytes]:
    """The name of the one layer of a document, in Unicode and as the bytes for programs that know only those."""
    data = write_psd(odd_stack(1), [name])
    at = data.index(b"8BIMluni")
    length, units = struct.unpack(">II", data[at + 8 : at + 16])
    assert length % 4 == 0 and length >= 4 + 2 * units
    legacy = data[data.index(b"8BIMnorm") + 12 + 4 + 8 : at]
    assert len(legacy) % 4 == 0
    return data[at + 16 : at + 16 + 2 * units].decode("utf-16-be"), legacy[1 : 1 + legacy[0]]


# ---------------------------------------------------------------------------------------------------------- the format


@pytest.mark.parametrize("size", [(20, 31), (1, 1), (1, 300), (300, 1), (131, 129)])
def test_every_layer_is_read_back_exactly_at_any_size(size: tuple[int, int]) -> None:
    stack = odd_stack(4, *size)
    assert np.array_equal(read_psd(write_psd(stack)), stack)


def test_a_single_layer_and_twenty_are_documents_too() -> None:
    for layers in (1, 20):
        assert np.array_equal(read_psd(write_psd(odd_stack(layers))), odd_stack(layers))


def test_the_first_alpha_channel_is_the_merged_transparency_and_no_stray_channel() -> None:
    document = PSDImage.open(io.BytesIO(write_psd(odd_stack())))
    information = document._record.layer_and_mask_information.layer_info
    assert information is not None and information.layer_count == -4
    assert document.channels == 4


def test_the_merged_image_is_the_composite_on_white_with_its_alpha() -> None:
    stack = odd_stack()
    stack[1:, :, -1] = 0  # the right column shows the background alone, with every alpha
    seen = np.asarray(Image.open(io.BytesIO(write_psd(stack))))
    expected = composite(stack)
    assert np.array_equal(seen[..., 3], expected[..., 3])
    assert len(set(seen[:, -1, 3].tolist())) > 10
    assert np.array_equal(seen[..., :3], on_backdrop(expected, "white"))


def test_colour_under_alpha_zero_is_not_kept() -> None:
    stack = odd_stack()
    stack[3, 4, 5] = (1, 2, 3, 0)
    assert write_psd(stack) == write_psd(np.where(stack[..., 3:] > 0, stack, 0).astype(np.uint8))


def test_a_document_says_its_resolution_its_profile_and_that_it_has_a_merged_image(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    save_psd(tmp_path / "a.psd", odd_stack(), resolution=300.5, profile=profile)
    resources = PSDImage.open(tmp_path / "a.psd").image_resources
    assert resources.get_data(1005).horizontal == 300.5 * 65536 == resources.get_data(1005).vertical
    assert resources.get_data(1005).horizontal_unit == 1  # per inch
    assert resources.get_data(1039) == profile
    assert resources.get_data(1057).has_composite
    with pytest.raises(LayerloopError, match="resolution is 0 pixels per inch: give one between"):
        save_psd(tmp_path / "b.psd", odd_stack(), resolution=0)


def test_without_a_profile_it_is_srgbs_and_the_same_at_any_time() -> None:
    profile = PSDImage.open(io.BytesIO(write_psd(odd_stack()))).image_resources.get_data(1039)
    assert "sRGB" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    assert struct.unpack(">6H", profile[24:36]) == (2000, 1, 1, 0, 0, 0)  # not the time of writing


# --------------------------------------------------------------------------------------------------------------- names


def test_names_of_any_script_are_kept_and_others_see_macroman() -> None:
    document = PSDImage.open(io.BytesIO(write_psd(odd_stack(), NAMES)))
    assert [layer.name for layer in document] == NAMES
    assert kept("日本") == ("日本", b"??")
    assert kept("Grün “1”") == ("Grün “1”", "Grün “1”".encode("mac_roman"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x" * 255, "x" * 255),
        ("x" * 256, "x" * 254 + "…"),
        ("🎨" * 128, "🎨" * 127 + "…"),  # two units each
        ("x" * 253 + "🎨🎨", "x" * 253 + "…"),
        ("x" * 253 + "e\u0301\u0302z", "x" * 253 + "…"),  # never between a letter and its accents
        ("x" * 252 + "👩\u200d🎨z", "x" * 252 + "…"),  # nor inside joined emoji
        ("x" * 253 + " yz", "x" * 253 + "…"),
        ("\u0301" * 300, "…"),
        (" two\nlines\t", "two lines"),
        ("a\ud800b", "a?b"),
    ],
)
def test_a_name_is_cut_by_one_rule(name: str, expected: str) -> None:
    assert name_as_kept(name) == expected
    unicode, legacy = kept(name)
    assert unicode == expected and legacy == expected.encode("mac_roman", "replace")[:255]


def test_an_empty_name_becomes_the_layers_own() -> None:
    document = PSDImage.open(io.BytesIO(write_psd(odd_stack(), ["", " ", "\0", "last"])))
    assert [layer.name for layer in document] == ["Background", "Layer 1", "Layer 2", "last"]


def test_neighbours_of_one_group_lie_in_one_folder() -> None:
    stack = odd_stack()
    document = PSDImage.open(io.BytesIO(write_psd(stack, NAMES, groups=[None, "文字", "文字", "Top"])))
    tree = [(layer.name, [inner.name for inner in layer] if layer.is_group() else None) for layer in document]
    assert tree == [(NAMES[0], None), ("文字", NAMES[1:3]), ("Top", NAMES[3:])]
    assert np.array_equal(read_psd(write_psd(stack, groups=["a", "b", "b", "a"])), stack)
    with pytest.raises(LayerloopError, match="1 groups were given for 4 layers"):
        write_psd(stack, groups=["only one"])


# --------------------------------------------------------------------------------------------------------------- files


def test_what_a_psd_cannot_hold_is_a_psb(tmp_path: Path) -> None:
    wide = odd_stack(2, 1, 30_001)
    with pytest.raises(LayerloopError, match=r"30001 x 1, .* 30,000 pixels a side: give the file the suffix .psb"):
        save_psd(tmp_path / "wide.psd", wide)
    assert list(tmp_path.iterdir()) == []
    save_psd(tmp_path / "wide.PSB", wide, ["日本", "b"], groups=["g", None])
    document = PSDImage.open(tmp_path / "wide.PSB")  # whose pixels psd-tools gives up to 30,000
    assert (document.version, document.size) == (2, (30_001, 1))
    assert [layer.name for layer in document.descendants()] == ["g", "日本", "b"]
    save_psd(tmp_path / "a.psb", odd_stack(4, 40, 60), groups=["g", "g", None, None])
    assert np.array_equal(read_psd((tmp_path / "a.psb").read_bytes()), odd_stack(4, 40, 60))
    with pytest.raises(LayerloopError, match="300,000 pixels a side: make it smaller"):
        save_psd(tmp_path / "wider.psb", np.zeros((1, 1, 300_001, 4), np.uint8))


def test_a_document_beyond_two_gigabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for most in (5_000, 12_000):  # passed in the layers, and in the merged image
        monkeypatch.setattr("layerloop.components.layers.psd.LARGEST_PSD", most)
        with pytest.raises(LayerloopError, match=rf"bytes, a .psd at most {most:,}: give the file the suffix .psb"):
            save_psd(tmp_path / "a.psd", odd_stack(4, 60, 31))
    save_psd(tmp_path / "a.psb", odd_stack(4, 60, 31))
    assert [file.name for file in tmp_path.iterdir()] == ["a.psb"]


def test_a_file_that_fails_leaves_the_old_one_and_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "a.psd"
    save_psd(path, odd_stack())
    before = path.read_bytes()
    with pytest.raises(LayerloopError, match="1 names were given for 4 layers"):
        save_psd(path, odd_stack(), ["only one"])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(LayerloopError, match=r"a.psd/b.psd cannot be written: .*: name another place"):
        save_psd(path / "b.psd", odd_stack())


def test_writing_takes_less_memory_than_the_pixels_themselves(tmp_path: Path) -> None:
    stack = np.random.default_rng(0).integers(0, 256, (5, 600, 800, 4), dtype=np.uint8)
    save_psd(tmp_path / "warm.psd", stack[:, :8, :8])  # imports
    tracemalloc.start()
    save_psd(tmp_path / "a.psd", stack)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.6 * stack.nbytes
    assert np.array_equal(read_psd((tmp_path / "a.psd").read_bytes()), np.where(stack[..., 3:] > 0, stack, 0))


# ------------------------------------------------------------------------------------------------------ other programs


def imagemagick() -> str | None:
    """A command of ImageMagick that reads Photoshop documents."""
    for tool in ("magick", "convert", "convert-im6.q16"):
        if shutil.which(tool):
            formats = subprocess.run([tool, "-list", "format"], capture_output=True, text=True).stdout
            if re.search(r"^\s*PSD\*? +PSD +r", formats, re.MULTILINE):
                return tool
    return None


def test_imagemagick_reads_the_same_layers(tmp_path: Path) -> None:
    if (tool := imagemagick()) is None:
        pytest.skip("ImageMagick is not installed")
    stack, path = odd_stack(), tmp_path / "a.psd"
    save_psd(path, stack, NAMES, resolution=144)
    said = subprocess.run(
        [tool, str(path), "-format", r"%w %h %X %Y %x|", "info:"], capture_output=True, text=True, check=True
    ).stdout.split("|")[:-1]
    assert [line.split()[-1] for line in said] == ["144"] * 5
    merged = composite(stack).astype(int)
    for index, line in enumerate(said):
        width, height, left, top = (int(value) for value in line.split()[:4])
        raw = subprocess.run(
            [tool, f"{path}[{index}]", "-depth", "8", "rgba:-"], capture_output=True, check=True
        ).stdout
        pixels = np.frombuffer(raw, np.uint8).reshape(height, width, 4)
        if index == 0:
            assert np.array_equal(pixels[..., 3], merged[..., 3])
            solid = merged[..., 3] > 200
            assert np.abs(pixels[solid].astype(int) - merged[solid]).max() <= 1
            continue
        seen = np.zeros_like(stack[0])
        seen[top : top + height, left : left + width] = pixels
        shown = stack[index - 1, ..., 3] > 0
        assert np.array_equal(seen[..., 3], stack[index - 1, ..., 3])
        assert np.array_equal(seen[shown], stack[index - 1][shown])


GIMP = """
(define (each items depth folder image)
  (for-each (lambda (item)
    (let* ((name (string-append folder "/" (number->string item) ".png")) (at (gimp-drawable-offsets item)))
      (gimp-message (string-append "LAYER|" (number->string item) "|" (car (gimp-item-get-name item)) "|"
        (number->string depth) "|" (number->string (car at)) "|" (number->string (cadr at))))
      (if (= 1 (car (gimp-item-is-group item)))
        (each (vector->list (cadr (gimp-item-get-children item))) (+ depth 1) folder image)
        (file-png-save RUN-NONINTERACTIVE image item name name 0 9 0 0 0 0 0))))
    items))
(let* ((image (car (gimp-file-load RUN-NONINTERACTIVE "{path}" "a.psd"))))
  (gimp-message (string-append "IMAGE|" (number->string (car (gimp-image-get-channels image))) "|"
    (number->string (car (gimp-image-get-resolution image)))))
  (each (vector->list (cadr (gimp-image-get-layers image))) 0 "{folder}" image))
(gimp-quit 0)
"""


def test_gimp_reads_the_same_layers_names_and_folders_and_no_stray_channel(tmp_path: Path) -> None:
    tool = next((name for name in ("gimp-console-2.10", "gimp-console") if shutil.which(name)), None)
    if tool is None:
        pytest.skip("GIMP 2.10 is not installed")
    stack = odd_stack()
    save_psd(tmp_path / "a.psd", stack, NAMES, groups=[None, "文字", "文字", None], resolution=144)
    script = GIMP.replace("{path}", str(tmp_path / "a.psd")).replace("{folder}", str(tmp_path))
    said = subprocess.run(
        [tool, "-idfs", "--batch-interpreter", "plug-in-script-fu-eval", "-b", f"(begin {script})"],
        capture_output=True, text=True, timeout=120, check=True,
    ).stderr  # fmt: skip
    assert "IMAGE|0|144" in said
    rows = [line.partition("LAYER|")[2].split("|") for line in said.splitlines() if "LAYER|" in line]
    assert [(name, int(depth)) for _, name, depth, _, _ in rows] == [
        (NAMES[3], 0), ("文字", 0), (NAMES[2], 1), (NAMES[1], 1), (NAMES[0], 0),
    ]  # fmt: skip
    for (item, _, _, left, top), layer in zip([row for row in rows if row[1] != "文字"], stack[::-1], strict=True):
        pixels = np.asarray(Image.open(tmp_path / f"{item}.png").convert("RGBA"))
        seen = np.zeros_like(layer)
        seen[int(top) : int(top) + len(pixels), int(left) : int(left) + pixels.shape[1]] = pixels
        assert np.array_equal(np.where(seen[..., 3:] > 0, seen, 0), layer)
