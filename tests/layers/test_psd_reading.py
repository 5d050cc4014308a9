"""Documents of other programs: written with psd-tools, read as straight RGBA layers or refused by the layer's name."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from psd_tools import PSDImage
from psd_tools.constants import BlendMode

from layerloop.components.layers.export import write_psd
from layerloop.components.layers.psd_reading import read_document
from layerloop.components.layers.stack import Pixels, composite
from layerloop.components.schema.errors import LayerloopError

SIDE = 12
RED, GREEN = (200, 30, 40, 255), (20, 180, 60, 255)


def card(colour: tuple[int, ...], width: int = 6, height: int = 6) -> Image.Image:
    return Image.new("RGBA", (width, height), colour)


def drawn(colour: tuple[int, ...], rows: slice, columns: slice) -> Pixels:
    out = np.zeros((SIDE, SIDE, 4), np.uint8)
    out[rows, columns] = colour
    return out


def document() -> Any:
    return PSDImage.new("RGBA", (SIDE, SIDE))


def read(made: Any, tmp_path: Path) -> Any:
    path = tmp_path / "a.psd"
    made.save(path)
    return read_document(path)


def test_layers_lie_on_the_canvas_with_their_opacity(tmp_path: Path) -> None:
    made = document()
    made.create_pixel_layer(card(RED), name="half", top=2, left=3, opacity=128)
    made.create_pixel_layer(card(GREEN), name="over the edge", top=-2, left=9)
    found = read(made, tmp_path)
    assert np.array_equal(found.layers[0], drawn((*RED[:3], 128), slice(2, 8), slice(3, 9)))
    assert np.array_equal(found.layers[1], drawn(GREEN, slice(0, 4), slice(9, 12))) and found.hidden == []


def test_hidden_layers_and_groups_are_left_out_and_named(tmp_path: Path) -> None:
    made = document()
    made.create_pixel_layer(card(RED), name="shown")
    made.create_pixel_layer(card(GREEN), name="off").visible = False
    made.create_group([made.create_pixel_layer(card(GREEN), name="inner")], name="folder").visible = False
    found = read(made, tmp_path)
    assert len(found.layers) == 1 and found.hidden == ["off", "folder"]


def test_a_mask_cuts_its_layer_and_one_that_is_off_does_not(tmp_path: Path) -> None:
    made = document()
    layer = made.create_pixel_layer(card(RED), name="masked", top=2, left=2)
    left = Image.fromarray(np.repeat(np.array([[255] * 3 + [64] + [0] * 2], np.uint8), 6, axis=0))
    layer.create_mask(left, top=2, left=2)
    expected = drawn(RED, slice(2, 8), slice(2, 8))
    expected[2:8, 2:8, 3] = np.asarray(left)
    expected[expected[..., 3] == 0] = 0
    assert np.array_equal(read(made, tmp_path).layers[0], expected)
    layer.mask.disabled = True
    assert np.array_equal(read(made, tmp_path).layers[0], drawn(RED, slice(2, 8), slice(2, 8)))


def test_a_groups_opacity_and_mask_fade_layers_that_do_not_overlap(tmp_path: Path) -> None:
    made = document()
    apart = [
        made.create_pixel_layer(card(RED, 4), name="a"),
        made.create_pixel_layer(card(GREEN, 4, 4), name="b", left=6),
    ]
    made.create_group(apart, name="pair")
    made.save(tmp_path / "a.psd")
    made = PSDImage.open(tmp_path / "a.psd")  # a mask of a group just made goes wrong
    group = made[0]
    group.opacity = 102
    group.create_mask(Image.new("L", (SIDE, 4), 255), top=0, left=0)
    found = read(made, tmp_path).layers
    assert np.array_equal(found[0], drawn((*RED[:3], 102), slice(0, 4), slice(0, 4)))
    assert np.array_equal(found[1], drawn((*GREEN[:3], 102), slice(0, 4), slice(6, 10)))
    theirs = np.asarray(PSDImage.open(tmp_path / "a.psd").composite(force=True).convert("RGBA"))
    ours, seen = composite(np.stack(found)), theirs[..., 3] > 0
    assert np.abs(ours[seen].astype(int) - theirs[seen]).max() <= 1 and not ours[~seen][:, 3].any()


def overlapping(made: Any) -> None:
    both = [made.create_pixel_layer(card(RED), name="a"), made.create_pixel_layer(card(GREEN), name="b")]
    made.create_group(both, name="pair").opacity = 128


def blended(made: Any) -> None:
    made.create_pixel_layer(card(RED), name="shade").blend_mode = BlendMode.MULTIPLY


def clipped(made: Any) -> None:
    made.create_pixel_layer(card(RED), name="under")
    made.create_pixel_layer(card(GREEN), name="light").clipping = True


def group_blended(made: Any) -> None:
    made.create_group([made.create_pixel_layer(card(RED), name="a")], name="glow").blend_mode = BlendMode.SCREEN


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (overlapping, "the group 'pair' of 2 layers that overlap, with an opacity or a mask"),
        (blended, "the layer 'shade' in blend mode multiply"),
        (clipped, "the layer 'light' clipped to the one below"),
        (group_blended, "the group 'glow' in blend mode screen"),
    ],
)
def test_what_no_stack_of_layers_can_say_is_refused_by_name(
    tmp_path: Path, change: Callable[[Any], None], line: str
) -> None:
    made = document()
    change(made)
    with pytest.raises(LayerloopError, match=re.escape(f"a.psd has {line}, which is no stack of RGBA layers: ")):
        read(made, tmp_path)


def with_block(key: bytes, data: bytes) -> bytes:
    """The bytes of a document of ours whose upper layer has one block more, in place of the end of its name."""
    plain = write_psd(np.stack([drawn(RED, slice(0, 8), slice(0, 8))]), ["x" * 200])
    start = plain.index(b"8BIMluni")
    length = 12 + int.from_bytes(plain[start + 8 : start + 12], "big")
    name = b"8BIMluni" + (8).to_bytes(4, "big") + (1).to_bytes(4, "big") + "n".encode("utf-16-be") + bytes(2)
    block = b"8BIM" + key + len(data).to_bytes(4, "big") + data
    rest = length - len(name) - len(block) - 12
    return plain[:start] + name + block + b"8BIMlyid" + rest.to_bytes(4, "big") + bytes(rest) + plain[start + length :]


@pytest.mark.parametrize(
    ("key", "data", "line"),
    [
        (b"nvrt", b"", "the layer 'n', a invert without pixels of its own"),
        (b"iOpa", b"\x80\0\0\0", ""),
    ],
)
def test_blocks_of_real_documents(tmp_path: Path, key: bytes, data: bytes, line: str) -> None:
    """An adjustment layer, and the opacity that Photoshop calls Fill."""
    (tmp_path / "a.psd").write_bytes(with_block(key, data))
    if line:
        with pytest.raises(LayerloopError, match=re.escape(line)):
            read_document(tmp_path / "a.psd")
    else:
        assert np.array_equal(
            read_document(tmp_path / "a.psd").layers[0], drawn((*RED[:3], 128), slice(0, 8), slice(0, 8))
        )


def test_another_colour_mode_and_no_document_are_one_line(tmp_path: Path) -> None:
    made = PSDImage.new("CMYK", (SIDE, SIDE))
    with pytest.raises(LayerloopError, match="a.psd is CMYK, which is no stack of RGBA layers: convert it to RGB"):
        read(made, tmp_path)
    buffer = io.BytesIO()
    document().save(buffer)
    packed = write_psd(np.stack([drawn(RED, slice(0, 8), slice(0, 8))]))
    at = packed.index(b"\0\1" + (8 * b"\0\2") + 8 * b"\xf9\xff")  # alpha of the layer: 8 rows of 2 bytes
    for data in (buffer.getvalue()[:40], packed[:at] + b"\0\2" + packed[at + 2 :]):
        (tmp_path / "a.psd").write_bytes(data)
        with pytest.raises(LayerloopError, match=r"cannot be read as a PSD \(\w+\): save it again"):
            read_document(tmp_path / "a.psd")
