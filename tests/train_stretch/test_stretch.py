"""A resident stretch leaves what the steps leave, byte for byte, however it was run and wherever it was killed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from warm_python import warm

from layerloop.components.generate_rollouts.step import run as generate_rollouts
from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.schema.record import SEAL
from layerloop.components.score_rollouts.ahead import Ahead, Arrivals
from layerloop.components.score_rollouts.step import run as score_rollouts
from layerloop.components.storage.campaign import Campaign
from layerloop.components.train_stretch import scoring, step
from layerloop.components.train_stretch.scoring import Scoring, Teller, read_news, write_news
from layerloop.components.train_stretch.step import Stretch, run
from layerloop.components.update_lora.step import run as update_lora

from .conftest import ITERATIONS, Begin

pytestmark = pytest.mark.timeout(600)

MEASURED = ("seconds", "latency")  # in a metric's name: of a clock, so of no two runs the same


def content(campaign: Campaign) -> dict[str, bytes]:
    """Every object of a campaign, but for who wrote it (the lease), what a clock measured in the scores' manifests, and
    the judge's own ids and times in its replies, of which only the names count."""
    found = {name: campaign.store.read(name) for name in campaign.store.list() if not name.startswith("lease/")}
    for name, data in found.items():
        if "/replies/" in name:
            found[name] = b""
        if name.endswith("scores/manifest.json"):
            manifest = json.loads(data)
            del manifest[SEAL]  # the hash of the rest
            metrics = manifest["metadata"]["metrics"]
            assert any(word in key for key in metrics for word in MEASURED)
            manifest["metadata"]["metrics"] = {
                key: value for key, value in metrics.items() if not any(word in key for word in MEASURED)
            }
            found[name] = json.dumps(manifest, sort_keys=True).encode()
    return found


def step_by_step(campaign: Campaign, judge_url: str, iterations: int = ITERATIONS) -> None:
    for iteration in range(1, iterations + 1):
        for worker in range(2):
            generate_rollouts(campaign=campaign.uri, iteration=iteration, worker=worker, workers=2)
        score_rollouts(campaign=campaign.uri, iteration=iteration, judge_url=judge_url)
        update_lora(campaign=campaign.uri, iteration=iteration)


