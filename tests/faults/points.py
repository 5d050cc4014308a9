"""Strikes: a stage is cut off at one change of the store, run again, and looked at."""

from __future__ import annotations

import shutil
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from layerloop.components.storage.owners import remove_abandoned_folders
from layerloop.components.storage.stores import open_store

from .places import Place
from .scenario import KILLED, Judged, Scenario, Stage, problems, spoil_orphans, stored_replies


@dataclass(frozen=True)
class Point:
    """A change of a stage's at which it is struck, by its number or by words of it."""

    stage: str
    store: str  # folder, s3 or rclone
    at: int = -1
    action: str = "kill"
    match: str = ""

    @property
    def name(self) -> str:
        return f"{self.store} {self.stage} {self.action} {self.at:03d}"


@dataclass
class Outcome:
    """What a strike came to."""

    label: str = ""  # the change
    reached: bool = True
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def changes(made: Scenario, stage: Stage, place: Place) -> list[str]:
    """The changes that an uninterrupted attempt makes, in words."""
    log = made.folder / f"count-{uuid.uuid4().hex[:8]}"
    with place.entered():
        uri = made.put(stage.name, place)
        done = made.run(stage, uri, {"log": str(log), "at": -1})
        assert done.status == 0, done.said
        remove(uri)
    return log.read_text().splitlines()


def strike(made: Scenario, point: Point, place: Place, *, spoil: bool) -> Outcome:
    """Kill a stage at a point, and look at what the next attempt makes of it.

    Args:
        place: where the copy of the campaign is put.
        spoil: also cut in half what the kill left without a manifest.
    """
    with place.entered():
        return _strike(made, point, place, spoil)


def _strike(made: Scenario, point: Point, place: Place, spoil: bool) -> Outcome:
    began, stage, uri = time.monotonic(), made.stage(point.stage), made.put(point.stage, place)
    folder = made.folder / f"strike-{uuid.uuid4().hex[:8]}"
    temporary, log = folder / "tmp", folder / "log"
    temporary.mkdir(parents=True)
    made.judge.answered.clear()
    hook = {"log": str(log), "at": point.at, "match": point.match, "action": point.action}
    first = made.run(stage, uri, hook, TMPDIR=str(temporary))
    labels = log.read_text().splitlines() if log.exists() else []
    found = (at for at, label in enumerate(labels) if at == point.at or (point.match and point.match in label))
    at = next(found, None)
    outcome = Outcome(label="" if at is None else labels[at], reached=at is not None)
    if outcome.reached:
        alone = stage.step != "train_stretch"  # else a process beside it may have been the one
        if first.status != KILLED and (alone or first.status == 0):
            outcome.problems.append(f"the first attempt ended with {first.status}: {last_line(first.said)}")
        judged = Judged(Counter(made.judge.answered), stored_replies(open_store(uri)))
        if spoil:
            spoil_orphans(uri)
        second = made.run(stage, uri, TMPDIR=str(temporary))
        if second.status != 0:
            outcome.problems.append(f"the next attempt ended with {second.status}: {last_line(second.said)}")
        if paid := judged.problem(made.judge.answered):
            outcome.problems.append(paid)
        outcome.problems += problems(made, stage, uri)
        remove_abandoned_folders(temporary)  # as the first step of every run does
        outcome.problems += [f"{path.name} is left in TMPDIR" for path in temporary.iterdir()]
    if not outcome.problems:
        remove(uri)
        shutil.rmtree(folder)
    outcome.seconds = time.monotonic() - began
    return outcome


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "nothing was said")


def remove(uri: str) -> None:
    """Remove a copy of the campaign."""
    if "://" not in uri:
        shutil.rmtree(Path(uri).parent, ignore_errors=True)
        return
    store = open_store(uri)
    for name in store.list():
        store.delete(name)
