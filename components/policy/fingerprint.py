"""The sha256 of a base: of all files that decide what it computes, those of large ones kept beside them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from layerloop.components.policy.base_files import base_files

DIGESTS = ".layerloop-sha256.json"
WORTH_KEEPING = 2**28  # bytes of a file whose sha256 is kept: it takes a second and more
SETTLED = 2.0  # seconds since a file's last change: within a clock's step it may change again and look the same


def fingerprint(folder: Path) -> str:
    """SHA-256, hex, over relative names and contents of all files that decide what the frozen base computes.

    Those of large files are kept beside them, in `.layerloop-sha256.json` of the folder, so that not every pod reads
    41 GB for them; one is taken from there while its file has the size and the times that it had then.

    Raises:
        LayerloopError: naming the first missing file.
    """
    files = base_files(folder)
    digests = _kept_digests(folder)
    missing = [file for file in files if file not in digests]
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter lock; 40 GB in shards
        digests |= dict(zip(missing, pool.map(_sha256, missing), strict=True))
    _keep_digests(folder, {file: digests[file] for file in files})
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(f"{file.relative_to(folder).as_posix()} {digests[file]}\n".encode())
    return total.hexdigest()


def _sha256(file: Path) -> str:
    blob = file.resolve().name
    if file.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob):
        return blob  # the hub's cache names large files by their sha256
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _state(file: Path) -> dict[str, int]:
    """What changes whenever a file's content does."""
    found = file.stat()
    return {"bytes": found.st_size, "modified_ns": found.st_mtime_ns, "changed_ns": found.st_ctime_ns}


def _kept_digests(folder: Path) -> dict[Path, str]:
    """Digests that still hold, of those kept beside the files."""
    try:
        kept = json.loads((folder / DIGESTS).read_bytes())
        return {
            folder / name: str(entry["sha256"])
            for name, entry in kept.items()
            if (folder / name).is_file() and entry == _state(folder / name) | {"sha256": entry["sha256"]}
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _keep_digests(folder: Path, digests: Mapping[Path, str]) -> None:
    """Keep the digests of large files that have not changed just now, if the folder can be written to."""
    now, kept = time.time_ns(), {}
    for file, sha256 in digests.items():
        state = _state(file)
        settled = now - max(state["modified_ns"], state["changed_ns"]) > SETTLED * 1e9
        if not file.is_symlink() and state["bytes"] >= WORTH_KEEPING and settled:
            kept[file.relative_to(folder).as_posix()] = state | {"sha256": sha256}
    text = json.dumps(kept, indent=1, sort_keys=True).encode()
    target = folder / DIGESTS
    with contextlib.suppress(OSError):  # a read-only claim: every pod hashes, as before
        if kept and (not target.is_file() or target.read_bytes() != text):
            partial = folder / f"{DIGESTS}.{uuid.uuid4().hex}"
            partial.write_bytes(text)
            partial.replace(target)
