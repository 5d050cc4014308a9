"""The step `train_stretch`: iterations in a row of rollouts, scores and update by ranks that keep the base loaded.

It calls what the three steps call and commits what they commit: a campaign does not show which way it was made. A
process beside rank 0 judges the iteration meanwhile: rank 0's candidates as soon as they are sampled, those of other
ranks as soon as their group is committed. An interrupted stretch continues from what is committed, with any number of
ranks.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from layerloop.components.generate_rollouts.step import sample_iteration
from layerloop.components.policy.at import LoadedPolicy
from layerloop.components.runtime import ranks
from layerloop.components.runtime.contract import StepResult, step_main
from layerloop.components.runtime.distributed import failing_together, process_group, rank
from layerloop.components.runtime.progress import log, time_left
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.steps import STEPS
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.lease import hold
from layerloop.components.storage.manifests import verify
from layerloop.components.storage.retention import apply_retention
from layerloop.components.storage.stores import open_store
from layerloop.components.train_stretch.scoring import Scoring
from layerloop.components.update_lora.step import Learning, begin_update, end_update, policy_metrics

if TYPE_CHECKING:
    import torch


def run(
    *,
    campaign: str,
    iterations: int,
    iteration: int | None = None,
    judge_url: str = "",
    until: int = 0,
    runtime: str = "",
) -> StepResult:
    """Train a campaign's policy by several iterations, with the base loaded once.

    What is committed is byte for byte what the steps generate_rollouts, score_rollouts and update_lora commit.

    Args:
        campaign: Root URI of the campaign.
        iterations: How many iterations, from `iteration` on; those that are committed already count.
        iteration: The first iteration; by default the one after the last committed policy.
        judge_url: Base URL of an OpenAI-compatible endpoint, such as http://127.0.0.1:8788/v1; by default the
            environment's OPENAI_BASE_URL. The key is the environment's OPENAI_API_KEY, if there is one.
        until: The campaign's target: no iteration beyond it is begun. 0 for none.
        runtime: Where and how fast to run: YAML or JSON text, or the path or URI of a file; empty for LAYERLOOP_RUNTIME
            and the defaults (`layerloop runtime`). It changes no result.

    Raises:
        LayerloopError: no iteration to do; as the three steps. What was committed before stays.
    """
    started = time.monotonic()
    opened = Campaign.open(campaign, runtime)
    first = opened.open_iteration(iteration)
    last = _last(first, iterations, until)
    opened.sources()
    opened.policy(first - 1)
    seconds: dict[str, float] = {}
    if _left(opened, first, last):
        with hold(opened.store, log=log):
            if left := _left(opened, first, last):  # by the run that held it until now
                stretch = Stretch(opened, left, judge_url, runtime)
                stretch.train()
                seconds = stretch.seconds
    else:
        log(f"iterations {first} to {last} of {opened.uri} are committed already")
    manifest = opened.policy(last)
    metrics = policy_metrics(manifest) | {f"{what}_seconds": spent for what, spent in seconds.items()}
    metrics |= {"iterations": float(last - first + 1), "seconds": time.monotonic() - started}
    return StepResult(manifests={"policy": manifest}, metrics=metrics)


def _last(first: int, iterations: int, until: int) -> int:
    """The stretch's last iteration.

    Raises:
        LayerloopError: there is none.
    """
    if iterations < 1:
        raise LayerloopError(f"iterations is {iterations}: give 1 or more")
    if 0 < until < first:
        raise LayerloopError(f"iteration is {first}, past the campaign's target {until}: give a greater until, or 0")
    last = first + iterations - 1
    if 0 < until < last and rank() == 0:
        log(f"iterations {until + 1} to {last} are past the run's target {until}: they are left out")
    return min(last, until) if until else last


def _left(campaign: Campaign, first: int, last: int) -> list[int]:
    """The iterations whose policy is not committed; what is committed is there."""
    left = []
    for number in range(first, last + 1):
        manifest = campaign.find(campaign.policy_dir(number))
        if manifest is None:
            left.append(number)
        else:
            verify(campaign.store, manifest)
    return left


class Stretch:
    """The iterations that are left to do, and the policy that stays loaded between them."""

    def __init__(self, campaign: Campaign, iterations: list[int], judge_url: str, runtime: str) -> None:
        self.campaign, self.iterations = campaign, iterations
        self.judge_url, self.runtime = judge_url, runtime
        self.loaded: LoadedPolicy | None = None
        self.scoring: Scoring | None = None  # on rank 0
        self.seconds: dict[str, float] = defaultdict(float)  # of this rank

    def train(self) -> None:
        """Do the iterations, on all ranks."""
        with process_group() as device, ExitStack() as stack:
            if rank() == 0:
                self.scoring = stack.enter_context(Scoring(self.campaign.uri, self.judge_url, self.runtime))
            lag, last = self.campaign.recipe.rollout.lag, self.iterations[-1]
            ready = self.iterations[0] - 1  # the last iteration that is sampled
            self._begin_scoring(ready + 1)
            began = time.monotonic()
            for number, iteration in enumerate(self.iterations):
                if rank() == 0:
                    left = time_left(number, len(self.iterations), time.monotonic() - began)
                    which = "" if iteration == number + 1 else f" ({number + 1} of this run's {len(self.iterations)})"
                    log(f"iteration {iteration} of {last}{which}" + (f"; training: {left}" if left else ""))
                while ready < min(iteration + lag, last):
                    ready += 1
                    self._sample(ready, device)
                learning = self._await_scores(iteration, device)
                if ready > iteration:  # sampled already: the judge need not wait for the update
                    self._begin_scoring(iteration + 1)
                self._learn(iteration, learning)
                if ready == iteration < last:
                    self._begin_scoring(iteration + 1)

    def _begin_scoring(self, iteration: int) -> None:
        """Let the judge have the iteration's groups as they come, unless they are scored already."""
        with failing_together():
            if self.scoring is not None and self.campaign.find(self.campaign.scores_dir(iteration)) is None:
                self.scoring.begin(iteration)

    def _sample(self, iteration: int, device: torch.device) -> None:
        with self._timed("sampling"):
            groups = range(self.campaign.recipe.rollout.groups)
            with failing_together():
                committed = self.campaign.committed_groups(iteration, groups)
                for manifest in committed.values():
                    verify(self.campaign.store, manifest)
            if len(committed) < len(groups):
                self.loaded = sample_iteration(
                    self.campaign,
                    iteration,
                    committed,
                    groups,
                    device=device,
                    loaded=self.loaded,
                    observer=self.scoring,
                ).loaded

    def _await_scores(self, iteration: int, device: torch.device) -> Learning:
        """Do what an update can do before its scores, then wait for them."""
        with self._timed("update"):
            learning = begin_update(self.campaign, iteration, device=device, loaded=self.loaded)
        with self._timed("waiting"), failing_together():
            if self.scoring is not None:
                self.scoring.end()
        return learning

    def _learn(self, iteration: int, learning: Learning) -> None:
        with self._timed("update"):
            end_update(self.campaign, iteration, learning)
            if rank() == 0:
                apply_retention(self.campaign, log=log)
        self.loaded = learning.loaded

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] += time.monotonic() - began


main = functools.partial(
    step_main, run, step=STEPS["train_stretch"], beyond=("policy", "previous"),
    launch=ranks.launch_per_gpu, store=open_store,
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(main())
