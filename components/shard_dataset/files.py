"""Files of inputs under the names that the file system or the bucket has for them, whatever they are.

The store of a campaign refuses names that might lead out of it; inputs belong to others, and their names are only read.
A local name that is not UTF-8 is a string with surrogates (PEP 383) on its way in, and `printable` on its way out.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.hub import hub_error
from layerloop.components.schema.messages import printable
from layerloop.components.storage.regular_files import open_regular
from layerloop.components.storage.stores import MissingObjectError, open_store

_HUB = re.compile(r"hf://(datasets|models|spaces)/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?")


class InputError(LayerloopError):
    """One input cannot be read, which ends no step; what else a store raises does."""


@dataclass(frozen=True)
class Passed:
    """A file that is not read, and why; no fault of the input."""

    origin: str  # printable
    kind: str  # what it is counted as: its suffix, `without suffix`, or a word for what it is
    reason: str


@dataclass
class Listing:
    """Names of files with their bytes, sorted, and what of the place cannot be read."""

    sizes: dict[str, int]
    passed: list[Passed] = field(default_factory=list)


class Files(Protocol):
    """A folder or a bucket's prefix, read only."""

    uri: str

    def listed(self, prefix: str = "") -> Listing:
        """All files whose name begins with `prefix`."""
        ...

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises InputError where the fault is the file's."""
        ...

    def open(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A seekable file. Raises InputError where the fault is the file's."""
        ...


def suffix_of(name: str) -> str:
    """The suffix of a file name in lower case, without its dot; empty without one."""
    base = name.rpartition("/")[2]
    return base.rpartition(".")[2].lower() if "." in base.lstrip(".") else ""


def local_path(uri: str) -> str:
    """The path of a `file://` URI, with what is percent-encoded in it where no file has it literally; others as they
    are."""
    path = uri.removeprefix("file://localhost") if uri.startswith("file://localhost/") else uri.removeprefix("file://")
    return unquote(path) if path != uri and "%" in path and not os.path.lexists(path) else path


def open_files(uri: str) -> Files:
    """The files at a folder path, `file://` URI, `s3://bucket/prefix` or `hf://datasets/owner/name[@revision]/folder`.

    Raises:
        LayerloopError: an empty or unsupported URI.
    """
    if "://" not in uri:
        return LocalFiles(Path(uri))
    if uri.startswith("hf://"):
        return HubFiles(uri)
    store = open_store(uri)
    from layerloop.components.storage.local import LocalStore

    return LocalFiles(store.root) if isinstance(store, LocalStore) else _bucket_files(uri)


class LocalFiles:
    """A folder. Linked files are followed, linked folders are not, and are said."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.uri = str(self.root)

    def listed(self, prefix: str = "") -> Listing:
        found = Listing({})
        unreadable: list[OSError] = []
        root = os.fspath(self.root)
        for directory, folders, files in os.walk(root, onerror=unreadable.append):
            base = directory[len(root) :].lstrip("/")
            inside = f"{base}/" if base else ""
            for folder in sorted(folders):
                if os.path.islink(os.path.join(directory, folder)):
                    reason = "a link to a folder is not followed: give the folder itself"
                    found.passed.append(Passed(printable(f"{inside}{folder}/"), "linked folders", reason))
            for file in files:
                self._add(f"{inside}{file}", found)
        for error in unreadable:
            name = printable(str(error.filename)[len(root) :].lstrip("/"))
            reason = f"folder cannot be read ({error.strerror}): allow it"
            found.passed.append(Passed(f"{name}/", "unreadable folders", reason))
        found.sizes = {name: size for name, size in sorted(found.sizes.items()) if name.startswith(prefix)}
        found.passed.sort(key=lambda item: item.origin)
        return found

    def _add(self, name: str, found: Listing) -> None:
        try:
            status = os.stat(self._path(name))
        except FileNotFoundError:
            if os.path.islink(self._path(name)):
                found.passed.append(Passed(printable(name), "broken links", "link leads nowhere: mend or delete it"))
            return  # else deleted while we walked
        except OSError as error:  # ELOOP of a link to itself, EACCES, EIO
            reason = f"file cannot be reached ({error.strerror}): mend or delete it"
            found.passed.append(Passed(printable(name), "broken links", reason))
            return
        if stat.S_ISREG(status.st_mode):
            found.sizes[name] = status.st_size
        else:  # a pipe or a device would be read without end
            found.passed.append(Passed(printable(name), "special files", "not a regular file"))

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        try:
            file = open_regular(self._path(name))
        except IsADirectoryError:
            raise InputError("a folder is no file: give its files, one a line") from None
        except OSError as error:
            raise InputError(f"file cannot be read ({error.strerror}): allow it, or restore it") from None
        except ValueError:  # a zero byte, which no name has
            raise InputError("file cannot be read (no file has such a name): correct it") from None
        with file:
            yield file

    def _path(self, name: str) -> str:
        return os.path.join(self.root, name)


def _bucket_files(uri: str) -> Files:
    """Objects of a bucket by their keys, those with empty parts such as `d//b.png` among them."""
    from layerloop.components.storage.s3 import S3Store

    class BucketFiles(S3Store):
        def listed(self, prefix: str = "") -> Listing:
            root = self._key("")
            names = {
                item["Key"][len(root) :]: int(item["Size"])
                for page in self._pages("", Prefix=root + prefix)
                for item in page.get("Contents", ())
            }  # consoles make "folder/" objects, too
            return Listing({name: names[name] for name in sorted(names) if name and not name.endswith("/")})

        def read(self, name: str, *, most: int | None = None) -> bytes:
            try:
                return super().read(name, most=most)
            except MissingObjectError as error:
                raise InputError(str(error)) from None

        @contextlib.contextmanager
        def open(self, name: str) -> Iterator[BinaryIO]:
            with contextlib.ExitStack() as stack:
                try:
                    file = stack.enter_context(super().open(name))
                except MissingObjectError as error:
                    raise InputError(str(error)) from None
                yield file

        def _key(self, name: str) -> str:
            return f"{self.prefix}/{name}" if self.prefix else name

    bucket, _, prefix = uri.partition("://")[2].partition("/")
    checked = S3Store.from_uri(uri if "?" in prefix else f"s3://{bucket}")  # a query may hold a signature
    return BucketFiles(checked.bucket, prefix, checked._client)


class HubFiles:
    """The files of a repository of the Hugging Face hub under a folder: `hf://datasets/owner/name[@revision][/folder]`.

    A file is downloaded when it is opened, into the hub's own cache (HF_HOME), where another attempt finds it again.
    The revision is looked up once, so that all files are of one commit.
    """

    def __init__(self, uri: str) -> None:
        match = _HUB.fullmatch(uri.rstrip("/"))
        if match is None:
            raise LayerloopError(
                f"{uri} names no repository of the hub: give hf://datasets/owner/name, with @revision after it and a "
                "folder or glob behind that if you like"
            )
        self.uri = uri
        self._kind, self._repository, self._folder = match[1].removesuffix("s"), match[2], match[4] or ""
        self._revision = match[3] or "main"
        self._commit = ""

    def listed(self, prefix: str = "") -> Listing:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        inside = f"{self._folder}/" if self._folder else ""
        with self._one_line():
            api = HfApi()
            if not self._commit:
                info = api.repo_info(self._repository, repo_type=self._kind, revision=self._revision)
                self._commit = str(info.sha)
            tree = api.list_repo_tree(self._repository, repo_type=self._kind, revision=self._commit, recursive=True)
            sizes = {entry.path: int(entry.size) for entry in tree if isinstance(entry, RepoFile)}
        names = {name.removeprefix(inside): size for name, size in sizes.items() if name.startswith(inside)}
        return Listing({name: names[name] for name in sorted(names) if name.startswith(prefix)})

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        path = f"{self._folder}/{name}" if self._folder else name
        revision = self._commit or self._revision
        try:
            with self._one_line():
                local = hf_hub_download(self._repository, path, repo_type=self._kind, revision=revision)
        except LayerloopError as error:
            if isinstance(error.__cause__, EntryNotFoundError):
                raise InputError(f"file {path} is not in {self._repository} at {revision}: correct its name") from None
            raise
        with open(local, "rb") as file:
            yield file

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        """What the hub's library raises, in one line."""
        try:
            yield
        except LayerloopError:
            raise
        except Exception as error:  # a dozen kinds; each means that the repository is not available
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise hub_error(
                error,
                f"{self.uri} is not available on the Hugging Face hub ({reason}): check the name and the revision, and "
                "HF_TOKEN or HF_ENDPOINT",
            ) from error
