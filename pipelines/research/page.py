"""The study's page: docs/RESULTS.md, docs/results.json and the curves, from the outcomes of its runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerloop.components.layers.columns import better_of, gives_verdict, title_of
from layerloop.components.reference_judge.identity import FINE, NAME
from layerloop.components.schema.recipe import Recipe, parse_recipe
from layerloop.pipelines.research.arms import ARMS, LAYERS, Run, Study
from layerloop.pipelines.research.outcomes import REWARD_STD, Interval, Outcome, interval, mean, outcome

COMPARED_WITH = {"phase1_fine": "full_fine"}  # arm -> the other, where that is not `full`


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
            *_samplers(by_arm),
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

**The base** is the tiny policy that ships with layerloop with its adapter of faults, which was trained on designs of
which 70 % are decomposed badly: things left in the background, veils, copies of the whole picture
(`components/research/faults.py`). The 20 B base has such faults from its own training, 1.65 bad layers a decomposition
(arXiv 2605.30257); the tiny policy as it ships has hardly any, and arm `shipped_base` shows what learning does to it.

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
    for layers in LAYERS:
        l1 = interval([_relative(*item.metrics[f"layer_l1.L{layers}"]) for item in full])
        line(f"layer RGB L1 at least 10 % lower, {layers} layers", l1, lambda change: change <= -0.1, percent=True)
    gap = interval([_relative(*item.metrics["evenness_gap"]) for item in full])
    line("evenness nearer to that of the true layers", gap, lambda change: change < 0, percent=True)
    spread = interval([b / a if a else math.inf for a, b in (item.metrics[REWARD_STD] for item in full)])
    line("spread of rewards at least doubled by phase 2", spread, lambda ratio: ratio >= 2)
    if pairs := [(item, alone[item.run.seed]) for item in full if item.run.seed in alone]:
        for name in full[0].measures:
            if not gives_verdict(_column(name)):
                continue
            wanted = better_of(_column(name))
            relative = interval([_relative(b.metrics[name][1], a.metrics[name][1]) for a, b in pairs])
            better: Callable[[float], bool] = (lambda gap: gap < 0) if wanted == "lower" else (lambda gap: gap > 0)
            line(f"{_title(name)}: ahead of `phase1_only`", relative, better, percent=True)
        lines += [
            "",
            "How much phase 2 can add to phase 1 depends on the judge: the closer the agreement of both within groups",
            "(below) is to 1, the less is left to add. `phase1_fine` against `full_fine` (further below) is the same",
            "comparison with a judge that is fine in both phases.",
        ]
    return "\n".join(lines) + "\n" + _room(full, by_arm.get("shipped_base", ()))


def _room(full: Sequence[Outcome], shipped: Sequence[Outcome]) -> str:
    """How much of the layers' L1 the base's faults cost, which is what there is to win back, and how much of it is
    won: per layer count, over the seeds that both arms have. `shipped` began as the base was before its faults."""
    before = {item.run.seed: item for item in shipped}
    pairs = [(item, before[item.run.seed]) for item in full if item.run.seed in before]
    if not pairs:
        return ""
    cost, won = [], []
    for layers in LAYERS:
        of = f"layer_l1.L{layers}"
        base = mean([item.metrics[of][0] for item, _ in pairs])
        tuned = mean([item.metrics[of][1] for item, _ in pairs])
        shipped_l1 = mean([item.metrics[of][0] for _, item in pairs])
        cost.append(f"{(base - shipped_l1) / base:.0%}" if base else "0%")
        won.append(f"{(base - tuned) / (base - shipped_l1):.0%}" if base > shipped_l1 else "none")
    seeds = ", ".join(str(item.run.seed) for item, _ in pairs)
    return f"""
