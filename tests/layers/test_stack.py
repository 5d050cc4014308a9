"""Compositing, backdrops and resizing of RGBA layer stacks."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from layerloop.components.layers.stack import Pixels, composite, flatten, on_backdrop, resize
from layerloop.components.schema.errors import LayerloopError


def random_stack(layers: int = 4, height: int = 7, width: int = 5, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (layers, height, width, 4), dtype=np.uint8)


def exactly_over(pixels: list[list[int]]) -> tuple[list[Fraction], Fraction]:
    """Straight colour and alpha in rational numbers, of one pixel's layers from the bottom up."""
    colour, alpha = [Fraction(0)] * 3, Fraction(0)
    for *rgb, a in pixels:
        cover = Fraction(a, 255)
        colour = [value * cover + old * (1 - cover) for value, old in zip(rgb, colour, strict=True)]
        alpha = cover + alpha * (1 - cover)
    return ([value / alpha for value in colour] if alpha else colour), alpha * 255


def test_composite_is_porter_duff_over_rounded_once() -> None:
    stack = random_stack(layers=6)
    found = composite(stack)
    for row in range(stack.shape[1]):
        for column in range(stack.shape[2]):
            colour, alpha = exactly_over([layer[row, column].tolist() for layer in stack])
            exact = [float(value) for value in (*colour, alpha)]
            assert np.abs(found[row, column] - exact).max() <= 0.5 + 1e-4


def test_composite_of_two_layers_is_within_a_level_of_pillows() -> None:
    lower, upper = random_stack(layers=2)
    theirs = np.asarray(Image.alpha_composite(Image.fromarray(lower), Image.fromarray(upper)))
    assert np.abs(composite(np.stack([lower, upper])).astype(int) - theirs).max() <= 1


def test_an_opaque_top_hides_everything_exactly() -> None:
    stack = random_stack()
    stack[-1, ..., 3] = 255
    assert np.array_equal(composite(stack), stack[-1])


def test_an_opaque_background_stays_opaque_under_any_layers() -> None:
    stack = random_stack(layers=20)
    stack[0, ..., 3] = 255
    assert (composite(stack)[..., 3] == 255).all()


def test_colour_under_alpha_zero_never_shows() -> None:
    stack = random_stack()
    stack[2, ..., 3] = 0
    assert np.array_equal(composite(stack), composite(np.delete(stack, 2, axis=0)))
    assert (composite(stack[2:3]) == 0).all()


def test_composite_of_a_batch_is_that_of_its_members() -> None:
    stacks = np.stack([random_stack(seed=1), random_stack(seed=2)])
    assert np.array_equal(composite(stacks), np.stack([composite(stack) for stack in stacks]))


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 4, 4), np.uint8),  # one image
        np.zeros((2, 4, 4, 3), np.uint8),  # without alpha
        np.zeros((2, 4, 4, 4)),  # floats
        np.zeros((0, 4, 4, 4), np.uint8),  # no layer
    ],
)
def test_what_is_no_stack_is_refused_in_one_line(wrong: np.ndarray) -> None:
    with pytest.raises(LayerloopError, match=r"stack is .*: "):
        composite(wrong)


def test_flattened_layers_are_merged_before_they_meet_the_backdrop() -> None:
    stack = np.zeros((2, 1, 3, 4), np.uint8)
    stack[0, 0, 1:] = (200, 100, 0, 255)
    stack[1, 0, 2] = (0, 0, 255, 51)  # alpha 0.2
    assert flatten(stack, "black").tolist() == [[[0, 0, 0], [200, 100, 0], [160, 80, 51]]]
    assert flatten(stack, "white").tolist() == [[[255, 255, 255], [200, 100, 0], [160, 80, 51]]]
    assert flatten(np.stack([stack] * 3), "black").shape == (3, 1, 3, 3)


def test_what_is_laid_on_a_backdrop_is_rounded_to_the_nearest_level() -> None:
    image = np.array([[[10, 20, 30, 200]]], np.uint8)  # times 200 / 255: 7.84, 15.69, 23.53
    assert on_backdrop(image, "black").tolist() == [[[8, 16, 24]]]
    assert on_backdrop(image, "white").tolist() == [[[63, 71, 79]]]  # and 55 more


def test_half_transparent_red_on_each_backdrop() -> None:
    image = np.full((16, 16, 4), (255, 0, 0, 51), np.uint8)  # alpha 0.2
    assert (on_backdrop(image, "white") == (255, 204, 204)).all()
    assert (on_backdrop(image, "black") == (51, 0, 0)).all()
    assert (on_backdrop(image, "magenta") == (255, 0, 204)).all()
    assert (on_backdrop(image, (100, 100, 100)) == (131, 80, 80)).all()


def test_a_checkerboard_shows_through_only_where_nothing_covers() -> None:
    image = np.zeros((16, 16, 4), np.uint8)
    image[:8] = (1, 2, 3, 255)
    shown = on_backdrop(image, "checker", cell=4)
    assert (shown[:8] == (1, 2, 3)).all()
    assert (shown[8, 0] == 255).all() and (shown[8, 4] == 204).all() and (shown[12, 4] == 255).all()


