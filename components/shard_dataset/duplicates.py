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
        """Origin of the first image with equal pixels or, with `near`, of a near-exact duplicate; None without."""
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
        found = [int(index) for index in nearest if same_image(image_hash, *self._details(int(index)))]
        return self._origins[min(found)] if found else None

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
NOISE_LEVELS = 6.0  # of 255, root mean square in a place: what compression adds to any place
NOISE_SHARE = 0.25  # of the place's own contrast: what resampling takes from it
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
    for _ in range(3):
        if worst <= 0.5:
            break
        moved = _laid_upon(one, two)
        if moved is None:
            break
        two = moved
        worst = min(worst, _places(one, two))
    return worst


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
    return _block_sums(np.square(values)) - np.square(_block_sums(values)) / BLOCK**2


def _block_sums(values: Floats) -> Floats:
    """Sums of BLOCK x BLOCK blocks, one every half block; what is left over at the far edges joins the last ones."""
    half = BLOCK // 2
    rows, columns = (-side % half for side in values.shape)
    padded = np.pad(values.astype(np.float64), ((0, max(rows, 0)), (0, max(columns, 0))), mode="edge")
    small = padded.reshape(padded.shape[0] // half, half, -1, half).sum(axis=(1, 3))
    if min(small.shape) < 2:
        return small * 4
    return small[1:, 1:] + small[:-1, 1:] + small[1:, :-1] + small[:-1, :-1]


def _laid_upon(one: Floats, two: Floats) -> Floats | None:
    """`two` shifted and stretched to lie upon `one`, by least squares over its gradient (Lucas and Kanade 1981)."""
    from PIL import Image

    height, width = one.shape
    down, across = np.gradient(two)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    columns = [across, across * x, down, down * y]
    matrix = np.array([[float(np.vdot(a, b)) for b in columns] for a in columns])
    target = np.array([float(np.vdot(column, one - two)) for column in columns])
    matrix += np.eye(4) * (1e-3 * np.trace(matrix) / 4 + 1e-6)
    move = np.linalg.solve(matrix, target)
    if not np.isfinite(move).all() or np.abs(move).max() > 4:
        return None
    # two(x + move) ~ one(x): Pillow's affine transform takes output to input pixels
    dx, sx, dy, sy = move
    a, e = 1 + 2 * sx / (width - 1 or 1), 1 + 2 * sy / (height - 1 or 1)
    centre_x, centre_y = width / 2, height / 2
    coefficients = (a, 0.0, dx + centre_x * (1 - a), 0.0, e, dy + centre_y * (1 - e))
    moved = np.asarray(
        Image.fromarray(two).transform((width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    )
    covered = np.asarray(
        Image.new("L", (width, height), 255).transform((width, height), Image.Transform.AFFINE, coefficients)
    )
    return np.where(covered == 255, moved, one)  # what came from beyond the edge is not compared


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
    return image.resize(size, Image.Resampling.BOX if scale <= 0.5 else Image.Resampling.LANCZOS)


def _packed(bits: npt.NDArray[np.bool_]) -> int:
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