The faults are {", ".join(cost)} of the base's layer L1 at 2, 3 and 4 layers (against the policy as it ships;
seed {seeds}): unlearning them can lower it by no more. `full` wins back {", ".join(won)} of that.
"""


def _measures_table(by_arm: Mapping[str, Sequence[Outcome]]) -> str:
    lines = ["| arm | measure | seeds | base | tuned | change |", "|---|---|---|---|---|---|"]
    for arm, items in by_arm.items():
        for name in items[0].measures:
            base = interval([item.metrics[name][0] for item in items])
            tuned = interval([item.metrics[name][1] for item in items])
            change = interval([_relative(*item.metrics[name]) for item in items])
            shown = f"{change.mean:+.1%}" + (f" ± {change.half:.1%}" if change.half is not None else "")
            lines.append(f"| `{arm}` | {_title(name)} | {base.n} | {base.mean:.4f} | {tuned} | {shown} |")
    lines.append("")
    lines += [f"- `{arm}`: {ARMS[arm].what}" for arm in by_arm]
    return "\n".join(lines) + "\n"


def _samplers(by_arm: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """Whether the gain of an adapter holds by other samplers than it was trained for; no section where none ran."""
    compared = {arm: some for arm, items in by_arm.items() if (some := [item for item in items if item.samplers])}
    if not compared:
        return []
    one = next(iter(compared.values()))[0].samplers
    names = list(next(iter(one.values())).measures)
    lines = [
        "| arm | sampler | seeds | " + " | ".join(_title(name) for name in names) + " | safe |",
        "|---" * (4 + len(names)) + "|",
    ]
    for arm, items in compared.items():
        for how in items[0].samplers:
            sampled = [item.samplers[how] for item in items]
            cells = []
            for name in names:
                base, tuned = (mean([one.measures[name][side] for one in sampled]) for side in (0, 1))
                mark = "**" if all(name in one.clear for one in sampled) else ""
                cells.append(f"{base:.4f} → {mark}{tuned:.4f}{mark} ({_relative(base, tuned):+.0%})")
            safe = sum(one.safe is True for one in sampled)
            lines.append(f"| `{arm}` | {how} | {len(sampled)} | {' | '.join(cells)} | {safe} of {len(sampled)} |")
    return [
        "## By the samplers that people use\n",
        "Base → tuned by each sampler, on at most 24 of the designs: means over seeds, bold where every seed's own\n"
        "test calls the difference clear. An adapter is safe with a sampler where no measure is clearly worse than\n"
        "the base's, nor than its own by the reference sampler, `heun-50`.\n",
        "\n".join(lines) + "\n",
    ]


def _column(name: str) -> str:
    """The column of an evaluation's table: `slot_l1` of `slot_l1.L2`."""
    return name.partition(".")[0]


def _title(name: str) -> str:
    """A measure in a sentence: `per-slot RGB L1, 2 layers` of `slot_l1.L2`."""
    column, _, layers = name.partition(".L")
    title = title_of(column)
    return title[0].lower() + title[1:] + (f", {layers} layers" if layers else "")


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
                value = mean([mean([getattr(spread, field) for spread in item.spreads[part]]) for item in items])
                cells.append(format(value, form))
        lines.append(f"| `{arm}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _comparison_table(by_arm: Mapping[str, Sequence[Outcome]]) -> str:
    names = next(iter(by_arm.values()))[0].measures
    lines = [
        "| arm | against | " + " | ".join(_title(name) for name in names) + " |",
        "|---" * (2 + len(names)) + "|",
    ]
    for arm, items in by_arm.items():
        other = COMPARED_WITH.get(arm, "full")
        others = {item.run.seed: item for item in by_arm.get(other, ())}
        pairs = [(item, others[item.run.seed]) for item in items if item.run.seed in others]
        if arm == other or not pairs:
            continue
        cells = [str(interval([a.metrics[name][1] - b.metrics[name][1] for a, b in pairs])) for name in names]
        lines.append(f"| `{arm}` | `{other}` | " + " | ".join(cells) + " |")
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
