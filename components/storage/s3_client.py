"""The client of a bucket, boto3's, with its settings from the environment.

boto3 itself reads AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, AWS_REGION, AWS_CA_BUNDLE and the standard credential chain:
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (with AWS_SESSION_TOKEN), a profile, a web identity (IRSA), the role of a
container or an instance. Beside these:

    LAYERLOOP_S3_ENCRYPTION   AES256, aws:kms or aws:kms:dsse: how the store is to encrypt what is written; by default
                              as the bucket says
    LAYERLOOP_S3_KMS_KEY      id, alias or ARN of the key for aws:kms; by default the bucket's or the account's
    LAYERLOOP_S3_ADDRESSING   virtual for a store that wants the bucket in the host name, path for one that wants it in
                              the path; by default as AWS wants it there, and path everywhere else
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.messages import reason_of
from layerloop.components.storage.s3_pace import keep_pace

ENCRYPTION: Final = "LAYERLOOP_S3_ENCRYPTION"
KMS_KEY: Final = "LAYERLOOP_S3_KMS_KEY"
ADDRESSING: Final = "LAYERLOOP_S3_ADDRESSING"
ATTEMPTS = 8  # of a request that was throttled, lost or answered with 5xx, by boto3 itself

_CHOICES = {ENCRYPTION: ("AES256", "aws:kms", "aws:kms:dsse"), ADDRESSING: ("virtual", "path")}
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_TOKEN_FILES = ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
_SENT = "layerloop-crc32"  # in the context of a call: the value that went with it
_WRITES = ("PutObject", "CreateMultipartUpload", "CopyObject")  # the calls that make an object


def client() -> Any:
    """One client for one set of settings: making it takes 0.1 s, and threads may share it.

    Raises:
        LayerloopError: a setting that boto3 or the store's protocol does not know.
    """
    return _new_client(frozenset(item for item in os.environ.items() if item[0].startswith(("AWS_", "LAYERLOOP_S3_"))))


def endpoint(made: Any) -> str:
    """Scheme and host that a client's requests go to, without credentials of the URL."""
    scheme, _, rest = str(made.meta.endpoint_url).partition("://")
    return f"{scheme}://{re.split('[/?#]', rest)[0].rpartition('@')[2]}"


def _check_variables(given: Mapping[str, str]) -> None:
    """Refuse what boto3 would find out late, in words that do not name it, or would send to another host.

    Raises:
        LayerloopError: a key with a character that no key has, an endpoint that is none, a token's file that cannot be
            read; never with a value that is secret.
    """
    for name in _KEYS:
        if any(not "!" <= letter <= "~" for letter in given.get(name, "")):
            raise LayerloopError(f"{name} has a blank, a line break or a letter that no key has: set it without")
    for name in _ENDPOINTS:
        if (url := given.get(name, "")) and not _is_endpoint(url):
            raise LayerloopError(
                f"{name} is {without_secrets(url)!r}, which is no address of a store: write it as https://host:port"
            )
    for name in _TOKEN_FILES if not given.get(_KEYS[0]) else ():
        if path := given.get(name):
            try:
                Path(path).read_text()
            except (OSError, UnicodeDecodeError) as error:
                reason = reason_of(error) if isinstance(error, OSError) else "it is not text"
                raise LayerloopError(
                    f"{name} is {path}, which cannot be read ({reason}): correct it, or mount the token"
                ) from None


def _is_endpoint(url: str) -> bool:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number or over 65535, or brackets that do not match
        return False
    return good and not parts.query and not parts.fragment and url.isprintable() and " " not in url


