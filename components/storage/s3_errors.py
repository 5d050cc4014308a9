"""What a bucket's server answers where it fails, in one line each: what is wrong and the remedy, nothing secret."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

from layerloop.components.storage.s3_pace import TooSlowError

BUSY = ("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "503", "429")
_ACTION = re.compile(r"\b(?:s3|kms):[A-Z][A-Za-z]{2,40}\b")  # as AWS names a right that lacks


def error_code(error: Any) -> str:
    """The code of a refusal; empty where the answer has none."""
    return str(error.response.get("Error", {}).get("Code", ""))


def error_status(error: Any) -> int:
    """The HTTP status of a refusal."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)


def is_passing(error: Exception) -> bool:
    """Whether a failure may not last: the server is busy, ill, restarting, or was not reached."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
    from urllib3.exceptions import HTTPError

    if isinstance(error, ClientError):
        return error_code(error) in BUSY or error_status(error) in (500, 502, 503, 504)
    if isinstance(error, BotoCoreError):
        return isinstance(error, HTTPClientError) or is_broken_answer(error)
    return isinstance(error, (Boto3Error, HTTPError))


def is_broken_answer(error: Exception) -> bool:
    """Whether an answer began and was cut: what boto3 has tried again itself is not."""
    from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    kinds = (HTTPError, IncompleteReadError, ReadTimeoutError, ResponseParserError, ResponseStreamingError)
    return isinstance(error, kinds)


def cause_of(error: Exception) -> Exception:
    """The error that boto3's transfers wrapped, which says more than theirs."""
    from boto3.exceptions import RetriesExceededError, S3UploadFailedError
    from botocore.exceptions import ClientError
    from s3transfer.exceptions import RetriesExceededError as TransferRetriesExceededError

    if isinstance(error, (RetriesExceededError, TransferRetriesExceededError)):
        return cause_of(error.last_exception) if isinstance(error.last_exception, Exception) else error
    inner = error.__cause__ or error.__context__
    return inner if isinstance(error, S3UploadFailedError) and isinstance(inner, ClientError) else error


def explanation(error: Any, bucket: str) -> str:
    """A refusal in words, without the name of the object."""
    code = error_code(error) or str(error_status(error) or "")
    if error.operation_name.startswith("AssumeRole"):
        return f"the role of AWS_ROLE_ARN or of the profile is refused ({code}): correct it, or the identity it is for"
    match code:
        case "NoSuchBucket":
            return f"bucket {bucket} does not exist: create it or correct the URI"
        case "AccessDenied" | "403" | "AllAccessDisabled" | "AccountProblem" | "Forbidden" | "UnauthorizedAccess":
            return f"access denied ({code}): {_rights(error)}"
        case "ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired" | "RequestExpired":
            return f"the credentials have expired ({code}): renew them and run the step again"
        case "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "InvalidToken" | "InvalidSecurity" | "401":
            return f"the store refused the credentials ({code}): renew or correct them"
        case "RequestTimeTooSkewed":
            return f"this machine's clock is off{_skew(error)} ({code}): set it right"
        case "PermanentRedirect" | "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException" | "301":
            return f"bucket {bucket} is in another region ({code}){_region(error)}"
        case "SecondLevelDomainForbidden" | "VirtualHostDomainRequired":
            return f"the store wants the bucket in the host name ({code}): set LAYERLOOP_S3_ADDRESSING=virtual"
        case "EntityTooLarge":
            return f"the store takes no object of this size ({code}): raise its limit"
        case _ if code.startswith("KMS"):
            return f"the store cannot use the key ({code}): correct LAYERLOOP_S3_KMS_KEY, or enable the key"
        case _ if "encryption" in code.lower():
            return f"the store refuses this encryption ({code}): set or leave out LAYERLOOP_S3_ENCRYPTION"
        case _ if "quota" in code.lower() or "full" in code.lower() or error_status(error) == 507:
            return f"there is no room left ({code}): free some space, or raise the quota"
        case _ if code in BUSY:
            return f"the store is too busy ({code}): try again later, or lower the number of workers"
        case "405" | "501" | "MethodNotAllowed" | "NotImplemented":
            return f"the server does not know this call ({code}): is AWS_ENDPOINT_URL the address of an S3 store?"
        case _ if code.isdigit():
            return f"the server answered {code}: see its log, or correct AWS_ENDPOINT_URL where it is not an S3 store"
        case _:
            return f"the store answered {code or 'an error without a code'}: see its own log"


def no_answer(error: Exception, where: str) -> str:
    """What is wrong where no S3 store has answered at the endpoint `where`."""
    from botocore.exceptions import ProxyConnectionError, SSLError
    from botocore.parsers import ResponseParserError

    kind = type(error).__name__
    if slow := next((one for one in _causes(error) if isinstance(one, TooSlowError)), None):
        return f"is too slow at {where} ({slow}): see to the store, the network and what is between, and run it again"
    if isinstance(error, ResponseParserError):
        return f"is not an S3 store at {where} ({kind}): correct AWS_ENDPOINT_URL"
    if isinstance(error, SSLError):
        return f"cannot be trusted at {where} ({kind}): set AWS_CA_BUNDLE to its CA's certificate, or correct the URL"
    if isinstance(error, ProxyConnectionError):
        name = f"{where.partition(':')[0].upper()}_PROXY"
        return (
            f"does not answer at {where} through the proxy of {name} ({kind}): correct it, or add the host to NO_PROXY"
        )
    return f"does not answer at {where} ({kind}): check AWS_ENDPOINT_URL and the network"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that led to it."""
    seen: list[BaseException] = []
    while error not in seen:
        yield error
        seen.append(error)
        wrapped = getattr(error, "kwargs", {}).get("error")  # of botocore's errors, whose context may be another by now
        inner = wrapped if isinstance(wrapped, BaseException) else error.__cause__ or error.__context__
        error = inner or error


def _rights(error: Any) -> str:
    """What to allow: the very right where the answer names it, as AWS does."""
    if found := _ACTION.search(str(error.response.get("Error", {}).get("Message", ""))):
        return f"allow {found[0]} to the credentials in use"
    wanted = {
        "ListObjectsV2": "list", "GetObject": "get", "HeadObject": "get", "PutObject": "put", "DeleteObject": "delete",
    }.get(error.operation_name)  # fmt: skip
    if wanted:
        return f"allow {wanted} to the credentials in use, which need get, put, list and delete"
    return "allow get, put, list and delete to the credentials in use"


def _region(error: Any) -> str:
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = error.response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region") or ""
    return f": set AWS_REGION={region}" if re.fullmatch(r"[a-z0-9-]{1,40}", region) else ": set AWS_REGION to its own"


def _skew(error: Any) -> str:
    """` by 20 minutes`, where the answer says both clocks."""
    details = error.response.get("Error", {})
    times = []
    for name in ("RequestTime", "ServerTime"):
        digits = re.sub(r"\D", "", str(details.get(name, "")))[:14]
        with contextlib.suppress(ValueError):
            times.append(time.mktime(time.strptime(digits, "%Y%m%d%H%M%S")))
    return f" by {abs(times[0] - times[1]) / 60:.0f} minutes" if len(times) == 2 else ""
