"""What a study found: docs/results.json, docs/RESULTS.md and its curves, from the campaigns of pipelines/study.py.

Every number is read from what the steps committed: evaluations' metrics.json and scores.parquet.
"""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerloop.components.judge.reference import FINE, NAME
from layerloop.components.schema.recipe import Recipe, parse_recipe
from layerloop.components.storage.campaign import Campaign
from layerloop.pipelines.study import ARMS, Run, Study

# metric -> (title, name in metrics.json, whether lower is better)
MEASURES: dict[str, tuple[str, str, bool]] = {
    "bad_layers": ("bad layers a decomposition", "designs.bad_layers", True),
    "l1_2": ("per-layer RGB L1, 2 layers", "designs.slot_l1.L2", True),
    "l1_3": ("per-layer RGB L1, 3 layers", "designs.slot_l1.L3", True),
    "l1_4": ("per-layer RGB L1, 4 layers", "designs.slot_l1.L4", True),
    "evenness": ("feature evenness", "designs.evenness", False),
}
REWARD_STD = "reward_std"
TWIN = {"phase1_fine": "full_fine"}  # arm -> what it is compared with, where that is not `full`
TIED = 1e-4  # deviation below which a group's rewards are all the same
# Two-sided 95 % quantile of Student's t by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Spread:
    """How rewards differ within groups, averaged over the groups of an iteration."""

    alone: float  # standard deviation of the phase-1 reward
    used: float  # of the reward that the advantages are made of
    tied: float  # share of groups whose phase-1 rewards are all the same
    agreement: float  # correlation of the two


@dataclass(frozen=True)
class Outcome:
    """One finished run: metric -> (base, tuned), and its rewards by iteration."""

    run: Run
    metrics: Mapping[str, tuple[float, float]]
    curve: Sequence[tuple[int, float]]  # (iteration, mean phase-1 reward)
    spreads: Sequence[Spread]  # by iteration


@dataclass(frozen=True)
class Interval:
    """Mean over seeds with a 95 % t-interval; `half` is None for a single seed."""

    mean: float
    half: float | None
    n: int

    def __str__(self) -> str:
        mean = f"{self.mean:.4f}".replace("-0.0000", "0.0000")
        return mean if self.half is None else f"{mean} ± {self.half:.4f}"


