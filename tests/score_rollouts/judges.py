"""A reference judge whose answers a test may change, and what scored campaigns and phase-2 requests show."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

from layerloop.components.judge.grids import Layout, cells_of, draw_grid
from layerloop.components.judge.images import fitted
from layerloop.components.reference_judge.answers import QualityCache, answer
from layerloop.components.reference_judge.request_images import BadRequestError
from layerloop.components.reference_judge.server import completion, refusal
from layerloop.components.schema.judging import ScoreRow
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.rollouts import read_groups
from layerloop.components.storage.shards import read_shard

Change = Callable[[dict[str, Any], int, str], str | None]


class MeddlingJudge(ThreadingHTTPServer):
    """The reference judge with `change(body, number, text)` in between: another text, or None for a 500."""

    daemon_threads = True
    change: Change = staticmethod(lambda body, number, text: text)
    asked = 0
    cache = QualityCache()
    answered: Counter[str]  # completions, each of which would be paid, by the hash of the request's body
    lock = threading.Lock()

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answered = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: MeddlingJudge
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.reply(200, {"object": "list", "data": [{"id": "layerloop-reference-judge", "object": "model"}]})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        body, digest = json.loads(data), hashlib.sha256(data).hexdigest()
        with self.server.lock:
            number = self.server.asked
            self.server.asked += 1
        try:
            text, tokens, images = answer(body, self.server.cache)
        except BadRequestError as error:
            self.reply(400, refusal(error))
            return
        changed = self.server.change(body, number, text)
        if changed is None:
            self.reply(500, {"error": {"message": "no"}})
        else:
            with self.server.lock:
                self.server.answered[digest] += 1
            self.reply(200, completion(changed, tokens, images) | {"id": digest})

    def reply(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def meddling_judge() -> Iterator[MeddlingJudge]:
    """One that serves, on a free port."""
    server = MeddlingJudge()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def rows_of(campaign: Campaign) -> list[ScoreRow]:
    return [
        ScoreRow.from_json(members["json"], where=key)
        for shard in campaign.scores(1).shards
        for key, members in read_shard(campaign.store, shard)
    ]


def in_order(rows: list[ScoreRow]) -> bool:
    """Whether every group's rewards fall from the truth (candidate 0) to the most spoiled."""
    groups = {row.group for row in rows}
    by_group = [[r.reward for r in rows if r.group == g and r.reward is not None] for g in groups]
    return all(len(r) > 1 and r == sorted(r, reverse=True) and r[0] > r[-1] for r in by_group)


def stacks_of(campaign: Campaign) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """(source, layers of every candidate) of every group, in order."""
    groups = read_groups(campaign.store, campaign.rollouts(1), layers=True)
    return [(group.image()[..., :3], [c.stack() for c in group.candidates]) for group in groups]


def is_phase2(body: dict[str, Any]) -> bool:
    return any(part.get("text", "").startswith("Grid on") for part in body["messages"][1]["content"])


def group_and_order(body: dict[str, Any], campaign: Campaign) -> tuple[int, list[int]]:
    """Which group a phase-2 request shows, and its candidates from the top row down, by the pixels of the cells."""
    parts = body["messages"][1]["content"]
    at = next(i for i, part in enumerate(parts) if part.get("text", "").startswith("Grid on white"))
    found = re.match(r"Grid on white: (\d+) rows, .*; (\d+) columns", parts[at]["text"])
    assert found is not None
    rows, columns = int(found[1]), int(found[2])
    shown = cells(base64.b64decode(parts[at + 1]["image_url"]["url"].partition(",")[2]), rows, columns)
    for group, (_, stacks) in enumerate(stacks_of(campaign)):
        if stacks[0].shape[0] + 1 != columns:
            continue
        drawn = [cells(draw_grid([fitted(s, 32)], "white").png, 1, columns)[0] for s in stacks]
        order = [next((i for i, d in enumerate(drawn) if np.array_equal(d, row)), None) for row in shown]
        if None not in order:
            return group, [index for index in order if index is not None]
    raise AssertionError("the grid shows no group of the campaign")


def cells(png: bytes, rows: int, columns: int) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(png)))
    layout = Layout.of_image((pixels.shape[1], pixels.shape[0]), rows, columns)
    assert layout is not None
    return cells_of(pixels, layout)
