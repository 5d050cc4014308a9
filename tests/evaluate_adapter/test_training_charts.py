"""What the page shows of training, read from the manifests of a campaign."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest

from layerloop.components.evaluate_adapter.charts import Line, lines
from layerloop.components.evaluate_adapter.history import training_charts
from layerloop.components.evaluate_adapter.results import score_manifests
from layerloop.components.schema.manifest import Manifest
from layerloop.components.storage.campaign import MANIFEST
from layerloop.components.storage.manifests import commit

from ..campaigns import CampaignBuilder


def committed(lab: CampaignBuilder, kind: Literal["scores", "policy"], iteration: int, **metadata: Any) -> None:
    manifest = Manifest(kind=kind, iteration=iteration, metadata=metadata)
    commit(lab.store, f"iterations/{iteration:06d}/{kind}/{MANIFEST}", manifest)


def test_every_chart_has_the_numbers_of_its_manifests(tmp_path: Path) -> None:
    lab = CampaignBuilder.begin(tmp_path / "campaign", {"name": "lab"})
    for k in (1, 2, 3):
        metrics = {"score_clean_layers": 0.1 * k, "reward_std_within_group": 0.01 * k}
        committed(lab, "scores", k, metrics=metrics if k != 2 else {})
        rest = {"kl": 1e-4 * k, "clip_fraction_low": 0.02 * k, "clip_fraction_high": 0.03 * k} if k > 1 else {}
        committed(lab, "policy", k, gradient_norm=float(k), **rest)
    charts = dict(training_charts(lab.campaign, 2, score_manifests(lab.campaign, 2)))
    assert charts["Criteria of the judge"] == (Line("clean layers", {1: 0.1}),)
    assert charts["Spread of rewards within groups"] == (Line("both phases", {1: 0.01}),)
    assert charts["KL to the base, per step"] == (Line("KL", {2: 2e-4}),)
    assert charts["Share of points whose gradient the clip stopped"] == (
        Line("ratio too low", {2: 0.04}),
        Line("ratio too high", {2: 0.06}),
    )
    assert charts["Gradient norm, the largest before clipping"] == (Line("gradient norm", {1: 1.0, 2: 2.0}),)


def test_what_no_iteration_recorded_has_no_chart(tmp_path: Path) -> None:
    lab = CampaignBuilder.begin(tmp_path / "campaign", {"name": "lab"})
    committed(lab, "policy", 1)
    assert training_charts(lab.campaign, 1, []) == []


@pytest.mark.parametrize("values", [[0.319], [1.02], [0.0], [0.4432, 0.4329], [1.0211, 1.0213]])
def test_every_line_of_a_charts_grid_has_a_number_of_its_own(values: list[float]) -> None:
    """One iteration had two lines, both called 0.319."""
    svg = lines([Line("x", dict(enumerate(values, 1)))], "x")
    numbers = re.findall(r'text-anchor="end">([^<]*)<', svg)
    assert len(numbers) >= 2 and len(set(numbers)) == len(numbers), numbers
    assert float(numbers[0]) <= min(values) and max(values) <= float(numbers[-1])
