"""How busy the client keeps a judge, what it costs, and what faults take away.

A local server stands in for the judge: it answers at once or after a set service time, so many at a time, and queues
the rest, as vLLM does.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerloop.components.judge.client import Judge
from layerloop.components.judge.features import EndpointFeatures
from layerloop.components.judge.images import candidate_images, encode_image, fitted
from layerloop.components.judge.methods import rubric
from layerloop.components.judge.parsing import parse
from layerloop.components.judge.replies import read_body
from layerloop.components.judge.requests import Request
from layerloop.components.judge.rubric import load_rubric
from layerloop.components.layers.designs import render_sketches
from layerloop.components.layers.stack import composite
from layerloop.components.schema.judging import JudgeRecipe
from layerloop.components.schema.runtime import JudgeRuntime, split_runtime
from layerloop.components.storage.images import decode_png, encode_png

RUBRIC = load_rubric("default")

# An asyncio server of `parallelism` slots and `service` seconds. Of 200 requests 20 fail (10 with 500 and 6 by a closed
# connection at once, 4 with half an answer after full service), and of 200 served 10 are ten times as slow, in random
# order. What it answers depends on the question alone. A client that goes away frees its slot.
SERVER = """
import asyncio, json, random, re, sys, zlib
parallelism, service, faulty = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "faulty"
NAMES = ("semantic_separation", "alpha_cleanliness", "background_inpainting", "feature_distribution",
         "content_validity")
rng = random.Random(0)

def shuffled(deck):
    while True:
        yield from rng.sample(deck, len(deck))

fates = shuffled(["500"] * 10 + ["closed"] * 6 + ["half"] * 4 + ["sound"] * 180)
speeds = shuffled([10] * 10 + [1] * 190)
slots = asyncio.Semaphore(parallelism)

def completion(text):
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return json.dumps({"id": "x", "object": "chat.completion", "model": "bench", "choices": [choice]}).encode()

def scores(body):
    value = zlib.crc32(body[body.index(b'"messages"'):])
    one = lambda salt: {name: (value >> (3 * i) ^ salt) % 6 for i, name in enumerate(NAMES)}
    rows = max((int(n) for n in re.findall(rb'candidate_(\\d+)', body[-20000:])), default=0)
    return {"scores": {f"candidate_{n}": one(n) for n in range(1, rows + 1)} if rows else one(0)}

async def serve(reader, writer):
    try:
        while True:
            head = (await reader.readuntil(b"\\r\\n\\r\\n")).lower()
            if head.startswith(b"get"):
                data = json.dumps({"object": "list", "data": [{"id": "bench", "object": "model"}]}).encode()
                writer.write(b"HTTP/1.1 200 OK\\r\\ncontent-length: %d\\r\\n\\r\\n" % len(data) + data)
                continue
            length = int(re.search(rb"content-length: (\\d+)", head)[1])
            body = await reader.readexactly(length)
            fate, seconds = next(fates) if faulty else "sound", service
            if fate == "500":
                writer.write(b"HTTP/1.1 500 Oops\\r\\ncontent-length: 2\\r\\n\\r\\n{}")
                continue
            if fate == "closed":
                return
            if faulty:
                seconds *= next(speeds)
            gone = asyncio.create_task(reader.read(1))
            async with slots:
                await asyncio.wait({gone}, timeout=seconds)
            if gone.done():
                return
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            data = completion(json.dumps(scores(body)))
            if fate == "half":
                data = data[:60]
            writer.write(b"HTTP/1.1 200 OK\\r\\ncontent-length: %d\\r\\n\\r\\n" % len(data) + data)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 22, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


