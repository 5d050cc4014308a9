"""`layerloop submit`: one run, or run after run to a target, with its result as exit status.

`kfp run create --wait` ends with 0 for a failed run and never returns for a cancelled one (kfp 2.17), so it is done
here.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from layerloop.components.schema.errors import LayerloopError
from layerloop.pipelines.kfp_api import AwayError, KfpApi, MissingError, RefusedError
from layerloop.pipelines.runnable import Pipeline, typed_parameters
from layerloop.pipelines.runs import (
    FAILED,
    INTERRUPTED,
    SUCCEEDED,
    UNFINISHED,
    Contact,
    LostError,
    Settings,
    Waiting,
    live_runs_of,
    options_of,
    run_link,
    start_run,
    wait_for,
)

MAX_FAILURES = 3  # runs in a row without progress
T = TypeVar("T")


def submit(
    api: KfpApi,
    pipeline: Pipeline,
    parameters: Mapping[str, Any],
    settings: Settings,
    waiting: Waiting,
    *,
    wait: bool = False,
) -> int:
    """Start a run; with `wait`, report it until it ends.

    Returns:
        Exit status: 0 when it succeeded (or was started, without `wait`), 1 when it failed, 3 when it was cancelled,
        skipped or took too long, 130 when the waiting was interrupted.

    Raises:
        LayerloopError: a wrong package or parameter, or the API server refuses or cannot be reached.
    """
    try:
        run_id = start_run(api, pipeline, parameters, settings)
    except KeyboardInterrupt:
        print(f"interrupted: the run may have been started, look before you start another: {api.ui}/#/runs", flush=True)
        return INTERRUPTED
    return attach(api, run_id, waiting) if wait else SUCCEEDED


def attach(api: KfpApi, run_id: str, waiting: Waiting) -> int:
    """Report an existing run until it ends; exit status as of `submit`."""
    try:
        return wait_for(api, run_id, waiting)
    except KeyboardInterrupt:
        print(
            f"interrupted: run {run_id} continues: {run_link(api, run_id)}\n"
            f"attach to it again:  layerloop submit --attach {run_id} {options_of(api)}",
            flush=True,
        )
        return INTERRUPTED
    except MissingError:
        raise
    except (AwayError, RefusedError) as error:
        again = f"attach to it again by `layerloop submit --attach {run_id} {options_of(api)}`"
        raise type(error)(f"{error}; when that is mended, {again}") from None


def submit_until(
    api: KfpApi,
    pipeline: Pipeline,
    parameters: Mapping[str, Any],
    settings: Settings,
    waiting: Waiting,
    *,
    until: int,
    head: Callable[[str], int],
    max_failures: int = MAX_FAILURES,
) -> int:
    """Run after run, until the campaign's head is at iteration `until`.

    A run of this campaign that is alive is attached to, whoever started it; only when there is none, one is started.
    How far the campaign is, its store says, which `head` reads: a run's state says that it ended, not what it reached.

    Args:
        head: The last committed iteration of a campaign's URI, 0 where there is no campaign yet.
        max_failures: Runs in a row that end without progress, after which it stops.

    Returns:
        Exit status: 0 when the target is reached, else that of the last run.
    """
    campaign = str(typed_parameters(pipeline, parameters)["campaign"])
    contact = Contact(waiting, what=f"campaign {campaign}")
    # Not max_failures: the count here starts from zero, which is how a chain is continued after it stopped itself.
    known = {"until": str(until)} if pipeline.declares("until") else {}
    run_id, fruitless, last = "", 0, SUCCEEDED
    try:
        reached = _first_look(head, campaign)
        while reached < until:
            began = time.monotonic()
            if fruitless >= max_failures:
                print(
                    f"campaign {campaign}: {fruitless} runs in a row without progress, stopped at iteration {reached}"
                )
                return last or FAILED
            given = {**parameters, **known}
            ask = functools.partial(_own_run, api, pipeline, campaign, given, settings)
            run = _wait_for_answer(contact, waiting, ask)
            if run is None:
                print(f"campaign {campaign} is at iteration {reached} of {until}: the time is up", flush=True)
                return UNFINISHED
            run_id = run
            last = wait_for(api, run_id, waiting)
            before, seen = reached, _wait_for_answer(contact, waiting, lambda: _look(head, campaign))
            reached = before if seen is None else seen
            print(f"campaign {campaign} is at iteration {reached} of {until}", flush=True)
            if last == UNFINISHED and reached < until:  # cancelled by a person, or out of time
                return last
            fruitless = 0 if reached > before else fruitless + 1
            if fruitless and fruitless < max_failures:
                pause = min(waiting.poll(time.monotonic() - began), 60.0)
                time.sleep(max(0.0, min(pause, waiting.deadline - time.monotonic())))
        print(f"campaign {campaign} has reached iteration {reached}, the target is {until}: done", flush=True)
        return SUCCEEDED
    except KeyboardInterrupt:
        going = f"run {run_id} continues: {run_link(api, run_id)}\n" if run_id else "no run was being waited for\n"
        print(f"interrupted: {going}the same command attaches to the campaign's run again, and continues", flush=True)
        return INTERRUPTED


def _first_look(head: Callable[[str], int], campaign: str) -> int:
    try:
        return head(campaign)
    except LayerloopError as error:
        raise LayerloopError(
            f"{error}; --until reads the campaign's store from here, and `layerloop campaign run-until` does not"
        ) from None


def _look(head: Callable[[str], int], campaign: str) -> int:
    """The head of a store that was readable before: now it is worth other tries."""
    try:
        return head(campaign)
    except LayerloopError as error:
        raise AwayError(str(error)) from None


def patiently(question: Callable[[], T], waiting: Waiting, *, what: str) -> T:
    """The answer of a server that may be away at first.

    Raises:
        LostError: it stays away for longer than the patience, or until the time is up. RefusedError passes through.
    """
    answer = _wait_for_answer(Contact(waiting, what=what), waiting, question)
    if answer is None:
        raise LostError(f"{what}: KFP did not answer in time: check --host")
    return answer


def _wait_for_answer(contact: Contact, waiting: Waiting, question: Callable[[], T]) -> T | None:
    """The answer, however long the server is away; None when the time is up."""
    began = time.monotonic()
    while (answer := contact.ask(question)) is None:
        pause, left = waiting.poll(time.monotonic() - began), waiting.deadline - time.monotonic()
        time.sleep(max(0.0, min(pause, left)))
        if left <= pause:
            return None
    return answer


def _own_run(
    api: KfpApi,
    pipeline: Pipeline,
    campaign: str,
    parameters: Mapping[str, Any],
    settings: Settings,
) -> str:
    """Id of the campaign's one live run: found, or started.

    Of two commands that start one at the same moment the later withdraws its own, so both wait for the same run.
    """
    alive = live_runs_of(api, campaign, pipeline.name)
    if alive:
        run_id = str(alive[0]["run_id"])
        print(f"campaign {campaign} has a live run, waiting for it: {run_link(api, run_id)}", flush=True)
        return run_id
    started = start_run(api, pipeline, parameters, settings)
    alive = live_runs_of(api, campaign, pipeline.name)
    first = str(alive[0]["run_id"]) if alive else started
    if first != started:
        print(f"run {first} was started at the same moment: run {started} is withdrawn", flush=True)
        api.post(f"runs/{started}:terminate")
    return first
