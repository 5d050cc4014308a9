"""Whose a temporary file is. Its name says the process that made it, so what a killed one left is told from what is
being written, and can be removed while others work."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# Seconds after which a temporary file is nobody's where its process cannot be looked for: it is on another machine, or
# its name says none. What is being written is younger.
ABANDONED = 86400.0
SCRATCH = "layerloop-"  # begin of the names of scratch folders
_OWNER = re.compile(r"-([0-9a-f]{8})\.(\d+)\.(\d+)-[0-9a-f]+$")


def identity(pid: int) -> list[str]:
    """What no other process of any machine has in common with this one: boot, namespace, id, and time of its start;
    empty where that cannot be said."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]  # field 22, starttime
    except (OSError, IndexError):
        return []
    return [boot, space, str(pid), started]


def owned_name(stem: str) -> str:
    """A name of its own for something temporary of this process, beginning with `stem`."""
    return f"{stem}-{_tag(os.getpid())}{secrets.token_hex(6)}"


def is_abandoned(name: str, age: float) -> bool:
    """Whether nobody will finish what has such a name.

    Args:
        age: seconds since it was last written to.
    """
    match, own = _OWNER.search(name), _tag(os.getpid())
    if match is None or not own.startswith(f"{match[1]}."):
        return age > ABANDONED
    return _tag(int(match[2])) != f"{match[1]}.{match[2]}.{match[3]}-"


@contextlib.contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A new folder for this block, by default in TMPDIR; those that killed processes left beside it are removed."""
    root = parent or Path(tempfile.gettempdir())
    remove_abandoned_folders(root)
    folder = root / owned_name(SCRATCH.rstrip("-"))
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned_folders(root: Path) -> None:
    """Remove scratch folders of killed processes of this user; links are not followed."""
    with contextlib.suppress(OSError):  # of others' making, or gone meanwhile: no reason not to work
        for path in root.glob(f"{SCRATCH}*"):
            about = path.lstat()
            ours = stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid()
            if ours and _OWNER.search(path.name) and is_abandoned(path.name, time.time() - about.st_mtime):
                shutil.rmtree(path, ignore_errors=True)


def _tag(pid: int) -> str:
    """`0123abcd.4711.98765-`: machine and namespace, id, and start of a process; empty where that cannot be said."""
    found = identity(pid)
    return f"{_hash(*found[:2])}.{found[2]}.{found[3]}-" if found else ""


@functools.cache
def _hash(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]
