"""The store in an S3 bucket, or in any server that speaks S3. Its settings are in s3_client.py, how requests are made
again and refused in s3_requests.py."""

from __future__ import annotations

import contextlib
import email.utils
import functools
import hashlib
import io
import logging
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC
from pathlib import Path
from typing import Any, BinaryIO

from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.storage.bids import BID, create_by_bid
from layerloop.components.storage.owners import ABANDONED
from layerloop.components.storage.s3_client import checksums, client, endpoint
from layerloop.components.storage.s3_errors import cause_of, error_code, error_status
from layerloop.components.storage.s3_requests import Requests
from layerloop.components.storage.store import (
    Entry,
    MissingObjectError,
    Names,
    Store,
    TooLargeError,
    checked_name,
    folder_prefix,
    is_name,
    missing_object,
)

_TOKEN = "layerloop-writer"  # object metadata: who wrote it, so that a retried request can recognise its own success
PART_BYTES = 16 << 20  # larger objects travel in parts of this size, several at once
_WORDLESS = ("301", "307", "400", "401", "403")  # codes of refusals that have no body
_CONFLICTS = 5  # a 409 (another writer is in the middle of the same name) is retried this often
_MAX_COPY = 5 * 10**9  # bytes that one request copies, by S3's documentation
_EXISTS = ("PreconditionFailed", "412")  # answers to a create-only put; the number where the body was cut off
_OTHER_BYTES = ("BadDigest", "XAmzContentChecksumMismatch")  # not those that were sent
_CONFLICT = ("ConditionalRequestConflict", "409")
PROBE = ".conditional-write-probe-"  # part of the names of objects that are there for a moment only

_ignores_conditions: dict[str, bool] = {}  # bucket at endpoint -> whether it was seen to overwrite on If-None-Match: *
_other_etags: set[str] = set()  # buckets at endpoints whose ETags were seen not to be the MD5 of a small object


