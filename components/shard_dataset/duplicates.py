"""Near-exact duplicates: the same image recompressed, rescaled or shifted by a pixel, and not merely a similar one.

Three stages, each dearer and surer than the one before. A difference hash and a thumbnail find candidates among all
images; the few nearest are compared at a size where a letter counts. There the two are laid upon each other (a shift
and a stretch of a pixel or two are taken out), and no place may differ by more than compression and resampling do:
forms and posters that differ in one word, or one digit, are different images.
"""

from __future__ import annotations

import tempfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

THUMBNAIL = 16  # pixels a side; 784 bytes per image are all that is kept in memory
MEAN_LEVELS = 4.0  # of 255, between thumbnails
MOST_LEVELS = 24.0  # of 255, between two pixels of thumbnails; a letter is judged by the details
SURE_LEVELS = 4  # of 255: a smaller step between neighbours is noise, and its bit of the hash says nothing

DETAIL = 640  # pixels of the longest side at which letters are compared
COLOUR = 64  # pixels of the longest side at which colours are compared
NEAREST = 8  # candidates that are compared in detail

Grey = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ImageHash:
    """A perceptual hash of an image, the thumbnail that confirms it, and the details that decide."""

    bits: int  # 64-bit difference hash
    sure: int  # which of its bits come of a step that is no noise
    thumbnail: npt.NDArray[np.uint8]  # (16, 16, 3)
    detail: Grey  # (H, W) luma, the longest side at most DETAIL
    colour: npt.NDArray[np.uint8]  # (H, W, 3), the longest side at most COLOUR


def hash_image(pixels: npt.NDArray[np.uint8] | Image.Image) -> ImageHash:
    """Hash `(H, W, 3)` uint8 pixels or an RGB image, at best at the size in which it came: a bit for each of 8x8
    neighbours (right brighter than left, luma at 9x8)."""
    from PIL import Image

    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    detail = _fitted(image, DETAIL)
    luma = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    step = luma[:, 1:] - luma[:, :-1]
    return ImageHash(
        _packed(step > 0),
        _packed(np.abs(step) >= SURE_LEVELS),
        np.asarray(detail.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)),
        np.asarray(detail.convert("L")),
        np.asarray(_fitted(detail, COLOUR)),
    )


class DuplicateIndex:
    """The images seen so far, by hash. Comparing with 100,000 of them is one vector operation, 0.2 ms; the details lie
    in a temporary file, up to 300 kB an image."""

    def __init__(self, bits: int) -> None:
        """`bits` is the hash distance up to which two images are compared closely (recipe.data.duplicate_bits)."""
        self._most = bits
        self._origins: list[str] = []
        self._by_key: dict[str, str] = {}
        self._bits = np.zeros((1024, 2), np.uint64)
        self._thumbnails = np.zeros((1024, THUMBNAIL, THUMBNAIL, 3), np.uint8)
        self._file = tempfile.TemporaryFile(prefix="layerloop-details-")  # noqa: SIM115 - closed with the index
        self._places: list[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = []

    def find_duplicate(self, key: str, image_hash: ImageHash, *, near: bool = True) -> str | None:
        """Origin of the image with equal pixels or, with `near`, of the nearest near-exact duplicate; None without."""
        if key in self._by_key or not near:
            return self._by_key.get(key)
        count = len(self._origins)
        both = self._bits[:count, 1] & np.uint64(image_hash.sure)
        distances = np.bitwise_count((self._bits[:count, 0] ^ np.uint64(image_hash.bits)) & both)
        alike = np.flatnonzero(distances <= self._most)
        if not len(alike):
            return None
        difference = np.abs(self._thumbnails[alike].astype(np.int16) - image_hash.thumbnail).reshape(len(alike), -1)
        means = difference.mean(axis=1)
        close = (means <= MEAN_LEVELS) & (difference.max(axis=1) <= MOST_LEVELS)
        nearest = alike[close][np.argsort(means[close], kind="stable")[:NEAREST]]
        for index in nearest:
            if same_image(image_hash, *self._details(int(index))):
                return self._origins[index]
        return None

    def add(self, key: str, image_hash: ImageHash, origin: str) -> None:
        """Remember an image by its key and hash; `origin` is what `find_duplicate` returns for it."""
        count = len(self._origins)
        if count == len(self._bits):
            self._bits = np.concatenate([self._bits, np.zeros_like(self._bits)])
            self._thumbnails = np.concatenate([self._thumbnails, np.zeros_like(self._thumbnails)])
        self._bits[count] = image_hash.bits, image_hash.sure
        self._thumbnails[count] = image_hash.thumbnail
        packed = zlib.compress(image_hash.detail.tobytes() + image_hash.colour.tobytes(), 1)
        self._places.append((self._file.seek(0, 2), len(packed), image_hash.detail.shape, image_hash.colour.shape))
        self._file.write(packed)
        self._origins.append(origin)
        self._by_key[key] = origin

    def _details(self, index: int) -> tuple[Grey, npt.NDArray[np.uint8]]:
        offset, size, detail, colour = self._places[index]
        self._file.seek(offset)
        data = np.frombuffer(zlib.decompress(self._file.read(size)), np.uint8)
        pixels = detail[0] * detail[1]
        return data[:pixels].reshape(detail), data[pixels:].reshape(colour)


# ------------------------------------------------------------------------------------------------------------- details

BLOCK = 8  # pixels a side of the places that are compared, half overlapping
NOISE_LEVELS = 7.0  # of 255, root mean square in a place: what compression adds to any place
NOISE_SHARE = 0.30  # of the place's own contrast: what resampling takes from it
HOPELESS = 3.0  # times what is allowed; a shift that was taken out leaves no such difference
MOST_COLOUR = 60.0  # of 255, between two pixels at COLOUR


def same_image(image_hash: ImageHash, detail: Grey, colour: npt.NDArray[np.uint8]) -> bool:
    """Whether two images show the same in every place."""
    return worst_place(image_hash.detail, detail) <= 1 and _colours_agree(image_hash.colour, colour)


def worst_place(first: Grey, second: Grey) -> float:
    """The largest difference of two luma images in a place, in what compression and resampling may do there; over 1
    they are different images. Infinite where their shapes differ."""
    if max(first.shape) > max(second.shape):
        first, second = second, first
    height, width = first.shape
    if abs(second.shape[1] * height / (second.shape[0] * width) - 1) > 0.01 + 1.5 / min(height, width):
        return float("inf")
    one, two = _smooth(first, (width, height)), _smooth(second, (width, height))
    worst = _places(one, two)
    if worst <= 1:
        return worst
    coarse_one, coarse_two = _halved(one), _halved(two)
    move = _move(coarse_one, coarse_two)
    if move is not None:  # twice at half the size, where a pixel is half a pixel, then once at the whole size
        again = _move(coarse_one, _moved(coarse_two, coarse_one, move))
        move = (move if again is None else move + again) * (2 if coarse_one is not one else 1)
        moved = _moved(two, one, move)
        worst = min(worst, _places(one, moved))
        if 1 < worst < HOPELESS and (last := _move(one, moved)) is not None:
            worst = min(worst, _places(one, _moved(two, one, move + last)))
    return worst


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


def _fitted(image: Image.Image, longest: int) -> Image.Image:
    from PIL import Image

    scale = longest / max(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _packed(bits: npt.NDArray[np.bool_]) -> int:
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
