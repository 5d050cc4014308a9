"""What a campaign's manifests say of its training up to an iteration: charts, evaluations before this one, and cost."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerloop.components.evaluate_adapter.cases import Kind
from layerloop.components.evaluate_adapter.charts import Line
from layerloop.components.layers.columns import DEFINITIONS, changed_definitions, quoted, title_of
from layerloop.components.storage.manifests import read_file

if TYPE_CHECKING:
    from layerloop.components.schema.manifest import Manifest
    from layerloop.components.storage.campaign import Campaign

_CRITERION = "score_"
# Of the manifests of policies: title of a chart -> name of a line -> field.
_LEARNING: Mapping[str, Mapping[str, str]] = {
    "KL to the base, per step": {"KL": "kl"},
    "Share of points whose gradient the clip stopped": {
        "ratio too low": "clip_fraction_low", "ratio too high": "clip_fraction_high",
    },
    "Gradient norm, the largest before clipping": {"gradient norm": "gradient_norm"},
}  # fmt: skip


@dataclass(frozen=True)
class Evaluated:
    """An evaluation of this campaign: measures of the adapter and of the base by `designs.bad_layers` and so on."""

    iteration: int
    link: str  # to its report, relative to that of the page; "" for the page itself
    tuned: Mapping[str, float]
    base: Mapping[str, float]


def training_charts(
    campaign: Campaign, iteration: int, scores: Sequence[Manifest]
) -> list[tuple[str, tuple[Line, ...]]]:
    """(title, lines) of what was recorded of the iterations until this one; what no iteration has is left out."""
    judged = {manifest.iteration or 0: _metrics_of(manifest) for manifest in scores}
    criteria = list(dict.fromkeys(name for row in judged.values() for name in row if name.startswith(_CRITERION)))
    names = {name.removeprefix(_CRITERION).replace("_", " "): name for name in criteria}
    charts = [_chart("Criteria of the judge", names, judged)]
    spread = {"both phases": "reward_std_within_group", "phase 1 alone": "reward_std_within_group_phase1"}
    charts.append(_chart("Spread of rewards within groups", spread, judged))
    policies = (campaign.find(campaign.policy_dir(earlier)) for earlier in range(1, iteration + 1))
    learned = {found.iteration or 0: found.metadata for found in policies if found is not None}
    charts += [_chart(title, fields, learned) for title, fields in _LEARNING.items()]
    return [(title, drawn) for title, drawn in charts if drawn]


def _chart(
    title: str, fields: Mapping[str, str], rows: Mapping[int, Mapping[str, Any]]
) -> tuple[str, tuple[Line, ...]]:
    found = []
    for name, field in fields.items():
        values = {k: float(row[field]) for k, row in rows.items() if isinstance(row.get(field), int | float)}
        if values:
            found.append(Line(name, values))
    return title, tuple(found)


def _metrics_of(manifest: Manifest) -> dict[str, float]:
    metrics = manifest.metadata.get("metrics")
    if not isinstance(metrics, dict):
        return {}
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


def earlier_evaluations(campaign: Campaign, iteration: int) -> list[Evaluated]:
    """The campaign's committed evaluations of earlier iterations."""
    folder = f"{campaign.evaluation_dir(f'iteration-{iteration:06d}')}/content"
    found = []
    names = set(campaign.evaluations())
    for earlier in range(1, iteration):
        if (name := f"iteration-{earlier:06d}") not in names:
            continue
        manifest = campaign.find(campaign.evaluation_dir(name))
        if manifest is None:
            continue
        document = json.loads(read_file(campaign.store, manifest.file("metrics.json")))
        reports = [file.name for file in manifest.files if file.base_name == "report.html"]
        link = posixpath.relpath(reports[0], folder) if reports else ""
        found.append(Evaluated(earlier, link, _means(document, "tuned"), _means(document, "base")))
    return found


def _means(document: Mapping[str, Any], whose: str) -> dict[str, float]:
    """The headline measures by today's definitions; one that was defined otherwise then is left out."""
    means, then = {}, document.get("definitions", {})
    for name in headline_names():
        row = document.get(name)
        if changed_definitions(name.partition(".")[2], then, DEFINITIONS):
            continue
        if isinstance(row, dict) and row.get(whose) is not None:
            means[name] = float(row[whose])
    return means


def headline_names() -> list[str]:
    """Names of the measures at the top of reports, `designs.bad_layers` and so on."""
    kinds: tuple[Kind, ...] = ("designs", "pictures")
    return [
        f"{kind}.{column}"
        for kind in kinds
        for column in quoted("designs headline" if kind == "designs" else "pictures headline")
    ]


def held_out_charts(evaluations: Sequence[Evaluated]) -> list[tuple[str, tuple[Line, ...]]]:
    """The headline measures over the evaluated iterations, of two or more; the base beside."""
    charts: list[tuple[str, tuple[Line, ...]]] = []
    for name in headline_names():
        tuned = {e.iteration: e.tuned[name] for e in evaluations if name in e.tuned}
        base = {e.iteration: e.base[name] for e in evaluations if name in e.base}
        if len(tuned) > 1:
            kind, _, column = name.partition(".")
            what = "held-out designs" if kind == "designs" else "unlabelled images"
            charts.append((f"{title_of(column)}, {what}", (Line("adapter", tuned), Line("base", base))))
    return charts


def judge_cost(scores: Sequence[Manifest]) -> str:
    """What the judge was asked in all these iterations, and its cost where prices were given; "" if nothing is kept."""
    kept = [row for manifest in scores if (row := _metrics_of(manifest)) and "judge_requests" in row]
    if not kept:
        return ""

    def total(name: str) -> float:
        return sum(row.get(name, 0.0) for row in kept)

    text = (
        f"{total('judge_requests'):,.0f} requests in {len(kept)} iteration{'s' if len(kept) > 1 else ''}, "
        f"{total('judge_tokens_input'):,.0f} tokens read and {total('judge_tokens_output'):,.0f} written"
    )
    priced = [row["judge_cost"] for row in kept if "judge_cost" in row]
    if not priced:
        return f"{text}; no prices in runtime.judge.price"
    where = "" if len(priced) == len(kept) else f", of {len(priced)} iterations that had prices"
    return f"{text}; cost {sum(priced):.2f} by the prices of the runtime{where}"
