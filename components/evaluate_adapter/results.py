"""Files of an evaluation other than images: `metrics.json` and the table of samples; and the rewards of training."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from layerloop.components.evaluate_adapter.against import watched_rows
from layerloop.components.evaluate_adapter.assess import Comparisons, Row
from layerloop.components.evaluate_adapter.charts import Point
from layerloop.components.evaluate_adapter.statistics import METHOD
from layerloop.components.layers.columns import DEFINITIONS, better_of, quoted, title_of
from layerloop.components.storage.manifests import read_file

if TYPE_CHECKING:
    from layerloop.components.schema.manifest import Manifest
    from layerloop.components.storage.campaign import Campaign


def metrics_json(
    comparisons: Comparisons,
    reference: Mapping[str, float],
    provenance: Mapping[str, Any],
    *,
    rows: Sequence[Row] = (),
) -> bytes:
    """`{"designs.bad_layers": {"base", "tuned", "difference", "low", "high", "n", ...}, ...}` and explanations.

    In addition to the comparison each measure has `title`, `better` ("lower", "higher" or null) and, on designs,
    `reference`: the true layers' own value. The other keys are `definitions`, `method`, `provenance` and `watched`, of
    the adapter's `rows` what makes this file the baseline of a later evaluation. Numbers that are undefined are null.
    """
    document: dict[str, Any] = {}
    for name, comparison in comparisons.flat().items():
        kind, column, *by_count = name.split(".")
        document[name] = {
            **comparison.as_json(),
            "title": ", ".join([title_of(column), *map(_in_words, by_count)]),
            "better": better_of(column),
        }
        if kind == "designs" and name == f"designs.{column}" and column in reference:
            document[name]["reference"] = reference[column]
    document["definitions"] = dict(DEFINITIONS)
    document["method"] = METHOD
    document["provenance"] = dict(provenance)
    document["watched"] = watched_rows(rows)
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _in_words(part: str) -> str:
    """A part of a comparison's name: `3 layers` of `L3`, `slot 0` of `slot0`."""
    return f"{part[1:]} layers" if part.startswith("L") else part.replace("slot", "slot ")


def kubeflow_metrics(document: Mapping[str, Any]) -> dict[str, float]:
    """The headline numbers of a `metrics.json`, flat: `designs_bad_layers_base`, `..._adapter`, `..._difference`."""
    found = {}
    for kind in ("designs", "pictures"):
        for column in quoted("kubeflow"):
            comparison = document.get(f"{kind}.{column}")
            if comparison is None:
                continue
            for name, key in (("base", "base"), ("adapter", "tuned"), ("difference", "difference")):
                if comparison[key] is not None:
                    found[f"{kind}_{column}_{name}"] = float(comparison[key])
    for name, value in document["provenance"].get("seconds", {}).items():
        found[f"seconds_{name}"] = float(value)
    return found


def samples_table(rows: Mapping[str, Sequence[Row]]) -> bytes:
    """`samples.parquet`: one row per decomposition, with its `model` and every number; null where undefined."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = [{"model": model, **row} for model, some in rows.items() for row in some]
    columns = dict.fromkeys(column for row in flat for column in row)
    texts, integers = {"model", "key", "kind"}, {"layers", "seed", "height", "width"}

    def column(name: str) -> pa.Array:
        values = [row.get(name) for row in flat]
        kind = pa.string() if name in texts else pa.int64() if name in integers else pa.float64()
        return pa.array([float(v) if v is not None and kind == pa.float64() else v for v in values], kind)

    buffer = io.BytesIO()
    pq.write_table(pa.table({name: column(name) for name in columns}), buffer, compression="zstd")
    return buffer.getvalue()


def mean_of(rows: Sequence[Row]) -> dict[str, float]:
    """Mean of every measured column over the rows where it is defined."""
    names = dict.fromkeys(name for row in rows for name in row if name not in ("key", "kind", "layers", "seed"))
    defined = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    return {name: float(np.mean(values)) for name, values in defined.items() if values}


# ---------------------------------------------------------------------------------------------- rewards of training


def score_manifests(campaign: Campaign, iteration: int) -> list[Manifest]:
    """Committed scores of iterations 1 to `iteration`; an adapter may have been carried over without them."""
    found = (campaign.find(campaign.scores_dir(earlier)) for earlier in range(1, iteration + 1))
    return [manifest for manifest in found if manifest is not None]


def reward_curve(campaign: Campaign, scores: Sequence[Manifest]) -> list[Point]:
    """Rewards of the valid candidates of each iteration."""
    import pyarrow.parquet as pq

    points = []
    for manifest in scores:
        table = pq.read_table(
            io.BytesIO(read_file(campaign.store, manifest.file("scores.parquet"))), columns=["reward"]
        )
        rewards = table.column("reward")
        valid = np.array([value for value in rewards.to_pylist() if value is not None])
        if len(valid):
            low, high = np.quantile(valid, (0.1, 0.9))
            points.append(
                Point(manifest.iteration or 0, float(valid.mean()), float(low), float(high), len(valid), len(rewards))
            )
    return points


def judge_sentence(scores: Sequence[Manifest]) -> str:
    """Sentences on which judge gave the rewards, explicit where it was rules and not a model."""
    from layerloop.components.reference_judge.identity import SCORE_RANGE

    if not scores:
        return "No scores are kept in this campaign, so this page cannot say which judge trained the adapter."

    def joined(manifest: Manifest, *names: str) -> str:
        return " ".join(str(value) for name in names if (value := manifest.metadata.get(name)))

    rubrics = " and ".join(dict.fromkeys(joined(m, "rubric", "rubric_version") for m in scores))
    judges = list(dict.fromkeys(joined(manifest, "judge") for manifest in scores))
    versions = ", ".join(dict.fromkeys(joined(manifest, "judge_version") for manifest in scores))
    rules = [judge for judge in judges if judge in SCORE_RANGE]
    if judges == rules:
        return (
            f"The rewards of training were given by {' and '.join(judges)}: rules over pixels that stand in for a "
            "vision-language model, so that the complete pipeline runs on one machine. A higher reward means that "
            f"these rules were pleased, not that a person or a VLM would be. Rubric: {rubrics}."
        )
    mixed = (
        f" Some came from {' and '.join(rules)}, which is rules over pixels and not a vision-language model."
        if rules
        else ""
    )
    return f"The rewards of training were given by {' and '.join(judges)} ({versions}).{mixed} Rubric: {rubrics}."