def test_layers_are_laid_on_a_backdrop_one_by_one() -> None:
    stack = random_stack()
    assert np.array_equal(on_backdrop(stack, "white")[2], on_backdrop(stack[2], "white"))


def test_rgb_has_nothing_to_be_laid_on() -> None:
    rgb = random_stack()[0, ..., :3]
    assert np.array_equal(on_backdrop(rgb, "magenta"), rgb)


def test_an_unknown_backdrop_is_refused() -> None:
    with pytest.raises(LayerloopError, match="backdrop is 'pink': choose checker, white"):
        on_backdrop(random_stack(), "pink")  # type: ignore[arg-type]


@pytest.mark.parametrize("resampling", ["lanczos", "bicubic", "bilinear", "box"])
def test_resizing_brings_no_hidden_colour_into_the_edges(resampling: str) -> None:
    """The halo of straight-alpha resampling: black under alpha 0 must not darken a white disc's rim."""
    image = np.zeros((64, 64, 4), np.uint8)
    rows, columns = np.mgrid[:64, :64]
    disc = (rows - 32) ** 2 + (columns - 32) ** 2 < 400
    image[disc] = (255, 255, 255, 255)
    for size in ((24, 24), (150, 100)):
        resized = resize(image, size, resampling)  # type: ignore[arg-type]
        assert (resized[resized[..., 3] > 0][:, :3] == 255).all()
        assert resized.shape == (size[1], size[0], 4)
    straight = np.asarray(Image.fromarray(image[..., :3]).resize((24, 24), Image.Resampling.LANCZOS))
    assert straight[resize(image, (24, 24))[..., 3] > 0].min() < 128  # what the premultiplying prevents


@pytest.mark.parametrize("resampling", ["lanczos", "bicubic", "bilinear", "box"])
def test_hidden_green_does_not_colour_the_rim_of_an_orange_disc(resampling: str) -> None:
    image = np.full((64, 64, 4), (0, 255, 0, 0), np.uint8)
    rows, columns = np.mgrid[:64, :64]
    image[(rows - 32) ** 2 + (columns - 32) ** 2 < 400] = (255, 128, 0, 255)
    for size in ((24, 24), (150, 100)):
        resized = resize(image, size, resampling)  # type: ignore[arg-type]
        assert (resized[resized[..., 3] > 0][:, :3] == (255, 128, 0)).all()


@pytest.mark.parametrize("resampling", ["lanczos", "bicubic", "bilinear", "box", "nearest"])
@pytest.mark.parametrize("size", [(10, 14), (31, 29), (70, 90), (120, 20)])  # smaller, larger, and one of each
@pytest.mark.parametrize("cover", [255, 100])
def test_one_flat_colour_stays_that_colour(resampling: str, size: tuple[int, int], cover: int) -> None:
    """Where a filter overshoots alpha it overshoots colour as much: clipped first, grey 128 is 142 at an opaque
    rectangle's edges and 158 at its corners."""
    image = np.zeros((32, 32, 4), np.uint8)
    image[8:24, 8:24] = (128, 3, 250, cover)
    resized = resize(image, size, resampling)  # type: ignore[arg-type]
    assert (resized[resized[..., 3] > 0][:, :3] == (128, 3, 250)).all()
    assert abs(int(resized[size[1] // 2, size[0] // 2, 3]) - cover) <= cover // 8
    assert (resized[0, 0] == 0).all()


def test_resizing_commutes_with_compositing() -> None:
    smooth = np.asarray(Image.fromarray(random_stack(1, 8, 8)[0]).resize((64, 64), Image.Resampling.BICUBIC))
    other = np.asarray(Image.fromarray(random_stack(1, 8, 8, seed=5)[0]).resize((64, 64), Image.Resampling.BICUBIC))
    stack = np.stack([np.where([True, True, True, False], smooth, 255).astype(np.uint8), other])
    before = resize(composite(stack), (32, 32), "box").astype(int)
    after = composite(resize(stack, (32, 32), "box")).astype(int)
    assert np.abs(before - after).mean() < 2


def test_nearest_copies_pixels_exactly() -> None:
    stack = random_stack(2, 3, 4)
    larger = resize(stack, (12, 9), "nearest")
    assert np.array_equal(larger, stack.repeat(3, axis=1).repeat(3, axis=2))
    assert np.array_equal(resize(larger, (4, 3), "nearest"), stack)


def test_resizing_to_the_same_size_changes_nothing() -> None:
    stack = random_stack()
    assert np.array_equal(resize(stack, (5, 7)), stack)


def test_impossible_sizes_and_filters_are_refused() -> None:
    with pytest.raises(LayerloopError, match="size is 0x4"):
        resize(random_stack(), (0, 4))
    with pytest.raises(LayerloopError, match="resampling is 'cubic': choose lanczos"):
        resize(random_stack(), (4, 4), "cubic")  # type: ignore[arg-type]
