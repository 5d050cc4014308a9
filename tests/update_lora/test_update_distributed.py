"""The step under torchrun: two gloo processes on the CPU, with and without a sharded base."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import load
from warm_python import warm

from layerloop.components.update_lora.step import run

from ..campaigns import CampaignBuilder, policy_folder
from .conftest import MakeLab, nan_in_the_last_group


def torchrun(lab: CampaignBuilder, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    command = [
        warm(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        "-m", "layerloop.components.update_lora", "--campaign", lab.uri,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def own_ranks(lab: CampaignBuilder, *arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """The step's plain command, with the number of processes (on GPUs: one each, by itself)."""
    command = [warm(), "-m", "layerloop.components.update_lora", "--campaign", lab.uri, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LAYERLOOP_PROCESSES": str(ranks)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


pytestmark = pytest.mark.timeout(660)  # three interpreters start at once


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_two_ranks_give_the_adapter_of_one_process_bit_for_bit_where_the_order_of_summation_is_the_same(
    make_lab: MakeLab,
) -> None:
    """Six groups in three updates: two microbatches each, whose sum does not depend on which rank made which."""
    labs = []
    for name in ("alone", "together"):
        lab = make_lab(name, update={"steps": 3, "ema": 0.9}, rollout={"groups": 6})
        lab.ready(1)
        labs.append(lab)
    alone, together = labs
    result = run(campaign=alone.uri)
    completed = torchrun(together)
    assert completed.returncode == 0, completed.stderr
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "ema.safetensors", "learner.json"):
        one, other = (policy_folder(lab.campaign, 1) / name for lab in (alone, together))
        assert one.read_bytes() == other.read_bytes(), name
    stored = together.campaign.policy(1)
    assert stored.counts == result.manifests["policy"].counts
    assert stored.metadata == result.manifests["policy"].metadata, "diagnostics are those of all ranks"


@pytest.mark.slow
def test_two_ranks_with_a_sharded_base_give_the_adapter_of_one_process_to_rounding(make_lab: MakeLab) -> None:
    """FSDP2, uneven microbatches (so that one rank is padded), three updates, KL (the adapter switched off) and all."""
    labs = []
    for name in ("alone", "together"):
        lab = make_lab(name, update={"steps": 3, "kl": 0.01}, rollout={"groups": 5})
        lab.ready(1)
        labs.append(lab)
    alone, together = labs
    run(campaign=alone.uri, runtime=json.dumps({"update": {"microbatch": 3}}))
    runtime = {"update": {"microbatch": 3}, "model": {"fsdp": True, "gradient_checkpointing": True}}
    completed = own_ranks(together, "--runtime", json.dumps(runtime))
    assert completed.returncode == 0, completed.stderr
    one, two = load(alone.adapter_weights(1)), load(together.adapter_weights(1))
    assert one.keys() == two.keys()
    for key in one:
        # a step of AdamW is at most the learning rate, 1e-3; rounding of a gradient moves it by parts of 1e-3 of that
        torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=2e-6)


def test_a_fault_that_one_rank_meets_stops_both_with_one_clear_line(make_lab: MakeLab) -> None:
    lab = make_lab(update={"steps": 1})
    lab.rollouts(1, change=nan_in_the_last_group)
    lab.scores(1)
    completed = own_ranks(lab)
    assert completed.returncode == 2
    lines = [line for line in completed.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "window has NaN or infinite latents" in lines[0]
    assert "Traceback" not in completed.stderr
    assert not lab.committed(1)
