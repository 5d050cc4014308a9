"""Score rows as files (a WebDataset shard and a parquet table) and as metrics."""

from __future__ import annotations

import io
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from layerloop.components.judge.canaries import CanaryReport
from layerloop.components.judge.statistics import Statistics
from layerloop.components.schema.judging import ScoreRow
from layerloop.components.schema.runtime import PriceRuntime
from layerloop.components.schema.trajectory import candidate_key
from layerloop.components.score_rollouts.calibration import position_share
from layerloop.components.score_rollouts.scoring import ScoredGroup
from layerloop.components.storage.shards import Sample


def samples_of(rows: Sequence[ScoreRow]) -> list[Sample]:
    """One WebDataset sample per candidate, keyed as its rollout."""
    return [(candidate_key(r.iteration, r.group, r.candidate), {"json": r.to_json()}) for r in rows]


def table_of(rows: Sequence[ScoreRow], names: Sequence[str]) -> bytes:
    """`scores.parquet`: the rows' fields, criteria as columns `phase1_<criterion>` and `phase2_<criterion>`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = {"iteration", "group", "candidate", "layers"}
    texts = {"image_key", "reason", "judge", "judge_version", "rubric", "rubric_version", "rubric_sha256"}
    texts |= {"prompt_sha256"}
    fields = [name for name in ScoreRow.model_fields if name not in ("phase1", "phase2")]
    columns = {}
    for name in fields:
        kind = pa.int64() if name in numbers else pa.string() if name in texts else pa.float64()
        columns[name] = pa.array([getattr(row, name) for row in rows], kind)
    for phase in ("phase1", "phase2"):
        for criterion in names:
            scores = [getattr(row, phase) for row in rows]
            columns[f"{phase}_{criterion}"] = pa.array(
                [None if s is None else s[criterion] for s in scores], pa.float64()
            )
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    return buffer.getvalue()


def counts_of(rows: Sequence[ScoreRow]) -> dict[str, int]:
    """Groups and candidates, and how many of them have no reward."""
    groups, kept = {row.group for row in rows}, {row.group for row in rows if row.reward is not None}
    return {
        "groups": len(groups),
        "groups_dropped": len(groups - kept),
        "candidates": len(rows),
        "candidates_masked": sum(row.reward is None for row in rows),
    }


def reward_metrics(rows: Sequence[ScoreRow], names: Sequence[str]) -> dict[str, float]:
    """Level of the rewards, their standard deviation within groups in both phases, masks."""
    groups: dict[int, list[ScoreRow]] = defaultdict(list)
    for row in rows:
        if row.reward is not None:
            groups[row.group].append(row)
    kept = list(groups.values())
    valid = [row for group in kept for row in group]
    metrics = {name: float(count) for name, count in counts_of(rows).items()}
    if valid:
        metrics["reward_mean"] = _mean([row.reward for row in valid if row.reward is not None])
        metrics["reward_std_within_group"] = _within([[r.reward for r in g if r.reward is not None] for g in kept])
        metrics["reward_std_within_group_phase1"] = _within(
            [[r.reward_phase1 for r in g if r.reward_phase1 is not None] for g in kept]
        )
        metrics["weight_mean"] = _mean([group[0].weight for group in kept])
        for name in names:
            scores = [phase[name] for row in valid if (phase := row.phase2 or row.phase1) is not None]
            metrics[f"score_{name}"] = _mean(scores)
        deviations = [row.uncertainty for row in valid if row.uncertainty is not None]
        if deviations:
            metrics["reward_uncertainty"] = math.sqrt(_mean([d * d for d in deviations]))
    return metrics


def mask_reasons(rows: Sequence[ScoreRow]) -> Counter[str]:
    """Masked candidates by the short form of their reason, such as `phase1: timeout`."""
    return Counter(":".join(row.reason.split(":")[:2]) for row in rows if row.reason is not None)


def judge_metrics(statistics: Statistics, price: PriceRuntime) -> dict[str, float]:
    """Requests, tokens, latencies and, with prices, cost."""
    metrics = {
        "judge_requests": float(statistics.sent),
        "judge_replies": float(statistics.answered),
        "judge_cache_hits": float(statistics.cache_hits),
        "judge_invalid_retries": float(statistics.invalid_retries),
        "judge_grids_followed_up": float(statistics.followed_up),
        "judge_rate_limited": float(statistics.rate_limited),
        "judge_given_up": float(statistics.given_up),
        "judge_missing_logprobs": float(statistics.missing_logprobs),
        "judge_attempts_failed": float(sum(statistics.failures.values())),
        "judge_tokens_input": float(statistics.tokens_in),
        "judge_tokens_cached": float(statistics.tokens_cached),
        "judge_tokens_output": float(statistics.tokens_out),
        "judge_latency_p50_seconds": statistics.percentile(0.50),
        "judge_latency_p95_seconds": statistics.percentile(0.95),
        "judge_latency_p99_seconds": statistics.percentile(0.99),
    }
    if price.input or price.output:
        cached = price.input if price.cached_input is None else price.cached_input
        fresh = statistics.tokens_in - statistics.tokens_cached
        cost = fresh * price.input + statistics.tokens_cached * cached + statistics.tokens_out * price.output
        metrics["judge_cost"] = cost / 1e6
    return metrics


def position_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """The judge's order bias: share of the reward variance within grids that a row's position explains."""
    share, beyond_chance = position_share(o for group in groups for o in group.positions)
    return {"position_share": share, "position_share_beyond_chance": beyond_chance}


def canary_metrics(report: CanaryReport | None, before: Mapping[str, float]) -> dict[str, float]:
    """Agreement of the judge with the canaries' grades; canaries that were not judged have no metric."""
    if report is None:
        return {}
    found = {
        "canary_agreement": report.agreement,
        "canary_agreement_phase2": report.agreement_phase2,
        "canary_injection_gain": report.injection_gain,
        "canary_drift": report.drift(before),
    }
    return {
        **{name: value for name, value in found.items() if value is not None},
        "canaries_failed": float(len(report.failures)),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _within(groups: Sequence[Sequence[float]]) -> float:
    """Root of the mean variance within groups of two or more; 0 without any."""
    variances = []
    for group in groups:
        if len(group) > 1:
            mean = _mean(group)
            variances.append(_mean([(value - mean) ** 2 for value in group]))
    return math.sqrt(_mean(variances)) if variances else 0.0
