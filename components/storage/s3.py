"""The store in an S3 bucket, or in any server that speaks S3. Settings are read from the environment by boto3:
AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import functools
import hashlib
import io
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.storage.owners import ABANDONED
from layerloop.components.storage.store import (
    Entry,
    MissingObjectError,
    Names,
    Store,
    checked_name,
    folder_prefix,
    is_name,
)

T = TypeVar("T")

_TOKEN = "layerloop-writer"  # object metadata: who wrote it, so that a retried request can recognise its own success
ATTEMPTS = 8  # retries of a request that was throttled, lost or answered with 5xx
PART_BYTES = 32 << 20  # larger objects travel in parts of this size, several at once
_CONFLICTS = 5  # a 409 (another writer is in the middle of the same name) is retried this often
_MAX_COPY = 5 * 10**9  # bytes that one request copies, by S3's documentation
_EXISTS = ("PreconditionFailed", "412")  # answers to a create-only put; the number where the body was cut off
_CONFLICT = ("ConditionalRequestConflict", "409")
PROBE, BID = ".conditional-write-probe-", ".bid-"  # parts of names of objects that are there for a moment only

# Without conditional writes a creator bids, waits, and the lowest bid puts the object. Two can put only where the first
# takes longer than the wait between looking and putting.
BID_SECONDS = 1.0
_BID_EXPIRES = 60.0  # seconds after which a bidder counts as dead

_ignores_conditions: dict[str, bool] = {}  # bucket at endpoint -> whether it was seen to overwrite on If-None-Match: *
_other_etags: set[str] = set()  # buckets at endpoints whose ETags were seen not to be the MD5 of a small object


class S3Store(Store):
    """Objects under one prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str, client: Any) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client = client

    @classmethod
    def from_uri(cls, uri: str) -> S3Store:
        """The store of `s3://bucket/prefix`; nothing is sent yet.

        Raises:
            LayerloopError: no bucket, an impossible prefix, or settings that boto3 refuses.
        """
        parts = urlsplit(uri)
        if not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
            raise LayerloopError(
                f"store URI {without_secrets(uri)} is not s3://bucket/prefix: set the rest by AWS_* variables"
            )
        prefix = parts.path.strip("/")
        return cls(parts.netloc, checked_name(prefix) if prefix else "", _client())

    @property
    def creates_once(self) -> bool:
        return not self._ignores_conditions()

    def write(self, name: str, data: bytes) -> None:
        self._put(name, lambda key: self._client.put_object(Bucket=self.bucket, Key=key, Body=data))

    def create(self, name: str, data: bytes) -> bool:
        return self._create_by_bid(name, data) if self._ignores_conditions() else self._create_if_absent(name, data)

    def upload(self, name: str, path: Path) -> None:
        # In parts when large; a multipart object appears when its last request completes.
        self._put(name, lambda key: self._client.upload_file(str(path), self.bucket, key, Config=_transfer()))

    def download(self, name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        key = self._key(name)  # boto3 writes a temporary file next to it and renames it
        self._ask(name, lambda: self._client.download_file(self.bucket, key, str(path), Config=_transfer()))

    def read(self, name: str) -> bytes:
        if (data := self._read_small(name)) is not None:
            return data
        buffer = io.BytesIO()
        self._fetch(name, buffer)
        return buffer.getvalue()

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        key = self._key(name)

        def read() -> bytes:
            wanted = f"bytes={offset}-{offset + size - 1}"
            answer = self._client.get_object(Bucket=self.bucket, Key=key, Range=wanted)
            with contextlib.closing(answer["Body"]) as body:
                begins = str(answer.get("ContentRange", "")).startswith(f"bytes {offset}-")
                if not begins:  # a server that knows no ranges sends all
                    body.read(offset)
                return bytes(body.read(None if begins else size))

        return self._ask(name, read) if size > 0 else b""

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
        key = self._key(name)
        found = self._ask(name, lambda: self._client.head_object(Bucket=self.bucket, Key=key)).get("ContentLength")
        if found is None:  # rclone under load
            entry = self.entries(name).get(name)
            if entry is None:
                raise self._missing(name)
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
        answer = self._ask("", lambda: self._client.list_objects_v2(Bucket=self.bucket, MaxKeys=1))
        date = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("date", "")
        try:
            return email.utils.parsedate_to_datetime(date).replace(tzinfo=UTC).timestamp()
        except ValueError:  # every server sends one
            return time.time()

    def folders(self, name: str = "") -> Names:
        start = folder_prefix(self.prefix) + folder_prefix(name)
        pages = self._pages(name, Prefix=start, Delimiter="/")
        return sorted(
            item["Prefix"][len(start) :].rstrip("/") for page in pages for item in page.get("CommonPrefixes", ())
        )

    def delete(self, name: str) -> None:
        key = self._key(name)
        with contextlib.suppress(MissingObjectError):  # some servers answer 404, S3 204
            self._ask(name, lambda: self._client.delete_object(Bucket=self.bucket, Key=key))

    def copy(self, name: str, target: str) -> None:
        from boto3.s3.transfer import TransferConfig

        source, key = {"Bucket": self.bucket, "Key": self._key(name)}, self._key(target)
        config = TransferConfig(multipart_threshold=_MAX_COPY, multipart_chunksize=_MAX_COPY)
        self._ask(name, lambda: self._client.copy(source, self.bucket, key, Config=config))

    def leftovers(self) -> Names:
        uploads = [f"unfinished upload of {name}" for name, *_ in self._uploads()]
        return [name for name in self.list() if PROBE in name or BID in name] + uploads

    def remove_leftovers(self) -> None:
        for name in self.list():
            if PROBE in name or BID in name:
                self.delete(name)
        self._abort([(name, upload) for name, upload, _ in self._uploads()])

    def _abort(self, uploads: list[tuple[str, str]]) -> None:
        for name, upload in uploads:
            abort = functools.partial(
                self._client.abort_multipart_upload, Bucket=self.bucket, Key=self._key(name), UploadId=upload
            )
            with contextlib.suppress(MissingObjectError):  # it was completed or aborted meanwhile
                self._ask(name, abort)

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

    @property
    def _endpoint(self) -> str:
        """Scheme and host that requests go to, without credentials of the URL."""
        parts = urlsplit(self._client.meta.endpoint_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    def _key(self, name: str) -> str:
        return folder_prefix(self.prefix) + checked_name(name)

    @property
    def _bucket_uri(self) -> str:
        return f"{self._endpoint}/{self.bucket}"

    def _pages(self, name: str, **arguments: str) -> list[Any]:
        """All pages of a listing."""
        pages: list[Any] = []
        more: dict[str, str] = {}
        while True:
            request = functools.partial(self._client.list_objects_v2, Bucket=self.bucket, **arguments, **more)
            pages.append(self._ask(name, request))
            if not pages[-1].get("IsTruncated"):
                return pages
            more = {"ContinuationToken": pages[-1]["NextContinuationToken"]}

    def _uploads(self) -> list[tuple[str, str, float]]:
        """Names, ids and times of begin of the multipart uploads under our prefix that were not completed."""
        root = folder_prefix(self.prefix)
        try:
            found = self._ask("", lambda: self._client.list_multipart_uploads(Bucket=self.bucket, Prefix=root))
        except LayerloopError:  # servers without that call, credentials without that right
            return []
        keys = [
            (item["Key"][len(root) :], str(item["UploadId"]), item["Initiated"].timestamp())
            for item in found.get("Uploads", ())
        ]
        return [key for key in keys if is_name(key[0])]

    def _put(self, name: str, put: Callable[[str], Any]) -> None:
        """Send an object. A 404 answers some servers' race of two first writers in a folder."""
        key = self._key(name)
        self._ask(name, lambda: put(key), again=("BadDigest", "NoSuchKey", "404"))

    def _fetch(self, name: str, file: BinaryIO) -> None:
        """The object into a file, in parts, several at once."""
        key = self._key(name)

        def fetch() -> None:
            file.seek(0)
            file.truncate()
            self._client.download_fileobj(self.bucket, key, file, Config=_transfer())

        self._ask(name, fetch)

    def _ask(self, name: str, request: Callable[[], T], *, let: tuple[str, ...] = (), again: tuple[str, ...] = ()) -> T:
        """The answer to a request, which is made again where the connection broke or the error's code is in `again`:
        boto3 repeats what failed before its answer began, and a broken answer of few calls."""
        from botocore.exceptions import ClientError

        for attempt in range(ATTEMPTS + 1):
            try:
                return request()
            except Exception as error:
                cause = _cause(error)
                refused = isinstance(cause, ClientError)
                repeat = _code(cause) in again if refused else _is_broken_answer(cause)
                if not repeat or attempt == ATTEMPTS:
                    with self._one_line(name, let=let):
                        raise cause from None
            time.sleep(min(5.0, 0.1 * 2**attempt))
        raise AssertionError("the last attempt returns or raises")

    def _read_small(self, name: str) -> bytes | None:
        """The object by one request, or None if it is large. One whose bytes are not those of its ETag is read again,
        until two reads agree: an ETag may be something else than their MD5."""
        key = self._key(name)

        def read() -> tuple[bytes | None, str]:
            answer = self._client.get_object(Bucket=self.bucket, Key=key)
            with contextlib.closing(answer["Body"]) as body:
                small = answer["ContentLength"] <= 2 * PART_BYTES
                return bytes(body.read()) if small else None, str(answer.get("ETag", "")).strip('"')

        data, etag = self._ask(name, read)
        while data is not None and self._bucket_uri not in _other_etags and _is_md5(etag) and _md5(data) != etag:
            once_more, etag = self._ask(name, read)
            if once_more == data:
                _other_etags.add(self._bucket_uri)
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
                self._ask(name, put, let=(*_EXISTS, *_CONFLICT), again=("BadDigest",))
                return True
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 412:
                    head = self._ask(name, lambda: self._client.head_object(Bucket=self.bucket, Key=key))
                    return bool(head["Metadata"].get(_TOKEN) == token)
                time.sleep(0.1 * 2**attempt)
        raise UnavailableError(f"{self.uri}/{name} is written by others all the time: try again")

    def _create_by_bid(self, name: str, data: bytes) -> bool:
        """Create where the store has no conditional writes: of those who bid at once the lowest bid puts the object.

        A bid that is older than a minute by the store's clock is of a creator that died.
        """
        if self.exists(name):
            return False
        bid = f"{name}{BID}{secrets.token_hex(8)}"
        self.write(bid, data)
        try:
            while True:
                time.sleep(BID_SECONDS)
                bids = self.entries(f"{name}{BID}")
                if self.exists(name):
                    return False
                if bid not in bids:  # removed as a leftover
                    self.write(bid, data)
                    continue
                alive = [n for n, entry in bids.items() if bids[bid].modified - entry.modified < _BID_EXPIRES]
                if min(alive) == bid:
                    self.write(name, data)
                    return self.read(name) == data
        finally:
            with contextlib.suppress(LayerloopError):
                self.delete(bid)

    def _ignores_conditions(self) -> bool:
        """Whether this bucket overwrites in spite of `If-None-Match: *`; tried once per process on a probe object."""
        if self._bucket_uri not in _ignores_conditions:
            name = f"{PROBE}{secrets.token_hex(8)}"
            self.write(name, b"")
            try:
                _ignores_conditions[self._bucket_uri] = not self._refuses_to_overwrite(name)
            finally:
                with contextlib.suppress(LayerloopError):  # credentials that may not delete are fine otherwise
                    self.delete(name)
            if _ignores_conditions[self._bucket_uri]:
                logging.getLogger(__name__).warning(
                    "s3://%s: no conditional writes here, so create-only writes bid for a second, and a writer that "
                    "stops in the middle may replace a manifest: run one job at a time on a campaign",
                    self.bucket,
                )
        return _ignores_conditions[self._bucket_uri]

    def _refuses_to_overwrite(self, name: str) -> bool:
        """Whether a create-only put of an existing object fails because it exists, not because of the header."""
        from botocore.exceptions import ClientError

        key, no = self._key(name), (*_EXISTS, "NotImplemented", "InvalidArgument", "InvalidRequest")
        try:
            self._ask(
                name,
                lambda: self._client.put_object(Bucket=self.bucket, Key=key, Body=b"", IfNoneMatch="*"),
                let=no,
            )
        except ClientError as error:
            return bool(error.response["ResponseMetadata"]["HTTPStatusCode"] == 412)
        return False

    @contextlib.contextmanager
    def _one_line(self, name: str, *, let: tuple[str, ...] = ()) -> Iterator[None]:
        """boto3's exceptions as one line each, without anything secret; error codes in `let` pass through."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ClientError as error:
            code = _code(error)
            if code in let:
                raise
            if code in ("NoSuchKey", "404"):
                raise self._missing(name) from None
            kind = UnavailableError if code in _BUSY or _status(error) >= 500 else LayerloopError
            raise kind(f"{self.uri}/{name}: {self._explain(error)}".replace("/:", ":")) from None
        except (NoCredentialsError, PartialCredentialsError):
            raise LayerloopError(
                f"{self.uri} needs credentials and none were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "a profile or a role"
            ) from None
        except (BotoCoreError, Boto3Error, HTTPError) as error:
            raise UnavailableError(
                f"{self.uri} does not answer at {self._endpoint} ({type(error).__name__}): "
                "check AWS_ENDPOINT_URL and the network"
            ) from None

    def _explain(self, error: Any) -> str:
        code = _code(error)
        match code:
            case "NoSuchBucket":
                return f"bucket {self.bucket} does not exist: create it or correct the URI"
            case "AccessDenied" | "403" | "AllAccessDisabled" | "AccountProblem":
                return f"access denied ({code}): allow get, put, list and delete to the credentials in use"
            case "ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired" | "RequestExpired":
                return f"the credentials have expired ({code}): renew them and run the step again"
            case "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "InvalidToken" | "InvalidSecurity":
                return f"the store refused the credentials ({code}): renew or correct them"
            case "RequestTimeTooSkewed":
                return f"this machine's clock is off{_skew(error)} ({code}): set it right"
            case "PermanentRedirect" | "AuthorizationHeaderMalformed" | "301" | "IllegalLocationConstraintException":
                region = error.response.get("Error", {}).get("Region") or ""
                advice = f", set AWS_REGION={region}" if region else ": set AWS_REGION to the bucket's"
                return f"bucket {self.bucket} is in another region ({code}){advice}"
            case "EntityTooLarge":
                return f"the store takes no object of this size ({code}): raise its limit"
            case _ if "quota" in code.lower() or "full" in code.lower() or _status(error) == 507:
                return f"there is no room left ({code}): free some space, or raise the quota"
            case _ if code in _BUSY:
                return f"the store is too busy ({code}): try again later, or lower the number of workers"
            case _:
                return f"the store answered {code or 'an error without a code'}: see its own log"


_BUSY = ("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "503", "429")


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)


def _cause(error: Exception) -> Exception:
    """The error that boto3's transfers wrapped, which says more than theirs."""
    from boto3.exceptions import RetriesExceededError, S3UploadFailedError
    from botocore.exceptions import ClientError
    from s3transfer.exceptions import RetriesExceededError as TransferRetriesExceededError

    if isinstance(error, (RetriesExceededError, TransferRetriesExceededError)):
        return _cause(error.last_exception) if isinstance(error.last_exception, Exception) else error
    inner = error.__cause__ or error.__context__
    return inner if isinstance(error, S3UploadFailedError) and isinstance(inner, ClientError) else error


def _is_broken_answer(error: Exception) -> bool:
    """Whether an answer began and was cut: what boto3 has tried again itself is not."""
    from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    kinds = (HTTPError, IncompleteReadError, ReadTimeoutError, ResponseParserError, ResponseStreamingError)
    return isinstance(error, kinds)


def _skew(error: Any) -> str:
    """` by 20 minutes`, where the answer says both clocks."""
    details = error.response.get("Error", {})
    times = []
    for name in ("RequestTime", "ServerTime"):
        digits = re.sub(r"\D", "", str(details.get(name, "")))[:14]
        with contextlib.suppress(ValueError):
            times.append(time.mktime(time.strptime(digits, "%Y%m%d%H%M%S")))
    return f" by {abs(times[0] - times[1]) / 60:.0f} minutes" if len(times) == 2 else ""


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _is_md5(etag: str) -> bool:
    return re.fullmatch("[0-9a-f]{32}", etag) is not None


def _send_md5(params: dict[str, Any], **_: Any) -> None:
    """Put the hash of a request's body into its headers, by which the server refuses a body that changed on its way."""
    body: Any = params.get("body")
    digest = hashlib.md5(usedforsecurity=False)
    if isinstance(body, (bytes, bytearray)):
        digest.update(body)
    elif hasattr(body, "seek") and hasattr(body, "read"):
        begin = body.tell()
        while block := body.read(1 << 20):
            digest.update(block)
        body.seek(begin)
    else:
        return
    params["headers"]["Content-MD5"] = base64.b64encode(digest.digest()).decode()


def _client() -> Any:
    """One client for one set of settings: making it takes 0.1 s, and threads may share it."""
    return _new_client(frozenset(item for item in os.environ.items() if item[0].startswith("AWS_")))


@functools.lru_cache(maxsize=8)
def _new_client(settings: frozenset[tuple[str, str]]) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        retries={"mode": "standard", "max_attempts": ATTEMPTS},  # waits between them double, with jitter
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=32,
        tcp_keepalive=True,
        # Shards carry their own sha256, and many S3-compatible servers refuse the newer checksum trailers.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        session = boto3.session.Session()
        region = session.region_name or os.environ.get("AWS_REGION") or "us-east-1"
        client = session.client("s3", config=config, region_name=region)
    except (BotoCoreError, ValueError) as error:
        raise LayerloopError(f"S3 settings are refused ({error}): check the AWS_* variables and profile") from None
    for operation in ("PutObject", "UploadPart"):
        client.meta.events.register(f"before-call.s3.{operation}", _send_md5)
    return client


def _transfer() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=2 * PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=8)
