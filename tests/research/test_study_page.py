"""The study's page says what the campaigns' files say, and judges expectations by them."""

from __future__ import annotations

import io
import json
from dataclasses import astuple
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layerloop.components.evaluate_adapter.assess import Row, compare_rows
from layerloop.components.evaluate_adapter.results import metrics_json
from layerloop.components.evaluate_adapter.samplers import MODELS, TABLE, sampler_table, samplers_dir
from layerloop.components.layers.columns import BY_SLOT, better_of, quoted
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.inference import COMPARED
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import parse_recipe
from layerloop.components.storage.campaign import MANIFEST, Campaign
from layerloop.components.storage.manifests import add_file
from layerloop.pipelines.research.arms import Run, Study
from layerloop.pipelines.research.outcomes import outcome
from layerloop.pipelines.research.page import write_results
from layerloop.pipelines.research.study import study_recipe

from ..campaigns import named

# What the base scores; its layer_l1 and slot_l1 by layer count.
BASE = {"bad_layers": 0.4, "evenness_gap": 0.6}
BASE_L1 = {2: 0.1, 3: 0.08, 4: 0.06}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(
        folder=tmp_path / "study", recipe=study_recipe(), iterations=2, images=tmp_path / "i",
        designs=tmp_path / "d", judge_urls={},
    )  # fmt: skip


def evaluation(base: list[Row], tuned: list[Row]) -> bytes:
    """The metrics.json that evaluate_adapter writes of these rows."""
    return metrics_json(compare_rows(base, tuned, seed=0), {}, {})


def design_rows(better: float = 0.0) -> list[Row]:
    """A design of each layer count, as evaluate_adapter measures it: as the base's, every measure better by a share."""
    towards = {name: 1 - better if better_of(name) == "lower" else 1 + better for name in quoted("study")}
    values = {name: BASE.get(name, 0.5) * factor for name, factor in towards.items()}
    return [
        {**values, "kind": "designs", "layers": layers, **{name: value * towards[name] for name in BY_SLOT}}
        for layers, value in BASE_L1.items()
    ]


def finished(study: Study, run: Run, *, better: float, alone: float, used: float) -> Run:
    """A campaign with what `outcome` reads: tuned = base times (1 - better), and +-alone, +-used about the reward."""
    campaign = Campaign.create_or_open(str(study.campaign(run)), parse_recipe(study.recipe_of(run)))
    folder = campaign.evaluation_dir(f"iteration-{study.iterations:06d}")
    _commit(campaign, folder, "metrics.json", evaluation(design_rows(), design_rows(better)), kind="evaluation")
    for iteration in range(1, study.iterations + 1):
        rows = [
            {"group": group, "reward_phase1": 0.5 + sign * alone, "reward": 0.5 + sign * used}
            for group in range(2)
            for sign in (-1, 1)
        ]
        rows.append({"group": 1, "reward_phase1": None, "reward": None})  # masked
        table = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), table)
        _commit(
            campaign,
            campaign.scores_dir(iteration),
            "scores.parquet",
            table.getvalue(),
            kind="scores",
            iteration=iteration,
        )
    return run


def _commit(campaign: Campaign, folder: str, name: str, data: bytes, **fields: object) -> None:
    file = add_file(campaign.store, f"{folder}/{name}", data)
    campaign.commit(folder, Manifest.model_validate({"files": (file,), **fields}))


def test_an_outcome_is_what_the_files_say(study: Study) -> None:
    found = outcome(study, finished(study, Run("full", 1), better=0.6, alone=0.02, used=0.1))
    assert found.metrics["bad_layers"] == pytest.approx((0.4, 0.16))
    assert found.metrics["slot_l1.L2"] == pytest.approx((0.1, 0.04))
    assert found.metrics["slot_l1.L4"] == pytest.approx((0.06, 0.024))
    assert found.metrics["layer_l1.L3"] == pytest.approx((0.08, 0.032))
    assert found.metrics["evenness_gap"] == pytest.approx((0.6, 0.24))
    assert found.metrics["reward_std"] == pytest.approx((0.02, 0.1))
    assert found.curve == [(1, 0.5), (2, 0.5)]
    assert all(astuple(spread) == pytest.approx((0.02, 0.1, 0.0, 1.0)) for spread in found.spreads)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("designs.evenness_gap", None, r"full-1 lacks evenness_gap, which the study quotes: remove .*iteration-000002"),
        (
            "definitions",
            {"bad_layers": "Blank or glazed."},
            r"full-1 was measured by another definition of bad_layers: ",
        ),
    ],
)
def test_an_evaluation_that_cannot_be_quoted_is_named(study: Study, key: str, value: object, message: str) -> None:
    run = finished(study, Run("full", 1), better=0.6, alone=0.02, used=0.1)
    campaign = Campaign.open(str(study.campaign(run)))
    folder = campaign.evaluation_dir("iteration-000002")
    metrics = json.loads(campaign.store.read(named(campaign.store, f"{folder}/metrics.json")))
    metrics[key] = value
    campaign.store.delete(f"{folder}/{MANIFEST}")
    _commit(campaign, folder, "metrics.json", json.dumps(metrics).encode(), kind="evaluation")
    with pytest.raises(LayerloopError, match=message):
        outcome(study, run)


