"""The pictures to decompose: found, read, and brought to upright 8-bit sRGB at their own size."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from layerloop.components.layers.normalise import on_white, orientation, target_size, upright_srgb
from layerloop.components.runtime.progress import log
from layerloop.components.schema.decomposition import MOST_MEGAPIXELS
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.messages import counted, printable
from layerloop.components.schema.recipe import DataRecipe
from layerloop.components.storage.images import decode_image, open_image
from layerloop.components.storage.stores import open_store, read_uri

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.uint8]
# Of files that are taken from a folder; a file that is named is taken whatever its suffix.
SUFFIXES = frozenset(
    [
        "png",
        "jpg",
        "jpeg",
        "jfif",
        "webp",
        "avif",
        "heic",
        "heif",
        "gif",
        "bmp",
        "tif",
        "tiff",
        "jp2",
        "j2k",
        "ppm",
        "pgm",
    ]
)
MOST_BYTES = 1 << 30  # of one encoded picture
RECORD = "layers.json"  # in a folder of results, written last
_ORIENTATION = 274  # tag of TIFF
SIDEWAYS = range(5, 9)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class Picture:
    """A picture that can be read: where it is, its bytes' sha256, and its size as it stands upright."""

    origin: str
    sha256: str
    width: int
    height: int
    note: str = ""  # what is said about it, such as that it is animated

    @property
    def stem(self) -> str:
        """Its name without folder and suffix, fit for a folder's name anywhere."""
        name = self.origin.rstrip("/").rpartition("/")[2]
        stem = name.rpartition(".")[0] or name
        kept = "".join(c if c.isalnum() or c in "-_.() " else "_" for c in stem).strip(" .")
        return kept[:80].rstrip(" .") or "picture"

    def read(self) -> Pixels:
        """`(H, W, 3)`, or `(H, W, 4)` where any pixel is transparent: uint8 sRGB, upright.

        Raises:
            LayerloopError: it cannot be read any more, or its pixels are damaged.
        """
        data = _read(self.origin)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise LayerloopError("file has changed since it was listed: run the command again")
        pixels = np.asarray(upright_srgb(decode_image(data, max_pixels=int(MOST_MEGAPIXELS * 1e6))))
        if pixels.shape[-1] == 4 and pixels[..., 3].min() == 255:
            pixels = pixels[..., :3]
        return np.ascontiguousarray(pixels)


def find_pictures(given: Iterable[str | Path]) -> list[str]:
    """Paths and URIs of the pictures, each once: files as they are, folders and `s3://` prefixes with all their images,
    sorted, without hidden ones and results of our own. One that is not there fails when it is looked at.

    Raises:
        LayerloopError: none is given.
    """
    found: dict[str, None] = {}
    for item in map(str, given):
        if "://" in item and suffix(item) in SUFFIXES:
            found[item] = None
        elif "://" in item or os.path.isdir(item):
            found |= dict.fromkeys(f"{item.rstrip('/')}/{name}" for name in _images_in(item)) or {item: None}
        else:
            found[item] = None
    if not found:
        raise LayerloopError("no pictures are given: name files or folders")
    return list(found)


def look_at(origin: str) -> Picture:
    """A picture by its header; no pixel is decoded.

    Raises:
        LayerloopError: it cannot be read, is not an image, or has too many pixels or bytes.
    """
    data = _read(origin)
    try:
        image = open_image(data, max_pixels=int(MOST_MEGAPIXELS * 1e6))
    except LayerloopError as error:  # no recipe is in play
        raise LayerloopError(str(error).replace(" or raise recipe.data.max_megapixels", "")) from None
    width, height = image.size
    if orientation(image) in SIDEWAYS and not _is_turned(image):
        width, height = height, width
    frames = _frames(image)
    note = f"has {frames} frames, of which the first is taken" if frames > 1 else ""
    return Picture(origin, hashlib.sha256(data).hexdigest(), width, height, note)


def _frames(image: Image.Image) -> int:
    """Frames or pages of an opened image, those that are views of one scene as one."""
    try:
        return int(getattr(image, "n_frames", 1)) if image.format != "MPO" else 1
    except Exception:  # of pages behind the first Pillow raises nearly anything, as they are no part of it
        return 1


def _is_turned(image: Image.Image) -> bool:
    """Whether an opened image's size is upright already, as that of a TIFF by its tag."""
    return getattr(image, "tag_v2", {}).get(_ORIENTATION) in SIDEWAYS


def working_size(picture: Picture, data: DataRecipe) -> tuple[int, int]:
    """(width, height) that the model works at; a very narrow picture is stretched to one multiple."""
    return target_size(picture.width, picture.height, data, stretch=True)


def condition(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """`(h, w, 3)` uint8: the picture on white at `size` = (w, h), by Lanczos, as all training images are resized."""
    from PIL import Image

    image = on_white(Image.fromarray(pixels))
    return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.LANCZOS))


def suffix(name: str) -> str:
    """The suffix in lower case, without its dot."""
    return name.rpartition("/")[2].rpartition(".")[2].lower()


def _images_in(folder: str) -> list[str]:
    names = open_store(folder).sizes() if "://" in folder else _local_names(folder)
    ours = {name.rpartition("/")[0] for name in names if name.rpartition("/")[2] == RECORD}
    shown = [name for name in names if not _hidden(name) and name.rpartition("/")[0] not in ours]
    if over := Counter(_suffix_text(name) for name in shown if suffix(name) not in SUFFIXES):
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(over.items(), key=lambda one: (-one[1], one[0])))
        count = counted(sum(over.values()), "files")
        log(f"passed over {count} of {printable(folder)}, no pictures by suffix ({kinds}): name one to have it taken")
    return [name for name in shown if suffix(name) in SUFFIXES]


def _suffix_text(name: str) -> str:
    base = name.rpartition("/")[2]
    return f".{printable(suffix(base))}" if "." in base else "without suffix"


def _local_names(folder: str) -> list[str]:
    """All files below a folder, links that lead nowhere among them, sorted; folders that cannot be read are said."""
    names: list[str] = []

    def unreadable(error: OSError) -> None:
        log(f"passed over {error.filename}: folder cannot be read ({error.strerror}): allow it")

    for directory, _, files in os.walk(folder, onerror=unreadable):
        inside = os.path.relpath(directory, folder)
        names += files if inside == "." else [f"{inside}/{name}" for name in files]
    return sorted(names)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _read(origin: str) -> bytes:
    if "://" in origin:
        data = read_uri(origin)
    else:
        try:
            if not os.path.lexists(origin):
                raise LayerloopError("it does not exist: correct the path")
            if os.path.isdir(origin):
                raise LayerloopError("the folder has no image: give pictures, or a folder of them")
            if os.path.islink(origin) and not os.path.exists(origin):
                raise LayerloopError("the link leads nowhere: mend or delete it")
            if not os.path.isfile(origin):  # a pipe or a device would be read without end
                raise LayerloopError("not a regular file: give an image file")
            if (size := os.path.getsize(origin)) > MOST_BYTES:
                raise LayerloopError(f"file has {size / 1e6:.0f} MB, over the {MOST_BYTES / 1e6:.0f} allowed")
            data = Path(origin).read_bytes()
        except OSError as error:
            raise LayerloopError(f"file cannot be read ({error.strerror}): allow it, or restore it") from None
    return data
