"""Photoshop documents of RGBA layers, written as they are read: one channel of one layer in memory at a time.

The format is Adobe's "Photoshop File Formats Specification" (adobe.com/devnet-apps/photoshop/fileformatashtml). What is
chosen within it, so that other programs open the file as Photoshop does:

- a layer is its bounding box with alpha as a channel of its own (id -1), not as a mask; rows are packed by PackBits,
  the one compression that every reader has;
- the layer count is negative: the fourth channel of the merged image is its transparency. Positive, it is a saved
  selection, which programs list as a stray channel;
- the merged image is laid on white, as Photoshop writes it, and readers take the white off again;
- a name is in Unicode (`luni`) and, for readers without that, in MacRoman;
- the colours are sRGB's unless another profile is given, and say so.
"""

from __future__ import annotations

import functools
import os
import struct
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from layerloop.components.layers.stack import Pixels, check_stack, composite, on_backdrop
from layerloop.components.schema.errors import LayerloopError

LONGEST_NAME = 255  # UTF-16 units of a layer's name
LONGEST_SIDE = {False: 30_000, True: 300_000}  # pixels; of a .psd, and of a .psb (large)
LARGEST_PSD = 2**31 - 1  # bytes
CHANNELS = {-1: 3, 0: 0, 1: 1, 2: 2}  # id in the file -> index in RGBA; alpha comes first, as in Photoshop's files
TOGETHER = 2**15  # pixels that are composited together: they take 100 bytes each meanwhile
_NOT_DIVIDER, _OPEN_FOLDER, _END_OF_FOLDER = 0, 1, 3


def layer_names(count: int) -> list[str]:
    """`Background`, `Layer 1`, ... bottom first."""
    return ["Background", *(f"Layer {index}" for index in range(1, count))][:count]


