"""From a payload to the body of an answer: the openai client over HTTP, with every failure named.

The openai package does the API (URL, key, headers, error classes); its `post` takes our bytes as they are, since its
typed `create` spends 2 ms per request on traversing the images.
"""

from __future__ import annotations

import asyncio
import functools
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urljoin, urlsplit, urlunsplit

from layerloop.components.judge.errors import read_error, shown
from layerloop.components.judge.network import (
    BodyError,
    certificates,
    check_environment,
    is_direct,
    no_answer,
    plain_body,
    read_coding,
    refused_by_proxy,
    refused_proxy,
    why_none,
)
from layerloop.components.judge.replies import MAX_BODY, UnusableError
from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.schema.messages import printable

if TYPE_CHECKING:
    from openai import AsyncOpenAI

FATAL = {401: "refuses the key", 403: "refuses access"}
NO_CREDIT = re.compile(  # the last ones are of Moonshot, OpenAI, Alibaba, xAI and Zhipu ("balance is not enough")
    r"insufficient[_ ](?:quota|credits?|balance|funds)|not enough credits?|credit balance|out of credits?|"
    r"billing_hard_limit|payment required|exceeded_current_quota_error|billing_not_active|\barrear|"
    r"used all available credits|\u4f59\u989d\u4e0d\u8db3",
    re.IGNORECASE,
)
# Besides all 5xx; 424, 498 and 499 are a generation that failed (TGI), capacity (Groq) and a call cut off on its way.
TRANSIENT = frozenset({408, 409, 424, 425, 429, 498, 499})
BUSY = frozenset({429, 503, 529})
LONGEST_RETRY_AFTER = 120.0  # seconds of Retry-After that are obeyed
GONE = {403: "refuses access", **dict.fromkeys((404, 405, 410), "is not there any more")}  # after good answers
FORBIDDEN = 8  # of these in a row, until it is the key, or the endpoint, and not the requests

MAX_FILE = 1 << 30  # bytes of a file of answers, of a batch; any other body has MAX_BODY
LANE = 8  # connections of one HTTP client
LEAST_KEY = 5  # characters of a key that is looked for in what an endpoint says; local servers have none


class ForbiddenError(LayerloopError):
    """A 403 before anything was answered: of the key, or of this one request."""

    def __init__(self, message: str, text: str) -> None:
        super().__init__(message)
        self.text = text


class TransportError(Exception):
    """An attempt that brought no reply. `text` is all that the error's body says, of which the problem shows a part."""

    def __init__(
        self, problem: UnusableError, *, status: int | None = None, retry_after: float | None = None, text: str = ""
    ) -> None:
        super().__init__(str(problem))
        self.problem, self.status, self.retry_after, self.text = problem, status, retry_after, text


@dataclass
class _Lane:
    """An API client with connections of its own."""

    openai: AsyncOpenAI
    active: int = 0  # requests in flight


