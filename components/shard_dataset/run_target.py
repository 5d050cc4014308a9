"""Whether a run has anything to do: its campaign's target, and the progress of the runs before it.

A campaign of hundreds of iterations is a chain of runs that nobody watches. So each run first checks whether there is
anything left to do, and whether the runs before it made progress.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerloop.components.runtime.progress import log
from layerloop.components.runtime.recurring import disable_recurring_run
from layerloop.components.runtime.refusals import POD
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.campaign import RECIPE, Campaign, check_publication_name
from layerloop.components.storage.stores import LARGEST_RECORD, Store

RUNS = "runs"  # folder of the records of runs that were started
MODES = ("end", "every-run", "never", "only")
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class RunTarget:
    """The part of a campaign that one run covers."""

    run_id: str  # KFP's; one of its own where there is none
    iterations: int  # that it was compiled with
    evaluate: str  # one of MODES; "only" is a run that trains nothing
    until: int = 0  # the campaign's target, an iteration; 0 for none
    max_failures: int = 0  # runs in a row without progress after which no further one starts; 0 for no limit
    publish_as: str = ""  # folder under published/; the campaign's folder with the iteration where it is empty

    @classmethod
    def of(
        cls, *, run_id: str, iterations: int, evaluate: str, until: int, max_failures: int, publish_as: str = ""
    ) -> RunTarget:
        """The run's target, checked.

        Raises:
            LayerloopError: a negative number, an unknown mode, or a name that cannot be published under.
        """
        for name, value in (("until", until), ("max_failures", max_failures)):
            if value < 0:
                raise LayerloopError(f"{name} is {value}: give 0 for none, or a positive number")
        if iterations < 1:
            raise LayerloopError(f"iterations is {iterations}: give 1 or more")
        if evaluate not in MODES:
            raise LayerloopError(f"evaluate is {evaluate!r}: choose one of {', '.join(MODES)}")
        if not _RUN_ID.fullmatch(run_id):  # a placeholder that nothing resolved: kfp.local and other runners
            run_id = f"local-{uuid.uuid4()}"
        if publish_as:
            check_publication_name(publish_as)
        return cls(
            run_id=run_id, iterations=iterations, evaluate=evaluate, until=until, max_failures=max_failures,
            publish_as=publish_as,
        )  # fmt: skip

    def left(self, head: int) -> str:
        """The work of this run: `iterations`, or `everything`: it evaluates and publishes after them, in mode `end`
        not before the target."""
        finishes = self.evaluate != "end" or not self.until or head + self.iterations >= self.until
        return "everything" if finishes else "iterations"

    def check_publication(self, campaign: Campaign) -> None:
        """Refuse a name that the run could not publish under at its end, many hours later.

        Raises:
            LayerloopError: the name holds the adapter of another iteration than the run ends with.
        """
        head = campaign.head()
        if not self.publish_as or self.left(head) != "everything":
            return
        last = max(head, min(head + self.iterations, self.until or head + self.iterations))
        taken = campaign.find(campaign.published_dir(self.publish_as))
        if taken is not None and taken.iteration != last:
            raise LayerloopError(
                f"{campaign.uri}/{campaign.published_dir(self.publish_as)} already holds the adapter of iteration "
                f"{taken.iteration}, and this run ends with iteration {last}: choose another "
                "publish_as, or leave it empty"
            )

    def is_done(self, campaign: Campaign) -> bool:
        """Whether the campaign has reached the target and all that follows it; if so, log it and end the chain of runs.

        A head at the target whose evaluation or publication is still missing is not done: a run that died there is
        continued by the next, whose iterations pass through at once.
        """
        head = campaign.head()
        if not self.until or head < self.until:
            return False
        if head == self.until and (missing := self._missing(campaign, head)):
            log(f"campaign {campaign.uri} is at its target, iteration {head}; {missing} is still to be done")
            return False
        log(f"campaign {campaign.uri} has reached its target: iteration {head} of {self.until}; nothing is left to do")
        self._end_chain()
        return True

    def begin(self, store: Store) -> None:
        """Record that this run starts and where the campaign is; refuse if the runs before it made no progress.

        Nothing is written without a limit, and nothing twice by a step that is retried.

        Raises:
            LayerloopError: `max_failures` runs in a row started where the campaign still is.
        """
        if not self.max_failures:
            return
        campaign = Campaign.open(store.uri) if store.exists(RECIPE) else None
        mark = _progress_mark(campaign)
        before = sorted((r for r in _records(store) if r["run"] != self.run_id), key=lambda record: record["started"])
        idle: list[str] = []
        for record in reversed(before):
            if record["mark"] != mark:
                break
            idle.insert(0, str(record["run"]))
        if len(idle) >= self.max_failures:
            self._end_chain()
            raise LayerloopError(
                f"{len(idle)} runs in a row ({', '.join(idle[-5:])}) made no progress on campaign {store.uri} "
                f"({mark}) and max_failures is {self.max_failures}: look at their logs, fix the cause, and start a run "
                "with max_failures 0; once it makes progress, the count starts from zero (as after deleting "
                f"{RUNS}/ of the campaign)"
            )
        record = {"run": self.run_id, "started": time.time(), "mark": mark}
        store.create(f"{RUNS}/{self.run_id}.json", (json.dumps(record, sort_keys=True) + "\n").encode())

    def _missing(self, campaign: Campaign, head: int) -> str:
        if self.evaluate in ("end", "every-run") and campaign.find(_evaluation(campaign, head)) is None:
            return "its evaluation"
        published = (campaign.find(campaign.published_dir(name)) for name in campaign.published())
        return "" if any(m is not None and m.iteration == head for m in published) else "its publication"

    def _end_chain(self) -> None:
        if POD in os.environ or "LAYERLOOP_KFP_API" in os.environ:
            disable_recurring_run(self.run_id)


def refuse_ephemeral_folder(campaign_uri: str) -> None:
    """Refuse a campaign in a folder of the pod's own file system, which the next pod does not see.

    A folder on a volume that an administrator mounts in every step is another file system, and is accepted.

    Raises:
        LayerloopError: in a pod of Kubeflow, a folder on the file system of the container.
    """
    text = campaign_uri.strip()
    if POD not in os.environ or ("://" in text and not text.startswith("file://")) or not text:
        return
    folder = Path(text.removeprefix("file://")).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if there.stat().st_dev == Path("/").stat().st_dev:
        raise LayerloopError(
            f"campaign is {text}, a folder of this pod, gone with it: give s3://bucket/prefix, which every step sees"
        )


def _evaluation(campaign: Campaign, iteration: int) -> str:
    return campaign.evaluation_dir(f"iteration-{iteration:06d}")


def _progress_mark(campaign: Campaign | None) -> str:
    """A campaign's progress in words: its head, and what is committed beyond it. Every output of a run changes it."""
    if campaign is None:
        return "not started"
    head = campaign.head()
    following = head + 1
    committed = len(campaign.sampled_groups(following)) + (campaign.find(campaign.scores_dir(following)) is not None)
    after = (campaign.find(_evaluation(campaign, head)) is not None) + len(campaign.published())
    sources = "with" if campaign.find(campaign.sources_dir) else "without"
    return f"iteration {head}, {committed} outputs of the next, {after} evaluated or published, {sources} sources"


def _records(store: Store) -> Iterator[dict[str, Any]]:
    """Records of earlier runs; unreadable ones are skipped."""
    for name in store.list(f"{RUNS}/"):
        try:
            record = json.loads(store.read(name, most=LARGEST_RECORD))
            yield {"run": str(record["run"]), "started": float(record["started"]), "mark": str(record["mark"])}
        except (ValueError, KeyError, TypeError, LayerloopError):
            continue
