"""Opens the store of a URI: a local folder or an S3 bucket."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.local import LocalStore
from layerloop.components.storage.store import LARGEST_RECORD, READS, MissingObjectError, Store

__all__ = ["LARGEST_RECORD", "READS", "LocalStore", "MissingObjectError", "Store", "open_store", "read_uri"]

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


def open_store(uri: str | Path) -> Store:
    """The store at a folder path, `file://` URI or `s3://bucket/prefix` (settings from the environment).

    Raises:
        LayerloopError: an empty or unsupported URI.
    """
    text = str(uri).strip()
    if not text:
        raise LayerloopError("store URI is empty: give a folder or s3://bucket/prefix")
    match = _SCHEME.match(text)
    if match is None:
        return LocalStore(Path(text))
    try:
        parts = urlsplit(text)
    except ValueError:  # brackets where a bucket's name or a host stands
        raise LayerloopError(f"store URI {without_secrets(text)} is none: write s3://bucket/prefix") from None
    match match.group(1).lower():
        case "file":
            if parts.netloc not in ("", "localhost"):
                raise LayerloopError(f"store URI {without_secrets(text)} names a host: write file:///absolute/path")
            return LocalStore(Path(unquote(parts.path)))
        case "s3":
            from layerloop.components.storage.s3 import S3Store

            return S3Store.from_uri(text)
        case scheme:
            raise LayerloopError(
                f"store URI {without_secrets(text)} has scheme {scheme}://: use a folder, file:// or s3://bucket/prefix"
            )


def read_uri(uri: str | Path, *, most: int | None = None) -> bytes:
    """The bytes of one file, at a path, `file://` or `s3://bucket/key`.

    Raises:
        LayerloopError: an impossible URI, nothing there, or more than `most` bytes.
    """
    if (shown := without_secrets(str(uri))) != str(uri):
        raise LayerloopError(f"{shown} carries a password or a signature: give the URI alone and set AWS_* variables")
    folder, _, name = str(uri).rpartition("/")
    if not name or folder.endswith(":/"):
        raise LayerloopError(f"{without_secrets(str(uri))} is a folder: give a file")
    return open_store(folder or ("/" if str(uri).startswith("/") else ".")).read(name, most=most)
