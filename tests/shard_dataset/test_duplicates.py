from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from layerloop.components.shard_dataset.duplicates import Gallery, look_at


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((64, 48), Image.Resampling.LANCZOS))


def twin(first: Image.Image, second: Image.Image, *, bits: int = 3) -> str | None:
    gallery = Gallery(bits)
    gallery.add("1", look_at(pixels(first)), "first")
    return gallery.twin_of("2", look_at(pixels(second)))


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


@pytest.mark.parametrize("seed", range(5))
def test_the_same_picture_recompressed_or_rescaled_is_a_twin(picture: Callable[..., Image.Image], seed: int) -> None:
    image = picture(seed, 320, 240)
    assert twin(image, image) == "first"
    assert twin(image, recompressed(image, 60), bits=6) == "first"
    assert twin(image, image.resize((1000, 750), Image.Resampling.BICUBIC)) == "first"


def test_different_pictures_are_no_twins(picture: Callable[..., Image.Image]) -> None:
    gallery = Gallery(10)
    for seed in range(60):
        look = look_at(pixels(picture(seed)))
        assert gallery.twin_of(str(seed), look) is None
        gallery.add(str(seed), look, str(seed))


def test_flat_pictures_share_a_hash_and_are_told_apart_by_colour() -> None:
    red, green = Image.new("RGB", (64, 48), (200, 0, 0)), Image.new("RGB", (64, 48), (0, 100, 0))
    assert look_at(pixels(red)).bits == look_at(pixels(green)).bits
    assert twin(red, green) is None
    assert twin(red, red) == "first"


def test_a_local_edit_is_another_picture(picture: Callable[..., Image.Image]) -> None:
    image = picture(3, 320, 240)
    edited = image.copy()
    edited.paste((255, 255, 255), (140, 100, 180, 130))
    edited.paste((0, 0, 0), (150, 105, 170, 125))
    assert twin(image, edited, bits=64) is None


def test_a_mirrored_and_a_grey_version_are_other_pictures(picture: Callable[..., Image.Image]) -> None:
    image = picture(4, 320, 240)
    assert twin(image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), bits=64) is None
    assert twin(image, image.convert("L"), bits=64) is None


def test_no_bits_still_finds_what_has_the_same_hash(picture: Callable[..., Image.Image]) -> None:
    image = picture(5, 320, 240)
    assert twin(image, image, bits=0) == "first"


def test_the_hash_is_one_bit_per_brighter_right_neighbour() -> None:
    ramp = np.repeat(np.linspace(0, 255, 72).astype(np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
    assert look_at(ramp).bits == 2**64 - 1
    assert look_at(ramp[:, ::-1]).bits == 0
    half = ramp.copy()
    half[32:] = half[32:, ::-1]
    assert look_at(half).bits == (2**32 - 1) << 32


def test_the_first_of_several_twins_is_named_also_after_the_gallery_has_grown() -> None:
    gallery = Gallery(0)
    rng = np.random.default_rng(0)
    looks = [look_at(rng.integers(0, 256, (16, 18, 3)).astype(np.uint8)) for _ in range(2500)]
    for number, look in enumerate(looks):
        gallery.add(f"key {number}", look, str(number))
    for number in (0, 1023, 1024, 2499):
        assert gallery.twin_of("new", looks[number]) == str(number)


def test_equal_keys_are_twins_also_where_only_exact_ones_count(picture: Callable[..., Image.Image]) -> None:
    gallery = Gallery(3)
    look = look_at(pixels(picture(1)))
    gallery.add("key", look, "first")
    assert gallery.twin_of("key", look, near=False) == "first"
    assert gallery.twin_of("other", look, near=False) is None
