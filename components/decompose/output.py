"""The folder that results go to: one subfolder a picture, which appears whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from layerloop.components.decompose.pictures import RECORD, Picture
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.runtime import flat
from layerloop.components.storage.stores import LocalStore

SETTINGS, LOCK = "settings.json", ".lock"
PARTIAL, OLD = ".partial-", ".replaced-"  # of subfolders that a killed run left behind


class OutputFolder:
    """A local folder of results that were all made with the same settings."""

    def __init__(self, root: str | Path) -> None:
        """Make the folder where it is not there.

        Raises:
            LayerloopError: a URI, a file, or a folder that cannot be written.
        """
        if "://" in str(root):
            raise LayerloopError(f"output {root} is a URI: give a local folder")
        self.root = Path(root).expanduser().absolute()
        self._store = LocalStore(self.root)
        self._store.check_writable()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LayerloopError(f"{self.root} cannot be made ({error.strerror}): give another folder") from None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder against other runs, and remove what a killed one left half-written.

        Raises:
            LayerloopError: another run holds it.
        """
        with (self.root / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LayerloopError(
                    f"{self.root} is being written by another run: wait for it, or give another folder"
                ) from None
            except OSError:  # a file system without locks
                pass
            for left in (*self.root.glob(f"{PARTIAL}*"), *self.root.glob(f"{OLD}*")):
                shutil.rmtree(left, ignore_errors=True)
            yield

    def check(self, settings: Mapping[str, Any]) -> None:
        """Compare settings with those of the results that are here; what either lacks is not compared.

        Raises:
            LayerloopError: they differ, or the file that has them is damaged.
        """
        file = self.root / SETTINGS
        if not file.is_file():
            return
        found = _read_json(file)
        if found is None:
            raise LayerloopError(f"{file} is damaged: delete it, and the results beside it, or give another folder")
        theirs, ours = flat(found), flat(settings)
        different = [
            f"{key}: {theirs[key]} -> {ours[key]}" for key in ours if key in theirs and ours[key] != theirs[key]
        ]
        if different:
            raise LayerloopError(
                f"{self.root} has results of other settings ({'; '.join(different)}): give another folder, or these "
                "settings"
            )

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Write the settings, which are checked first.

        Raises:
            LayerloopError: as `check`, or the folder cannot be written.
        """
        self.check(settings)
        self._store.write(SETTINGS, (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())

    def name_for(self, picture: Picture, taken: Collection[str]) -> str:
        """The subfolder of a picture: its name, or with a part of its bytes' hash where that is another one's.

        Raises:
            LayerloopError: both are folders of something else.
        """
        for name in (picture.stem, f"{picture.stem}-{picture.sha256[:8]}"):
            folder = self.root / name
            if name not in taken and (not os.path.lexists(folder) or self._source_of(name) == picture.sha256):
                return name
        raise LayerloopError(f"{self.root / picture.stem} is not this picture's: move it away, or give another folder")

    def done(self, name: str, formats: Collection[str]) -> bool:
        """Whether the subfolder holds all files that its record lists, and the record all of these formats."""
        record = _read_json(self.root / name / RECORD)
        if record is None or not set(formats) <= set(record.get("formats", ())):
            return False
        sizes: Any = record.get("files")
        if not isinstance(sizes, dict):
            return False
        return all(
            (path := self.root / name / file).is_file() and path.stat().st_size == size for file, size in sizes.items()
        )

    @contextlib.contextmanager
    def picture(self, name: str) -> Iterator[LocalStore]:
        """A store for a picture's files, which are in the subfolder `name` at the end; after a failure nothing is.

        Raises:
            LayerloopError: the folder cannot be written.
        """
        token = secrets.token_hex(6)
        partial, old, final = self.root / f"{PARTIAL}{token}", self.root / f"{OLD}{token}", self.root / name
        try:
            yield LocalStore(partial)
            if final.exists():
                final.rename(old)
            partial.rename(final)
        except OSError as error:
            raise LayerloopError(
                f"{final} cannot be written ({error.strerror}): allow it, or free some space"
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)

    def _source_of(self, name: str) -> str | None:
        record = _read_json(self.root / name / RECORD)
        source = record.get("source") if record is not None else None
        return source.get("sha256") if isinstance(source, dict) else None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
