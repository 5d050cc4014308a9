"""Requests to a bucket: each is made again while what fails may pass, and refused in one line."""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.schema.messages import reason_of
from layerloop.components.storage.s3_client import ATTEMPTS
from layerloop.components.storage.s3_errors import (
    BUSY,
    cause_of,
    error_code,
    error_status,
    explanation,
    is_broken_answer,
    is_passing,
    no_answer,
)
from layerloop.components.storage.store import StoreError, missing_object

T = TypeVar("T")

PATIENCE = 120.0  # seconds in which a store that has answered before is asked again while it fails

_answered: set[str] = set()  # buckets at endpoints that have answered this process


class Requests:
    """Requests to the bucket at an endpoint. `uri` is the store's, for messages."""

    def __init__(self, endpoint: str, bucket: str, uri: str) -> None:
        self._endpoint, self._bucket, self._uri = endpoint, bucket, uri
        self.where = f"{endpoint}/{bucket}"

    @property
    def have_succeeded(self) -> bool:
        """Whether this process has had an answer from the bucket that is no error."""
        return self.where in _answered

    def ask(self, name: str, request: Callable[[], T], *, let: tuple[str, ...] = (), again: tuple[str, ...] = ()) -> T:
        """The answer to a request, which is made again where the connection broke or the error's code is in `again`:
        boto3 repeats what failed before its answer began, and a broken answer of few calls. It stops early where many
        requests fail at once, so a store that has answered before is asked for `PATIENCE` seconds."""
        began = time.monotonic()
        for attempt in itertools.count():
            try:
                answer = request()
            except Exception as error:
                cause = cause_of(error)
                if not self._is_worth_another(cause, attempt, again, time.monotonic() - began):
                    with self._one_line(name, let=let):
                        raise cause from None
            else:
                _answered.add(self.where)
                return answer
            time.sleep(min(5.0, 0.1 * 2**attempt) * random.uniform(0.5, 1.0))
        raise AssertionError("the last attempt returns or raises")

    def _is_worth_another(self, error: Exception, attempt: int, again: tuple[str, ...], seconds: float) -> bool:
        from botocore.exceptions import ClientError

        refused = isinstance(error, ClientError)
        if refused and attempt < ATTEMPTS and error_code(error) in again:
            return True
        if is_broken_answer(error) and attempt < ATTEMPTS and (attempt == 0 or seconds < PATIENCE):
            return True
        return is_passing(error) and self.have_succeeded and seconds < PATIENCE

    @contextlib.contextmanager
    def _one_line(self, name: str, *, let: tuple[str, ...] = ()) -> Iterator[None]:
        """boto3's exceptions as one line each, without anything secret; error codes in `let` pass through."""
        from boto3.exceptions import Boto3Error
        from botocore import exceptions as boto
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        try:
            yield
        except boto.ClientError as error:
            code = error_code(error)
            if code in let:
                raise
            if code in ("NoSuchKey", "404"):
                raise missing_object(self._uri, name) from None
            kind = UnavailableError if code in BUSY or error_status(error) >= 500 else StoreError
            raise kind(f"{self._uri}/{name}: {explanation(error, self._bucket)}".replace("/:", ":")) from None
        except (boto.NoCredentialsError, boto.PartialCredentialsError):
            raise StoreError(
                f"{self._uri} needs credentials and none were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "a profile or a role"
            ) from None
        except (boto.CredentialRetrievalError, boto.MetadataRetrievalError, boto.SSOError) as error:
            raise StoreError(
                f"{self._uri}: the profile or role gives no credentials ({type(error).__name__}): sign in again, or "
                "correct it"
            ) from None
        except RecursionError:  # boto3 looks for the bucket's region where it is sent elsewhere, and is sent elsewhere
            raise LayerloopError(
                f"{self._uri}: {self._endpoint} redirects every request: correct AWS_ENDPOINT_URL (https?), or "
                "set AWS_REGION to the bucket's"
            ) from None
        except boto.ParamValidationError:
            raise LayerloopError(f"{self._uri} names no bucket that can exist: correct the URI") from None
        except (boto.BotoCoreError, Boto3Error, HTTPError, ResponseParserError) as error:
            raise UnavailableError(f"{self._uri} {no_answer(error, self._endpoint)}") from None
        except OSError as error:
            if error.filename is None:  # not of a profile's token, which is read when a request is signed
                raise
            raise LayerloopError(
                f"{self._uri}: {error.filename}, which the profile names, cannot be read ({reason_of(error)}): correct "
                "it, or mount the token"
            ) from None
