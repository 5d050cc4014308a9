"""The regression gate: an evaluation fails where it is worse than a baseline, an earlier one or a metrics.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from layerloop.components.evaluate_adapter.assess import Row
from layerloop.components.evaluate_adapter.statistics import FEWEST, Comparison, compare, holm
from layerloop.components.layers.columns import better_of, changed_definitions, quoted, title_of
from layerloop.components.layers.measure import MEASURES
from layerloop.components.runtime.progress import log
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.seeds import seed_for
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.manifests import read_file
from layerloop.components.storage.stores import read_uri

PREVIOUS: Final = "previous"  # the baseline that is the campaign's last evaluation of an earlier iteration

# Few, to keep false alarms rare and the adjustment for their number small.
WATCHED = tuple(
    (kind, column)
    for kind in ("designs", "pictures")
    for column in quoted("nightly")
    if kind == "designs" or MEASURES[column].needs != "truth"
)
_IDENTITY = ("kind", "key", "layers", "seed")


class WorseError(LayerloopError):
    """An evaluation is worse than its baseline. It is committed all the same."""

    status: int = 3


def watched_rows(rows: Sequence[Row]) -> list[Row]:
    """Of each decomposition of the adapter its identity and the measures that a later evaluation is gated by; what
    `metrics.json` keeps of them, so that this one file is a baseline."""
    columns = dict.fromkeys(column for _, column in WATCHED)
    return [{name: row.get(name) for name in (*_IDENTITY, *columns)} for row in rows]


def fail_when_worse(campaign: Campaign, evaluation: Manifest, baseline: str) -> None:
    """Compare an evaluation with a baseline, image by image, and log the differences.

    Both adapters decomposed the same images from the same noise, and their numbers stand in `metrics.json`, so
    differences are paired. P-values are adjusted for the measures that are watched (Holm), so that at most one in
    twenty evaluations fails where nothing changed.

    Args:
        baseline: The path or URI of a `metrics.json`, or "previous" for the campaign's last evaluation of an earlier
            iteration; where there is none, or none of the same images, that is logged and nothing fails.

    Raises:
        WorseError: a watched measure is clearly worse; the line names each of them.
        LayerloopError: `baseline` is no such file, has fewer than `FEWEST` images in common, or other definitions of
            the measures.
    """
    now = json.loads(read_file(campaign.store, evaluation.file("metrics.json")))
    iteration = evaluation.iteration or 0
    if baseline == PREVIOUS:
        name, before = _previous(campaign, iteration)
        if before is None:
            log(f"iteration {iteration} is the first evaluated iteration: there is no earlier one to compare it with")
            return
    else:
        name, before = baseline, read_baseline(baseline)
    comparisons = compare_evaluations(before.get("watched", []), now["watched"], seed=campaign.recipe.seed)
    if (reason := _incomparable(name, before, now, comparisons)) is not None:
        if baseline != PREVIOUS:
            raise LayerloopError(reason)
        log(reason)
        return
    for column, comparison in comparisons.items():
        log(f"since {name}: {_comparison_text(column, comparison)}")
    if (most := max(comparison.n for comparison in comparisons.values())) < FEWEST:
        reason = f"{name} has {most} of the images, and nothing is told from fewer than {FEWEST}: evaluate it on more"
        if baseline != PREVIOUS:
            raise LayerloopError(reason)
        log(reason)
    worse = [_comparison_text(column, item) for column, item in comparisons.items() if _is_worse(column, item)]
    if worse:
        report = f"{campaign.uri}/{campaign.evaluation_dir(f'iteration-{iteration:06d}')}"
        raise WorseError(f"iteration {iteration} is worse than {name}: {'; '.join(worse)}: see {report}")


def read_baseline(uri: str) -> dict[str, Any]:
    """A `metrics.json` at a path or URI.

    Raises:
        LayerloopError: not there, or not the `metrics.json` of an evaluation.
    """
    remedy = "give the metrics.json of an evaluation"
    try:
        document: Any = json.loads(read_uri(uri), parse_constant=_no_number)
    except ValueError:
        raise LayerloopError(f"baseline {uri} is not JSON: {remedy}") from None
    rows = document.get("watched") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not isinstance(document.get("definitions"), dict):
        raise LayerloopError(f"baseline {uri} has no numbers by image: {remedy}, of this version of layerloop")
    if not all(
        isinstance(row, dict) and all(isinstance(row.get(name), int | str) for name in _IDENTITY) for row in rows
    ):
        raise LayerloopError(f"baseline {uri} has a row without its image and seed: {remedy}")
    for kind, column in WATCHED:
        values = [row.get(column, _LACKING) for row in rows if row["kind"] == kind]
        if _LACKING in values:
            raise LayerloopError(f"baseline {uri} lacks {column} of {kind}: {remedy}, of this version of layerloop")
        if odd := [value for value in values if value is not None and not isinstance(value, int | float)]:
            raise LayerloopError(f"baseline {uri} has {str(odd[0])[:40]!r} as {column}: {remedy}")
    return document


_LACKING: Final = "lacking"


def _no_number(name: str) -> float:
    """Refuse what JSON has no words for, such as NaN, which would be worse than nothing."""
    raise ValueError(name)


def compare_evaluations(before: Sequence[Row], now: Sequence[Row], *, seed: int) -> dict[str, Comparison]:
    """The watched measures over the images of both, `designs.bad_layers` and so on; `base` is before."""
    earlier = {_identity(row): row for row in before}
    pairs = [(earlier[key], row) for row in now if (key := _identity(row)) in earlier]
    found = {}
    for kind, column in WATCHED:
        chosen = [(b, n) for b, n in pairs if n["kind"] == kind]
        comparison = compare(
            [b.get(column) for b, _ in chosen],
            [n.get(column) for _, n in chosen],
            seed=seed_for(seed, "sign flips"),
        )
        if comparison.n:
            found[f"{kind}.{column}"] = comparison
    return holm(found)


def _previous(campaign: Campaign, iteration: int) -> tuple[str, dict[str, Any] | None]:
    """Name and metrics of the last evaluation of an earlier iteration."""
    evaluated = set(campaign.evaluations())
    names = [f"iteration-{earlier:06d}" for earlier in range(iteration - 1, 0, -1)]
    for name in (name for name in names if name in evaluated):
        manifest = campaign.find(campaign.evaluation_dir(name))
        if manifest is not None:
            return name, json.loads(read_file(campaign.store, manifest.file("metrics.json")))
    return "", None


def _incomparable(
    name: str, before: Mapping[str, Any], now: Mapping[str, Any], comparisons: Mapping[str, Comparison]
) -> str | None:
    """Why two evaluations cannot be compared, in one line."""
    if not comparisons:
        return f"{name} was evaluated on other images or from other seeds: they cannot be compared, evaluate it again"
    columns = dict.fromkeys(column for _, column in WATCHED)
    theirs: Mapping[str, Any] = before.get("definitions", {})
    other = [column for column in columns if changed_definitions(column, theirs, now["definitions"])]
    if other:
        what = ", ".join(other)
        return f"{name} was measured by another definition of {what}: they cannot be compared, evaluate it again"
    return None


def _identity(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _IDENTITY)


def _is_worse(name: str, comparison: Comparison) -> bool:
    if not comparison.clear or comparison.difference is None:
        return False
    return comparison.difference > 0 if better_of(name.partition(".")[2]) == "lower" else comparison.difference < 0


def _comparison_text(name: str, c: Comparison) -> str:
    interval = "" if c.low is None else f", interval {c.low:+.4g} to {c.high:+.4g}, p {c.adjusted:.2g}"
    title = title_of(name.partition(".")[2])
    return f"{name} ({title[:1].lower()}{title[1:]}) {c.base:.4g} -> {c.tuned:.4g}{interval}, {c.n} pairs"
