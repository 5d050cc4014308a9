from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from layerloop.components.shard_dataset.duplicates import DuplicateIndex, hash_image


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((64, 48), Image.Resampling.LANCZOS))


def duplicate_of(first: Image.Image, second: Image.Image, *, bits: int = 3) -> str | None:
    index = DuplicateIndex(bits)
    index.add("1", hash_image(pixels(first)), "first")
    return index.find_duplicate("2", hash_image(pixels(second)))


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


@pytest.mark.parametrize("seed", range(5))
def test_an_image_recompressed_or_rescaled_is_a_duplicate(draw_image: Callable[..., Image.Image], seed: int) -> None:
    image = draw_image(seed, 320, 240)
    assert duplicate_of(image, image) == "first"
    assert duplicate_of(image, recompressed(image, 60), bits=6) == "first"
    assert duplicate_of(image, image.resize((1000, 750), Image.Resampling.BICUBIC)) == "first"


def test_different_images_are_not_duplicates(draw_image: Callable[..., Image.Image]) -> None:
    index = DuplicateIndex(10)
    for seed in range(60):
        image_hash = hash_image(pixels(draw_image(seed)))
        assert index.find_duplicate(str(seed), image_hash) is None
        index.add(str(seed), image_hash, str(seed))


def test_flat_images_share_a_hash_and_are_distinguished_by_colour() -> None:
    red, green = Image.new("RGB", (64, 48), (200, 0, 0)), Image.new("RGB", (64, 48), (0, 100, 0))
    assert hash_image(pixels(red)).bits == hash_image(pixels(green)).bits
    assert duplicate_of(red, green) is None
    assert duplicate_of(red, red) == "first"


def test_a_local_edit_is_another_image(draw_image: Callable[..., Image.Image]) -> None:
    image = draw_image(3, 320, 240)
    edited = image.copy()
    edited.paste((255, 255, 255), (140, 100, 180, 130))
    edited.paste((0, 0, 0), (150, 105, 170, 125))
    assert duplicate_of(image, edited, bits=64) is None


def test_a_mirrored_and_a_grey_version_are_other_images(draw_image: Callable[..., Image.Image]) -> None:
    image = draw_image(4, 320, 240)
    assert duplicate_of(image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), bits=64) is None
    assert duplicate_of(image, image.convert("L"), bits=64) is None


def test_no_bits_still_finds_what_has_the_same_hash(draw_image: Callable[..., Image.Image]) -> None:
    image = draw_image(5, 320, 240)
    assert duplicate_of(image, image, bits=0) == "first"


def test_the_hash_is_one_bit_per_brighter_right_neighbour() -> None:
    ramp = np.repeat(np.linspace(0, 255, 72).astype(np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
    assert hash_image(ramp).bits == 2**64 - 1
    assert hash_image(ramp[:, ::-1]).bits == 0
    half = ramp.copy()
    half[32:] = half[32:, ::-1]
    assert hash_image(half).bits == (2**32 - 1) << 32


def test_the_first_of_several_duplicates_is_named_also_after_the_index_has_grown() -> None:
    index = DuplicateIndex(0)
    rng = np.random.default_rng(0)
    hashes = [hash_image(rng.integers(0, 256, (16, 18, 3)).astype(np.uint8)) for _ in range(2500)]
    for number, image_hash in enumerate(hashes):
        index.add(f"key {number}", image_hash, str(number))
    for number in (0, 1023, 1024, 2499):
        assert index.find_duplicate("new", hashes[number]) == str(number)


def test_equal_keys_are_duplicates_also_where_only_exact_ones_count(draw_image: Callable[..., Image.Image]) -> None:
    index = DuplicateIndex(3)
    image_hash = hash_image(pixels(draw_image(1)))
    index.add("key", image_hash, "first")
    assert index.find_duplicate("key", image_hash, near=False) == "first"
    assert index.find_duplicate("other", image_hash, near=False) is None
