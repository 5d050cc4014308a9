"""How many processes a step runs in."""

from __future__ import annotations

import pytest
import torch

from layerloop.components.runtime import ranks
from layerloop.components.runtime.distributed import log_first
from layerloop.components.schema.errors import LayerloopError


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


def test_what_all_ranks_find_is_said_by_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        monkeypatch.setenv("WORLD_SIZE", "2")
        log_first(f"found by {number}")
    assert capsys.readouterr().err == "found by 0\n"
