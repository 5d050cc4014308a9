"""Comparison of an evaluation with the previous one, by which a nightly evaluation fails."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from layerloop.components.evaluate_adapter.assess import Row
from layerloop.components.evaluate_adapter.statistics import LEVEL, Comparison, compare
from layerloop.components.layers.columns import better_of, quoted, title_of
from layerloop.components.layers.measure import MEASURES
from layerloop.components.runtime.progress import log
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.seeds import seed_for
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.manifests import read_file

# Few, to keep false alarms rare: with every measure at 95 %, most nights would have one.
WATCHED = tuple(
    (kind, column)
    for kind in ("designs", "pictures")
    for column in quoted("nightly")
    if kind == "designs" or MEASURES[column].needs != "truth"
)


def fail_when_worse(campaign: Campaign, evaluation: Manifest) -> None:
    """Compare an evaluation with the last one of an earlier iteration, image by image, and log the differences.

    Both adapters decomposed the same images from the same noise, and each stored its numbers (`samples.parquet`), so
    differences are paired. The intervals are those of the report, widened for the number of measures that are watched
    (Bonferroni), so that at most one in twenty evaluations fails where nothing changed.

    Raises:
        LayerloopError: an interval says that a watched measure is worse; the line names each of them.
    """
    now = evaluation.iteration
    names = [f"iteration-{earlier:06d}" for earlier in range((now or 0) - 1, 0, -1)]
    evaluated = set(campaign.evaluations())
    before = next((name for name in names if name in evaluated), None)
    previous = campaign.find(campaign.evaluation_dir(before)) if before else None
    if before is None or previous is None:
        log(f"iteration {now} is the first evaluated iteration: there is no earlier one to compare it with")
        return
    comparisons = compare_evaluations(
        _adapter_rows(campaign, previous),
        _adapter_rows(campaign, evaluation),
        resamples=campaign.runtime.evaluation.bootstrap,
        seed=campaign.recipe.seed,
    )
    if not comparisons:
        log(f"{before} was evaluated on other images than iteration {now}: they cannot be compared")
        return
    for name, comparison in comparisons.items():
        log(f"since {before}: {_comparison_text(name, comparison)}")
    worse = [
        _comparison_text(name, comparison) for name, comparison in comparisons.items() if _is_worse(name, comparison)
    ]
    if worse:
        report = f"{campaign.uri}/{campaign.evaluation_dir(f'iteration-{now:06d}')}/report.html"
        raise LayerloopError(f"iteration {now} is worse than {before}: {'; '.join(worse)}: see {report}")


def compare_evaluations(
    before: Sequence[Row], now: Sequence[Row], *, resamples: int, seed: int
) -> dict[str, Comparison]:
    """The watched measures over the images of both, `designs.bad_layers` and so on; `base` is before."""
    earlier = {_identity(row): row for row in before}
    pairs = [(earlier[key], row) for row in now if (key := _identity(row)) in earlier]
    level = 1 - (1 - LEVEL) / len(WATCHED)
    found = {}
    for kind, column in WATCHED:
        chosen = [(b, n) for b, n in pairs if n["kind"] == kind]
        comparison = compare(
            [b.get(column) for b, _ in chosen],
            [n.get(column) for _, n in chosen],
            resamples=resamples,
            seed=seed_for(seed, "bootstrap", kind, column, 0),
            level=level,
        )
        if comparison.n:
            found[f"{kind}.{column}"] = comparison
    return found


def _adapter_rows(campaign: Campaign, evaluation: Manifest) -> list[Row]:
    """Rows of the adapter's decompositions in an evaluation's `samples.parquet`."""
    import pyarrow.parquet as pq

    table: Any = pq.read_table(io.BytesIO(read_file(campaign.store, evaluation.file("samples.parquet"))))
    return [row for row in table.to_pylist() if row["model"] != "base"]


def _identity(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("kind", "key", "layers", "seed"))


def _is_worse(name: str, comparison: Comparison) -> bool:
    if not comparison.clear or comparison.difference is None:
        return False
    return comparison.difference > 0 if better_of(name.partition(".")[2]) == "lower" else comparison.difference < 0


def _comparison_text(name: str, c: Comparison) -> str:
    interval = "" if c.low is None else f", interval {c.low:+.4g} to {c.high:+.4g}"
    title = title_of(name.partition(".")[2])
    return f"{name} ({title[:1].lower()}{title[1:]}) {c.base:.4g} -> {c.tuned:.4g}{interval}, {c.n} pairs"
