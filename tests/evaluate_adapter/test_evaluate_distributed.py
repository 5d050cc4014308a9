"""The step in several processes: gloo on the CPU, with and without a sharded base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from warm_python import warm

from layerloop.components.evaluate_adapter import decompose
from layerloop.components.evaluate_adapter.cases import Case
from layerloop.components.evaluate_adapter.decompose import balance, cost
from layerloop.components.evaluate_adapter.step import run
from layerloop.components.storage.campaign import MANIFEST

from ..campaigns import CampaignBuilder, named, plain_name, rank_1_sees
from .conftest import MakeLab, case_of, drawn_design, fill, hold_out, source_of

pytestmark = pytest.mark.timeout(400)  # three interpreters start at once


def own_ranks(lab: CampaignBuilder, fsdp: bool, **environ: str) -> subprocess.CompletedProcess[str]:
    """The step's plain command, run in two processes (on GPUs: one each, by itself)."""
    runtime = json.dumps({"model": {"fsdp": fsdp}})
    module = "layerloop.components.evaluate_adapter"
    command = [warm(), "-m", module, "--campaign", lab.uri, "--runtime", runtime]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LAYERLOOP_PROCESSES": "2"} | environ
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=360)


def kept(lab: CampaignBuilder) -> dict[str, bytes]:
    """Everything of the evaluation that does not say when and in which time it was made."""
    names = [name for name in lab.store.list("evaluations/") if name.endswith((".tar", ".png", ".parquet"))]
    return {plain_name(name): lab.store.read(name) for name in names}


@pytest.mark.parametrize("fsdp", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["complete", "sharded"])
def test_two_ranks_leave_what_one_process_leaves(make_lab: MakeLab, tmp_path: Path, fsdp: bool) -> None:
    """Five designs and two images in four batches of unequal sizes, with a base each and with one that they share; the
    second rank found another head, as where a training has gone on meanwhile."""
    alone = fill(make_lab(str(tmp_path / "alone")))
    together = fill(make_lab(str(tmp_path / "together")))
    run(campaign=alone.uri)
    done = own_ranks(together, fsdp, PYTHONPATH=str(rank_1_sees(tmp_path, "Campaign.head = lambda self: 1")))
    assert done.returncode == 0, done.stderr[-3000:]
    log = done.stderr
    assert "in 2 processes" in log and "loaded completely" not in log
    assert len(kept(alone)) > 8 and kept(together) == kept(alone)
    metrics = json.loads(together.store.read(named(together.store, "evaluations/iteration-000002/metrics.json")))
    assert metrics["provenance"]["machine"].startswith("2 x ")
    assert [shard.samples for shard in together.campaign.find("evaluations/iteration-000002").shards] == [7, 7]  # type: ignore[union-attr]


@pytest.mark.slow
def test_ranks_make_as_many_shards_at_a_time_as_they_are_and_keep_those_of_an_earlier_attempt(
    make_lab: MakeLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of two cases: three for each model and one with a single case, of which the second exists already."""
    monkeypatch.setattr(decompose, "CASES_PER_SHARD", 2)
    alone = fill(make_lab(str(tmp_path / "alone")))
    together = fill(make_lab(str(tmp_path / "together")))
    manifest = run(campaign=alone.uri).manifests["evaluation"]
    assert [shard.samples for shard in manifest.shards] == [2, 2, 2, 1, 2, 2, 2, 1]
    earlier = manifest.shards[1].name
    together.store.write(earlier, alone.store.read(earlier))
    script = tmp_path / "in_twos.py"
    script.write_text(
        "from layerloop.components.evaluate_adapter import decompose, step\ndecompose.CASES_PER_SHARD = 2\n"
        f"step.run(campaign={together.uri!r})\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        done.stderr.count("2 decompositions, kept from an earlier attempt") == 1
        and done.stderr.count(f"{plain_name(earlier)}: ") == 1
    )
    assert kept(together) == kept(alone)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["complete", "sharded"])
def test_a_fault_that_one_rank_meets_ends_both_with_one_clear_line(make_lab: MakeLab, fsdp: bool) -> None:
    """One of two images has a side that the model does not take, so one rank fails while the other samples."""
    lab = make_lab()
    images = [source_of(drawn_design(seed, 2, width=width)) for seed, width in ((1, 32), (2, 40))]
    hold_out(lab, [], images)
    lab.adapter(1)
    done = own_ranks(lab, fsdp)
    assert done.returncode == 2, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "image width is 40 pixels: the model needs a multiple of 16" in lines.pop()
    if not fsdp:  # else the other rank may be heard losing its peer in the middle of a layer
        assert "Traceback" not in done.stderr
    assert not lab.store.exists(f"evaluations/iteration-000001/{MANIFEST}")


# ---- who does what


def case(layers: int, side: int) -> Case:
    return case_of("k", "pictures", layers, 0, np.zeros((side, side, 3), np.uint8), None)


def test_a_batch_costs_its_tokens_of_layers_composite_and_condition() -> None:
    assert cost([case(4, 32)] * 3) == 3 * 6 * 32 * 32


def test_a_dear_batch_is_balanced_by_several_cheap_ones() -> None:
    """Dealt in turn the first rank would have 9 and 1 and 1, the second 3."""
    assert balance([9, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4]]
    assert balance([2, 2, 3, 3, 4], 2) == [[0, 1, 4], [2, 3]]


def test_every_batch_is_dealt_to_one_rank() -> None:
    shares = balance([float(1 + index % 5) for index in range(23)], 4)
    assert sorted(item for share in shares for item in share) == list(range(23))
    assert balance([1.0], 3) == [[0], [], []]
