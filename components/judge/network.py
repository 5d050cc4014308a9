"""What stands between the client and a judge: certificates, proxies, codings of bodies; and why a connection failed.

All of it is of the environment that people set and seldom see, so each fault is a line that names the variable.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from layerloop.components.judge.replies import UnusableError
from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.schema.messages import printable

_HEADERS = {"OPENAI_ORG_ID": "", "OPENAI_PROJECT_ID": "", "OPENAI_CUSTOM_HEADERS": "\n"}  # and what parts several
_UNPACKED = ("gzip", "x-gzip", "deflate")


class BodyError(Exception):
    """A body that cannot be read, and why."""

    def __init__(self, problem: UnusableError) -> None:
        super().__init__(str(problem))
        self.problem = problem


class TooLargeError(BodyError):
    """A body that is longer than any judgement."""

    def __init__(self, most: int) -> None:
        super().__init__(UnusableError("body_too_large", f"over {most >> 20} MB"))


def check_environment(url: str) -> None:
    """Refuse variables that would make every request fail.

    Raises:
        LayerloopError: a proxy for `url` that is no address, or a header that HTTP cannot carry.
    """
    import httpx2

    try:
        httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError) as error:
        raise LayerloopError(
            f"judge_url is {printable(without_secrets(url))} ({_line(error)}): give a base URL such as "
            "http://127.0.0.1:8788/v1"
        ) from None
    for name, between in _HEADERS.items():  # which the openai package sends
        if any(not " " <= letter <= "~" for letter in os.environ.get(name, "") if letter not in between):
            raise LayerloopError(f"{name} has characters that no HTTP header has: correct it, or unset it")
    for name in _proxies(url) if not is_direct(url) else ():
        given = os.environ[name]
        try:
            parts = urlsplit(given if "://" in given else f"http://{given}")
            good = bool(parts.hostname) and parts.port != 0 and not any(letter.isspace() for letter in given)
        except ValueError:  # a port that is no number or over 65535, or brackets that do not match
            good = False
        if not good:
            raise LayerloopError(
                f"{name} is {printable(_without_password(given))!r}, which is no address of a proxy: write it as "
                "http://proxy:3128, unset it, or put the judge's host in NO_PROXY"
            )


def refused_proxy(url: str, error: Exception) -> LayerloopError:
    """The refusal of a proxy that the HTTP client cannot use: SOCKS, as a rule."""
    given = [name for name in ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY") for name in (name, name.lower())]
    given = [name for name in given if os.environ.get(name)]
    odd = [name for name in given if not os.environ[name].startswith(("http://", "https://"))]
    name = (odd or given or ["the proxy"])[0]
    return LayerloopError(
        f"{name} is {printable(_without_password(os.environ.get(name, '')))}, which cannot be used for judge "
        f"{without_secrets(url)} ({_line(error)[:100]}): unset it, give an http:// proxy, or put the host in NO_PROXY"
    )


def refused_by_proxy(url: str, said: str) -> str:
    """The line about a proxy that wants a password."""
    name = (_proxies(url) or ["the environment"])[0]
    return (
        f"the proxy of {name} refuses judge {without_secrets(url)} (HTTP 407{': ' if said else ''}{said}): write its "
        "user and password into it, http://user:password@proxy:3128, or put the judge's host in NO_PROXY"
    )


def certificates() -> Any:
    """The TLS context of the environment.

    Raises:
        LayerloopError: SSL_CERT_FILE or SSL_CERT_DIR names nothing usable, or SSLKEYLOGFILE cannot be written.
    """
    import httpx2

    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        path = os.environ.get(name)
        several = (path or "").split(os.pathsep) if name == "SSL_CERT_DIR" else [path or ""]
        if path and not any(os.path.exists(one) for one in several):
            raise LayerloopError(f"{name} is {path}, which does not exist: correct it, or unset it")
    log = os.environ.get("SSLKEYLOGFILE")
    try:
        return httpx2.create_ssl_context()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        if log and getattr(error, "filename", None) == log:
            raise LayerloopError(f"SSLKEYLOGFILE is {log}, which cannot be written ({error}): unset it") from None
        path = os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR") or "certifi's"
        raise LayerloopError(f"the certificates of {path} cannot be loaded ({error}): correct SSL_CERT_FILE") from None


def is_direct(url: str) -> bool:
    """Whether the environment's proxy has no part in calling the URL: of this machine, or named in NO_PROXY."""
    from urllib.request import proxy_bypass

    host = urlsplit(url).hostname or ""
    here = host in {"localhost", "::1", "0.0.0.0", "::"} or host.startswith("127.")
    return here or bool(proxy_bypass(host))


