"""The images of a WebDataset tar, by its headers: members that are an image of their sample, and what is wrong."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from layerloop.components.schema.messages import printable
from layerloop.components.shard_dataset.files import Passed, suffix_of
from layerloop.components.shard_dataset.items import (
    IMAGE_SUFFIXES,
    Item,
    broken_item,
    hidden,
    one_line,
    passed_over,
    sized_item,
)
from layerloop.components.storage.foreign import HEAD, foreign_kind

_EXTENSIONS = (  # types of headers that are not of a member
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
_LONGEST_EXTENSION = 1_000_000  # bytes
_CHUNK = 1 << 20  # bytes that are looked at, at once

# `<key>.<word>.png` beside other files of the key is what WebDataset keeps about an image, not the image.
_ROLES = re.compile(
    r"(?:mask|matte|alpha|depth|disparity|normals?|seg|segm|segmentation|labels?|annotations?|edges?|canny|pose|flow"
    r"|layer)[-_]?\d*",
    re.IGNORECASE,
)


def tar_items(file: BinaryIO, where: str, passed: list[Passed], *, max_bytes: int) -> Iterator[Item]:
    """The image of every sample of a WebDataset tar.

    WebDataset cuts a name at its first dot. `<key>.png` is the image of its sample, and `<key>.mask.png` beside it is
    not; where a key has no `<key>.<image suffix>`, its dot belongs to a name, `22.05.png` or `photo.v2.png`.

    Args:
        where: the tar's printable name, for origins.
        passed: what is not read is added to it.
        max_bytes: an image of more is a problem, and is not read.
    """
    members, problem = _members(file)
    keys = {member.key for member in members if member.extension in IMAGE_SUFFIXES}
    for member in members:
        origin = f"{where}:{printable(member.name)}"
        reason = _no_image(member, keys)
        if reason is not None:
            if member.key not in keys or suffix_of(member.name) in IMAGE_SUFFIXES:
                passed.append(Passed(origin, reason[0], reason[1]))
            continue
        data = b""
        if member.size < 0:  # which would be read to the tar's end
            yield broken_item(origin, f"member has a size of {member.size} bytes: make the tar again")
            continue
        if member.size <= max_bytes:
            try:
                file.seek(member.offset)
                data = file.read(member.size)
            except (OSError, ValueError, OverflowError, MemoryError) as error:
                yield broken_item(origin, f"member cannot be read ({one_line(error)}): make the tar again")
                continue
        yield sized_item(origin, member.size, max_bytes, lambda data=data: data)  # type: ignore[misc]
    if problem is not None:
        yield broken_item(where, problem)


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int
    size: int
    plain: bool  # whether its data are stored at `offset` as they are

    @property
    def key(self) -> str:
        """WebDataset's key: the name up to the first dot of its last part."""
        folder, slash, base = self.name.rpartition("/")
        return f"{folder}{slash}{base.partition('.')[0]}"

    @property
    def extension(self) -> str:
        """WebDataset's extension: the rest."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()


class _Bounded(tarfile.TarInfo):
    """A header. Those that extend others, by a long name or PAX's fields, are read into memory, whatever they say."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENSIONS and self.size > _LONGEST_EXTENSION:
            raise tarfile.HeaderError(f"an extended header has {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def _members(file: BinaryIO) -> tuple[list[_Member], str | None]:
    """The members of a tar as far as its headers can be read, and what is wrong with it."""
    members: list[_Member] = []
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Bounded) as tar:
            for info in tar:
                plain = info.isreg() and not info.issparse()
                if not info.isdir():
                    members.append(_Member(info.name, info.offset_data, info.size, plain))
            end = tar.offset
        file.seek(end)
        complete = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        if complete and _goes_on(file):
            return (
                members,
                "tar goes on behind its end, as tars that were put together with cat do: give each by itself",
            )
    except Exception as error:  # hostile headers raise nearly anything
        file.seek(0)
        head = file.read(HEAD)
        if not members and head[257:262] != b"ustar" and (foreign := foreign_kind(head)):
            return members, f"file named .tar is {foreign[0]}: {foreign[1]}"
        return members, f"tar is damaged ({one_line(error)}): make it again"
    return members, None if complete else "tar has no end-of-archive mark, it was cut short: make it again"


def _goes_on(file: BinaryIO) -> bool:
    """Whether anything but zeros follows."""
    while chunk := file.read(_CHUNK):
        if chunk.count(0) != len(chunk):
            return True
    return False


def _no_image(member: _Member, keys: set[str]) -> tuple[str, str] | None:
    """(kind, reason) where a member is not the image of its sample."""
    base = member.name.rpartition("/")[2]
    suffix = suffix_of(base)
    if hidden(member.name) or suffix not in IMAGE_SUFFIXES:
        passed = passed_over(member.name)
        return passed.kind, passed.reason
    if not member.plain:
        return "links in tars", "a link, sparse or special member is not read: store the file itself"
    if member.extension in IMAGE_SUFFIXES:
        return None
    if member.key in keys:
        return "parts of samples", f"belongs to the sample {printable(member.key)}, which has an image of its own"
    word = member.extension.rpartition(".")[0].rpartition(".")[2]
    if _ROLES.fullmatch(word):
        return "parts of samples", f"{word!r} is not an image but about one: name the image <key>.png"
    return None
