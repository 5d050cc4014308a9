"""A nightly evaluation fails where the adapter got worse since the last one, and says by what."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerloop.components.evaluate_adapter.against import (
    PREVIOUS,
    WATCHED,
    WorseError,
    compare_evaluations,
    fail_when_worse,
)
from layerloop.components.evaluate_adapter.assess import compare_rows
from layerloop.components.evaluate_adapter.results import metrics_json
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


def metrics(adapter: list[dict[str, Any]]) -> bytes:
    """metrics.json of the rows of an adapter."""
    return metrics_json(compare_rows(adapter, adapter, seed=0), {}, {}, rows=adapter)


def evaluated(campaign: Campaign, iteration: int, adapter: list[dict[str, Any]]) -> Manifest:
    folder = campaign.evaluation_dir(f"iteration-{iteration:06d}")
    file = add_file(campaign.store, f"{folder}/metrics.json", metrics(adapter))
    return commit(
        campaign.store, f"{folder}/{MANIFEST}", Manifest(kind="evaluation", iteration=iteration, files=(file,))
    )


def test_the_first_evaluation_has_nothing_to_be_worse_than(campaign: Campaign, capsys: Any) -> None:
    fail_when_worse(campaign, evaluated(campaign, 3, rows()), PREVIOUS)
    assert "iteration 3 is the first evaluated iteration" in capsys.readouterr().err


def test_a_night_on_which_nothing_changed_is_green_and_says_so(campaign: Campaign, capsys: Any) -> None:
    evaluated(campaign, 3, rows())
    fail_when_worse(campaign, evaluated(campaign, 5, rows(seed=1)), PREVIOUS)
    assert capsys.readouterr().err.count("since iteration-000003: ") == len(WATCHED)


def test_what_got_worse_is_named_with_its_interval(campaign: Campaign) -> None:
    evaluated(campaign, 2, rows(shift={"designs.bad_layers": 0.1}))  # not the last before it
    evaluated(campaign, 3, rows())
    tonight = evaluated(campaign, 5, rows(shift={"designs.bad_layers": 0.05, "pictures.bad_layers": -0.1}, seed=1))
    with pytest.raises(WorseError) as caught:
        fail_when_worse(campaign, tonight, PREVIOUS)
    line = str(caught.value)
    assert line.startswith("iteration 5 is worse than iteration-000003: designs.bad_layers (")
    assert "24 pairs" in line
    assert "pictures" not in line  # that got better
    assert "layer_l1" not in line
    assert line.endswith("evaluations/iteration-000005")


def test_what_got_better_is_green(campaign: Campaign) -> None:
    evaluated(campaign, 3, rows())
    shift = {f"{kind}.{column}": -0.1 for kind, column in WATCHED}
    fail_when_worse(campaign, evaluated(campaign, 5, rows(shift=shift, seed=1)), PREVIOUS)


def test_too_few_pictures_raise_no_alarm(campaign: Campaign) -> None:
    evaluated(campaign, 3, rows(5))
    fail_when_worse(campaign, evaluated(campaign, 5, rows(5, shift={"designs.bad_layers": 0.2}, seed=1)), PREVIOUS)


def test_other_pictures_are_not_compared(campaign: Campaign, capsys: Any) -> None:
    evaluated(campaign, 3, [{**row, "seed": 1000 + row["seed"]} for row in rows()])
    fail_when_worse(campaign, evaluated(campaign, 5, rows(shift={"designs.bad_layers": 0.2})), PREVIOUS)
    assert "evaluated on other images or from other seeds" in capsys.readouterr().err


def test_a_metrics_file_by_itself_is_a_baseline(campaign: Campaign, tmp_path: Path) -> None:
    (tmp_path / "release.json").write_bytes(metrics(rows()))
    fail_when_worse(campaign, evaluated(campaign, 3, rows(seed=1)), str(tmp_path / "release.json"))
    worse = evaluated(campaign, 4, rows(shift={"designs.layer_l1": 0.05}, seed=1))
    with pytest.raises(
        WorseError, match=r"iteration 4 is worse than .*release\.json: designs\.layer_l1 \(layer RGB L1"
    ) as caught:
        fail_when_worse(campaign, worse, str(tmp_path / "release.json"))
    assert (caught.value.status, LayerloopError.status) == (3, 2)


def as_baseline(change: Callable[[dict[str, Any]], None]) -> bytes:
    document = json.loads(metrics(rows()))
    change(document)
    return json.dumps(document).encode()


def of_another_seed(document: dict[str, Any]) -> None:
    for row in document["watched"]:
        row["seed"] += 1000


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"{", "is not JSON: give the metrics.json of an evaluation"),
        (b"[]", "has no numbers by image"),
        (as_baseline(lambda document: document.pop("watched")), "has no numbers by image"),
        (as_baseline(lambda document: document["watched"][0].pop("seed")), "has a row without its image and seed"),
        (
            as_baseline(lambda document: document["watched"][0].update(key=["k0"])),
            "has a row without its image and seed",
        ),
        (as_baseline(lambda document: document["watched"][0].pop("layer_l1")), "lacks layer_l1 of designs: give the"),
        (as_baseline(lambda document: document["watched"][0].update(bad_layers="two")), "has 'two' as bad_layers"),
        (as_baseline(lambda document: document["watched"][0].update(bad_layers=float("nan"))), "is not JSON"),
        (
            as_baseline(lambda document: document["watched"].__delitem__(slice(5, 44))),
            "has 5 of the images, and nothing",
        ),
        (as_baseline(of_another_seed), "was evaluated on other images or from other seeds"),
        (
            as_baseline(lambda document: document["definitions"].update(bad_layers="as it was")),
            "was measured by another definition of bad_layers",
        ),
        (
            as_baseline(lambda document: document["definitions"].update(idle="as it was")),
            "was measured by another definition of bad_layers",
        ),
    ],
)
def test_a_baseline_that_cannot_be_compared_with_is_one_line(
    campaign: Campaign, tmp_path: Path, text: bytes, line: str
) -> None:
    (tmp_path / "b.json").write_bytes(text)
    with pytest.raises(LayerloopError, match=line) as caught:
        fail_when_worse(campaign, evaluated(campaign, 3, rows()), str(tmp_path / "b.json"))
    assert caught.value.status == 2 and "\n" not in str(caught.value)


def test_the_p_values_are_adjusted_for_all_that_is_watched() -> None:
    """Over many nights without a change, few ring: at most one in twenty, chance aside."""
    alarms = 0
    for night in range(200):
        before, now = rows(seed=2 * night), rows(seed=2 * night + 1)
        found = compare_evaluations(before, now, seed=night)
        alarms += any(c.clear and c.difference is not None and c.difference > 0 for c in found.values())
    assert alarms <= 16
