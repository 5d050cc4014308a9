"""A refused task is not retried like a crashed one, and its refusal affects nothing else."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from layerloop.components.runtime.contract import step_main
from layerloop.components.runtime.outputs import StepResult
from layerloop.components.runtime.refusals import KEPT_SECONDS
from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.storage.stores import open_store

calls: list[str] = []
errors: list[Exception | None] = []


def run(*, campaign: str, images: str = "") -> StepResult:
    calls.append(images)
    if errors[-1]:
        raise errors[-1]
    return StepResult()


@pytest.fixture(autouse=True)
def _begin(monkeypatch: pytest.MonkeyPatch) -> None:
    calls.clear()
    errors[:] = [LayerloopError("images is empty: give a folder")]
    monkeypatch.delenv("KFP_POD_NAME", raising=False)


class Attempts:
    """Pods of one task: the executor input's output URI names the run and the driver's salt."""

    def __init__(self, campaign: str, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.campaign, self.patch, self.capsys = campaign, patch, capsys

    def __call__(self, pod: str, *, run_id: str = "run-1", images: str = "") -> tuple[int, str]:
        """Exit status and last line of a pod."""
        if pod:
            self.patch.setenv("KFP_POD_NAME", pod)
        task = {
            "inputs": {"parameterValues": {"campaign": self.campaign, "images": images}},
            "outputs": {"artifacts": {"x": {"artifacts": [{"uri": f"minio://mlpipeline/{run_id}/salt/x"}]}}},
        }
        status = step_main(run, store=open_store, argv=["--executor-input", json.dumps(task)])
        return status, self.capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def attempt(store_uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Attempts:
    return Attempts(store_uri, monkeypatch, capsys)


def test_the_second_pod_says_at_once_that_it_is_the_same_refusal(attempt: Attempts) -> None:
    assert attempt("wf-impl-0") == (2, "error: images is empty: give a folder")
    for pod in ("wf-impl-1", "wf-impl-2"):
        status, line = attempt(pod)
        assert status == 2
        assert line.startswith("error: images is empty: give a folder (the same refusal as 0 s ago in pod wf-impl-0, ")
    assert len(calls) == 1


def test_another_run_and_a_changed_input_are_tried(attempt: Attempts) -> None:
    attempt("wf-impl-0")
    errors.append(None)
    assert attempt("other-impl-0", run_id="run-2")[0] == 0
    assert attempt("wf-impl-1", images="photos")[0] == 0
    assert calls == ["", "", "photos"]


def test_a_run_that_a_person_retries_is_tried_again(attempt: Attempts) -> None:
    """The UI's retry deletes the failed pods, so Argo counts from the start and the first pod's name comes back."""
    attempt("wf-impl-0")
    attempt("wf-impl-1")
    errors.append(None)
    assert attempt("wf-impl-0")[0] == 0
    assert attempt("wf-impl-1")[0] == 0  # an eviction after that is not a refusal
    assert len(calls) == 3


def test_a_judge_that_did_not_answer_is_asked_again(attempt: Attempts) -> None:
    errors.append(UnavailableError("judge does not answer"))
    assert attempt("wf-impl-0") == (2, "error: judge does not answer")
    assert attempt("wf-impl-1") == (2, "error: judge does not answer")
    assert len(calls) == 2


def test_an_old_refusal_is_not_believed(attempt: Attempts) -> None:
    attempt("wf-impl-0")
    store = open_store(attempt.campaign)
    (name,) = store.list("refusals/")
    record = json.loads(store.read(name))
    store.write(name, json.dumps(record | {"at": time.time() - KEPT_SECONDS - 1}).encode())
    assert "same refusal" not in attempt("wf-impl-1")[1]
    assert len(calls) == 2


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"pod": 1, "at": "x", "error": ""}'])
def test_a_damaged_record_is_none(attempt: Attempts, damage: bytes) -> None:
    attempt("wf-impl-0")
    store = open_store(attempt.campaign)
    (name,) = store.list("refusals/")
    store.write(name, damage)
    assert "same refusal" not in attempt("wf-impl-1")[1]


def test_nothing_is_written_outside_a_pod(attempt: Attempts, tmp_path: Path) -> None:
    assert attempt("")[0] == 2
    assert open_store(attempt.campaign).list() == []


def test_a_campaign_that_cannot_be_opened_is_refused_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt = Attempts("gopher://x", monkeypatch, capsys)
    assert attempt("wf-impl-0") == (2, "error: images is empty: give a folder")
    assert attempt("wf-impl-1") == (2, "error: images is empty: give a folder")


def test_of_several_ranks_the_first_remembers(attempt: Attempts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert attempt("wf-impl-0")[0] == 2
    assert open_store(attempt.campaign).list() == []


def test_what_is_no_refusal_is_not_remembered(attempt: Attempts) -> None:
    errors.append(ZeroDivisionError("a defect"))
    with pytest.raises(ZeroDivisionError):
        attempt("wf-impl-0")
    assert open_store(attempt.campaign).list() == []


def test_services_that_do_not_answer_raise_what_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    from layerloop.components.judge.client import Judge
    from layerloop.components.schema.judging import JudgeRecipe

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UnavailableError, match="does not answer at"):
        open_store("s3://bucket/prefix").read("x")

    async def ask() -> Any:
        async with Judge("http://127.0.0.1:9/v1", JudgeRecipe(model="m")) as judge:
            return await judge.check_reachable()

    with pytest.raises(UnavailableError, match="does not answer"):
        asyncio.run(ask())
