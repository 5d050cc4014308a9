"""Near-exact duplicates: the same image recompressed, rescaled or shifted by a pixel, and not merely a similar one.

Three stages, each dearer and surer than the one before. A difference hash and a thumbnail find candidates among all
images; where a family of images is alike in both (forms of one template), the places in which its members differ rank
them (`families.py`); the nearest few are compared in detail (`details.py`).
"""

from __future__ import annotations

import tempfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from layerloop.components.shard_dataset.details import Details, same_image, same_shape
from layerloop.components.shard_dataset.families import Cells, Family, cells_in

if TYPE_CHECKING:
    from PIL import Image

THUMBNAIL = 16  # pixels a side; 800 bytes per image are all that is kept in memory
MEAN_LEVELS = 4.0  # of 255, between thumbnails
MOST_LEVELS = 24.0  # of 255, between two pixels of thumbnails; a letter is judged by the details
FAMILY_SHARE = 0.25  # of both, within which an image joins the family of another
SURE_LEVELS = 4  # of 255: a smaller step between neighbours is noise, and its bit of the hash says nothing

DETAIL = 640  # pixels of the longest side at which letters are compared
COLOUR = 64  # pixels of the longest side at which colours are compared
NEAREST = 8  # candidates that are compared in detail
TOLD_APART = 4  # of those that a family's cells have ranked, which leaves little to chance
AT_ONCE = 2048  # thumbnails that are compared at once

Floats = npt.NDArray[np.float32]
Indexes = npt.NDArray[np.intp]
Scalar = TypeVar("Scalar", bound=np.generic)
Thumbnails = npt.NDArray[np.uint8]  # (..., 16, 16, 3)


@dataclass(frozen=True)
class ImageHash:
    """A perceptual hash of an image, the thumbnail that confirms it, and the details that decide."""

    bits: int  # 64-bit difference hash
    sure: int  # which of its bits come of a step that is no noise
    thumbnail: Thumbnails
    details: Details  # the longest sides at most DETAIL and COLOUR


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
        Details(np.asarray(detail.convert("L")), np.asarray(_fitted(detail, COLOUR))),
    )


@dataclass(frozen=True)
class _Alike:
    """Images whose hash and thumbnail are those of another one, ascending, and how far their thumbnails are from it:
    the mean, an upper bound where a family has many."""

    indexes: Indexes
    means: Floats


