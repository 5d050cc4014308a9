"""GPUs of one machine among the steps of a local run."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from layerloop.pipelines.gpus import VARIABLE, GpuPool, visible_gpus


def test_workers_take_turns_on_one_gpu() -> None:
    pool, running, most = GpuPool(["0"]), [0], [0]
    lock = threading.Lock()

    def worker() -> None:
        with pool.lend("generate_rollouts", workers=2) as environment:
            assert environment == {VARIABLE: "0"}
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            time.sleep(0.02)
            with lock:
                running[0] -= 1

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert most == [1]
    assert pool.free == {"0"}


@pytest.mark.parametrize(("gpus", "workers", "each"), [(8, 1, 8), (8, 2, 4), (8, 4, 4), (3, 2, 1), (1, 2, 1)])
def test_several_gpus_are_divided_among_the_workers_side_by_side(gpus: int, workers: int, each: int) -> None:
    pool = GpuPool([str(number) for number in range(gpus)])
    assert pool.share("generate_rollouts", workers) == each
    with pool.lend("generate_rollouts", workers) as first:
        if gpus >= 2 * each:
            with pool.lend("generate_rollouts", workers) as second:
                assert not set(first[VARIABLE].split(",")) & set(second[VARIABLE].split(","))
    with pool.lend("update_lora") as whole:
        assert len(whole[VARIABLE].split(",")) == gpus


def test_a_step_without_a_gpu_sees_none_and_waits_for_none() -> None:
    pool = GpuPool(["0"])
    with pool.lend("update_lora"), pool.lend("score_rollouts") as scoring, pool.lend("shard_dataset") as sharding:
        assert scoring == sharding == {VARIABLE: ""}
    with pool.lend("publish_adapter") as publishing:
        assert publishing == {VARIABLE: "0"}


def test_gpus_are_given_back_after_a_failure_and_nothing_is_said_without_any() -> None:
    pool = GpuPool(["0", "1"])
    with pytest.raises(ZeroDivisionError), pool.lend("update_lora"):
        raise ZeroDivisionError
    assert pool.free == {"0", "1"}
    with GpuPool([]).lend("update_lora") as environment:
        assert environment == {}


@pytest.mark.parametrize(
    ("value", "found"), [("0,1", ["0", "1"]), ("", []), ("-1", []), ("2, GPU-3a", ["2", "GPU-3a"]), ("1,-1,0", ["1"])]
)
def test_cudas_variable_says_which_are_visible(value: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, value)
    assert visible_gpus() == found


def test_else_the_drivers_tool_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-2)'\n")
    tool.chmod(0o755)
    assert visible_gpus() == ["0", "1"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert visible_gpus() == []