def no_answer(url: str, error: BaseException) -> LayerloopError:
    """The refusal of a judge that no connection could be made to."""
    shown, why = without_secrets(url), why_none(url, error)
    if any(isinstance(cause, ssl.SSLError) for cause in _causes(error)):
        return LayerloopError(
            f"judge {shown} cannot be called by TLS ({why}): set SSL_CERT_FILE to the certificate of its authority, or "
            "correct the URL (--judge-url, OPENAI_BASE_URL)"
        )
    return UnavailableError(
        f"judge {shown} does not answer ({why}): start it (`layerloop judge serve`), or give its URL (--judge-url, "
        "OPENAI_BASE_URL)"
    )


def why_none(url: str, error: BaseException) -> str:
    """Why a connection brought no answer, in a few words, with the proxy's variable where there is one."""
    causes = _causes(error)
    said = next((text for cause in reversed(causes) if (text := _of_system(cause))), None)
    if said is None:
        last = causes[0] if len(causes) < 2 else causes[1]  # what the HTTP client says, inside what openai says
        said = f"{type(last).__name__}: {_line(last)}" if str(last) else type(last).__name__
    proxies = _proxies(url) if not is_direct(url) else []
    return f"{said[:150]}, through the proxy of {proxies[0]}" if proxies else said[:150]


def _of_system(error: BaseException) -> str | None:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        odd = error.reason == "WRONG_VERSION_NUMBER"
        return "no TLS is spoken there: is it an http:// URL?" if odd else f"TLS fails: {error.reason or error}"
    if isinstance(error, socket.gaierror):
        return f"its host is not known: {error.strerror}"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return None


def _causes(error: BaseException) -> list[BaseException]:
    found = [error]
    while (inner := found[-1].__cause__ or found[-1].__context__) is not None and len(found) < 12:
        found.append(inner)
    return found


def _proxies(url: str) -> list[str]:
    """Names of the variables whose proxy is used for a URL, the first of them."""
    scheme = urlsplit(url).scheme.lower()
    names = [name for kind in (scheme, "all") for name in (f"{kind}_proxy", f"{kind.upper()}_PROXY")]
    return [name for name in names if os.environ.get(name)][:1]


def _line(error: BaseException) -> str:
    return printable(" ".join(str(error).split())) or type(error).__name__


def _without_password(url: str) -> str:
    return re.sub(r"^(\w+://)?.*@", r"\1...@", url)


# -------------------------------------------------------------------------------------------------------------- bodies


def read_coding(headers: Mapping[str, str]) -> str:
    """How a body is coded, though `identity` was asked for: empty, `gzip` or `deflate`; what is no coding is none.

    Raises:
        BodyError: a coding that is not read.
    """
    coding = headers.get("content-encoding", "").strip().lower()
    if coding in _UNPACKED:
        return coding.removeprefix("x-")
    if coding in ("br", "zstd", "compress") or "," in coding:
        detail = f"{coding}, which was not asked for: switch compression off at the endpoint or its proxy"
        raise BodyError(UnusableError("body_compressed", printable(detail)))
    return ""


async def plain_body(stream: AsyncIterable[bytes], coding: str, most: int) -> AsyncIterator[bytes]:
    """A body without its coding, which some gateways add whatever is asked; one that is marked and plain is left.

    Raises:
        BodyError: over `most` bytes, packed or not, of which no more are unpacked; or packed and damaged or cut off.
    """
    size, unpacker = 0, None
    head: bytes | None = b""  # the first two bytes may come one by one
    async for chunk in stream:
        if head is not None:
            head += chunk
            if len(head) < 2:
                continue
            zipped = head[0] & 15 == 8 and int.from_bytes(head[:2], "big") % 31 == 0  # RFC 1950, section 2.2
            if head.startswith(b"\x1f\x8b") or (coding == "deflate" and zipped):
                unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)
            chunk, head = head, None
        while chunk:
            try:
                part = chunk if unpacker is None else unpacker.decompress(chunk, most - size + 1)
            except zlib.error as error:
                raise BodyError(UnusableError("body_compressed", f"and damaged ({_line(error)})")) from None
            chunk = b"" if unpacker is None else unpacker.unconsumed_tail
            size += len(part)
            if size > most:
                raise TooLargeError(most)
            yield part
    if unpacker is not None and not unpacker.eof:
        raise BodyError(UnusableError("body_compressed", "and cut off"))
    if head:
        yield head
