"""A list of URIs as an input: a text file with one file a line, as benchmarks of pictures on the web are given.

A line is the path (relative to the list) or URI of an image, tar or parquet: local, `s3://`, `hf://` or `http(s)://`.
Empty lines and those that begin with `#` say nothing. What a line's place does not give is a fault of that file only.
"""

from __future__ import annotations

import base64
import contextlib
import io
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any, BinaryIO, Final
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.messages import printable
from layerloop.components.shard_dataset.files import Files, InputError, Listing, local_path, open_files

SUFFIXES: Final = ("txt",)
MOST_BYTES: Final = 1_000_000_000  # of one file on the web
TIMEOUT: Final = 30.0  # seconds without an answer, or between two parts of one
SLOWEST: Final = 20_000  # bytes a second beyond these, of a body that comes in drops
_ATTEMPTS, _PAUSE = 3, 1.0  # of a file whose server fails; seconds before the second, doubled for the third
_SAFE = "/%:@!$&'()*+,;=~-._?"  # characters of an address that stay as they are, a % among them
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # statuses that may not last


class ListedFiles:
    """The files of a list, by their URIs without queries and passwords, which may be secrets."""

    def __init__(self, uri: str, text: str) -> None:
        self.uri = uri
        folder = uri.rpartition("/")[0]
        self._uris: dict[str, str] = {}
        for line in map(str.strip, re.split(r"\r\n?|\n", text)):  # a name may have other line breaks of Unicode
            if line and not line.startswith("#"):
                absolute = line if "://" in line or line.startswith("/") else f"{folder}/{line}"
                self._add(absolute)
        if not self._uris:
            raise LayerloopError(f"list {printable(uri)} names no file: write the URI of an image on each line")
        self._stores: dict[str, Files] = {}

    def _add(self, uri: str) -> None:
        scheme, mark, rest = uri.partition("://")
        scheme, uri = (scheme.lower(), f"{scheme.lower()}{mark}{rest}") if mark else ("file", uri)
        if scheme not in ("file", "s3", "hf", "http", "https"):
            shown = printable(_without_secrets(uri))
            raise LayerloopError(f"list {printable(self.uri)} has {shown}: give paths, s3://, hf:// or http(s)://")
        if uri in self._uris.values():
            return
        name = shown = _without_secrets(uri)
        number = 1
        while name in self._uris:  # the same address with another query
            number += 1
            name = f"{shown}#{number}"
        self._uris[name] = uri

    def listed(self, prefix: str = "") -> Listing:
        """All files, in the order of their names; their sizes are not known before they are read, so 0."""
        return Listing({name: 0 for name in sorted(self._uris) if name.startswith(prefix)})

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        uri = self._uris[name]
        if uri.startswith(("http://", "https://")):
            yield io.BytesIO(download(uri))
            return
        parent, _, base = local_path(uri).rpartition("/")
        if parent not in self._stores:
            self._stores[parent] = open_files(parent or "/")
        with self._stores[parent].open(base) as file:
            yield file


def download(url: str) -> bytes:
    """The bytes at an http(s) address; a server that fails is asked again.

    Raises:
        InputError: it does not give them, in one line without the address.
    """
    request = _request(url)
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return _body(answer)
        except urllib.error.HTTPError as error:
            problem = f"its server answers {error.code}"
            if error.code in _PASSING:
                continue
            break
        except (OSError, HTTPException, ValueError) as error:  # URLError and time-outs are OSErrors
            problem = f"its server does not answer ({_reason(error)})"
            continue
    raise InputError(f"file cannot be fetched, {problem}: correct its line, or take it out of the list")


def _request(url: str) -> urllib.request.Request:
    """A request for an address as a browser takes it: letters of any script, blanks, and a password, which is sent to
    this server only.

    Raises:
        InputError: it is no address.
    """
    try:
        parts = urlsplit(url)
        host = (
            (parts.hostname or "").encode("idna").decode()
            if ":" not in (parts.hostname or "")
            else f"[{parts.hostname}]"
        )
        if not host:
            raise ValueError("it has no host")
        server = host if parts.port is None else f"{host}:{parts.port}"
        path, query = quote(parts.path, safe=_SAFE), quote(parts.query, safe=_SAFE)
    except ValueError as error:
        raise InputError(f"its line is no address ({_without_userinfo(_reason(error))}): correct it") from None
    request = urllib.request.Request(
        urlunsplit((parts.scheme, server, path, query, "")), headers={"User-Agent": "layerloop (image benchmark)"}
    )
    if parts.username is not None:
        both = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(both.encode()).decode()}")
    return request


def _body(answer: Any) -> bytes:
    """A body within bounds of bytes and of time."""
    began, parts, size = time.monotonic(), [], 0
    while part := answer.read1(1 << 20):
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise InputError(f"file has over {MOST_BYTES / 1e6:.0f} MB: make it smaller")
        if (seconds := time.monotonic() - began) > TIMEOUT + size / SLOWEST:
            raise TimeoutError(f"{size} bytes in {seconds:.0f} s")
    if (missing := answer.length) is not None and missing > 0:
        raise OSError(f"{missing} bytes are missing")
    return b"".join(parts)


def _reason(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or error
    return printable(" ".join(str(reason).split()))[:100] or type(error).__name__


def _without_userinfo(text: str) -> str:
    return re.sub(r"[^\s'\"]*@", "...@", text)


def _without_secrets(uri: str) -> str:
    """A URI without what may be a secret in it: user, password, query and fragment."""
    if "://" not in uri:
        return uri
    scheme, _, rest = uri.partition("://")
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    server, slash, path = rest.partition("/")
    return f"{scheme}://{server.rpartition('@')[2]}{slash}{path}"