@functools.lru_cache(maxsize=8)
def _new_client(settings: frozenset[tuple[str, str]]) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    given = dict(settings)
    _check_variables(given)
    encryption, addressing = _encryption(given), _choice(given, ADDRESSING)
    config = Config(
        retries={"mode": "standard", "max_attempts": ATTEMPTS},  # waits between them double, with jitter
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=32,
        tcp_keepalive=True,
        # Requests carry checksums of ours (`Checksums`): many S3-compatible servers refuse the newer trailers.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": addressing} if addressing else None,
    )
    try:
        session = boto3.session.Session()
        region = session.region_name or os.environ.get("AWS_REGION") or "us-east-1"
        made = session.client("s3", config=config, region_name=region)
    except (BotoCoreError, ValueError, OSError, AttributeError, TypeError) as error:  # of files and values of a profile
        reason = " ".join(str(error).split())[:300]
        raise LayerloopError(f"S3 settings are refused ({reason}): check the AWS_* variables and profile") from None
    keep_pace(made)
    ours = checksums(endpoint(made))
    for operation in ("PutObject", "UploadPart"):
        made.meta.events.register(f"before-parameter-build.s3.{operation}", ours.add)
        made.meta.events.register(f"after-call.s3.{operation}", ours.learn)
    for operation in _WRITES if encryption else ():
        made.meta.events.register(f"provide-client-params.s3.{operation}", _with(encryption))
    return made


def _encryption(settings: Mapping[str, str]) -> dict[str, str]:
    """Parameters of the calls that write; empty where nothing is asked for."""
    chosen, key = _choice(settings, ENCRYPTION), settings.get(KMS_KEY, "").strip()
    if key and not chosen.startswith("aws:kms"):
        raise LayerloopError(f"{KMS_KEY} is set but {ENCRYPTION} is {chosen or 'not'}: set it to aws:kms too")
    return {"ServerSideEncryption": chosen} | ({"SSEKMSKeyId": key} if key else {}) if chosen else {}


def _choice(settings: Mapping[str, str], name: str) -> str:
    value = settings.get(name, "").strip()
    if value and value not in _CHOICES[name]:
        raise LayerloopError(f"{name} is {value!r}: choose {', '.join(_CHOICES[name])}, or leave it out")
    return value


def _with(added: Mapping[str, str]) -> Callable[..., dict[str, Any]]:
    """A hook of boto3 that adds parameters to a call."""

    def add(params: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        return {**params, **added}

    return add


class Checksums:
    """The hash in a request's headers, by which the store refuses a body that changed on its way.

    Every store compares Content-MD5, which costs both sides more than all the rest of sending a file. CRC-32 costs a
    fifth, but stores of other makers refuse it or overlook it: a request that asks for it (`ChecksumAlgorithm`) brings
    both until an answer has shown the store's own.
    """

    def __init__(self) -> None:
        self.compares_crc32: bool | None = None  # None: not known yet

    def add(self, params: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
        """To the parameters of a call."""
        crc32 = params.get("ChecksumAlgorithm") == "CRC32"
        if crc32:
            value = 0
            for block in _blocks(params.get("Body", b"")):
                value = zlib.crc32(block, value)
            params["ChecksumCRC32"] = context[_SENT] = base64.b64encode(value.to_bytes(4, "big")).decode()
        if not (crc32 and self.compares_crc32):
            digest = hashlib.md5(usedforsecurity=False)
            for block in _blocks(params.get("Body", b"")):
                digest.update(block)
            params["ContentMD5"] = base64.b64encode(digest.digest()).decode()

    def learn(self, parsed: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
        """From an answer: a store that has compared a CRC-32 says it back."""
        if _SENT in context and parsed.get("ResponseMetadata", {}).get("HTTPStatusCode") == 200:
            self.compares_crc32 = parsed.get("ChecksumCRC32") == context[_SENT]


@functools.cache
def checksums(store: str) -> Checksums:
    """What this process knows of the store at an endpoint."""
    return Checksums()


def _blocks(body: Any) -> Iterator[bytes | memoryview]:
    """A request's body; a file is left where it was."""
    if isinstance(body, (bytes, bytearray)):
        yield memoryview(body)
        return
    begin = body.tell()
    while block := body.read(1 << 20):
        yield block
    body.seek(begin)