def save_psd(
    path: Path,
    stack: Pixels,
    names: Sequence[str] | None = None,
    *,
    groups: Sequence[str | None] | None = None,
    resolution: float = 72.0,
    profile: bytes | None = None,
) -> None:
    """Write a stack `(L, H, W, 4)` as a Photoshop document, large document format where the suffix is `.psb`.

    The file appears under its name when it is complete. On top of the stack and the file's buffers this takes about
    1.5 layers of memory.

    Args:
        path: Of the file, which is replaced where it exists.
        stack: Bottom layer first. Colour under alpha 0 is not kept.
        names: One a layer, bottom first. A name is cut to 255 UTF-16 units, the last of them `…`; control characters
            become spaces; an empty name becomes that of `layer_names`.
        groups: One a layer, None for no group: neighbours with the same group lie in one folder of that name.
        resolution: Pixels per inch.
        profile: ICC profile of the colours; sRGB's where none is given.

    Raises:
        LayerloopError: a number of names or groups other than of layers; sides or bytes beyond the format; a file that
            cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        try:
            with partial.open("w+b") as file:
                large = path.suffix.lower() == ".psb"
                write_document(file, stack, names, groups=groups, resolution=resolution, profile=profile, large=large)
            os.replace(partial, path)
        except OSError as error:
            raise LayerloopError(f"{path} cannot be written: {error.strerror or error}: name another place") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def write_document(
    file: BinaryIO,
    stack: Pixels,
    names: Sequence[str] | None = None,
    *,
    groups: Sequence[str | None] | None = None,
    resolution: float = 72.0,
    profile: bytes | None = None,
    large: bool = False,
) -> None:
    """As `save_psd`, into a file that can seek; `large` for the large document format."""
    check_stack(stack)
    if stack.ndim != 4:
        raise LayerloopError(f"stack is uint8{list(stack.shape)}: a document holds one decomposition, (L, H, W, 4)")
    height, width = stack.shape[1:3]
    if max(height, width) > LONGEST_SIDE[large]:
        remedy = "give the file the suffix .psb" if max(height, width) <= LONGEST_SIDE[True] else "make it smaller"
        raise LayerloopError(
            f"the image is {width} x {height}, a Photoshop document has at most {LONGEST_SIDE[large]:,} pixels a side: "
            f"{remedy}"
        )
    entries = _entries(names, groups, len(stack))
    file.write(struct.pack(">4sH6xHIIHH", b"8BPS", 2 if large else 1, 4, height, width, 8, 3))  # RGB with alpha
    file.write(struct.pack(">I", 0))  # no palette
    with _length(file, ">I"):
        file.write(_resources(resolution, profile if profile is not None else _srgb_profile()))
    long = ">Q" if large else ">I"
    with _length(file, long):
        with _length(file, long, multiple=4):
            _write_layers(file, stack, entries, large=large)
        file.write(struct.pack(">I", 0))  # no global mask
    _write_merged(file, stack, large=large)
    if not large and file.tell() > LARGEST_PSD:
        raise LayerloopError(
            f"the document has {file.tell():,} bytes, a .psd at most {LARGEST_PSD:,}: give the file the suffix .psb"
        )


# --------------------------------------------------------------------------------------------------------------- names


@dataclass(frozen=True)
class _Entry:
    """A record of the file: a layer of the stack, or an end of a folder."""

    name: str
    layer: int | None = None
    divider: int = _NOT_DIVIDER


def _entries(names: Sequence[str] | None, groups: Sequence[str | None] | None, count: int) -> list[_Entry]:
    """The records, bottom first: a folder is what lies between its end, below, and the record that names it, above."""
    defaults = layer_names(count)
    names = defaults if names is None else names
    groups = [None] * count if groups is None else groups
    for what, given in (("names", names), ("groups", groups)):
        if len(given) != count:
            raise LayerloopError(f"{len(given)} {what} were given for {count} layers: give one each, bottom first")
    entries: list[_Entry] = []
    for index, (name, group) in enumerate(zip(names, groups, strict=True)):
        if group is not None and (index == 0 or groups[index - 1] != group):
            entries.append(_Entry("</Layer group>", divider=_END_OF_FOLDER))
        entries.append(_Entry(name_as_kept(name) or defaults[index], index))
        if group is not None and (index == count - 1 or groups[index + 1] != group):
            entries.append(_Entry(name_as_kept(group) or "Group", divider=_OPEN_FOLDER))
    return entries


def name_as_kept(name: str) -> str:
    """A name as the document holds it: without control characters or blanks around it, and, where it has more than
    `LONGEST_NAME` UTF-16 units, cut between two characters with an ellipsis at its end."""
    clean = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in name).strip()
    clean = clean.encode("utf-16-be", "replace").decode("utf-16-be")  # a lone surrogate becomes a question mark
    if _units(clean) <= LONGEST_NAME:
        return clean
    cuts = [cut for cut in range(1, LONGEST_NAME) if _units(clean[:cut]) < LONGEST_NAME and _ends_at(clean, cut)]
    return clean[: max(cuts, default=0)].rstrip() + "…"


def _ends_at(text: str, cut: int) -> bool:
    """Whether a character as people see it ends there: no mark belongs to it and no joiner binds it to the next."""
    joiner = "\u200d"
    return unicodedata.category(text[cut])[0] != "M" and joiner not in text[cut - 1 : cut + 1]


def _units(text: str) -> int:
    return len(text.encode("utf-16-be")) // 2


# ------------------------------------------------------------------------------------------------------------ sections


@contextmanager
def _length(file: BinaryIO, form: str, *, multiple: int = 1) -> Iterator[None]:
    """A section after its length, which is written last; padded to a multiple of bytes.

    Raises:
        LayerloopError: a length beyond the field.
    """
    file.write(struct.pack(form, 0))
    start = file.tell()
    yield
    file.write(bytes(-(file.tell() - start) % multiple))
    end = file.tell()
    if form == ">I" and end - start > LARGEST_PSD:
        raise LayerloopError(
            f"the document has more than {end:,} bytes, a .psd at most {LARGEST_PSD:,}: give the file the suffix .psb"
        )
    file.seek(start - struct.calcsize(form))
    file.write(struct.pack(form, end - start))
    file.seek(end)


def _resources(resolution: float, profile: bytes) -> bytes:
    """Resolution (1005), ICC profile (1039), and that there is a merged image (1057)."""
    if not 0 < resolution < 2**15:
        raise LayerloopError(f"resolution is {resolution:g} pixels per inch: give one between 1 and 32,767")
    fixed = round(resolution * 65536)
    writer = b"".join(struct.pack(">I", len(text)) + text.encode("utf-16-be") for text in ("layerloop", "layerloop"))
    blocks = {
        1005: struct.pack(">IHHIHH", fixed, 1, 1, fixed, 1, 1),  # pixels per inch, shown in inches
        1039: profile,
        1057: struct.pack(">IB", 1, 1) + writer + struct.pack(">I", 1),
    }
    out = b""
    for identity, data in blocks.items():
        out += struct.pack(">4sHHI", b"8BIM", identity, 0, len(data)) + data + bytes(len(data) % 2)
    return out


@functools.cache
def _srgb_profile() -> bytes:
    from PIL import ImageCms

    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)  # made now, it says; equal stacks give equal bytes
    return bytes(profile)


def _write_layers(file: BinaryIO, stack: Pixels, entries: Sequence[_Entry], *, large: bool) -> None:
    """The layer info section: all records, then the channels of each, whose lengths go into the records last."""
    file.write(struct.pack(">h", -len(entries)))
    long = ">Q" if large else ">I"
    boxes = [(0, 0, 0, 0) if entry.layer is None else _bounds(stack[entry.layer]) for entry in entries]
    lengths_at = []
    for entry, (left, top, right, bottom) in zip(entries, boxes, strict=True):
        file.write(struct.pack(">iiiiH", top, left, bottom, right, len(CHANNELS)))
        lengths_at.append(file.tell())
        for channel in CHANNELS:
            file.write(struct.pack(">h", channel) + struct.pack(long, 0))
        blend = b"norm" if entry.divider != _OPEN_FOLDER else b"pass"
        file.write(struct.pack(">4s4sBBBB", b"8BIM", blend, 255, 0, 8, 0))  # opaque, unclipped, visible
        with _length(file, ">I"):
            file.write(struct.pack(">II", 0, 0))  # no mask, no blending ranges
            file.write(_name_blocks(entry))
    for entry, box, at in zip(entries, boxes, lengths_at, strict=True):
        lengths = []
        for index in CHANNELS.values():
            start = file.tell()
            file.write(b"\0\0" if entry.layer is None else _channel(stack[entry.layer], box, index, large=large))
            lengths.append(file.tell() - start)
        end = file.tell()
        file.seek(at)
        for channel, length in zip(CHANNELS, lengths, strict=True):
            file.write(struct.pack(">h", channel) + struct.pack(long, length))
        file.seek(end)


def _name_blocks(entry: _Entry) -> bytes:
    """The name in MacRoman as a Pascal string and in UTF-16, and what a folder's end needs."""
    legacy = entry.name.encode("mac_roman", "replace")[:255]
    legacy = bytes([len(legacy)]) + legacy
    legacy += bytes(-len(legacy) % 4)
    text = struct.pack(">I", _units(entry.name)) + entry.name.encode("utf-16-be")
    text += bytes(-len(text) % 4)
    blocks = legacy + struct.pack(">4s4sI", b"8BIM", b"luni", len(text)) + text
    if entry.divider:
        blend = b"8BIMpass" if entry.divider == _OPEN_FOLDER else b""
        blocks += struct.pack(">4s4sII", b"8BIM", b"lsct", 4 + len(blend), entry.divider) + blend
    return blocks


