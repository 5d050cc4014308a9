"""Batch API mode: requests are gathered in a file, the file is uploaded and polled for, the answers are delivered.

For the rest of the judge `await batches(key, payload)` replaces one HTTP request. A batch is sent when no request has
joined it for a while, which is when everybody waits, or when it is full. Batches in progress are entered in a ledger,
so a step that was killed finds them again and pays for nothing twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Protocol, TypeVar

from layerloop.components.judge.errors import read_error, shown
from layerloop.components.judge.network import TooLargeError
from layerloop.components.judge.replies import UnusableError
from layerloop.components.judge.transport import MAX_FILE, Connection, TransportError
from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.schema.runtime import BatchRuntime

T = TypeVar("T")
ENDPOINT = "/v1/chat/completions"
OVER = frozenset({"completed", "failed", "expired", "cancelled"})
LABEL = "layerloop"  # metadata key under which a batch carries the digest of its requests
ODD_ANSWERS = 3  # to one call that are none of the API, until it has no batches
POLL_FAILURES = 20  # in a row, until the judge counts as gone
CALL_SECONDS = 120.0  # of a call about a batch, in all
FILE_SECONDS = 3600.0  # of sending or fetching a file


class Ledger(Protocol):
    """Storage of the batches in progress; the step keeps it in the campaign. Called from worker threads."""

    def entries(self) -> Mapping[str, dict[str, Any]]:
        """State of every batch, by name."""

    def enter(self, name: str, entry: dict[str, Any]) -> None:
        """Store the state of a batch under its name."""


class LedgerMemory(dict[str, dict[str, Any]]):
    """A `Ledger` that lasts as long as the process."""

    def entries(self) -> Mapping[str, dict[str, Any]]:
        return self

    def enter(self, name: str, entry: dict[str, Any]) -> None:
        self[name] = entry


@dataclass
class _Gathering:
    """A file of requests that is not sent yet."""

    file: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    waiting: dict[str, asyncio.Future[bytes]] = field(default_factory=dict)
    size: int = 0
    last: float = field(default_factory=time.monotonic)

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(sorted(self.waiting)).encode()).hexdigest()


class Batches:
    """`Post` by batches. Use as `async with Batches(connection, runtime, ledger) as post`.

    A batch that fails altogether, or takes longer than the runtime allows, ends everything with a LayerloopError.
    """

    def __init__(self, connection: Connection, runtime: BatchRuntime, ledger: Ledger) -> None:
        self.connection, self.runtime, self.ledger = connection, runtime, ledger
        self.sent = 0  # batches created
        self._gathering = _Gathering()
        self._known: dict[str, str] = {}  # request key -> name of the ledger's entry that has it in progress
        self._entries: dict[str, dict[str, Any]] = {}
        self._waiting: dict[
            str, dict[str, asyncio.Future[bytes]]
        ] = {}  # entry -> request key -> futures of its callers
        self._early: dict[str, bytes] = {}  # answers of batches of an earlier run that nobody has asked for yet
        self._tasks: set[asyncio.Task[None]] = set()
        self._closer: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Read the ledger; batches of an earlier run are resumed as soon as one of their requests is asked again."""
        self._entries = dict(await asyncio.to_thread(self.ledger.entries))
        for name, entry in self._entries.items():
            self._known.update(dict.fromkeys(set(entry["keys"]) - set(entry["failed"]), name))

    async def close(self) -> None:
        """Cancel all waiting; the ledger keeps the batches for the next run."""
        for task in (*self._tasks, *([self._closer] if self._closer else [])):
            task.cancel()
        self._gathering.file.close()

    async def __call__(self, key: str, payload: bytes) -> bytes:
        """The body of one answer.

        Raises:
            TransportError: this request failed or is missing from its batch; it may be asked again.
            LayerloopError: its batch failed.
        """
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if key in self._early:
            return self._early.pop(key)
        name = self._known.get(key)
        if name is not None:
            waiting = self._waiting.setdefault(name, {})
            waiting[key] = future
            if len(waiting) == 1:
                self._start_task(self._resume_batch(name, waiting))
            return await future
        line = b'{"custom_id": "%s", "method": "POST", "url": "%s", "body": %s}\n' % (
            key.encode(),
            ENDPOINT.encode(),
            payload,
        )
        limit = self.runtime.max_megabytes << 20
        if self._gathering.waiting and self._gathering.size + len(line) > limit:
            self._send_gathered()
        gathering = self._gathering
        gathering.file.write(line)
        gathering.size += len(line)
        gathering.last = time.monotonic()
        gathering.waiting[key] = future
        if len(gathering.waiting) >= self.runtime.max_requests:
            self._send_gathered()
        elif self._closer is None or self._closer.done():
            self._closer = asyncio.create_task(self._send_when_quiet())
        return await future

    # --------------------------------------------------------------------------------------------------------- sending

    async def _send_when_quiet(self) -> None:
        while self._gathering.waiting:
            rest = self._gathering.last + self.runtime.linger_seconds - time.monotonic()
            if rest <= 0:
                self._send_gathered()
                return
            await asyncio.sleep(rest)

    def _send_gathered(self) -> None:
        gathering, self._gathering = self._gathering, _Gathering()
        self._start_task(self._run(gathering), gathering.waiting)

    def _start_task(self, work: Any, waiting: Mapping[str, asyncio.Future[bytes]] | None = None) -> None:
        """Run `work`; its exception is raised in every waiting caller."""

        async def guarded() -> None:
            try:
                await work
            except Exception as error:
                for future in (waiting or {}).values():
                    if not future.done():
                        future.set_exception(error)

        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, gathering: _Gathering) -> None:
        """Upload, create, record, collect. The ledger is written before the batch is created: a batch that a killed
        step created and did not enter is found by the digest in its metadata."""
        name = gathering.digest
        entry: dict[str, Any] = {"keys": sorted(gathering.waiting), "batch": None, "failed": []}
        await asyncio.to_thread(self.ledger.enter, name, entry)
        self._entries[name] = entry
        try:
            gathering.file.seek(0)
            data = await asyncio.to_thread(gathering.file.read)
        finally:
            gathering.file.close()
        api = self.connection.openai
        uploaded = await self._call_with_retries(
            lambda: api.files.create(file=("requests.jsonl", data), purpose="batch"), _id, seconds=FILE_SECONDS
        )
        entry["batch"] = await self._call_with_retries(
            lambda: api.batches.create(
                input_file_id=uploaded,
                endpoint=ENDPOINT,  # type: ignore[arg-type]
                completion_window="24h",
                metadata={LABEL: name},
            ),
            _id,
        )
        self.sent += 1
        await asyncio.to_thread(self.ledger.enter, name, entry)
        await self._collect_answers(name, gathering.waiting)

    async def _resume_batch(self, name: str, waiting: dict[str, asyncio.Future[bytes]]) -> None:
        """Resume a batch of an earlier run. If it was never created, its requests may be sent again."""
        try:
            await asyncio.sleep(self.runtime.linger_seconds)  # let the callers that ask again gather, then deliver once
            entry = self._entries[name]
            if entry["batch"] is None:
                entry["batch"] = await self._find_batch(name)
            if entry["batch"] is None:
                for key in entry["keys"]:
                    self._known.pop(key, None)
                self._deliver({}, waiting, "batch_lost")
                return
            await self._collect_answers(name, waiting)
        except Exception as error:
            for future in waiting.values():
                if not future.done():
                    future.set_exception(error)

    async def _find_batch(self, name: str) -> str | None:
        return await self._call_with_retries(
            lambda: self.connection.openai.batches.list(limit=100),
            lambda page: next((_id(batch) for batch in page.data if (batch.metadata or {}).get(LABEL) == name), None),
        )

    # ------------------------------------------------------------------------------------------------------ collecting

    async def _collect_answers(self, name: str, waiting: dict[str, asyncio.Future[bytes]]) -> None:
        """Wait for a batch to end and deliver its answers."""
        entry, api = self._entries[name], self.connection.openai
        until = time.monotonic() + self.runtime.max_hours * 3600
        while True:
            batch = await self._call_with_retries(lambda: api.batches.retrieve(entry["batch"]), _State.of)
            if batch.status in OVER:
                break
            if time.monotonic() > until:
                raise UnavailableError(
                    f"batch {entry['batch']} is {batch.status} after {self.runtime.max_hours:g} h: run the step again "
                    "later, it will collect the same batch"
                )
            await asyncio.sleep(self.runtime.poll_seconds)
        answers: dict[str, tuple[int, bytes]] = {}
        for file in batch.files:
            answers |= await self._call_with_retries(
                lambda file=file: api.files.content(file),  # type: ignore[misc]
                lambda content: read_output(content.content),
                seconds=FILE_SECONDS,
            )
        entry["failed"] = [key for key in entry["keys"] if answers.get(key, (0, b""))[0] != 200]
        await asyncio.to_thread(self.ledger.enter, name, entry)
        for key in entry["keys"]:
            self._known.pop(key, None)
        if batch.status == "failed" and not answers:
            raise LayerloopError(f"batch {entry['batch']} failed ({shown(batch.errors) or 'no reason given'})")
        self._deliver(answers, waiting, f"batch_{batch.status}")

    def _deliver(
        self, answers: Mapping[str, tuple[int, bytes]], waiting: Mapping[str, asyncio.Future[bytes]], missing: str
    ) -> None:
        if any(status == 200 for status, _ in answers.values()):
            self.connection.saw_answer()
        for key, future in waiting.items():
            if future.done():
                continue
            if key not in answers:
                future.set_exception(TransportError(UnusableError(missing)))
                continue
            status, body = answers[key]
            if status == 200:
                future.set_result(body)
            else:
                try:
                    future.set_exception(self.connection.refusal(status, body, {}))
                except LayerloopError as error:
                    future.set_exception(error)
        self._early |= {key: body for key, (status, body) in answers.items() if status == 200 and key not in waiting}

    async def _call_with_retries(
        self, call: Callable[[], Awaitable[Any]], read: Callable[[Any], T], *, seconds: float = CALL_SECONDS
    ) -> T:
        """What `read` finds in an API call about batches, which takes at most so many seconds and is retried while the
        judge cannot be reached or is busy, and a few times where the answer is none of the API (a proxy's page).

        Raises:
            LayerloopError: it refuses batches or has none, a file is too large, or it cannot be reached for long.
        """
        import openai

        odd = 0
        for attempt in range(POLL_FAILURES):
            try:
                async with asyncio.timeout(seconds):
                    answer = await call()
                return read(answer)
            except (AttributeError, KeyError, TypeError, ValueError, openai.APIResponseValidationError):
                odd, wait = odd + 1, None
                if odd == ODD_ANSWERS or read is _id:  # what may have made something is not sent twice
                    raise LayerloopError(
                        f"judge {self.connection.url} answers calls about batches with something else: "
                        "set runtime.judge.batch.enabled to false, or see what stands before it"
                    ) from None
            except openai.APIStatusError as error:
                problem = self.connection.status_error(error)
                if not problem.problem.retry:
                    raise LayerloopError(
                        f"judge {self.connection.url} refuses batches ({problem.problem}): "
                        "set runtime.judge.batch.enabled to false"
                    ) from None
                wait = problem.retry_after
            except (openai.APIConnectionError, TooLargeError, TimeoutError) as error:
                if isinstance(error.__cause__ or error, TooLargeError):
                    raise LayerloopError(
                        f"judge {self.connection.url} gives a file of answers of over {MAX_FILE >> 20} MB: "
                        "lower runtime.judge.batch.max_requests"
                    ) from None
                wait = None
            await asyncio.sleep(min(self.runtime.poll_seconds, wait or 0.5 * 2**attempt))
        raise UnavailableError(f"judge {self.connection.url} cannot be reached: run the step again when it is back")


