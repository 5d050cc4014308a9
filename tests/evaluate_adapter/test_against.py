"""A nightly evaluation fails where the adapter got worse since the last one, and says by what."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerloop.components.evaluate_adapter.against import WATCHED, compare_evaluations, fail_when_worse
from layerloop.components.evaluate_adapter.results import samples_table
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import parse_recipe
from layerloop.components.storage.campaign import MANIFEST, Campaign
from layerloop.components.storage.manifests import add_file, commit
from layerloop.pipelines.inputs import recipe_text


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    return Campaign.create_or_open(str(tmp_path / "campaign"), parse_recipe(recipe_text("tiny", [])))


def rows(count: int = 24, *, shift: dict[str, float] | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Numbers of `count` designs and as many unlabelled images; `shift` is added to a column."""
    rng = np.random.default_rng(7)
    noise = np.random.default_rng(100 + seed)
    found = []
    for kind in ("designs", "pictures"):
        for index in range(count):
            row: dict[str, Any] = {"key": f"k{index}", "kind": kind, "layers": 3, "seed": index}
            for column in ("bad_layers", "layer_l1", "recomposition_error"):
                row[column] = rng.uniform(0.2, 0.4) + noise.normal(0, 0.01) + (shift or {}).get(f"{kind}.{column}", 0)
            if kind == "pictures":
                row["layer_l1"] = None  # no true layers
            found.append(row)
    return found


def evaluated(campaign: Campaign, iteration: int, adapter: list[dict[str, Any]]) -> Manifest:
    folder, name = campaign.evaluation_dir(f"iteration-{iteration:06d}"), f"iteration-{iteration:06d}"
    table = samples_table({"base": rows(), name: adapter})
    file = add_file(campaign.store, f"{folder}/samples.parquet", table)
    return commit(
        campaign.store, f"{folder}/{MANIFEST}", Manifest(kind="evaluation", iteration=iteration, files=(file,))
    )


def test_the_first_evaluation_has_nothing_to_be_worse_than(campaign: Campaign, capsys: Any) -> None:
    fail_when_worse(campaign, evaluated(campaign, 3, rows()))
    assert "iteration 3 is the first evaluated iteration" in capsys.readouterr().err


def test_a_night_on_which_nothing_changed_is_green_and_says_so(campaign: Campaign, capsys: Any) -> None:
    evaluated(campaign, 3, rows())
    fail_when_worse(campaign, evaluated(campaign, 5, rows(seed=1)))
    assert capsys.readouterr().err.count("since iteration-000003: ") == len(WATCHED)


def test_what_got_worse_is_named_with_its_interval(campaign: Campaign) -> None:
    evaluated(campaign, 2, rows(shift={"designs.bad_layers": 0.1}))  # not the last before it
    evaluated(campaign, 3, rows())
    tonight = evaluated(campaign, 5, rows(shift={"designs.bad_layers": 0.05, "pictures.bad_layers": -0.1}, seed=1))
    with pytest.raises(LayerloopError) as caught:
        fail_when_worse(campaign, tonight)
    line = str(caught.value)
    assert line.startswith("iteration 5 is worse than iteration-000003: designs.bad_layers (")
    assert "24 pairs" in line
    assert "pictures" not in line  # that got better
    assert "layer_l1" not in line
    assert "evaluations/iteration-000005/report.html" in line


def test_what_got_better_is_green(campaign: Campaign) -> None:
    evaluated(campaign, 3, rows())
    shift = {f"{kind}.{column}": -0.1 for kind, column in WATCHED}
    fail_when_worse(campaign, evaluated(campaign, 5, rows(shift=shift, seed=1)))


def test_too_few_pictures_raise_no_alarm(campaign: Campaign) -> None:
    evaluated(campaign, 3, rows(5))
    fail_when_worse(campaign, evaluated(campaign, 5, rows(5, shift={"designs.bad_layers": 0.2}, seed=1)))


def test_other_pictures_are_not_compared(campaign: Campaign, capsys: Any) -> None:
    evaluated(campaign, 3, [{**row, "seed": 1000 + row["seed"]} for row in rows()])
    fail_when_worse(campaign, evaluated(campaign, 5, rows(shift={"designs.bad_layers": 0.2})))
    assert "evaluated on other images" in capsys.readouterr().err


def test_the_intervals_are_wide_enough_for_all_that_is_watched() -> None:
    """Over many nights without a change, few ring: at most one in twenty, chance aside."""
    alarms = 0
    for night in range(200):
        before, now = rows(seed=2 * night), rows(seed=2 * night + 1)
        found = compare_evaluations(before, now, resamples=300, seed=night)
        alarms += any(c.clear and c.difference is not None and c.difference > 0 for c in found.values())
    assert alarms <= 16
