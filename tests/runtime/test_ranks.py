"""How many processes a step runs in."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from warm_python import warm

from layerloop.components.runtime import distributed, ranks
from layerloop.components.runtime.contract import step_main
from layerloop.components.runtime.distributed import PATIENCE, log_first
from layerloop.components.runtime.outputs import StepResult
from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.schema.runtime import BatchRuntime


@pytest.fixture(autouse=True)
def _no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LAYERLOOP_PROCESSES", raising=False)


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(("visible", "processes"), [(0, 1), (1, 1), (8, 8)])
def test_one_process_per_gpu(visible: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, visible)
    assert ranks.num_processes() == processes


def test_the_variable_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 8)
    monkeypatch.setenv("LAYERLOOP_PROCESSES", "1")
    assert ranks.num_processes() == 1
    gpus(monkeypatch, 0)
    monkeypatch.setenv("LAYERLOOP_PROCESSES", "3")
    assert ranks.num_processes() == 3


def test_a_rank_starts_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 8)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LAYERLOOP_PROCESSES", "8")
    assert ranks.num_processes() == 1


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "9"])
def test_a_number_that_cannot_be_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 8)
    monkeypatch.setenv("LAYERLOOP_PROCESSES", value)
    with pytest.raises(LayerloopError, match=rf"LAYERLOOP_PROCESSES is '{value}': give an integer from 1 to 8"):
        ranks.num_processes()


def test_a_pod_whose_gpus_torch_cannot_use_does_not_work_on_its_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that is too old for torch's CUDA: torch says so in a warning, and that there is no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(distributed, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("KFP_POD_NAME", "pod")
    (tmp_path / "nvidiactl").touch()
    assert distributed.device().type == "cpu"  # a pod without GPUs
    (tmp_path / "nvidia0").touch()
    with pytest.raises(
        UnavailableError, match=r"its CUDA 13\.0 needs a newer driver on the node, or the node is faulty"
    ):
        distributed.device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert distributed.device().type == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.delenv("KFP_POD_NAME")
    assert distributed.device().type == "cpu"  # a workstation, whose tiny policy needs no GPU


def test_what_all_ranks_find_is_said_by_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        monkeypatch.setenv("WORLD_SIZE", "2")
        log_first(f"found by {number}")
    assert capsys.readouterr().err == "found by 0\n"


STEP = """
import os, signal, time
from datetime import timedelta
from torch.distributed.distributed_c10d import _set_pg_timeout
from layerloop.components.runtime.contract import step_main
from layerloop.components.runtime.outputs import StepResult
from layerloop.components.runtime.distributed import failing_together, process_group, rank
from layerloop.components.schema.errors import UnavailableError

def run(*, what: str) -> StepResult:
    if what == "killed":
        if rank() == 0:
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    with process_group():
        _set_pg_timeout(timedelta(seconds=0.5))  # of the group that GPUs work in
        with failing_together():
            if rank() == 1:
                time.sleep(2)  # as for a judge
                raise UnavailableError("s3://bucket is " + what)
    return StepResult()

if __name__ == "__main__":
    raise SystemExit(step_main(run))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "ranked.py").write_text(STEP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sys, "executable", warm())
    for name in ("OMP_NUM_THREADS", "LAYERLOOP_RUN", "LAYERLOOP_LAUNCHED"):
        monkeypatch.setenv(name, "1")  # what `launch` sets goes with the test
    return "ranked"


def test_a_refusal_of_one_rank_is_said_once_and_stays_what_it_is(
    module: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """However long the others have waited for it."""
    with pytest.raises(LayerloopError, match=r"^s3://bucket is busy$") as refused:
        ranks.launch(module, ["--what", "busy"], processes=2)
    assert type(refused.value) is UnavailableError
    assert refused.value.status == 2
    printed = "".join(capfd.readouterr())
    assert "error" not in printed
    assert "elastic" not in printed


def test_a_rank_waits_for_another_as_long_as_a_judges_batch_may_take() -> None:
    assert timedelta(hours=BatchRuntime().max_hours) < PATIENCE


def test_the_rank_that_a_signal_ended_is_named(module: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert ranks.launch(module, ["--what", "killed"], processes=2) == 1
    *_, last = capfd.readouterr().err.splitlines()
    assert last == "rank 1 of 2 was ended by SIGKILL, most often because memory ran out"


def test_a_rank_of_another_launcher_says_its_refusal_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(*, campaign: str) -> StepResult:
        raise LayerloopError(f"{campaign} is not here")

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.delenv("LAYERLOOP_LAUNCHED", raising=False)
    assert step_main(run, argv=["--campaign", "/c"]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == "error: /c is not here"
    monkeypatch.setenv("LAYERLOOP_LAUNCHED", "1")
    assert step_main(run, argv=["--campaign", "/c"]) == 2
    assert "error" not in capfd.readouterr().err
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "/c is not here"
