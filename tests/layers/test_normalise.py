from __future__ import annotations

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms

from layerloop.components.layers.normalise import image_key, normalise, target_size
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import DataRecipe
from layerloop.components.storage.images import decode_image

DATA = DataRecipe(resolution=64, multiple=16)


def through(image: Image.Image, kind: str, **options: object) -> np.ndarray:
    """The normalised pixels of an image that was saved and read again."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return normalise(decode_image(buffer.getvalue()), DATA)


def flat(mode: str, colour: object, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new(mode, size, colour)  # type: ignore[arg-type]


def swapped_profile() -> bytes:
    """A minimal ICC matrix profile with sRGB's primaries, of which red and green have changed places."""

    def s15(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    red, green, blue = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)  # D50-adapted
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.2 * 256)) + bytes(2)
    tags = {b"rXYZ": green, b"gXYZ": red, b"bXYZ": blue, b"wtpt": (0.9642, 1.0, 0.8249)}
    body = {tag: b"XYZ " + bytes(4) + s15(*xyz) for tag, xyz in tags.items()}
    body |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    body[b"desc"] = b"desc" + bytes(4) + struct.pack(">I", 5) + b"swap\0" + bytes(79)
    body[b"cprt"] = b"text" + bytes(4) + b"none\0" + bytes(3)
    table, data, offset = b"", b"", 128 + 4 + 12 * len(body)
    for tag, content in body.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", offset + len(data), len(content))
        data += content
    size = offset + len(data)
    header = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    header += bytes(28) + s15(0.9642, 1.0, 0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(body)) + table + data


@pytest.mark.parametrize(
    ("size", "resolution", "multiple", "expected"),
    [
        ((1000, 1000), 640, 16, (640, 640)),
        ((1920, 1080), 640, 16, (640, 352)),  # 360 / 16 = 22.5, which Python's round takes to 22, as the authors'
        ((1080, 1920), 640, 16, (352, 640)),
        ((3000, 2000), 640, 16, (640, 432)),  # 426.7
        ((30, 20), 640, 16, (640, 432)),  # small images are enlarged
        ((640, 10), 640, 16, (640, 16)),
        ((100, 100), 650, 16, (656, 656)),
        ((3000, 2000), 64, 32, (64, 32)),
    ],
)
def test_the_longest_side_is_the_resolution_and_sides_are_multiples(
    size: tuple[int, int], resolution: int, multiple: int, expected: tuple[int, int]
) -> None:
    assert target_size(*size, DataRecipe(resolution=resolution, multiple=multiple)) == expected


def test_a_strip_is_refused() -> None:
    with pytest.raises(
        LayerloopError, match=r"image is 4000 x 10, at most 0\.2 pixels on its short side at 64: crop it"
    ):
        normalise(flat("RGB", 0, (4000, 10)), DATA)


def test_resizing_is_lanczos(draw_image: Callable[..., Image.Image]) -> None:
    image = draw_image(1, 200, 150)
    expected = np.asarray(image.resize((64, 48), Image.Resampling.LANCZOS))
    assert np.array_equal(normalise(image, DATA), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright_whatever_their_exif_orientation(orientation: int) -> None:
    upright = Image.new("RGB", (64, 32), "white")
    upright.paste((255, 0, 0), (0, 0, 32, 16))  # red in the top left quarter
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(through(stored, "PNG", exif=exif), np.asarray(upright))


def test_an_embedded_profile_is_converted_to_srgb() -> None:
    pixels = through(flat("RGB", (200, 50, 100)), "PNG", icc_profile=swapped_profile())
    assert np.abs(pixels[0, 0].astype(int) - (50, 200, 100)).max() <= 6  # a power of 2.2 is not exactly sRGB's curve


def test_alpha_survives_a_profile() -> None:
    pixels = through(flat("RGBA", (200, 50, 100, 0)), "PNG", icc_profile=swapped_profile())
    assert (pixels == 255).all()


def test_an_srgb_profile_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = through(flat("RGB", (200, 50, 100)), "PNG", icc_profile=profile)
    assert np.abs(pixels[0, 0].astype(int) - (200, 50, 100)).max() <= 1


@pytest.mark.parametrize("profile", [b"rubbish", swapped_profile()[:200]])
def test_a_damaged_profile_is_ignored(profile: bytes) -> None:
    assert (through(flat("RGB", (200, 50, 100)), "PNG", icc_profile=profile) == (200, 50, 100)).all()


def test_a_profile_of_another_colour_space_is_ignored() -> None:
    assert (through(flat("L", 77), "PNG", icc_profile=swapped_profile()) == 77).all()


def palette_with_hole() -> Image.Image:
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 0, 10, 20, 30] + [0] * 762)
    image.paste(0, (0, 0, 32, 64))
    return image