class S3Store(Store):
    """Objects under one prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str, client: Any) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client = client
        self._requests = Requests(endpoint(client), bucket, self.uri)

    @classmethod
    def from_uri(cls, uri: str) -> S3Store:
        """The store of `s3://bucket/prefix`; nothing is sent yet.

        Raises:
            LayerloopError: no bucket, an impossible prefix, or settings that boto3 refuses.
        """
        bucket, _, prefix = uri.partition("://")[2].partition("/")
        if not bucket or "@" in bucket or "?" in uri or without_secrets(uri) != uri:
            raise LayerloopError(
                f"store URI {without_secrets(uri)} is not s3://bucket/prefix: set the rest by AWS_* variables"
            )
        prefix = prefix.strip("/")
        return cls(bucket, checked_name(prefix) if prefix else "", client())

    @property
    def creates_once(self) -> bool:
        return not self._ignores_conditions()

    def write(self, name: str, data: bytes) -> None:
        self._put(name, lambda key: self._client.put_object(Bucket=self.bucket, Key=key, Body=data))

    def create(self, name: str, data: bytes) -> bool:
        return create_by_bid(self, name, data) if self._ignores_conditions() else self._create_if_absent(name, data)

    def upload(self, name: str, path: Path) -> None:
        # In parts when large; a multipart object appears when its last request completes.
        self._put(name, functools.partial(self._upload, path))

    def download(self, name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        key = self._key(name)  # boto3 writes a temporary file next to it and renames it
        self._requests.ask(name, lambda: self._client.download_file(self.bucket, key, str(path), Config=_transfer()))

    def read(self, name: str, *, most: int | None = None) -> bytes:
        if (data := self._read_small(name, most)) is not None:
            return data
        buffer = io.BytesIO()
        self._fetch(name, buffer)
        return buffer.getvalue()

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        from botocore.exceptions import ClientError

        key = self._key(name)

        def read() -> bytes:
            wanted = f"bytes={offset}-{offset + size - 1}"
            answer = self._client.get_object(Bucket=self.bucket, Key=key, Range=wanted)
            with contextlib.closing(answer["Body"]) as body:
                begins = str(answer.get("ContentRange", "")).startswith(f"bytes {offset}-")
                if not begins:  # a server that knows no ranges sends all
                    body.read(offset)
                return bytes(body.read(None if begins else size))

        try:
            return self._requests.ask(name, read, let=("InvalidRange", "416")) if size > 0 else b""
        except ClientError:  # it ends before
            return b""

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        with tempfile.TemporaryFile(prefix="layerloop-") as file:
            self._fetch(name, file)
            file.seek(0)
            yield file

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except MissingObjectError:
            return False
        return True

    def size(self, name: str) -> int:
        found = self._head(name).get("ContentLength")
        if found is None:  # rclone under load
            entry = self.entries(name).get(name)
            if entry is None:
                raise missing_object(self.uri, name)
            return entry.size
        return int(found)

    def entries(self, prefix: str = "") -> dict[str, Entry]:
        root = folder_prefix(self.prefix)
        found = {
            item["Key"][len(root) :]: Entry(
                int(item["Size"]), item["LastModified"].timestamp(), str(item.get("ETag", "")).strip('"')
            )
            for page in self._pages(prefix, Prefix=root + prefix)
            for item in page.get("Contents", ())
        }
        return {name: found[name] for name in sorted(found) if is_name(name)}  # consoles make "folder/" objects, too

    def clock(self) -> float:
        answer = self._requests.ask("", lambda: self._client.list_objects_v2(Bucket=self.bucket, MaxKeys=1))
        date = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("date", "")
        try:
            return email.utils.parsedate_to_datetime(date).replace(tzinfo=UTC).timestamp()
        except ValueError:  # every server sends one
            return time.time()

    def children(self, name: str = "") -> Iterator[str]:
        start = folder_prefix(self.prefix) + folder_prefix(name)
        for page in self._pages(name, Prefix=start, Delimiter="/"):
            yield from (item["Prefix"][len(start) :] for item in page.get("CommonPrefixes", ()))
            yield from (item["Key"][len(start) :] for item in page.get("Contents", ()) if item["Key"] != start)

    def delete(self, name: str) -> None:
        key = self._key(name)
        with contextlib.suppress(MissingObjectError):  # some servers answer 404, S3 204
            self._requests.ask(name, lambda: self._client.delete_object(Bucket=self.bucket, Key=key))

    def copy(self, name: str, target: str) -> None:
        from boto3.s3.transfer import TransferConfig

        source, key = {"Bucket": self.bucket, "Key": self._key(name)}, self._key(target)
        config = TransferConfig(multipart_threshold=_MAX_COPY, multipart_chunksize=_MAX_COPY)
        self._requests.ask(name, lambda: self._client.copy(source, self.bucket, key, Config=config))

    def leftovers(self) -> Names:
        uploads = [f"unfinished upload of {name}" for name, *_ in self._uploads()]
        return [name for name in self.list() if PROBE in name or BID in name] + uploads

    def remove_leftovers(self) -> None:
        for name in self.list():
            if PROBE in name or BID in name:
                self.delete(name)
        self._abort([(name, upload) for name, upload, _ in self._uploads()])

    def _abort(self, uploads: list[tuple[str, str]]) -> None:
        from botocore.exceptions import ClientError

        for name, upload in uploads:
            abort = functools.partial(
                self._client.abort_multipart_upload, Bucket=self.bucket, Key=self._key(name), UploadId=upload
            )
            with contextlib.suppress(MissingObjectError, ClientError):  # it was completed or aborted meanwhile
                self._requests.ask(name, abort, let=("NoSuchUpload",))

    def remove_abandoned(self) -> int:
        now, entries = self.clock(), self.entries(PROBE)
        probes = [name for name, entry in entries.items() if now - entry.modified > ABANDONED]
        for name in probes:
            self.delete(name)
        uploads = [(name, upload) for name, upload, begun in self._uploads() if now - begun > ABANDONED]
        self._abort(uploads)
        return len(probes) + len(uploads)

    def check_writable(self) -> None:
        self._ignores_conditions()  # writes an object and deletes it

    def _key(self, name: str) -> str:
        return folder_prefix(self.prefix) + checked_name(name)

    def _pages(self, name: str, **arguments: str) -> Iterator[Any]:
        """The pages of a listing, each when it is asked for."""
        more: dict[str, str] = {}
        while True:
            request = functools.partial(self._client.list_objects_v2, Bucket=self.bucket, **arguments, **more)
            page = self._requests.ask(name, request)
            yield page
            if not page.get("IsTruncated"):
                return
            token = page.get("NextContinuationToken")  # some servers send none with a delimiter-free listing
            more = {"ContinuationToken": token} if token else {"StartAfter": page["Contents"][-1]["Key"]}

    def _uploads(self) -> list[tuple[str, str, float]]:
        """Names, ids and times of begin of the multipart uploads under our prefix that were not completed."""
        root = folder_prefix(self.prefix)
        paginator = self._client.get_paginator("list_multipart_uploads")
        try:
            pages = self._requests.ask("", lambda: list(paginator.paginate(Bucket=self.bucket, Prefix=root)))
        except LayerloopError:  # servers without that call, credentials without that right
            return []
        found = [
            (item["Key"][len(root) :], str(item["UploadId"]), item["Initiated"].timestamp())
            for page in pages
            for item in page.get("Uploads", ())
        ]
        return [upload for upload in found if is_name(upload[0])]

    def _head(self, name: str) -> Any:
        """What the store says of an object. A refused HEAD has no words, so a call that has some asks the same: of a
        404 too while nothing in the bucket has been read, since there may be no such bucket."""
        from botocore.exceptions import ClientError

        key = self._key(name)

        def get() -> Any:
            answer = self._client.get_object(Bucket=self.bucket, Key=key)
            answer["Body"].close()
            return answer

        wordless = _WORDLESS if self._requests.have_succeeded else (*_WORDLESS, "404")
        try:
            return self._requests.ask(name, lambda: self._client.head_object(Bucket=self.bucket, Key=key), let=wordless)
        except ClientError:
            return self._requests.ask(name, get)

    def _put(self, name: str, put: Callable[[str], Any]) -> None:
        """Send an object. A 404 answers some servers' race of two first writers in a folder, or the last request of a
        multipart upload that was completed by the one before, whose answer was lost."""
        key = self._key(name)
        self._requests.ask(name, lambda: put(key), again=(*_OTHER_BYTES, "NoSuchKey", "NoSuchUpload", "404"))

    def _upload(self, path: Path, key: str) -> None:
        """A file, with CRC-32 unless the store refuses it: then it takes the same without."""
        from botocore.exceptions import ClientError

        known = checksums(endpoint(self._client))
        if known.compares_crc32 is not False:
            try:
                crc32 = {"ChecksumAlgorithm": "CRC32"}
                self._client.upload_file(str(path), self.bucket, key, ExtraArgs=crc32, Config=_transfer())
                return
            except Exception as error:
                cause = cause_of(error)
                may_be = isinstance(cause, ClientError) and error_status(cause) in (400, 403, 405, 501)
                if known.compares_crc32 or not may_be or error_code(cause) in _OTHER_BYTES:
                    raise
        self._client.upload_file(str(path), self.bucket, key, Config=_transfer())
        known.compares_crc32 = False

    def _fetch(self, name: str, file: BinaryIO) -> None:
        """The object into a file, in parts, several at once."""
        key = self._key(name)

        def fetch() -> None:
            file.seek(0)
            file.truncate()
            self._client.download_fileobj(self.bucket, key, file, Config=_transfer())

        self._requests.ask(name, fetch)

    def _read_small(self, name: str, most: int | None) -> bytes | None:
        """The object by one request, or None if it is large. One whose bytes are not those of its ETag is read again,
        until two reads agree: an ETag may be something else than their MD5."""
        key = self._key(name)

        def read() -> tuple[bytes | None, str]:
            answer = self._client.get_object(Bucket=self.bucket, Key=key)
            with contextlib.closing(answer["Body"]) as body:
                size = int(answer.get("ContentLength") or 0)
                if most is not None and size > most:
                    raise TooLargeError(f"{self.uri}/{name}", size, most)
                return bytes(body.read()) if size <= 2 * PART_BYTES else None, str(answer.get("ETag", "")).strip('"')

        data, etag = self._requests.ask(name, read)
        while data is not None and self._requests.where not in _other_etags and _is_md5(etag) and _md5(data) != etag:
            once_more, etag = self._requests.ask(name, read)
            if once_more == data:
                _other_etags.add(self._requests.where)
            data = once_more
        return data

    def _create_if_absent(self, name: str, data: bytes) -> bool:
        """One conditional put. A 412 may answer our own retried request whose first answer was lost."""
        from botocore.exceptions import ClientError

        token, key = secrets.token_hex(16), self._key(name)

        def put() -> None:
            self._client.put_object(Bucket=self.bucket, Key=key, Body=data, IfNoneMatch="*", Metadata={_TOKEN: token})

        for attempt in range(_CONFLICTS):
            try:
                self._requests.ask(name, put, let=(*_EXISTS, *_CONFLICT), again=_OTHER_BYTES)
                return True
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 412:
                    return bool(self._head(name)["Metadata"].get(_TOKEN) == token)
                time.sleep(0.1 * 2**attempt)
        raise UnavailableError(f"{self.uri}/{name} is written by others all the time: try again")

    def _ignores_conditions(self) -> bool:
        """Whether this bucket overwrites in spite of `If-None-Match: *`; tried once per process on a probe object."""
        if self._requests.where not in _ignores_conditions:
            name = f"{PROBE}{secrets.token_hex(8)}"
            self.write(name, b"")
            try:
                _ignores_conditions[self._requests.where] = not self._refuses_to_overwrite(name)
            finally:
                with contextlib.suppress(LayerloopError):  # credentials that may not delete are fine otherwise
                    self.delete(name)
            if _ignores_conditions[self._requests.where]:
                logging.getLogger(__name__).warning(
                    "s3://%s: no conditional writes here, so create-only writes bid for a second, and a writer that "
                    "stops in the middle may replace a manifest: run one job at a time on a campaign",
                    self.bucket,
                )
        return _ignores_conditions[self._requests.where]

    def _refuses_to_overwrite(self, name: str) -> bool:
        """Whether a create-only put of an existing object fails because it exists, not because of the header."""
        from botocore.exceptions import ClientError

        key, no = self._key(name), (*_EXISTS, "NotImplemented", "InvalidArgument", "InvalidRequest")
        try:
            self._requests.ask(
                name,
                lambda: self._client.put_object(Bucket=self.bucket, Key=key, Body=b"", IfNoneMatch="*"),
                let=no,
            )
        except ClientError as error:
            return bool(error.response["ResponseMetadata"]["HTTPStatusCode"] == 412)
        return False


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _is_md5(etag: str) -> bool:
    return re.fullmatch("[0-9a-f]{32}", etag) is not None


def _transfer() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=2 * PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=8)