def interval(values: Sequence[float]) -> Interval:
    """Student's 95 % confidence interval of the mean of independent seeds."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return Interval(mean, None, n)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return Interval(mean, STUDENT.get(n - 1, 1.96) * deviation / math.sqrt(n), n)


def outcome(study: Study, run: Run) -> Outcome:
    """Read one finished run."""
    import pyarrow.parquet as pq

    place = Campaign.open(str(study.campaign(run)))
    metrics = json.loads(place.store.read(f"evaluations/iteration-{study.iterations:06d}/metrics.json"))
    found = {name: _pair(metrics, key) for name, (_, key, _) in MEASURES.items()}
    curve, spreads = [], []
    for iteration in range(1, study.iterations + 1):
        table = pq.read_table(io.BytesIO(place.store.read(f"{place.scores_dir(iteration)}/scores.parquet")))
        rows = [row for row in table.to_pylist() if row["reward"] is not None]
        alone = [row["reward_phase1"] for row in rows]
        curve.append((iteration, sum(alone) / len(alone)))
        spreads.append(_spread(rows))
    found[REWARD_STD] = (_mean([spread.alone for spread in spreads]), _mean([spread.used for spread in spreads]))
    return Outcome(run, found, curve, spreads)


def _pair(metrics: Mapping[str, Any], key: str) -> tuple[float, float]:
    return float(metrics[key]["base"]), float(metrics[key]["tuned"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(rows: Sequence[Mapping[str, Any]]) -> Spread:
    groups: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append((row["reward_phase1"], row["reward"]))
    alone, used, agreement = [], [], []
    for pairs in groups.values():
        first, final = ([pair[column] for pair in pairs] for column in (0, 1))
        alone.append(statistics.pstdev(first))
        used.append(statistics.pstdev(final))
        if min(alone[-1], used[-1]) >= TIED:
            agreement.append(statistics.correlation(first, final))
    tied = [float(deviation < TIED) for deviation in alone]
    return Spread(_mean(alone), _mean(used), _mean(tied), _mean(agreement) if agreement else 0.0)


def write_results(study: Study, done: Sequence[Run], planned: Sequence[Run], docs: Path) -> Path:
    """Write results.json, RESULTS.md and curves into `docs`; returns the page."""
    outcomes = [outcome(study, run) for run in done]
    by_arm: dict[str, list[Outcome]] = {}
    for item in outcomes:
        by_arm.setdefault(item.run.arm, []).append(item)
    docs.mkdir(parents=True, exist_ok=True)
    figures = {
        arm: {
            str(item.run.seed): {name: {"base": b, "tuned": t} for name, (b, t) in item.metrics.items()}
            for item in items
        }
        for arm, items in by_arm.items()
    }
    (docs / "results.json").write_text(json.dumps(figures, indent=2) + "\n")
    if by_arm:
        _draw_curves(by_arm, docs / "results-rewards.svg")
    page = docs / "RESULTS.md"
    page.write_text(_page(study, by_arm, [run for run in planned if run not in done]))
    return page


# ------------------------------------------------------------------------------------------------------------- the page


def _page(study: Study, by_arm: Mapping[str, Sequence[Outcome]], missing: Sequence[Run]) -> str:
    parts = ["# Does it learn?\n"]
    if not by_arm:
        parts.append("No run is finished yet.\n")
    else:
        first = next(iter(by_arm.values()))[0].run
        parts += [
            _setting(study, parse_recipe(study.recipe_of(first))),
            "## What was expected\n",
            "Means over seeds, ± Student's 95 % interval; the paper found the like on its scale. Where the mean is as\n"
            "expected but not the whole interval, it says so.\n",
            _expectations(by_arm),
            "## Held-out designs, before and after\n",
            "Tuned is the adapter of the last iteration. ± is Student's 95 % interval over seeds. The change is tuned\n"
            "against base.\n",
            _measures_table(by_arm),
            "## Spread of rewards within a group\n",
            "Standard deviation of the reward within a group, averaged over groups and iterations: from phase 1\n"
            "alone, and as used for the advantages.\n",
            _spread_table(by_arm),
            "Over the first and the last fifth of the iterations; with the share of groups whose candidates all have\n"
            "the same phase-1 reward, and the correlation of both rewards within groups:\n",
            _early_and_late(by_arm),
            "## Arm against arm\n",
            "Difference of the tuned value to the other arm's of the same seed, averaged over seeds.\n",
            _comparison_table(by_arm),
            "## Rewards over iterations\n",
            "Phase-1 reward, averaged over ten iterations; thin lines are seeds, dashed arms have one. Its scale\n"
            "does not depend on the group, but on the judge.\n",
            "![rewards over iterations](results-rewards.svg)\n",
        ]
    if missing:
        names = ", ".join(f"`{run.name}`" for run in missing)
        parts += ["## Not finished\n", f"{names}: run `make study` again.\n"]
    return "\n".join(parts)


def _setting(study: Study, recipe: Recipe) -> str:
    rollout = recipe.rollout
    window = rollout.window
    last = window.start + window.size - 1
    candidates = f"{rollout.groups} groups of {rollout.group_size} candidates"
    noise = f"`{rollout.noise.dynamics}` noise of level {rollout.noise.eta} in steps {window.start} to {last}"
    measured = f"{recipe.evaluation.designs} held-out designs, with {recipe.evaluation.steps} Heun steps"
    return f"""`make study` runs every arm for {study.iterations} iterations of {candidates}:
{rollout.min_layers} to {rollout.max_layers} layers, {rollout.steps} steps, {noise}, learning rate
{recipe.update.learning_rate:g}. Then it measures base and tuned policy on {measured} from the same noise.

**The base** is the tiny policy that ships with layerloop, trained on with designs of which 60 % are decomposed badly:
things left in the background, veils, copies of the whole picture (`components/pretrain_policy/faults.py`). The 20 B
base has such faults from its own training, 1.65 bad layers a decomposition (arXiv 2605.30257); the tiny policy as it
ships has hardly any, and arm `shipped_base` shows what learning does to it.