@pytest.mark.parametrize(
    ("image", "kind", "options", "expected"),
    [
        (flat("L", 77), "PNG", {}, (77, 77, 77)),
        (flat("1", 1), "PNG", {}, (255, 255, 255)),
        (flat("RGBA", (255, 0, 0, 128)), "PNG", {}, (255, 127, 127)),
        (flat("RGBA", (9, 9, 9, 0)), "PNG", {}, (255, 255, 255)),
        (flat("LA", (0, 51)), "PNG", {}, (204, 204, 204)),
        (flat("RGB", (1, 2, 3)), "PNG", {"transparency": (1, 2, 3)}, (255, 255, 255)),
        (flat("RGB", (1, 2, 3)), "PNG", {"transparency": (7, 7, 7)}, (1, 2, 3)),
        (flat("RGB", (1, 2, 3)).quantize(2), "PNG", {}, (1, 2, 3)),
        (flat("CMYK", (0, 255, 255, 0)), "JPEG", {"quality": 100}, (255, 0, 0)),
        (flat("CMYK", (0, 0, 0, 255)), "TIFF", {}, (0, 0, 0)),
        (flat("I;16", 257 * 77), "PNG", {}, (77, 77, 77)),
        (flat("I;16", 65535), "TIFF", {}, (255, 255, 255)),
        (flat("I", 257 * 77), "TIFF", {}, (77, 77, 77)),
        (flat("F", 0.2), "TIFF", {}, (51, 51, 51)),
        (flat("RGB", (1, 2, 3)), "BMP", {}, (1, 2, 3)),
        (flat("RGB", (1, 2, 3)), "WEBP", {"lossless": True}, (1, 2, 3)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_every_kind_of_pixel_becomes_eight_bit_rgb_on_white(
    image: Image.Image, kind: str, options: dict[str, object], expected: tuple[int, int, int]
) -> None:
    pixels = through(image, kind, **options)
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= 1


def test_transparency_of_a_palette_becomes_white() -> None:
    pixels = through(palette_with_hole(), "PNG", transparency=0)
    assert (pixels[:, :28] == 255).all()
    assert (pixels[:, 36:] == (10, 20, 30)).all()


def test_sixteen_bit_colour_keeps_its_eight_high_bits() -> None:
    import zlib

    row = b"\0" + struct.pack(">3H", 0x4D00, 0x8001, 0xFFFF) * 64
    header = struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 64)) + chunk(b"IEND", b"")
    pixels = normalise(decode_image(png), DATA)
    assert np.abs(pixels.astype(int) - (0x4D, 0x80, 0xFF)).max() <= 1


def test_lab_is_converted() -> None:
    pixels = through(flat("LAB", (255, 128, 128)), "TIFF")  # L* 100, a* and b* 0: white
    assert pixels.min() >= 253


@pytest.mark.parametrize(("mode", "value"), [("F", 300.0), ("F", float("nan")), ("I", 70000), ("I", -1)])
def test_32_bit_values_without_a_known_scale_are_refused(mode: str, value: float) -> None:
    with pytest.raises(
        LayerloopError, match=r"image has 32-bit values outside 0\.\.(1|65535): save it with 8 or 16 bits"
    ):
        normalise(flat(mode, value), DATA)


def test_an_animation_gives_its_first_frame() -> None:
    frames = [flat("RGB", colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        pixels = through(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 2, kind


def test_keys_tell_pixels_and_shapes_apart() -> None:
    white = np.full((32, 64, 3), 255, np.uint8)
    keys = {image_key(white), image_key(white.transpose(1, 0, 2)), image_key(white - np.uint8(1))}
    assert len(keys) == 3
    assert image_key(white) == image_key(white.copy())
    assert all(len(key) == 16 and set(key) <= set("0123456789abcdef") for key in keys)