def page_of(study: Study, done: list[Run], missing: list[Run], docs: Path) -> str:
    return write_results(study, done, [*done, *missing], docs).read_text()


def test_the_page_says_what_holds_and_what_does_not(study: Study, tmp_path: Path) -> None:
    done = [
        *(finished(study, Run("full", seed), better=0.6 + 0.01 * seed, alone=0.02, used=0.1) for seed in range(3)),
        *(finished(study, Run("phase1_only", seed), better=0.3, alone=0.02, used=0.02) for seed in range(3)),
    ]
    page = page_of(study, done, [Run("nft", 0)], tmp_path / "docs")
    assert "| bad layers at least halved | -61.0% ± 2.5% | yes |" in page
    assert "| spread of rewards at least doubled by phase 2 | 5.00 ± 0.00 | yes |" in page
    assert "| evenness nearer to that of the true layers | -61.0% ± 2.5% | yes |" in page
    assert "per-slot RGB L1, 2 layers: ahead" not in page, "no verdict follows from it"
    assert "**no**" not in page and "on average" not in page
    assert "`nft-0`: run `make study` again." in page
    assert "| `phase1_only` | `full` | 0.1240 ± 0.0099 |" in page
    figures = json.loads((tmp_path / "docs" / "results.json").read_text())
    assert figures["full"]["2"]["bad_layers"] == pytest.approx({"base": 0.4, "tuned": 0.152})
    assert set(figures) == {"full", "phase1_only"}
    assert (tmp_path / "docs" / "results-rewards.svg").read_text().startswith("<?xml")


def test_what_did_not_come_out_is_said(study: Study, tmp_path: Path) -> None:
    done = [
        finished(study, Run("full", 0), better=0.05, alone=0.02, used=0.03),
        finished(study, Run("phase1_only", 0), better=0.06, alone=0.0, used=0.0),
    ]
    page = page_of(study, done, [], tmp_path / "docs")
    assert "| bad layers at least halved | -5.0% | **no** |" in page
    assert "| spread of rewards at least doubled by phase 2 | 1.50 | **no** |" in page
    assert "| bad layers: ahead of `phase1_only` | +1.1% | **no** |" in page
    assert "| `phase1_only` | 0.0000 | 0.0000 | 0.0000 | 0.0000 | 100% | 100% | 0.00 | 0.00 |" in page


def test_a_mean_whose_interval_says_less_is_told_apart(study: Study, tmp_path: Path) -> None:
    done = [
        finished(study, Run("full", seed), better=better, alone=0.02, used=0.1)
        for seed, better in enumerate((0.8, 0.5, 0.3))
    ]
    page = page_of(study, done, [], tmp_path / "docs")
    assert "| bad layers at least halved | -53.3% ± 62.5% | yes, on average |" in page
    assert "| spread of rewards at least doubled by phase 2 | 5.00 ± 0.00 | yes |" in page


def test_what_there_is_to_win_back_is_what_the_faults_cost(study: Study, tmp_path: Path) -> None:
    """The base's L1 less that of the policy as it ships, at the seeds that both arms have."""
    full = [finished(study, Run("full", seed), better=0.2, alone=0.02, used=0.1) for seed in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        for layers, value in list(BASE_L1.items()):
            patch.setitem(BASE_L1, layers, value / 2)
        shipped = finished(study, Run("shipped_base", 0), better=0.0, alone=0.02, used=0.1)
    page = page_of(study, [*full, shipped], [], tmp_path / "docs")
    assert "The faults are 50%, 50%, 50% of the base's layer L1" in page
    assert "seed 0): unlearning" in page and "`full` wins back 40%, 40%, 40% of that." in page


def test_samplers_are_shown_with_what_holds_by_them(study: Study, tmp_path: Path) -> None:
    done = [finished(study, Run("full", seed), better=0.6, alone=0.02, used=0.1) for seed in range(2)]
    assert "## By the samplers" not in page_of(study, done, [], tmp_path / "without")
    campaign = Campaign.open(str(study.campaign(done[0])))
    rows = {
        (how, model): [
            {"kind": "designs", "bad_layers": (0.4 if model == "base" else 0.1) + 0.01 * n}
            if how not in COMPARED[1:3]
            else {"kind": "designs", "bad_layers": 0.1 + (-1) ** n * (0.002 if model == "adapter" else 0)}
            if how == COMPARED[2]
            else {"kind": "designs", "bad_layers": 0.5 + (0.3 if model == "adapter" else 0) + 0.01 * n}
            for n in range(12)
        ]
        for how in COMPARED
        for model in MODELS
    }
    table = json.dumps(sampler_table(rows, seed=0)).encode()
    _commit(campaign, samplers_dir(campaign, study.iterations), TABLE, table, kind="evaluation")
    page = page_of(study, done, [], tmp_path / "docs")
    assert "| `full` | heun-50 | 1 | 0.4550 → **0.1550** (-66%) | 1 of 1 |" in page
    assert "| `full` | euler-20 | 1 | 0.5550 → **0.8550** (+54%) | 0 of 1 |" in page
    assert "| `full` | euler-30 | 1 | 0.1000 → 0.1000 (+0%) |" in page, "not clear, so not bold"
    assert page.count("| `full` | euler-") == 8
