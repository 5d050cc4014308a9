from __future__ import annotations

import io
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from PIL import Image

from layerloop.components.shard_dataset.duplicates import (
    AT_ONCE,
    MEAN_LEVELS,
    MOST_LEVELS,
    DuplicateIndex,
    ImageHash,
    hash_image,
)
from layerloop.components.shard_dataset.families import SIDE, Family

from .posters import WORDS, Poster, copies, form


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


def test_flat_images_share_a_hash_and_are_distinguished_by_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    red, green = Image.new("RGB", (64, 48), (200, 0, 0)), Image.new("RGB", (64, 48), (0, 100, 0))
    assert hash_image(pixels(red)).bits == hash_image(pixels(green)).bits
    assert duplicate_of(red, green) is None
    assert duplicate_of(red, red) == "first"
    monkeypatch.setattr(DuplicateIndex, "_details", lambda *_: pytest.fail("thumbnails tell them apart, for less"))
    assert duplicate_of(red, green) is None


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


def poster(layout: int) -> Poster:
    return Poster(
        layout, WORDS[layout % 30], " ".join(WORDS[(layout + k) % 30] for k in (3, 7, 11)), f"{1000 + layout * 37}"
    )


def variants(layout: int) -> list[Image.Image]:
    """The same poster with another headline, another word in a line, another digit."""
    own = poster(layout)
    line = own.line.replace(WORDS[(layout + 7) % 30], WORDS[(layout + 8) % 30])
    digit = own.number[:3] + str((int(own.number[3]) + 1 + layout % 8) % 10)
    return [
        own.draw(),
        Poster(layout, WORDS[(layout + 1) % 30], own.line, own.number).draw(),
        Poster(layout, own.headline, line, own.number).draw(),
        Poster(layout, own.headline, own.line, digit).draw(),
    ]


def hashed(image: Image.Image) -> ImageHash:
    return hash_image(image.convert("RGB"))


@pytest.mark.parametrize("layout", range(2))
def test_posters_that_differ_in_a_text_are_kept_and_their_copies_found(layout: int) -> None:
    """A larger count: 60 layouts, 240 posters and 160 forms, see `measured` below."""
    dropped, found, asked = measured([layout], forms=0)
    assert (dropped, found) == (0, asked)


def measured(layouts: Iterable[int], *, forms: int) -> tuple[int, int, int]:
    """(different images dropped, copies found, copies asked for)."""
    index, dropped, found, asked = DuplicateIndex(3), 0, 0, 0
    different = [(f"{n}-{k}", image) for n in layouts for k, image in enumerate(variants(n))]
    different += [(f"form {n}", form(f"{n * 73 % 9000 + 1000}")) for n in range(forms)]
    for name, image in different:
        image_hash = hashed(image)
        dropped += index.find_duplicate(name, image_hash) is not None
        index.add(name, image_hash, name)
    for n, (name, image) in enumerate(different):
        if n % 4 == 0:
            for what, copy in copies(image):
                asked += 1
                found += index.find_duplicate(f"{name} {what}", hashed(copy)) == name
    return dropped, found, asked


def test_a_copy_is_found_among_forms_that_differ_in_a_number() -> None:
    """Their thumbnails hardly differ, so that a copy's own form is none of the nearest by them."""
    index = DuplicateIndex(3)
    for number in range(24):
        image_hash = hashed(form(f"10{number:02d}"))
        assert index.find_duplicate(str(number), image_hash) is None
        index.add(str(number), image_hash, str(number))
    for number, part in ((5, slice(0, None, 3)), (17, slice(1, None, 3))):
        for what, copy in list(copies(form(f"10{number:02d}")))[part]:
            assert index.find_duplicate(what, hashed(copy)) == str(number), what


def test_a_family_is_told_apart_by_the_cells_that_differ() -> None:
    rng = np.random.default_rng(3)
    shared = rng.integers(0, 256, SIDE * SIDE).astype(np.uint8)
    cells = np.repeat(shared[None], 60, axis=0)
    cells[:, 5000:5030] = rng.integers(0, 256, (60, 30))
    family = Family(100)
    asked: list[int] = []

    def cells_of(index: int) -> np.ndarray:
        asked.append(index)
        return cells[index - 100]

    for index in range(101, 160):
        family.add(index)
        query = np.clip(cells[index - 100].astype(int) + rng.integers(-6, 7, SIDE * SIDE), 0, 255).astype(np.uint8)
        nearest = family.nearest(query, np.arange(100, index + 1), cells_of, most=3)
        assert nearest[0][1] == index and nearest == sorted(nearest) and len(nearest) <= 3
        some = family.nearest(query, np.arange(100, index), cells_of, most=3)  # without the nearest itself
        assert index not in [number for _, number in some]
    assert len(asked) < 6 * 60  # each member's cells once, and again whenever the family has doubled


def test_a_family_far_from_the_question_as_a_whole_is_decided_as_one_by_one() -> None:
    """The triangle inequality is a short cut: what it says must be what all thumbnails say."""
    rng = np.random.default_rng(8)
    grey = [np.full((48, 64, 3), 120, np.uint8) for _ in range(3)]
    index = DuplicateIndex(64)
    hashes = []
    for number in range(AT_ONCE + 200):
        base = grey[number % 3] + rng.integers(0, 7, 3).astype(np.uint8)
        hashes.append(hash_image(base))
        index.add(str(number), hashes[-1], str(number))
    question = hash_image(np.full((48, 64, 3), 125, np.uint8))
    apart = np.abs(np.stack([h.thumbnail for h in hashes]).astype(int) - question.thumbnail).reshape(len(hashes), -1)
    expected = np.flatnonzero((apart.mean(axis=1) <= MEAN_LEVELS) & (apart.max(axis=1) <= MOST_LEVELS))
    assert 0 < len(expected) < len(hashes)
    assert index._alike(question).indexes.tolist() == expected.tolist()
