"""The store in an S3 bucket, or in any server that speaks S3. Settings are read from the environment by boto3:
AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.storage.store import MissingObjectError, Names, Store, checked_name, folder_prefix, is_name

_TOKEN = "layerloop-writer"  # object metadata: who wrote it, so that a retried request can recognise its own success
ATTEMPTS = 8  # retries of a request that was throttled, lost or answered with 5xx
PART_BYTES = 32 << 20  # larger objects travel in parts of this size, several at once
_CONFLICTS = 5  # a 409 (another writer is in the middle of the same name) is retried this often

_ignores_conditions: dict[str, bool] = {}  # bucket at endpoint -> whether it was seen to overwrite on If-None-Match: *


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

    def write(self, name: str, data: bytes) -> None:
        with self._one_line(name):
            self._client.put_object(Bucket=self.bucket, Key=self._key(name), Body=data)

    def create(self, name: str, data: bytes) -> bool:
        if self._ignores_conditions():
            if self.exists(name):
                return False
            self.write(name, data)
            return True
        return self._create_if_absent(name, data)

    def upload(self, name: str, path: Path) -> None:
        with self._one_line(name):  # in parts when large; a multipart object appears when its last request completes
            self._client.upload_file(str(path), self.bucket, self._key(name), Config=_transfer())

    def download(self, name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._one_line(name):  # boto3 writes a temporary file next to it and renames it
            self._client.download_file(self.bucket, self._key(name), str(path), Config=_transfer())

    def read(self, name: str) -> bytes:
        if (data := self._read_small(name)) is not None:
            return data
        buffer = io.BytesIO()
        with self._one_line(name):  # in parts, several at once
            self._client.download_fileobj(self.bucket, self._key(name), buffer, Config=_transfer())
        return buffer.getvalue()

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        with tempfile.TemporaryFile(prefix="layerloop-") as file:
            with self._one_line(name):
                self._client.download_fileobj(self.bucket, self._key(name), file, Config=_transfer())
            file.seek(0)
            yield file

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except MissingObjectError:
            return False
        return True

    def size(self, name: str) -> int:
        with self._one_line(name):
            return int(self._client.head_object(Bucket=self.bucket, Key=self._key(name))["ContentLength"])

    def sizes(self, prefix: str = "") -> dict[str, int]:
        root = folder_prefix(self.prefix)
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=root + prefix)
        with self._one_line(prefix):
            found = {item["Key"][len(root) :]: int(item["Size"]) for page in pages for item in page.get("Contents", ())}
        return {name: found[name] for name in sorted(found) if is_name(name)}  # consoles make "folder/" objects, too

    def folders(self, name: str = "") -> Names:
        start = folder_prefix(self.prefix) + folder_prefix(name)
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start, Delimiter="/")
        with self._one_line(name):
            return sorted(
                item["Prefix"][len(start) :].rstrip("/") for page in pages for item in page.get("CommonPrefixes", ())
            )

    def delete(self, name: str) -> None:
        with self._one_line(name):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(name))

    def check_writable(self) -> None:
        self._ignores_conditions()  # writes an object and deletes it

    @property
    def _endpoint(self) -> str:
        """Scheme and host that requests go to, without credentials of the URL."""
        parts = urlsplit(self._client.meta.endpoint_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    def _key(self, name: str) -> str:
        return folder_prefix(self.prefix) + checked_name(name)

    def _read_small(self, name: str) -> bytes | None:
        """The object by one request, or None if it is large. boto3 retries requests, but not a body that breaks off."""
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        attempt = 0
        while True:
            with self._one_line(name):
                answer = self._client.get_object(Bucket=self.bucket, Key=self._key(name))
                with contextlib.closing(answer["Body"]) as body:
                    if answer["ContentLength"] > 2 * PART_BYTES:
                        return None
                    try:
                        return bytes(body.read())
                    except (HTTPClientError, IncompleteReadError):
                        if attempt == ATTEMPTS:
                            raise
            time.sleep(0.1 * 2**attempt)
            attempt += 1

    def _create_if_absent(self, name: str, data: bytes) -> bool:
        """One conditional put. A 412 may answer our own retried request whose first answer was lost."""
        from botocore.exceptions import ClientError

        token = secrets.token_hex(16)
        for attempt in range(_CONFLICTS):
            try:
                with self._one_line(name, let=("PreconditionFailed", "ConditionalRequestConflict")):
                    self._client.put_object(
                        Bucket=self.bucket, Key=self._key(name), Body=data, IfNoneMatch="*", Metadata={_TOKEN: token}
                    )
                return True
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 412:
                    with self._one_line(name):
                        head = self._client.head_object(Bucket=self.bucket, Key=self._key(name))
                    return bool(head["Metadata"].get(_TOKEN) == token)
                time.sleep(0.1 * 2**attempt)
        raise LayerloopError(f"{self.uri}/{name} is written by others all the time: try again")

    def _ignores_conditions(self) -> bool:
        """Whether this bucket overwrites in spite of `If-None-Match: *`; tried once per process on a probe object."""
        bucket_uri = f"{self._endpoint}/{self.bucket}"
        if bucket_uri not in _ignores_conditions:
            name = f".conditional-write-probe-{secrets.token_hex(8)}"
            self.write(name, b"")
            _ignores_conditions[bucket_uri] = not self._refuses_to_overwrite(name)
            with contextlib.suppress(LayerloopError):  # credentials that may not delete are fine otherwise
                self.delete(name)
            if _ignores_conditions[bucket_uri]:
                logging.getLogger(__name__).warning(
                    "s3://%s: no conditional writes here, so create-only writes are check-then-put", self.bucket
                )
        return _ignores_conditions[bucket_uri]

    def _refuses_to_overwrite(self, name: str) -> bool:
        """Whether a create-only put of an existing object fails because it exists, not because of the header."""
        from botocore.exceptions import ClientError

        try:
            with self._one_line(name, let=("PreconditionFailed", "NotImplemented", "InvalidArgument")):
                self._client.put_object(Bucket=self.bucket, Key=self._key(name), Body=b"", IfNoneMatch="*")
        except ClientError as error:
            return bool(error.response["ResponseMetadata"]["HTTPStatusCode"] == 412)
        return False

    @contextlib.contextmanager
    def _one_line(self, name: str, *, let: tuple[str, ...] = ()) -> Iterator[None]:
        """boto3's exceptions as one line each, without anything secret; error codes in `let` pass through."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in let:
                raise
            if code in ("NoSuchKey", "404"):
                raise self._missing(name) from None
            raise LayerloopError(f"{self.uri}/{name}: {self._explain(code)}") from None
        except (NoCredentialsError, PartialCredentialsError):
            raise LayerloopError(
                f"{self.uri} needs credentials and none were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "a profile or a role"
            ) from None
        except (BotoCoreError, Boto3Error) as error:
            raise UnavailableError(
                f"{self.uri} does not answer at {self._endpoint} ({type(error).__name__}): "
                "check AWS_ENDPOINT_URL and the network"
            ) from None

    def _explain(self, code: str) -> str:
        match code:
            case "NoSuchBucket":
                return f"bucket {self.bucket} does not exist: create it or correct the URI"
            case "AccessDenied" | "403" | "AllAccessDisabled" | "AccountProblem":
                return f"access denied ({code}): allow get, put, list and delete to the credentials in use"
            case "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "ExpiredToken" | "InvalidToken":
                return f"the store refused the credentials ({code}): renew or correct them"
            case _:
                return f"the store answered {code or 'an error without a code'}: see its own log"


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
        return session.client("s3", config=config, region_name=region)
    except (BotoCoreError, ValueError) as error:
        raise LayerloopError(f"S3 settings are refused ({error}): check the AWS_* variables and profile") from None


def _transfer() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=2 * PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=8)