@contextmanager
def server(parallelism: int, service: float, *, faulty: bool = False) -> Iterator[str]:
    command = [sys.executable, "-c", SERVER, str(parallelism), str(service), "faulty" if faulty else "sound"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
        finally:
            process.terminate()


def small_request() -> Request:
    stack = render_sketches(np.random.default_rng(0), count=1, layers=3, size=(64, 64), photo_share=0.0)[0]
    source, images = encode_image(composite(stack)), candidate_images(stack, ("white",))
    return rubric.request(RUBRIC, source, images, JudgeRecipe(), label="bench")


def variants(request: Request, count: int) -> list[Request]:
    return [replace(request, system=f"{request.system} {index}") for index in range(count)]


def ahead(parallelism: int) -> int:
    return parallelism + max(2, parallelism // 2)


def settings(**changes: Any) -> tuple[JudgeRecipe, JudgeRuntime]:
    """Recipe and runtime of a judge, each with its own of `changes`."""
    recipe, runtime = split_runtime({"judge": {"model": "bench", "timeout_seconds": 600, "retries": 8} | changes})
    return JudgeRecipe.model_validate(recipe.get("judge", {})), JudgeRuntime.model_validate(runtime["judge"])


@dataclass(frozen=True)
class Run:
    """A judged list of requests: the scores in order, and when (seconds from the start) each answer came, in time."""

    scores: list[Any]
    times: list[float]

    def rate(self, round_: int) -> float:
        """Answers a second between the first round of answers and the last, `round_` answers each.

        The judge fills up and runs empty once in a step of minutes. Here, where a run has ten rounds, both would be a
        tenth of what is measured, so they are left out; `total` has them.
        """
        return (len(self.times) - 2 * round_) / (self.times[-1 - round_] - self.times[round_ - 1])

    @property
    def total(self) -> float:
        """Answers a second from the first request to the last answer."""
        return len(self.times) / self.times[-1]


async def judged(judge: Judge, requests: list[Request]) -> Run:
    times: list[float] = []

    async def one(request: Request) -> Any:
        scores, _ = await judge.ask(request)
        times.append(time.monotonic() - start)
        return scores

    async with judge:
        await judge.check_reachable()  # the first connection and imports are not the judge's time
        start = time.monotonic()
        scores = await asyncio.gather(*(one(request) for request in requests))
    return Run(scores, times)


def test_the_judge_is_kept_busy_at_every_parallelism(record_benchmark: Callable[[str, float], None]) -> None:
    """Answers a second as a share of parallelism / service time, which is all that the judge can give.

    A few more requests are in flight than the judge has places, as docs/JUDGE.md recommends: the next one waits at the
    judge, not on the way to it. The service time grows with the parallelism, as a GPU's does: a VLM of 9 billion
    parameters judges some tens of candidates a second however many it has at once. Here it is 32 a second, which the
    two cores that client and server share can carry; what the client itself costs is the next benchmark. The requests
    go the full way (payload, HTTP, limiter, parsing, store); their images are small.
    """
    request = small_request()
    fractions: dict[int, float] = {}
    totals: dict[int, float] = {}
    for parallelism in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        service = max(0.25, parallelism / 32)
        rounds = 8 if parallelism <= 64 else 6
        for _ in range(2):  # a second time if it fell short, because other processes disturb
            with server(parallelism, service) as url:
                judge = Judge(url, *settings(concurrency=ahead(parallelism)))
                run = asyncio.run(judged(judge, variants(request, rounds * parallelism)))
            fraction = run.rate(parallelism) * service / parallelism
            if fraction > fractions.get(parallelism, 0.0):
                fractions[parallelism], totals[parallelism] = fraction, run.total * service / parallelism
            if fraction >= 0.95:
                break
    print({parallelism: round(fraction, 3) for parallelism, fraction in fractions.items()})
    print("with filling and emptying", {parallelism: round(fraction, 3) for parallelism, fraction in totals.items()})
    record_benchmark("judge_capacity_fraction", min(fractions.values()))
    assert min(fractions.values()) >= 0.93  # the mark is 0.95; shared machines lose some


def test_baselines_of_one_at_a_time_and_all_at_once(record_benchmark: Callable[[str, float], None]) -> None:
    request, parallelism, service = small_request(), 16, 0.5
    capacity = parallelism / service
    with server(parallelism, service) as url:
        sequential = asyncio.run(judged(Judge(url, *settings(concurrency=1)), variants(request, 16)))
        everything = settings(concurrency=10_000, timeout_factor=0)
        unbounded = asyncio.run(judged(Judge(url, *everything), variants(request, 320)))
    record_benchmark("judge_sequential_capacity_fraction", sequential.total / capacity)
    record_benchmark("judge_unbounded_capacity_fraction", unbounded.total / capacity)
    assert sequential.total < unbounded.total


def test_client_overhead(record_benchmark: Callable[[str, float], None]) -> None:
    """CPU milliseconds a phase-1 request: render, encode, hash, payload, parse; designs of 2..5 layers at 256 pixels,
    groups of eight that share their encoded source. Best of nine rounds, because other processes disturb."""
    stacks = [
        stack
        for layers in (2, 3, 4, 5)
        for stack in render_sketches(np.random.default_rng(layers), count=8, layers=layers, size=(256, 256))
    ]
    sources = [composite(stacks[first]) for first in range(0, len(stacks), 8)]  # come as images
    scores = json.dumps({"scores": dict.fromkeys(RUBRIC.names, 3)})
    body = json.dumps({"choices": [{"message": {"content": scores}, "finish_reason": "stop"}]}).encode()
    rounds = []
    for _ in range(9):
        start = time.process_time()
        for first in range(0, len(stacks), 8):
            source = encode_image(sources[first // 8])
            for stack in stacks[first : first + 8]:
                images = candidate_images(stack, ("white",))
                request = rubric.request(RUBRIC, source, images, JudgeRecipe(), label="bench")
                assert request.digest
                EndpointFeatures().payload(request, settings()[0], seed=1, temperature=0.0)
                parse(request, read_body(body))
        rounds.append((time.process_time() - start) / len(stacks) * 1e3)
    record_benchmark("judge_client_ms", min(rounds))
    assert min(rounds) < 5


def test_reading_and_sizing_what_was_rolled_out(record_benchmark: Callable[[str, float], None]) -> None:
    """CPU milliseconds a candidate to read four layers of 640 pixels (PNG) and to size them to 256."""
    stacks = render_sketches(np.random.default_rng(4), count=4, layers=4, size=(640, 640))
    encoded = [[encode_png(layer) for layer in stack] for stack in stacks]
    read, sized = [], []
    for _ in range(5):
        start = time.process_time()
        decoded = [np.stack([decode_png(png) for png in layers]) for layers in encoded]
        middle = time.process_time()
        for stack in decoded:
            fitted(stack, 256)
        read.append((middle - start) / len(stacks) * 1e3)
        sized.append((time.process_time() - middle) / len(stacks) * 1e3)
    record_benchmark("judge_read_640_ms", min(read))
    record_benchmark("judge_size_640_to_256_ms", min(sized))
    assert min(sized) < 30  # 50 in floating point


def test_faults_cost_little_throughput_and_change_no_score(record_benchmark: Callable[[str, float], None]) -> None:
    """Throughput with 10 % failing and 5 % ten times as slow, as a share of throughput without.

    What is lost at the least: 2 % fail after full service, and the slow ones hold a slot for 1.5 times the usual
    latency (`timeout_factor`) until they are given up: 1 + 0.02 + 0.05 * 1.5, so 0.91 is the most that is possible.
    """
    requests, parallelism, service = variants(small_request(), 960), 16, 0.6
    changes = {"concurrency": parallelism, "give_up_seconds": 1e6}
    with server(parallelism, service) as url:
        sound = asyncio.run(judged(Judge(url, *settings(**changes)), requests))
    with server(parallelism, service, faulty=True) as url:
        judge = Judge(url, *settings(**changes))
        faulty = asyncio.run(judged(judge, requests))
    print(dict(judge.statistics.failures), f"total runs {faulty.total / sound.total:.3f}")
    fraction = faulty.rate(parallelism) / sound.rate(parallelism)
    record_benchmark("judge_faulty_fraction", fraction)
    assert faulty.scores == sound.scores
    assert fraction >= 0.83  # the mark is 0.85; shared machines lose some


STEP = """
import json, resource, sys
from layerloop.components.score_rollouts.step import run
result = run(campaign=sys.argv[1], judge_url=sys.argv[2])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
names = ("candidates", "candidates_masked", "seconds")
print(json.dumps({"peak_mb": peak, **{name: result.metrics[name] for name in names}}))
"""


@pytest.mark.timeout(1800)
def test_memory_of_ten_thousand_candidates(record_benchmark: Callable[[str, float], None], tmp_path: Path) -> None:
    """Peak resident megabytes of a complete step over 10,000 candidates of 64 pixels, its replies stored as usual."""
    from layerloop.components.schema.recipe import Recipe
    from layerloop.components.schema.trajectory import CandidateRecord, GroupRecord, candidate_key, group_key
    from layerloop.components.storage.campaign import Campaign
    from layerloop.components.storage.rollouts import commit_group, shard_name
    from layerloop.components.storage.shards import Sample, write_shard

    groups, size, layers, side = 1250, 8, 3, 64
    judge = {"model": "bench", "resolution": side, "phase2": {"resolution": side}, "canaries": False}
    campaign = Campaign.create_or_open(
        str(tmp_path / "campaign"),
        Recipe.model_validate({"name": "bench", "rollout": {"groups": groups, "group_size": size}, "judge": judge}),
    )
    stacks = render_sketches(np.random.default_rng(0), count=16, layers=layers, size=(side, side))
    encoded = [[encode_png(layer) for layer in stack] for stack in stacks]
    sources = [encode_png(composite(stack)) for stack in stacks]
    trajectory = os.urandom(100_000)

    def samples(record: GroupRecord) -> Iterator[Sample]:
        yield group_key(1, record.group), {"json": record.to_json(), "source.png": sources[record.group % 16]}
        for index in range(size):
            candidate = CandidateRecord(
                iteration=1, group=record.group, candidate=index, image_key=record.image_key, seed=index
            )
            members = {f"layer{at}.png": png for at, png in enumerate(encoded[(record.group + index) % 16])}
            members |= {"json": candidate.to_json(), "trajectory.safetensors": trajectory}
            yield candidate_key(1, record.group, index), members

    folder = campaign.rollouts_dir(1)
    for group in range(groups):
        record = GroupRecord(
            iteration=1, group=group, image_key=f"{group:016x}", layers=layers, group_size=size, height=side,
            width=side, latent_height=8, latent_width=8, sigmas=(1.0, 0.0), window_start=0, window_size=0,
            dynamics="ode", etas=(), share_prefix=False, outside="euler", base_fingerprint="0" * 64,
            adapter_sha256=None,
        )  # fmt: skip
        shard = write_shard(campaign.store, shard_name(folder, group), samples(record))
        commit_group(campaign.store, folder, record, shard, model_calls=0)
    with server(64, 0.0) as url:
        done = subprocess.run(
            [sys.executable, "-c", STEP, campaign.uri, url],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"LAYERLOOP_RUNTIME": "judge: {concurrency: 64}"},
        )
    reported = json.loads(done.stdout.splitlines()[-1])
    assert reported["candidates"] == groups * size and reported["candidates_masked"] == 0
    record_benchmark("judge_peak_mb", reported["peak_mb"])
    record_benchmark("judge_step_candidates_per_second", reported["candidates"] / reported["seconds"])
    assert reported["peak_mb"] < 1000