**The judge** is `{recipe.judge.model}`: rules over the pixels it is shown, not a vision-language model. It is built
to be coarse about a candidate alone, nearly always 2 or 3 of 0 to 5, and fine side by side, as vision-language models
are found to be (arXiv 2605.30257 sees no variance at all within groups in phase 1). So two things here are by
construction: that phase 2 spreads the rewards, and that it knows what phase 1 cannot tell. Its twin, `{FINE}`,
uses all of 0 to 5 alone; `full_fine` and `phase1_fine` show how much of the lead of the whole method is the judge's
coarseness. What this page shows is that the loop turns such rewards into better decompositions, measured by other
numbers than the reward. It does not show what a real judge would reward, nor what the 20 B model would learn.
"""


# What the paper found on its scale, and so what is expected here: (words, whether it holds for these outcomes).
def _expectations(by_arm: Mapping[str, Sequence[Outcome]]) -> str:
    full, alone = by_arm.get("full", ()), {item.run.seed: item for item in by_arm.get("phase1_only", ())}
    if not full:
        return ""
    lines = ["| expected of `full` | found | |", "|---|---|---|"]

    def line(words: str, found: Interval, holds: Callable[[float], bool], *, percent: bool = False) -> None:
        ends = [found.mean] if found.half is None else [found.mean - found.half, found.mean + found.half]
        verdict = "**no**" if not holds(found.mean) else "yes" if all(map(holds, ends)) else "yes, on average"
        half = "" if found.half is None else (f" ± {found.half:.1%}" if percent else f" ± {found.half:.2f}")
        shown = (f"{found.mean:+.1%}" if percent else f"{found.mean:.2f}") + half
        lines.append(f"| {words} | {shown} | {verdict} |")

    bad = interval([_relative(*item.metrics["bad_layers"]) for item in full])
    line("bad layers at least halved", bad, lambda change: change <= -0.5, percent=True)
    for layers in (2, 3, 4):
        l1 = interval([_relative(*item.metrics[f"l1_{layers}"]) for item in full])
        line(f"per-layer RGB L1 at least 10 % lower, {layers} layers", l1, lambda change: change <= -0.1, percent=True)
    even = interval([_relative(*item.metrics["evenness"]) for item in full])
    line("evenness up", even, lambda change: change > 0, percent=True)
    spread = interval([b / a if a else math.inf for a, b in (item.metrics[REWARD_STD] for item in full)])
    line("spread of rewards at least doubled by phase 2", spread, lambda ratio: ratio >= 2)
    if pairs := [(item, alone[item.run.seed]) for item in full if item.run.seed in alone]:
        for name, (title, _, lower) in MEASURES.items():
            relative = interval([_relative(b.metrics[name][1], a.metrics[name][1]) for a, b in pairs])
            better: Callable[[float], bool] = (lambda gap: gap < 0) if lower else (lambda gap: gap > 0)
            line(f"{title}: ahead of `phase1_only`", relative, better, percent=True)
        lines += [
            "",
            "How much phase 2 can add to phase 1 depends on the judge: the closer the agreement of both within groups",
            "(below) is to 1, the less is left to add. `phase1_fine` against `full_fine` (further below) is the same",
            "comparison with a judge that is fine in both phases.",
        ]
    return "\n".join(lines) + "\n" + _room(full, by_arm.get("shipped_base", ()))


def _room(full: Sequence[Outcome], shipped: Sequence[Outcome]) -> str:
    """How much of the per-layer L1 the base's faults cost, which is what there is to win back, and how much of it is
    won: per layer count, over the seeds that both arms have. `shipped` began as the base was before its faults."""
    before = {item.run.seed: item for item in shipped}
    pairs = [(item, before[item.run.seed]) for item in full if item.run.seed in before]
    if not pairs:
        return ""
    cost, won = [], []
    for layers in (2, 3, 4):
        of = f"l1_{layers}"
        base = _mean([item.metrics[of][0] for item, _ in pairs])
        tuned = _mean([item.metrics[of][1] for item, _ in pairs])
        whole = _mean([item.metrics[of][0] for _, item in pairs])
        cost.append(f"{(base - whole) / base:.0%}" if base else "0%")
        won.append(f"{(base - tuned) / (base - whole):.0%}" if base > whole else "none")
    seeds = ", ".join(str(item.run.seed) for item, _ in pairs)
    return f"""