def _channel(layer: Pixels, box: tuple[int, int, int, int], index: int, *, large: bool) -> bytes:
    """One channel of a layer inside its box, packed; colour under alpha 0 is 0."""
    left, top, right, bottom = box
    part = layer[top:bottom, left:right]
    plane = np.ascontiguousarray(part[..., index])
    if index < 3:
        plane[part[..., 3] == 0] = 0
    return struct.pack(">H", 1) + b"".join(_packed(plane, large=large))


def _write_merged(file: BinaryIO, stack: Pixels, *, large: bool) -> None:
    """The merged image: RGB laid on white, then alpha; the lengths of all rows come before the rows."""
    height, width = stack.shape[1:3]
    merged = np.empty((4, height, width), np.uint8)
    rows = max(1, TOGETHER // width)
    for top in range(0, height, rows):
        seen = composite(stack[:, top : top + rows])
        merged[:3, top : top + rows] = np.moveaxis(on_backdrop(seen, "white"), -1, 0)
        merged[3, top : top + rows] = seen[..., 3]
    file.write(struct.pack(">H", 1))
    at = file.tell()
    file.write(bytes(4 * height * (4 if large else 2)))
    counts = b""
    for plane in merged:
        lengths, rows = _packed(plane, large=large)
        counts += lengths
        file.write(rows)
    end = file.tell()
    file.seek(at)
    file.write(counts)
    file.seek(end)


def _packed(plane: Pixels, *, large: bool) -> tuple[bytes, bytes]:
    """A plane `(h, w)` in PackBits: the bytes of each row, and the rows."""
    from psd_tools.compression import encode_rle

    height, width = plane.shape
    packed = encode_rle(plane.tobytes(), width, height, 8, 2 if large else 1)
    first = height * (4 if large else 2)
    return packed[:first], packed[first:]


def _bounds(layer: Pixels) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the pixels that are not transparent; one pixel for a blank layer, since programs
    disagree about an empty box."""
    rows, columns = np.flatnonzero(layer[..., 3].any(axis=1)), np.flatnonzero(layer[..., 3].any(axis=0))
    if not len(rows):
        return 0, 0, 1, 1
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