class DuplicateIndex:
    """The images seen so far, by hash. Comparing with 100,000 of them takes about a millisecond, of one family a few;
    the details lie in a temporary file, up to 300 kB an image."""

    def __init__(self, bits: int) -> None:
        """`bits` is the hash distance up to which two images are compared closely (recipe.data.duplicate_bits)."""
        self._most = bits
        self._origins: list[str] = []
        self._by_key: dict[str, str] = {}
        self._bits: npt.NDArray[np.uint64] = np.zeros((1024, 2), np.uint64)
        self._thumbnails: Thumbnails = np.zeros((1024, THUMBNAIL, THUMBNAIL, 3), np.uint8)
        self._first: Indexes = np.zeros(1024, np.intp)  # the first image of each one's family
        self._apart: Floats = np.zeros((1024, 2), np.float32)  # mean and largest difference from its thumbnail
        self._families: dict[int, Family] = {}  # those of two or more, by their first image
        self._file = tempfile.TemporaryFile(prefix="layerloop-details-")  # noqa: SIM115 - closed with the index
        self._places: list[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = []
        self._cells: dict[int, tuple[int, int]] = {}  # where the file has an image's cells in its family's frame
        self._asked: tuple[ImageHash, _Alike] | None = None  # the last question, which `add` follows as a rule

    def find_duplicate(self, key: str, image_hash: ImageHash, *, near: bool = True) -> str | None:
        """Origin of the image with equal pixels or, with `near`, of the nearest near-exact duplicate; None without."""
        if key in self._by_key or not near:
            return self._by_key.get(key)
        alike = self._alike(image_hash)
        self._asked = image_hash, alike
        for index in self._nearest(image_hash, alike):
            if same_image(image_hash.details, self._details(int(index))):
                return self._origins[index]
        return None

    def add(self, key: str, image_hash: ImageHash, origin: str) -> None:
        """Remember an image by its key and hash; `origin` is what `find_duplicate` returns for it."""
        alike = self._asked[1] if self._asked and self._asked[0] is image_hash else self._alike(image_hash)
        self._asked = None
        count = len(self._origins)
        if count == len(self._bits):
            self._bits, self._thumbnails = _doubled(self._bits), _doubled(self._thumbnails)
            self._first, self._apart = _doubled(self._first), _doubled(self._apart)
        self._bits[count] = image_hash.bits, image_hash.sure
        self._thumbnails[count] = image_hash.thumbnail
        details = image_hash.details
        self._places.append(
            (*self._stored(details.luma.tobytes() + details.colour.tobytes()), details.luma.shape, details.colour.shape)
        )
        self._origins.append(origin)
        self._by_key[key] = origin
        self._first[count] = count
        self._join_family(count, alike)

    # --------------------------------------------------------------------------------------------------------- finding

    def _alike(self, image_hash: ImageHash) -> _Alike:
        """What hash and thumbnail find. A family that is near enough as a whole is not looked at one by one: the
        distances of thumbnails obey the triangle inequality."""
        count = len(self._origins)
        both = self._bits[:count, 1] & np.uint64(image_hash.sure)
        distances = np.bitwise_count((self._bits[:count, 0] ^ np.uint64(image_hash.bits)) & both)
        found = np.flatnonzero(distances <= self._most)
        firsts = np.flatnonzero(np.bincount(self._first[found])) if len(found) > AT_ONCE else found
        if len(firsts) > len(found) // 2:
            apart = self._apart_from(found, image_hash.thumbnail)
        else:
            to_first = np.zeros((count, 2), np.float32)
            to_first[firsts] = self._apart_from(firsts, image_hash.thumbnail)
            to_first, own = to_first[self._first[found]], self._apart[found]
            apart = to_first + own
            unsure = ~_close(apart) & _close(np.abs(to_first - own))
            apart[unsure] = self._apart_from(found[unsure], image_hash.thumbnail)
        close = _close(apart)
        return _Alike(found[close], apart[close, 0])

    def _apart_from(self, indexes: Indexes, thumbnail: Thumbnails) -> Floats:
        """(mean, largest) difference of thumbnails, in levels: `(N, 2)`."""
        out = np.zeros((len(indexes), 2), np.float32)
        for start in range(0, len(indexes), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            difference = np.abs(self._thumbnails[indexes[part]].astype(np.int16) - thumbnail)
            difference = difference.reshape(len(difference), -1)
            out[part, 0], out[part, 1] = difference.mean(axis=1), difference.max(axis=1)
        return out

    def _nearest(self, image_hash: ImageHash, alike: _Alike) -> list[int]:
        """Those to compare in detail, the likeliest first."""
        nearest = alike.indexes[np.argsort(alike.means, kind="stable")[:NEAREST]]
        if len(alike.indexes) <= NEAREST:
            return [int(index) for index in nearest]
        ranked: list[tuple[int, float, int]] = []  # distances of two families do not compare, ranks do
        firsts = self._first[alike.indexes]
        for first in np.flatnonzero(np.bincount(firsts)):
            if (family := self._families.get(int(first))) is None:
                continue
            cells = cells_in(self._details(int(first)).luma, image_hash.details.luma)
            if cells is not None:
                members = alike.indexes[firsts == first]
                found = family.nearest(cells, members, self._cells_of, most=TOLD_APART)
                ranked += [(rank, distance, number) for rank, (distance, number) in enumerate(found)]
        alone = [int(index) for index in nearest if int(self._first[index]) not in self._families]
        return [index for _, _, index in sorted(ranked)[:NEAREST]] + alone or [int(index) for index in nearest]

    # -------------------------------------------------------------------------------------------------------- families

    def _join_family(self, index: int, alike: _Alike) -> None:
        """Put a new image into the family of the nearest first image that is much like it, if there is one."""
        shape = self._places[index][2]
        firsts = np.flatnonzero(np.bincount(self._first[alike.indexes]))
        firsts = firsts[[same_shape(self._places[first][2], shape) for first in firsts]] if len(firsts) else firsts
        if not len(firsts):
            return
        apart = self._apart_from(firsts, self._thumbnails[index])
        nearest = int(np.argmin(apart[:, 0]))
        if not _close(apart[nearest : nearest + 1] / FAMILY_SHARE)[0]:
            return
        first = int(firsts[nearest])
        self._first[index], self._apart[index] = first, apart[nearest]
        self._families.setdefault(first, Family(first)).add(index)

    def _cells_of(self, index: int) -> Cells:
        """An image's cells in the frame of its family, worked out once."""
        if index not in self._cells:
            first, own = self._details(int(self._first[index])).luma, self._details(index).luma
            if (cells := cells_in(first, own)) is None:
                raise AssertionError("a family has one shape")
            self._cells[index] = self._stored(cells.tobytes())
        return np.frombuffer(self._loaded(*self._cells[index]), np.uint8)

    def _details(self, index: int) -> Details:
        offset, size, luma, colour = self._places[index]
        data = np.frombuffer(self._loaded(offset, size), np.uint8)
        pixels = luma[0] * luma[1]
        return Details(data[:pixels].reshape(luma), data[pixels:].reshape(colour))

    def _stored(self, data: bytes) -> tuple[int, int]:
        """(offset, bytes) in the file."""
        packed = zlib.compress(data, 1)
        offset = self._file.seek(0, 2)
        self._file.write(packed)
        return offset, len(packed)

    def _loaded(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        return zlib.decompress(self._file.read(size))


def _close(apart: Floats) -> npt.NDArray[np.bool_]:
    """Which `(N, 2)` (mean, largest) differences are those of one image."""
    return (apart[:, 0] <= MEAN_LEVELS) & (apart[:, 1] <= MOST_LEVELS)


def _doubled(values: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    return np.concatenate([values, np.zeros_like(values)])


def _fitted(image: Image.Image, longest: int) -> Image.Image:
    from PIL import Image

    scale = longest / max(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _packed(bits: npt.NDArray[np.bool_]) -> int:
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
