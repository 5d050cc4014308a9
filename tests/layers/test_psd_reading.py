"""Documents of other programs: written with psd-tools, read as straight RGBA layers or refused by the layer's name."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from psd_tools import PSDImage
from psd_tools.constants import BlendMode, ChannelID, Compression, Tag
from psd_tools.psd.layer_and_mask import ChannelInfo, MaskFlags
from psd_tools.psd.tagged_blocks import TaggedBlock

from layerloop.components.layers.export import write_psd
from layerloop.components.layers.psd import write_document
from layerloop.components.layers.psd_reading import read_layers
from layerloop.components.layers.stack import Pixels, composite
from layerloop.components.schema.errors import LayerloopError

from .test_normalise import swapped_profile

SIDE = 12
RED, GREEN = (200, 30, 40, 255), (20, 180, 60, 255)


def card(colour: tuple[int, ...], width: int = 6, height: int = 6) -> Image.Image:
    return Image.new("RGBA", (width, height), colour)


def drawn(colour: tuple[int, ...], rows: slice, columns: slice) -> Pixels:
    out = np.zeros((SIDE, SIDE, 4), np.uint8)
    out[rows, columns] = colour
    return out


class Document(NamedTuple):
    layers: list[Pixels]
    hidden: list[str]


def document(mode: str = "RGBA", depth: Any = 8) -> Any:
    return PSDImage.new(mode, (SIDE, SIDE), depth=depth)


def read_document(path: Path) -> Document:
    hidden: list[str] = []
    return Document(list(read_layers(path, hidden)), hidden)


def read(made: Any, tmp_path: Path) -> Document:
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


def artboard(made: Any) -> None:
    group = made.create_group([made.create_pixel_layer(card(RED), name="a")], name="page 1")
    add_block(group, b"artb", descriptor())


def blended_if(made: Any) -> None:
    layer = made.create_pixel_layer(card(RED), name="sky")
    layer._record.blending_ranges.composite_ranges = [(0, 65535), (0x6464, 65535)]  # not over what is dark


def group_blended(made: Any) -> None:
    made.create_group([made.create_pixel_layer(card(RED), name="a")], name="glow").blend_mode = BlendMode.SCREEN


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (overlapping, "the group 'pair' of layers that overlap, with an opacity or a mask"),
        (blended, "the layer 'shade' in blend mode multiply"),
        (clipped, "the layer 'light' clipped to the one below"),
        (group_blended, "the group 'glow' in blend mode screen"),
        (artboard, "the artboard 'page 1'"),
        (blended_if, "the layer 'sky' with advanced blending (blend if, knockout or channels)"),
    ],
)
def test_what_no_stack_of_layers_can_say_is_refused_by_name(
    tmp_path: Path, change: Callable[[Any], None], line: str
) -> None:
    made = document()
    change(made)
    with pytest.raises(LayerloopError, match=re.escape(f"a.psd has {line}, which is no stack of RGBA layers: ")):
        read(made, tmp_path)


# ------------------------------------------------------------------- blocks of real documents, byte for byte (Adobe's
# Photoshop File Formats Specification, "Additional Layer Information")


def add_block(layer: Any, key: bytes, data: bytes) -> None:
    layer._record.tagged_blocks[Tag(key)] = TaggedBlock(key=key, data=data)


def word(value: int) -> bytes:
    return struct.pack(">I", value)


def named(key: str) -> bytes:
    return (word(0) if len(key) == 4 else word(len(key))) + key.encode()


def descriptor(kind: str = "null", items: Mapping[str, bytes] | None = None) -> bytes:
    """A descriptor block: the version, an empty name, a class, and items with their types."""
    return word(16) + object_of(kind, items or {})


def object_of(kind: str, items: Mapping[str, bytes]) -> bytes:
    return word(0) + named(kind) + word(len(items)) + b"".join(named(key) + value for key, value in items.items())


def flag(value: bool) -> bytes:
    return b"bool" + bytes([value])


def shadow(**flags: bool) -> bytes:
    return b"Objc" + object_of("DrSh", {key: flag(value) for key, value in flags.items()})


def effects(on: bool, effect: bytes) -> bytes:
    return word(0) + descriptor(items={"masterFXSwitch": flag(on), "DrSh": effect})


OLD_FILL = word(2) + b"8BIMnorm" + bytes(10) + b"\xff\x01" + bytes(10)  # a colour overlay of Photoshop 5, on
PATH = struct.pack(">H24x", 6)  # "path fill rule" alone: nothing is outlined
EFFECTS, BLENDING = "the layer 'n' with layer effects", "the layer 'n' with advanced blending"
VECTOR = "'n' with a vector mask"


@pytest.mark.parametrize(
    ("key", "data", "line"),
    [
        (b"nvrt", b"", "the layer 'n', a invert without pixels of its own"),
        (b"SoCo", descriptor(), "the layer 'n', a solidcolorfill without pixels of its own"),
        (b"lfx2", effects(True, shadow(enab=True, present=True)), EFFECTS),
        (b"lfx2", effects(True, shadow(enab=True)), EFFECTS),  # before 2015 nothing said `present`
        (b"lfx2", effects(True, b"VlLs" + word(1) + shadow(enab=True, present=True)), EFFECTS),
        (b"lmfx", effects(True, shadow(enab=True, present=True)), EFFECTS),
        (b"lfx2", b"\0\0\0\1??", EFFECTS),  # of which nothing can be said
        (b"lrFX", struct.pack(">HH", 0, 1) + b"8BIMsofi" + word(len(OLD_FILL)) + OLD_FILL, EFFECTS),
        (b"vmsk", struct.pack(">II", 3, 0) + PATH, VECTOR),
        (b"vsms", struct.pack(">II", 3, 0) + PATH, VECTOR),
        (b"knko", b"\x01\0\0\0", BLENDING),
        (b"brst", word(1), BLENDING),
    ],
)
def test_what_a_block_adds_to_a_layer_is_refused_by_name(tmp_path: Path, key: bytes, data: bytes, line: str) -> None:
    """Adjustments, fills, effects, vector masks, and blending that goes beyond the blend mode."""
    made = document()
    add_block(made.create_pixel_layer(card(RED), name="n"), key, data)
    with pytest.raises(LayerloopError, match=re.escape(line)):
        read(made, tmp_path)


@pytest.mark.parametrize(
    ("key", "data"),
    [
        (b"lfx2", effects(False, shadow(enab=True, present=True))),
        (b"lfx2", effects(True, shadow(enab=False, present=True))),
        (b"lfx2", effects(True, shadow(enab=True, present=False))),
        (b"vmsk", struct.pack(">II", 3, 4) + PATH),  # disabled
        (b"knko", bytes(4)),
        (b"brst", b""),
        (b"SoLd", b"soLD" + word(4) + descriptor()),  # a smart object, with the pixels that it shows
        (b"iOpa", b"\xff\0\0\0"),
    ],
)
def test_what_a_block_does_not_change_is_read(tmp_path: Path, key: bytes, data: bytes) -> None:
    made = document()
    add_block(made.create_pixel_layer(card(RED), name="n"), key, data)
    assert np.array_equal(read(made, tmp_path).layers[0], drawn(RED, slice(0, 6), slice(0, 6)))


def test_fill_opacity_and_opacity_multiply(tmp_path: Path) -> None:
    made = document()
    add_block(made.create_pixel_layer(card(RED), name="n", opacity=128), b"iOpa", b"\x80\0\0\0")
    assert np.array_equal(read(made, tmp_path).layers[0], drawn((*RED[:3], 64), slice(0, 6), slice(0, 6)))


def test_a_vector_mask_counts_by_the_pixels_that_both_masks_are_stored_with(tmp_path: Path) -> None:
    """Channel -3 is a pixel mask and a vector mask together; where the pixel mask is off, only the path says."""
    made = document()
    layer = made.create_pixel_layer(card(RED), name="n")
    layer.create_mask(Image.new("L", (6, 6), 255), top=0, left=0)
    add_block(layer, b"vmsk", struct.pack(">II", 3, 0) + PATH)
    both, _, _ = layer._make_mask_channel_data(Image.new("L", (6, 3), 255), Compression.RAW)
    layer._record.channel_info.append(ChannelInfo(id=ChannelID.REAL_USER_LAYER_MASK, length=len(both.data) + 2))
    layer._channels.append(both)
    data = layer._record.mask_data
    data.real_flags, data.real_background_color = MaskFlags(parameters_applied=True), 0
    data.real_top, data.real_left, data.real_bottom, data.real_right = 0, 0, 3, 6
    assert np.array_equal(read(made, tmp_path).layers[0], drawn(RED, slice(0, 3), slice(0, 6)))
    layer.mask.disabled = True
    with pytest.raises(LayerloopError, match=re.escape(VECTOR)):
        read(made, tmp_path)


def test_grey_and_sixteen_bits_are_eight_bits_of_colour(tmp_path: Path) -> None:
    grey, deep, light = document("LA"), document(depth=16), document(depth=32)
    grey.create_pixel_layer(Image.new("LA", (6, 6), (77, 128)), name="g")
    for made in (deep, light):
        made.create_pixel_layer(card(RED), name="d")
    assert np.array_equal(read(grey, tmp_path).layers[0], drawn((77, 77, 77, 128), slice(0, 6), slice(0, 6)))
    assert np.array_equal(read(deep, tmp_path).layers[0], drawn(RED, slice(0, 6), slice(0, 6)))
    with pytest.raises(LayerloopError, match="a.psd has 32 bits a channel"):  # linear light
        read(light, tmp_path)


@pytest.mark.parametrize(("profile", "red_and_green"), [(swapped_profile(), (30, 200)), (b"rubbish", (200, 30))])
def test_a_profile_is_converted_and_a_damaged_one_ignored(
    tmp_path: Path, profile: bytes, red_and_green: tuple[int, int]
) -> None:
    """As those of pictures are."""
    with (tmp_path / "a.psd").open("wb") as file:
        write_document(file, np.stack([drawn(RED, slice(0, 8), slice(0, 8))]), profile=profile)
    (found,) = read_document(tmp_path / "a.psd").layers
    assert np.abs(found[0, 0].astype(int) - (*red_and_green, *RED[2:])).max() < 10


def test_a_group_with_a_sharp_mask_may_overlap(tmp_path: Path) -> None:
    """Where a mask is 0 or 1 and nothing between, masking each layer is masking the group."""
    made = document()
    both = [made.create_pixel_layer(card(RED), name="a"), made.create_pixel_layer(card(GREEN), name="b")]
    made.create_group(both, name="pair")
    made.save(tmp_path / "a.psd")
    made = PSDImage.open(tmp_path / "a.psd")
    made[0].create_mask(Image.new("L", (SIDE, 3), 255), top=0, left=0)
    found = read(made, tmp_path).layers
    assert [np.flatnonzero(layer[..., 3].any(1)).tolist() for layer in found] == [[0, 1, 2]] * 2


def test_documents_without_layers_and_empty_layers_have_none(tmp_path: Path) -> None:
    assert read(document(), tmp_path) == ([], [])
    made = document()
    made.create_pixel_layer(Image.new("RGBA", (0, 0)), name="e")
    assert not read(made, tmp_path).layers[0].any()


def test_a_large_canvas_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.psd").write_bytes(struct.pack(">4sH6xHIIHH", b"8BPS", 1, 4, 30_000, 30_000, 8, 3) + bytes(14))
    with pytest.raises(LayerloopError, match="a.psd is 30000 x 30000, of 100 megapixels at most: make it smaller"):
        read_document(tmp_path / "a.psd")


def test_what_is_lost_in_a_damaged_document_is_not_passed_over(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """psd-tools goes on without the blocks behind one that it cannot read: without the opacity, for one."""
    made = document()
    layer = made.create_pixel_layer(card(RED), name="n")
    add_block(layer, b"iOpa", b"\x80\0\0\0")
    made.save(tmp_path / "a.psd")
    data = (tmp_path / "a.psd").read_bytes()
    (tmp_path / "a.psd").write_bytes(data.replace(b"8BIMiOpa", b"8BxMiOpa"))
    with pytest.raises(LayerloopError, match=r"a\.psd is damaged \(Invalid signature .*\): save it again"):
        read_document(tmp_path / "a.psd")
    assert capfd.readouterr() == ("", "")


def test_a_name_of_any_length_is_one_short_line(tmp_path: Path) -> None:
    made = document()
    made.create_pixel_layer(card(RED), name="a\n" * 100).blend_mode = BlendMode.MULTIPLY
    with pytest.raises(LayerloopError) as refused:
        read(made, tmp_path)
    assert "\n" not in str(refused.value) and len(str(refused.value).replace(str(tmp_path), "")) < 250


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
