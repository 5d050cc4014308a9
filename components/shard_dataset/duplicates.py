"""Near-exact duplicates: the same image recompressed or rescaled, and not merely a similar one.

A difference hash finds candidates; a comparison of small thumbnails confirms them, since a hash of flat or smooth
images says little: all flat images share one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

THUMBNAIL = 16  # pixels a side; 768 bytes per image are all that is kept
MEAN_LEVELS = 3.0  # of 255; 120 photographs, recompressed at JPEG quality 30 or rescaled, moved by 1.7 at most
MOST_LEVELS = 16.0  # of 255; the same photographs: 11 at most; a local edit, such as another word, moves a pixel more


@dataclass(frozen=True)
class ImageHash:
    """A perceptual hash of an image, and the thumbnail that confirms it."""

    bits: int  # 64-bit difference hash
    thumbnail: npt.NDArray[np.uint8]  # (16, 16, 3)


def hash_image(pixels: npt.NDArray[np.uint8]) -> ImageHash:
    """Hash `(H, W, 3)` uint8 pixels: a bit for each of 8x8 neighbours (right brighter than left, luma at 9x8)."""
    from PIL import Image

    image = Image.fromarray(pixels)
    luma = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = int.from_bytes(np.packbits(luma[:, 1:] > luma[:, :-1]).tobytes(), "big")
    return ImageHash(bits, np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)))


class DuplicateIndex:
    """The images seen so far, by hash. Comparing with 100,000 of them is one vector operation, 0.2 ms."""

    def __init__(self, bits: int) -> None:
        """`bits` is the hash distance up to which two images are compared closely (recipe.data.duplicate_bits)."""
        self._most = bits
        self._origins: list[str] = []
        self._by_key: dict[str, str] = {}
        self._bits = np.zeros(1024, np.uint64)
        self._thumbnails = np.zeros((1024, THUMBNAIL, THUMBNAIL, 3), np.uint8)

    def find_duplicate(self, key: str, image_hash: ImageHash, *, near: bool = True) -> str | None:
        """Origin of the first image with equal pixels or, with `near`, of a near-exact duplicate; None without."""
        if key in self._by_key or not near:
            return self._by_key.get(key)
        count = len(self._origins)
        distances = np.bitwise_count(self._bits[:count] ^ np.uint64(image_hash.bits))
        for index in np.flatnonzero(distances <= self._most):
            difference = np.abs(self._thumbnails[index].astype(np.int16) - image_hash.thumbnail)
            if difference.mean() <= MEAN_LEVELS and difference.max() <= MOST_LEVELS:
                return self._origins[index]
        return None

    def add(self, key: str, image_hash: ImageHash, origin: str) -> None:
        """Remember an image by its key and hash; `origin` is what `find_duplicate` returns for it."""
        count = len(self._origins)
        if count == len(self._bits):
            self._bits = np.concatenate([self._bits, np.zeros_like(self._bits)])
            self._thumbnails = np.concatenate([self._thumbnails, np.zeros_like(self._thumbnails)])
        self._bits[count], self._thumbnails[count] = image_hash.bits, image_hash.thumbnail
        self._origins.append(origin)
        self._by_key[key] = origin