class Connection:
    """An endpoint of the OpenAI API.

    Requests in flight are spread over clients of LANE connections each: a pool of httpx looks at all of its connections
    for every request, which at hundreds of them takes longer than the request.
    """

    def __init__(self, url: str, key: str) -> None:
        import httpx2
        from openai import AsyncOpenAI

        self.url, self._url, self._key = without_secrets(url), url, key  # the first is shown
        check_environment(url)
        # Loading the certificates takes 50 ms, so it is done once, and not for plain HTTP.
        self._trust_env = not is_direct(url)
        self._verify = False if url.lower().startswith("http://") else certificates()
        try:
            client = self._client()
        except (ValueError, ImportError, httpx2.InvalidURL) as error:  # of a proxy: SOCKS, or no URL
            raise refused_proxy(url, error) from None
        parts = urlsplit(url)  # what a URL asks for (?api-version=...) goes behind the path of each call
        base, query = urlunsplit(parts._replace(query="", fragment="")), dict(parse_qsl(parts.query, True))
        self.openai = AsyncOpenAI(
            base_url=base, api_key=key, max_retries=0, http_client=client, default_query=query or None
        )
        self._lanes = [_Lane(self.openai)]
        self.answered = False  # by a completion, since this was opened
        self.forbidden = 0  # answers of GONE in a row

    def _client(self) -> Any:
        import httpx2
        from openai import DefaultAsyncHttpxClient

        return DefaultAsyncHttpxClient(
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=LANE),
            trust_env=self._trust_env,
            follow_redirects=False,  # a redirect would send images and key to another host
            verify=self._verify,
            headers={"Accept-Encoding": "identity"},  # bodies have a few kB
            event_hooks={"response": [_bound_body]},
        )

    def _lane(self) -> _Lane:
        """The first that has room, so that open connections are used again."""
        lane = next((lane for lane in self._lanes if lane.active < LANE), None)
        if lane is None:
            lane = _Lane(self.openai.with_options(http_client=self._client()))
            self._lanes.append(lane)
        return lane

    async def close(self) -> None:
        """Close all connections."""
        for lane in self._lanes:
            await lane.openai.close()

    async def post(self, payload: bytes, *, timeout: float) -> bytes:
        """The body of a chat completion with status 200.

        Raises:
            TransportError: anything else, by name.
            LayerloopError: the judge refuses the key.
        """
        import httpx2
        import openai

        lane = self._lane()
        lane.active += 1
        try:
            async with asyncio.timeout(timeout):  # of the whole: the client's own is of each read
                response = await lane.openai.post(
                    "/chat/completions",
                    cast_to=httpx2.Response,
                    content=payload,
                    options={"headers": {"Content-Type": "application/json"}, "timeout": timeout},
                )
            return bytes(response.content)
        except (openai.APITimeoutError, httpx2.TimeoutException, TimeoutError):
            raise TransportError(UnusableError("timeout", f"over {timeout:g} s")) from None
        except openai.APIStatusError as error:
            raise self.status_error(error) from None
        except BodyError as error:
            raise TransportError(error.problem) from None
        except (openai.APIConnectionError, httpx2.HTTPError, httpx2.StreamError, OSError) as error:
            if isinstance(error.__cause__, BodyError):
                raise TransportError(error.__cause__.problem) from None
            raise TransportError(UnusableError("connection", why_none(self._url, error))) from None
        finally:
            lane.active -= 1

    def status_error(self, error: Any) -> TransportError:
        """A 3xx, 4xx or 5xx as a TransportError. Raises LayerloopError where no request could succeed."""
        return self.refusal(int(error.status_code), error.response.content, error.response.headers)

    def refusal(self, status: int, body: bytes, headers: Mapping[str, str]) -> TransportError:
        """The TransportError of a status and its body.

        Raises:
            LayerloopError: no request could succeed: the key or the proxy's is refused, there is no credit, or it is
                gone.
        """
        text = self._words_of(body)
        if 300 <= status < 400 and not self.answered:
            raise LayerloopError(self._moved(status, headers))
        if status == 402 or (status in (400, 403, 429) and NO_CREDIT.search(text)):
            raise UnavailableError(
                f"judge {self.url} has no credit (HTTP {status}: {shown(text) or 'no reason given'}): add some and run "
                "the step again; what it has answered is stored, and only the rest is sent"
            )
        if status == 401 or (status == 403 and not self.answered):
            raise (LayerloopError if status == 401 else functools.partial(ForbiddenError, text=text))(
                f"judge {self.url} {FATAL[status]} (HTTP {status}{': ' if text else ''}{shown(text)}): "
                "set OPENAI_API_KEY to a key that it takes"
            )
        if status == 407:
            raise LayerloopError(refused_by_proxy(self._url, shown(text)))
        if status in GONE and self.answered:
            self.forbidden += 1
            if self.forbidden >= FORBIDDEN:
                raise UnavailableError(
                    f"judge {self.url} {GONE[status]} (HTTP {status}, {self.forbidden} times in a row: {shown(text)}): "
                    "see what it says; what it has answered is stored, so run the step again when that is settled"
                )
        problem = UnusableError(f"http_{status}", shown(text), retry=status in TRANSIENT or not 400 <= status < 500)
        return TransportError(problem, status=status, retry_after=read_retry_after(headers), text=text)

    def error_in_body(self, problem: UnusableError, body: bytes) -> TransportError:
        """The TransportError of a body with status 200 that is no completion but may be an error.

        Raises:
            LayerloopError: it says that there is no credit, or that the key is refused.
        """
        if problem.reason != "error_body":
            return TransportError(problem)
        text = self._words_of(body)
        code = re.search(r"\bcode (\d{3})\b", text)
        status = int(code[1]) if code else None
        if status in (401, 402):
            self.refusal(status, body, {})
        return TransportError(problem, status=status, text=text)

    def _words_of(self, body: bytes) -> str:
        """What an error says, without the key, of which some endpoints show all or a part."""
        text = read_error(body)
        return _without_keys(text.replace(self._key, "...") if len(self._key) > LEAST_KEY else text)

    def _moved(self, status: int, headers: Mapping[str, str]) -> str:
        """The line about a redirect, which is not followed."""
        target = urljoin(f"{self._url.rstrip('/')}/chat/completions", headers.get("location", ""))
        target = printable(without_secrets(target)).removesuffix("/chat/completions")
        to = f"to {target}: give that as its URL if it is" if headers.get("location") else "to nowhere: give the URL of"
        api = "an OpenAI-compatible API (--judge-url, OPENAI_BASE_URL)"
        return f"judge {self.url} redirects (HTTP {status}) {to} {api}"

    def saw_answer(self) -> None:
        """A completion came: the key is good, and a later 403 is about its request."""
        self.answered, self.forbidden = True, 0

    async def models(self, *, timeout: float) -> list[str]:
        """Ids of the models that are served; empty where the endpoint does not list them, or not for this key.

        Raises:
            LayerloopError: nothing answers at the URL.
        """
        import openai

        try:
            async with asyncio.timeout(timeout):
                page = await self.openai.models.list(timeout=timeout)
            return [str(model.id) for model in page.data or []]
        except (openai.APIConnectionError, TimeoutError) as error:
            if isinstance(error.__cause__, BodyError):
                return []
            raise no_answer(self._url, error) from None
        except Exception:  # refused, or not a list of models: it only serves a better message
            return []


def _without_keys(text: str) -> str:
    """A refusal of a key without the key, of which some endpoints show a part."""
    return re.sub(r"\b(?:sk|key|gsk|hf|AIza)[-_][\w*.-]+|[\w-]*\*{3,}[\w-]*", "...", text)


async def _bound_body(response: Any) -> None:
    """Event hook: let no body, of an error either, be read beyond MAX_BODY, nor a file beyond MAX_FILE; and unpack it
    within that, since a compressed one may be a decompression bomb."""
    import httpx2

    most = MAX_FILE if response.request.url.path.endswith("/content") else MAX_BODY
    coding = read_coding(response.headers)

    class Bounded(httpx2.AsyncByteStream):
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for part in plain_body(self.stream, coding, most):
                yield part

        async def aclose(self) -> None:
            await self.stream.aclose()

    response.headers.pop("content-encoding", None)
    response.stream = Bounded(response.stream)


def read_retry_after(headers: Any) -> float | None:
    """Seconds of retry-after-ms or Retry-After (a number or a date), bounded; None if there is none."""
    from email.utils import parsedate_to_datetime

    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError, OSError):
                continue
        if seconds >= 0:  # NaN fails this too
            return min(seconds, LONGEST_RETRY_AFTER)
    return None