def _id(value: Any) -> str:
    """The id of an object of the API. Raises AttributeError or TypeError: it is none."""
    if not isinstance(value.id, str) or not value.id:
        raise TypeError("no id")
    return value.id


@dataclass(frozen=True)
class _State:
    """Where a batch stands: its status, the files of its answers and errors, and why it failed."""

    status: str
    files: list[str]
    errors: str

    @classmethod
    def of(cls, batch: Any) -> _State:
        """Raises AttributeError or TypeError: it is no batch."""
        if not isinstance(batch.status, str):
            raise TypeError("no status")
        errors = batch.errors.model_dump() if hasattr(batch.errors, "model_dump") else batch.errors
        files = [file for file in (batch.output_file_id, batch.error_file_id) if isinstance(file, str) and file]
        return cls(batch.status, files, read_error(errors))


def read_output(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Request key -> (status, body) of an output or error file; lines without an answer are left out."""
    answers: dict[str, tuple[int, bytes]] = {}
    for line in data.splitlines():
        try:
            value = json.loads(line)
            key = value["custom_id"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if not isinstance(key, str):
            continue
        response = value.get("response")
        if isinstance(response, dict) and isinstance(response.get("status_code"), int):
            answers[key] = (response["status_code"], json.dumps(response.get("body")).encode())
        else:
            answers[key] = (500, json.dumps({"error": value.get("error")}).encode())
    return answers
