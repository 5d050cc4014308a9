"""Inputs on the Hugging Face hub: `hf://datasets/owner/name[@revision][/folder or file]`, read only.

A file is downloaded when it is opened, into the hub's own cache (HF_HOME), where another attempt finds it again. The
revision is looked up once, so that all files are of one commit.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import BinaryIO

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.shard_dataset.files import InputError, Listing

_URI = re.compile(r"hf://(datasets|models|spaces)/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?")


class HubFiles:
    """The files of a repository under a folder."""

    def __init__(self, uri: str) -> None:
        match = _URI.fullmatch(uri.rstrip("/"))
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
            raise LayerloopError(
                f"{self.uri} is not available on the Hugging Face hub ({reason}): check the name and the revision, and "
                "HF_TOKEN or HF_ENDPOINT"
            ) from error