@pytest.fixture(scope="module")
def expected(begin: Begin, judge_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A campaign of two iterations, made step by step."""
    with pytest.MonkeyPatch.context() as patch:
        runtime = {"rollout": {"batch_size": 2}, "update": {"microbatch": 8}}
        patch.setenv("LAYERLOOP_RUNTIME", json.dumps(runtime))
        campaign = begin(tmp_path_factory.mktemp("steps"))
        step_by_step(campaign, judge_url)
    learned = campaign.policy(ITERATIONS)
    assert learned.counts["optimizer_steps"] == 2 * ITERATIONS, "there is something to compare"
    return content(campaign)


def stretch(campaign: Campaign, judge_url: str, *, ranks: int = 1, **options: Any) -> subprocess.CompletedProcess[str]:
    """The step's own command."""
    flags = {"campaign": campaign.uri, "judge-url": judge_url, "iterations": ITERATIONS, **options}
    command = [warm(), "-m", "layerloop.components.train_stretch"]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"LAYERLOOP_PROCESSES": str(ranks)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_a_stretch_leaves_what_the_steps_leave(
    begin: Begin, judge_url: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    campaign = begin(tmp_path)
    result = run(campaign=campaign.uri, iterations=ITERATIONS, judge_url=judge_url)
    assert content(campaign) == expected
    assert result.manifests["policy"] == campaign.policy(ITERATIONS)
    assert result.metrics["iterations"] == 2 and result.metrics["sampling_seconds"] > 0


def test_two_ranks_leave_what_one_leaves(
    begin: Begin, judge_url: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Groups of four candidates in batches of two, so that the ranks share a group."""
    campaign = begin(tmp_path)
    done = stretch(campaign, judge_url, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert content(campaign) == expected
    told = [line for line in done.stderr.splitlines() if line.startswith("iteration ") and " of 2" in line]
    assert told == ["iteration 1 of 2", "iteration 2 of 2; training: less than a minute left"]


@pytest.mark.parametrize(
    ("at", "iteration"),
    [
        ("end_update", 2),
        *(pytest.param(*where, marks=pytest.mark.slow) for where in (("sample_iteration", 2), ("begin_update", 1))),
    ],
)
def test_killed_anywhere_it_goes_on(
    at: str,
    iteration: int,
    begin: Begin,
    judge_url: str,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    campaign = begin(tmp_path)
    real = getattr(step, at)

    def killed(opened: Campaign, current: int, *rest: Any, **options: Any) -> Any:
        if current == iteration:
            raise KeyboardInterrupt
        return real(opened, current, *rest, **options)

    monkeypatch.setattr(step, at, killed)
    with pytest.raises(KeyboardInterrupt):
        run(campaign=campaign.uri, iteration=1, iterations=ITERATIONS, judge_url=judge_url)
    monkeypatch.setattr(step, at, real)
    run(campaign=campaign.uri, iteration=1, iterations=ITERATIONS, judge_url=judge_url)
    assert without_counts_of_replies(content(campaign)) == without_counts_of_replies(expected)
    assert campaign.head() == ITERATIONS


def without_counts_of_replies(found: dict[str, bytes]) -> dict[str, bytes]:
    """Scores' manifests count the replies that were stored already, and those that were asked for."""
    return {name: data for name, data in found.items() if not name.endswith("scores/manifest.json")}


@pytest.mark.slow
def test_killed_outright_while_it_samples_it_goes_on_with_other_ranks(
    begin: Begin, judge_url: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    campaign = begin(tmp_path)
    command = [sys.executable, "-m", "layerloop.components.train_stretch", "--iterations", str(ITERATIONS)]
    process = subprocess.Popen([*command, "--campaign", campaign.uri, "--judge-url", judge_url])
    while not campaign.sampled_groups(1):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert campaign.head() == 0
    done = stretch(campaign, judge_url, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert without_counts_of_replies(content(campaign)) == without_counts_of_replies(expected)


def test_the_judge_is_told_what_was_sampled_and_nothing_of_a_sampler_that_was_cut_off() -> None:
    draw = np.random.default_rng(0)
    image, stacks = (draw.integers(0, 256, shape, dtype=np.uint8) for shape in ((8, 6, 4), (2, 3, 8, 6, 4)))
    pipe, arrivals, taken = io.BytesIO(), Arrivals(), list[Ahead]()
    write_news(pipe, Ahead(7, 3, 4, image, stacks))
    write_news(pipe, None)
    write_news(pipe, Ahead(7, 3, 6, image, stacks))
    arrivals.listen(7, taken.append)
    read_news(io.BytesIO(pipe.getvalue()[:-1]), arrivals)
    (ahead,) = taken
    assert (ahead.iteration, ahead.group, ahead.first) == (7, 3, 4)
    assert np.array_equal(ahead.image, image) and np.array_equal(ahead.stacks, stacks)
    assert arrivals._news.is_set()


def test_a_judging_process_that_memory_ended_is_one_line_and_worth_another_attempt() -> None:
    with Scoring("/nowhere", "http://127.0.0.1:9/v1", "") as judging:
        judging._process.kill()
        judging.begin(1)
        with pytest.raises(
            UnavailableError, match=r"^the scoring process was ended by SIGKILL, most often because memo"
        ):
            judging.end()


def test_candidates_that_would_fill_the_memory_are_not_told() -> None:
    """The judge has them with their group; that a group is there is always told."""
    reading, writing = os.pipe()
    teller, pixels = Teller(writing), np.zeros((1, 1, 512, 512, 4), np.uint8)
    with mock.patch.object(scoring, "MOST_BYTES", pixels.nbytes - 1):
        teller.tell(Ahead(1, 0, 0, pixels[0, 0], pixels))
    teller.tell(None)
    assert os.read(reading, 100) == b"{}\n"
    os.close(reading)
    teller.tell(Ahead(1, 0, 0, pixels[0, 0], pixels))  # the process has ended
    teller.close()


def test_what_is_committed_is_not_done_again(
    begin: Begin, judge_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign = begin(tmp_path)
    step_by_step(campaign, judge_url, 1)
    before = content(campaign)
    result = run(campaign=campaign.uri, iteration=1, iterations=1, judge_url="http://127.0.0.1:9/v1")
    assert content(campaign) == before
    assert result.manifests["policy"].iteration == 1
    begun: list[list[int]] = []
    monkeypatch.setattr(Stretch, "train", lambda stretch: begun.append(stretch.iterations))
    with pytest.raises(LayerloopError, match="iterations/000002/policy is not committed"):
        run(campaign=campaign.uri, iteration=1, iterations=2, judge_url=judge_url)
    assert begun == [[2]]


def test_it_ends_at_the_target(begin: Begin, judge_url: str, tmp_path: Path) -> None:
    campaign = begin(tmp_path)
    run(campaign=campaign.uri, iterations=5, until=1, judge_url=judge_url)
    assert campaign.iterations() == [1] and campaign.head() == 1
    with pytest.raises(LayerloopError, match="iteration is 2, past the campaign's target 1: give a greater until, or"):
        run(campaign=campaign.uri, iterations=5, until=1, judge_url=judge_url)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"iterations": 0}, "iterations is 0: give 1 or more"),
        ({"iterations": 1, "iteration": 4}, "iterations/000003/policy is not committed: run update_lora first"),
    ],
)
def test_a_stretch_that_cannot_be_is_refused_before_it_begins(
    arguments: dict[str, int], line: str, begin: Begin, tmp_path: Path
) -> None:
    campaign = begin(tmp_path)
    with pytest.raises(LayerloopError, match=line):
        run(campaign=campaign.uri, judge_url="http://127.0.0.1:9/v1", **arguments)
    assert campaign.iterations() == []


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_judge_that_does_not_answer_ends_the_stretch_with_its_line(begin: Begin, tmp_path: Path, ranks: int) -> None:
    campaign = begin(tmp_path)
    done = stretch(campaign, "http://127.0.0.1:9/v1", ranks=ranks)
    assert done.returncode == 2, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "http://127.0.0.1:9/v1 does not answer" in lines.pop()
    assert "Traceback" not in done.stderr
    assert campaign.head() == 0


@pytest.mark.slow
def test_a_policy_that_lags_is_the_same_both_ways_and_its_ratios_start_off_one(
    begin: Begin, judge_url: str, tmp_path: Path
) -> None:
    steps, resident = (begin(tmp_path / name, rollout={"lag": 1}) for name in ("steps", "resident"))
    step_by_step(steps, judge_url, 3)
    run(campaign=resident.uri, iterations=3, judge_url=judge_url)
    assert content(resident) == content(steps)
    sampled_with = [resident.rollouts(n)[0].metadata["adapter_sha256"] for n in (1, 2, 3)]
    assert sampled_with == [None, None, resident.policy(1).metadata["adapter_sha256"]]
    offs = [float(resident.policy(n).metadata["first_log_ratio_abs"]) for n in (1, 2, 3)]  # type: ignore[arg-type]
    assert offs[0] == 0 and offs[1] > 1e-5 and offs[2] > 1e-5
    noise = [float(resident.policy(n).metadata["replay_noise"]) for n in (1, 2, 3)]  # type: ignore[arg-type]
    assert all(abs(one - noise[0]) < 0.05 for one in noise), "anchors are those of the policy that sampled"
