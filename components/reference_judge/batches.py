"""Files and batches of the reference judge's API, in memory: enough of OpenAI's Batch API for a campaign."""

from __future__ import annotations

import email.parser
import email.policy
import json
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from layerloop.components.reference_judge.request_images import BadRequestError

MAX_KEPT = 1 << 30  # bytes of files; the oldest are forgotten first
ENDPOINT = "/v1/chat/completions"

Complete = Callable[[bytes], tuple[int, dict[str, Any]]]  # body -> status, answer


class BatchDesk:
    """Takes files and batches of chat completions, and works them off in threads of its own."""

    def __init__(self, complete: Complete) -> None:
        self._complete = complete
        self._lock = threading.Lock()
        self._files: dict[str, bytes] = {}
        self._batches: dict[str, dict[str, Any]] = {}

    def add_upload(self, content_type: str, data: bytes) -> dict[str, Any]:
        """A file from a multipart form with the fields `file` and `purpose`."""
        head = f"Content-Type: {content_type}\r\n\r\n".encode()
        message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + data)
        fields = {}
        for part in message.iter_parts() if message.is_multipart() else ():
            fields[part.get_param("name", header="content-disposition")] = part
        if "file" not in fields or "purpose" not in fields:
            raise BadRequestError("give a multipart form with 'file' and 'purpose'", param="file")
        if str(fields["purpose"].get_content()).strip() != "batch":
            raise BadRequestError("'purpose' must be batch", param="purpose")
        content = fields["file"].get_payload(decode=True)
        if not isinstance(content, bytes):
            raise BadRequestError("'file' has no content", param="file")
        return self._file(self._add(content), len(content))

    def content(self, name: str) -> bytes:
        """Bytes of a file."""
        with self._lock:
            if name not in self._files:
                raise BadRequestError(f"there is no file {name[:60]}", status=404, code="not_found")
            return self._files[name]

    def create(self, data: bytes) -> dict[str, Any]:
        """Start a batch on an uploaded file."""
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            raise BadRequestError("the body is not JSON") from None
        if not isinstance(body, dict) or body.get("endpoint") != ENDPOINT:
            raise BadRequestError(f"'endpoint' must be {ENDPOINT}", param="endpoint")
        lines = self.content(str(body.get("input_file_id"))).splitlines()
        batch = {
            "id": f"batch_{uuid.uuid4().hex[:24]}",
            "object": "batch",
            "endpoint": ENDPOINT,
            "input_file_id": body["input_file_id"],
            "completion_window": body.get("completion_window") or "24h",
            "status": "in_progress",
            "created_at": int(time.time()),
            "metadata": body.get("metadata"),
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
        }
        with self._lock:
            self._batches[str(batch["id"])] = batch
        threading.Thread(target=self._work, args=(batch, lines), daemon=True).start()
        return dict(batch)

    def batch(self, name: str) -> dict[str, Any]:
        """State of one batch."""
        with self._lock:
            if name not in self._batches:
                raise BadRequestError(f"there is no batch {name[:60]}", status=404, code="not_found")
            return dict(self._batches[name])

    def batches(self) -> dict[str, Any]:
        """All batches, newest first."""
        with self._lock:
            return {"object": "list", "data": [dict(b) for b in reversed(self._batches.values())], "has_more": False}

    def _work(self, batch: dict[str, Any], lines: list[bytes]) -> None:
        good: list[bytes] = []
        bad: list[bytes] = []
        for line in lines:
            try:
                request = json.loads(line)
                key, body = str(request["custom_id"]), json.dumps(request["body"]).encode()
            except (ValueError, KeyError, TypeError, RecursionError):
                key, body = "", b"null"
            status, answer = self._complete(body)
            response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": answer}
            target = good if status == 200 else bad
            target.append(json.dumps({"custom_id": key, "response": response, "error": None}).encode())
        finished: dict[str, Any] = {"status": "completed", "completed_at": int(time.time())}
        for field, answers in (("output_file_id", good), ("error_file_id", bad)):
            if answers:
                finished[field] = self._add(b"\n".join(answers) + b"\n")
        finished["request_counts"] = {"total": len(lines), "completed": len(good), "failed": len(bad)}
        with self._lock:
            batch.update(finished)

    def _add(self, content: bytes) -> str:
        name = f"file-{uuid.uuid4().hex[:24]}"
        with self._lock:
            self._files[name] = content
            while sum(map(len, self._files.values())) > MAX_KEPT and len(self._files) > 1:
                self._files.pop(next(iter(self._files)))
        return name

    def _file(self, name: str, size: int) -> dict[str, Any]:
        return {
            "id": name,
            "object": "file",
            "bytes": size,
            "created_at": int(time.time()),
            "filename": "requests.jsonl",
            "purpose": "batch",
            "status": "processed",
        }
