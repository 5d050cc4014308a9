"""The lease: of several runs one works, the others wait, and nobody waits for the dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from layerloop.components.schema.errors import UnavailableError
from layerloop.components.storage import lease
from layerloop.components.storage.lease import EVALUATION, TRAINING, Timing, hold, holder, run_id, take_over
from layerloop.components.storage.owners import identity
from layerloop.components.storage.stores import Store, open_store

QUICK = Timing(beat=0.2, expiry=30.0, poll=0.1, say=60.0, patience=30.0)


@pytest.fixture
def store(store_uri: str) -> Store:
    return open_store(store_uri)


def held_until(store: Store, run: str, done: threading.Event, *, timing: Timing = QUICK) -> threading.Thread:
    """A run that holds the lease until it is told to end; it holds it when this returns."""
    begun = threading.Event()

    def work() -> None:
        with hold(store, log=lambda line: None, run=run, timing=timing):
            begun.set()
            done.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(30)
    return thread


def test_a_second_run_is_told_who_holds_the_campaign_and_goes_on_when_it_is_free(store: Store) -> None:
    done, said = threading.Event(), list[str]()
    first = held_until(store, "one", done)
    threading.Timer(1.0, done.set).start()
    with hold(store, log=said.append, run="two", timing=QUICK):
        assert done.is_set(), "it waited"
        held = holder(store, TRAINING)
        assert held is not None and held.run == "two"
    first.join()
    (line,) = said
    assert line.startswith(f"training of {store.uri} is held by run one (") and f"process {os.getpid()}) since " in line
    assert f"layerloop campaign lease {store.uri} --take-over" in line
    assert (found := holder(store, TRAINING)) is not None and found.alive is None, "free"


def test_a_run_that_has_waited_long_enough_says_so_and_may_be_tried_again(store: Store) -> None:
    done = threading.Event()
    first = held_until(store, "one", done)
    try:
        with (
            pytest.raises(UnavailableError, match=r"is held by run one .*: waited \d+ s; run it again later, or layer"),
            hold(store, log=lambda line: None, run="two", timing=Timing(poll=0.05, patience=0.2)),
        ):
            raise AssertionError("it must not get it")
    finally:
        done.set()
        first.join()


def test_the_processes_of_one_run_work_at_the_same_time(store: Store) -> None:
    """Workers in parallel, a retried pod, a context within a context."""
    done = threading.Event()
    workers = [held_until(store, "one", done) for _ in range(3)]
    with hold(store, log=pytest.fail, run="one", timing=QUICK), hold(store, log=pytest.fail, run="one", timing=QUICK):
        claims = [name for name in store.list("lease/training/") if name.count("/") == 2]
        assert len(claims) == 1, "they share a claim"
        assert len(store.list("lease/training/")) == 6
    done.set()
    for worker in workers:
        worker.join()
    assert [name for name in store.list("lease/training/") if name.count("/") == 3] == []


def test_an_evaluation_does_not_keep_the_training_waiting(store: Store) -> None:
    with hold(store, log=pytest.fail, run="one"), hold(store, EVALUATION, log=pytest.fail, run="two"):
        assert [holder(store, scope).run for scope in (TRAINING, EVALUATION)] == ["one", "two"]  # type: ignore[union-attr]


HOLDER = """
import sys, time
from layerloop.components.storage.lease import hold
from layerloop.components.storage.stores import open_store
with hold(open_store(sys.argv[1]), log=print, run="killed"):
    print("holds", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def killed_run(store: Store) -> Callable[[], None]:
    """A run in a process of its own that holds the lease; calling this kills it."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, store.uri], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "holds\n"

    def kill() -> None:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()  # type: ignore[union-attr]

    return kill


def test_a_run_that_was_killed_on_this_machine_keeps_nobody_waiting(
    store: Store, killed_run: Callable[[], None]
) -> None:
    assert holder(store, TRAINING).alive is not None  # type: ignore[union-attr]
    killed_run()
    with hold(store, log=pytest.fail, run="two", timing=QUICK):
        members = [name for name in store.list("lease/training/") if name.count("/") == 3]
        assert len(members) == 1, "nothing of it is left"


def test_a_run_that_was_killed_elsewhere_expires_by_the_stores_clock(
    store: Store, killed_run: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_run()
    monkeypatch.setattr(lease, "_is_dead_here", lambda member: False)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # this machine's clock says nothing
    said = list[str]()
    began = time.monotonic()
    with hold(store, log=said.append, run="two", timing=Timing(beat=0.2, expiry=3.0, poll=0.1)):
        assert 0.5 < time.monotonic() - began < 20 and len(said) == 1
    with hold(store, log=pytest.fail, run="killed", timing=Timing(poll=0.1)):
        pass  # a retried pod of the same run never waits


def test_a_paused_run_that_wakes_up_says_that_it_was_overtaken_and_frees_nothing(store: Store) -> None:
    said = list[str]()
    with hold(store, log=said.append, run="paused", timing=Timing(beat=0.3)):
        held = take_over(store, TRAINING)  # as `campaign lease --take-over` does
        assert held is not None and held.run == "paused"
        done = threading.Event()
        other = held_until(store, "other", done)
        deadline = time.monotonic() + 20
        while not said and time.monotonic() < deadline:
            time.sleep(0.05)
        assert said and "took training of" in said[0]
    assert (now := holder(store, TRAINING)) is not None and now.run == "other" and now.alive is not None
    done.set()
    other.join()


def test_a_sign_of_life_reads_nothing_of_the_other_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, read = open_store(tmp_path), list[str]()
    really = type(store).open
    with hold(store, log=pytest.fail, run="one", timing=Timing(beat=0.05)), hold(store, log=pytest.fail, run="one"):
        before = {name: entry.etag for name, entry in store.entries("lease/").items()}
        monkeypatch.setattr(type(store), "open", lambda s, name: read.append(name) or really(s, name))
        time.sleep(0.4)
        now = {name: entry.etag for name, entry in store.entries("lease/").items()}
    assert read == [] and sum(before[name] != etag for name, etag in now.items()) == 1


def test_of_fifty_runs_at_once_one_works_at_a_time(tmp_path: Path) -> None:
    store, inside, most, order = open_store(tmp_path), list[int](), list[int](), list[int]()
    timing = Timing(beat=5.0, expiry=60.0, poll=0.02, patience=120.0)

    def work(me: int) -> None:
        with hold(store, log=lambda line: None, run=f"run{me}", timing=timing):
            inside.append(me)
            most.append(len(inside))
            time.sleep(0.002)
            inside.remove(me)
            order.append(me)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(order) == list(range(50)) and set(most) == {1}
    assert len(store.list("lease/")) <= 9, "claims of long ago are removed"


def test_a_process_belongs_to_the_run_that_its_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LAYERLOOP_RUN", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    own = run_id()
    assert own == run_id() and str(os.getpid()) in own
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert run_id() == "job--29500"
    monkeypatch.setenv("LAYERLOOP_RUN", "run-1")
    assert run_id() == "run-1"


def test_a_number_that_another_process_has_now_is_not_the_dead_one(tmp_path: Path) -> None:
    member = {"process": identity(os.getpid())}
    assert not lease._is_dead_here(member)
    boot, space, pid, started = member["process"]
    assert lease._is_dead_here({"process": [boot, space, pid, str(int(started) - 1)]})
    assert not lease._is_dead_here({"process": ["another boot", space, "999999", started]})
    assert not lease._is_dead_here(json.loads('{"process": ["", "", "x"]}'))