The faults are {", ".join(cost)} of the base's per-layer L1 at 2, 3 and 4 layers (against the policy as it ships;
seed {seeds}): unlearning them can lower it by no more. `full` wins back {", ".join(won)} of that.
"""


def _measures_table(by_arm: Mapping[str, Sequence[Outcome]]) -> str:
    lines = ["| arm | measure | seeds | base | tuned | change |", "|---|---|---|---|---|---|"]
    for arm, items in by_arm.items():
        for name, (title, _, _) in MEASURES.items():
            base = interval([item.metrics[name][0] for item in items])
            tuned = interval([item.metrics[name][1] for item in items])
            change = interval([_relative(*item.metrics[name]) for item in items])
            shown = f"{change.mean:+.1%}" + (f" ± {change.half:.1%}" if change.half is not None else "")
            lines.append(f"| `{arm}` | {title} | {base.n} | {base.mean:.4f} | {tuned} | {shown} |")
    lines.append("")
    lines += [f"- `{arm}`: {ARMS[arm].what}" for arm in by_arm]
    return "\n".join(lines) + "\n"


def _relative(base: float, tuned: float) -> float:
    return (tuned - base) / base if base else 0.0


def _spread_table(by_arm: Mapping[str, Sequence[Outcome]]) -> str:
    lines = ["| arm | phase 1 alone | as used | ratio |", "|---|---|---|---|"]
    for arm, items in by_arm.items():
        pairs = [item.metrics[REWARD_STD] for item in items]
        alone, used = interval([a for a, _ in pairs]), interval([b for _, b in pairs])
        ratio = interval([b / a if a else 0.0 for a, b in pairs])
        lines.append(f"| `{arm}` | {alone} | {used} | {ratio.mean:.2f} |")
    return "\n".join(lines) + "\n"


def _early_and_late(by_arm: Mapping[str, Sequence[Outcome]]) -> str:
    names = ("phase 1 alone", "as used", "tied in phase 1", "agreement")
    lines = ["| arm | " + " | ".join(f"{name}, first | last" for name in names) + " |", "|---" * 9 + "|"]
    for arm, items in by_arm.items():
        count = len(items[0].spreads)
        fifth = max(1, count // 5)
        cells = []
        for field, form in (("alone", ".4f"), ("used", ".4f"), ("tied", ".0%"), ("agreement", ".2f")):
            for part in (slice(fifth), slice(count - fifth, count)):
                value = _mean([_mean([getattr(spread, field) for spread in item.spreads[part]]) for item in items])
                cells.append(format(value, form))
        lines.append(f"| `{arm}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _comparison_table(by_arm: Mapping[str, Sequence[Outcome]]) -> str:
    lines = [
        "| arm | against | " + " | ".join(title for title, _, _ in MEASURES.values()) + " |",
        "|---" * (2 + len(MEASURES)) + "|",
    ]
    for arm, items in by_arm.items():
        twin = TWIN.get(arm, "full")
        others = {item.run.seed: item for item in by_arm.get(twin, ())}
        pairs = [(item, others[item.run.seed]) for item in items if item.run.seed in others]
        if arm == twin or not pairs:
            continue
        cells = [str(interval([a.metrics[name][1] - b.metrics[name][1] for a, b in pairs])) for name in MEASURES]
        lines.append(f"| `{arm}` | `{twin}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _draw_curves(by_arm: Mapping[str, Sequence[Outcome]], path: Path, *, smooth: int = 10) -> None:
    """Mean reward over iterations, a panel a judge: seeds thin, their mean thick, dashed where there is one seed."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "layerloop"  # the same drawing gives the same bytes
    from matplotlib import pyplot

    judges = {arm: ARMS[arm].changes.get("judge", {}).get("model", NAME) for arm in by_arm}
    panels = list(dict.fromkeys(judges.values()))
    widths = [3 if panel == NAME else 2 for panel in panels]
    figure, row = pyplot.subplots(
        1, len(panels), figsize=(11, 5), layout="constrained", squeeze=False, width_ratios=widths
    )
    on = dict(zip(panels, row[0], strict=True))
    for arm, items in by_arm.items():
        index = [other for other in by_arm if judges[other] == judges[arm]].index(arm)
        axes, colour = on[judges[arm]], f"C{index}"
        lines = []
        for item in items:
            values = [value for _, value in item.curve]
            lines.append([sum(values[max(0, i - smooth + 1) : i + 1]) / min(i + 1, smooth) for i in range(len(values))])
            if len(items) > 1:
                axes.plot(range(1, len(values) + 1), lines[-1], color=colour, alpha=0.3, linewidth=0.8)
        mean = [sum(column) / len(column) for column in zip(*lines, strict=True)]
        style: dict[str, Any] = {"linewidth": 2} if len(items) > 1 else {"linewidth": 1, "linestyle": "--"}
        axes.plot(range(1, len(mean) + 1), mean, color=colour, label=arm, **style)
    for panel, axes in on.items():
        axes.set_title(panel, loc="left", fontsize="medium")
        axes.set_xlabel("iteration")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    row[0][0].set_ylabel(f"mean phase-1 reward, {smooth} iterations")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
