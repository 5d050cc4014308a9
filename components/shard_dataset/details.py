"""Whether two images show the same, place by place, at a size where a letter counts.

The two are laid upon each other (a shift and a stretch of a pixel or two are taken out), and no place may differ by
more than compression and resampling do: forms and posters that differ in one word, or one digit, are different images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Grey = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Details:
    """An image at two sizes: `luma[H, W]` for its letters, and the much smaller `colour[h, w, 3]`."""

    luma: Grey
    colour: npt.NDArray[np.uint8]


BLOCK = 8  # pixels a side of the places that are compared, half overlapping
NOISE_LEVELS = 7.0  # of 255, root mean square in a place: what compression adds to any place
NOISE_SHARE = 0.30  # of the place's own contrast: what resampling takes from it
HOPELESS = 3.0  # times what is allowed; a shift that was taken out leaves no such difference
MOST_COLOUR = 60.0  # of 255, between two pixels at COLOUR


def same_image(first: Details, second: Details) -> bool:
    """Whether two images show the same in every place."""
    return worst_place(first.luma, second.luma) <= 1 and _colours_agree(first.colour, second.colour)


def laid_upon(first: Grey, second: Grey) -> Floats | None:
    """The second luma image at the size of the first, a shift and a stretch of a pixel or two taken out; None where
    their shapes differ."""
    height, width = first.shape
    if not same_shape(first.shape, second.shape):
        return None
    one, two = _smooth(first, (width, height)), _smooth(second, (width, height))
    move = _whole_move(one, two)
    if move is None:
        return two
    moved = _moved(two, one, move)
    last = _move(one, moved)
    return moved if last is None else _moved(two, one, move + last)


def worst_place(first: Grey, second: Grey) -> float:
    """The largest difference of two luma images in a place, in what compression and resampling may do there; over 1
    they are different images. Infinite where their shapes differ."""
    if max(first.shape) > max(second.shape):
        first, second = second, first
    height, width = first.shape
    if not same_shape(first.shape, second.shape):
        return float("inf")
    one, two = _smooth(first, (width, height)), _smooth(second, (width, height))
    worst = _places(one, two)
    if worst <= 1:
        return worst
    move = _whole_move(one, two)
    if move is not None:
        moved = _moved(two, one, move)
        worst = min(worst, _places(one, moved))
        if 1 < worst < HOPELESS and (last := _move(one, moved)) is not None:
            worst = min(worst, _places(one, _moved(two, one, move + last)))
    return worst


def _whole_move(one: Floats, two: Floats) -> npt.NDArray[np.float64] | None:
    """`_move`, found in two steps at half the size, where a pixel is half a pixel."""
    coarse_one, coarse_two = _halved(one), _halved(two)
    move = _move(coarse_one, coarse_two)
    if move is None:
        return None
    again = _move(coarse_one, _moved(coarse_two, coarse_one, move))
    return (move if again is None else move + again) * (2 if coarse_one is not one else 1)


def same_shape(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Whether two (height, width) are of one image, up to the rounding of sizes."""
    height, width = first
    return abs(second[1] * height / (second[0] * width) - 1) <= 0.01 + 1.5 / min(height, width)


def _halved(values: Floats) -> Floats:
    height, width = (side // 2 * 2 for side in values.shape)
    if min(height, width) < 16:
        return values
    return values[:height, :width].reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))


def _smooth(luma: Grey, size: tuple[int, int]) -> Floats:
    """At `size` and without the finest detail, which no two encoders keep alike."""
    from PIL import Image, ImageFilter

    image = Image.fromarray(luma)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(0.8)), np.float32)


def _places(one: Floats, two: Floats) -> float:
    inner = (slice(2, -2), slice(2, -2)) if min(one.shape) > 24 else (slice(None), slice(None))
    one, two = one[inner], two[inner]
    residual = _block_sums(np.square(one - two))
    contrast = np.maximum(_variance_sums(one), _variance_sums(two))
    allowed = NOISE_LEVELS**2 * BLOCK**2 + NOISE_SHARE**2 * contrast
    return float(np.sqrt((residual / allowed).max()))


def _variance_sums(values: Floats) -> Floats:
    squares, sums = _block_sums(np.square(values)), _block_sums(values)
    return (squares - np.square(sums) / BLOCK**2).astype(np.float32, copy=False)


def _block_sums(values: Floats) -> Floats:
    """Sums of BLOCK x BLOCK blocks, one every half block; what is left over at the far edges joins the last ones."""
    half = BLOCK // 2
    rows, columns = (-side % half for side in values.shape)
    padded = np.pad(values, ((0, rows), (0, columns)), mode="edge") if rows or columns else values
    small = padded.reshape(padded.shape[0] // half, half, -1, half).sum(axis=(1, 3))
    if min(small.shape) < 2:
        return small * 4
    return small[1:, 1:] + small[:-1, 1:] + small[1:, :-1] + small[:-1, :-1]


def _move(one: Floats, two: Floats) -> npt.NDArray[np.float64] | None:
    """(shift right, stretch, shift down, stretch) in pixels by which `two` is laid upon `one`, a stretch at the edges:
    least squares over the gradient (Lucas and Kanade 1981). None where there is no such thing."""
    height, width = one.shape
    down, across = np.gradient(two)
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    columns = np.stack([across, across * x, down, down * y]).reshape(4, -1)
    matrix = (columns @ columns.T).astype(np.float64)
    target = (columns @ (one - two).ravel()).astype(np.float64)
    matrix += np.eye(4) * (1e-3 * np.trace(matrix) / 4 + 1e-6)
    move: npt.NDArray[np.float64] = np.linalg.solve(matrix, target)
    return move if np.isfinite(move).all() and np.abs(move).max() <= 4 else None


def _moved(two: Floats, one: Floats, move: npt.NDArray[np.float64]) -> Floats:
    """`two` moved; what comes from beyond its edge is taken from `one`, and so not compared."""
    from PIL import Image

    height, width = two.shape
    across, stretch_x, down, stretch_y = move
    a, e = 1 + 2 * stretch_x / max(1, width - 1), 1 + 2 * stretch_y / max(1, height - 1)
    c, f = across + width / 2 * (1 - a), down + height / 2 * (1 - e)
    moved = np.array(
        Image.fromarray(two).transform(
            (width, height), Image.Transform.AFFINE, (a, 0.0, c, 0.0, e, f), Image.Resampling.BICUBIC
        )
    )
    x, y = a * (np.arange(width) + 0.5) + c, e * (np.arange(height) + 0.5) + f  # where each pixel comes from
    beyond = ((y < 1) | (y > height - 1))[:, None] | ((x < 1) | (x > width - 1))[None, :]
    moved[beyond] = one[beyond]
    return moved


def _colours_agree(first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8]) -> bool:
    from PIL import Image

    if max(first.shape) > max(second.shape):
        first, second = second, first
    size = (first.shape[1], first.shape[0])
    other = np.asarray(Image.fromarray(second).resize(size, Image.Resampling.BOX), np.float32)
    return float(np.abs(first - other).max()) <= MOST_COLOUR
