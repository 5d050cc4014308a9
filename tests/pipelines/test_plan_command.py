"""`layerloop plan`: the numbers follow from the recipe, and what is assumed can be set."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from layerloop.components.generate_rollouts.plan import plan_iteration
from layerloop.components.judge.canaries import GRADES, ORDERS
from layerloop.components.policy.sampling import Plan as SamplingPlan
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import Recipe, parse_recipe
from layerloop.components.schema.runtime import Runtime
from layerloop.pipelines.cli import main
from layerloop.pipelines.inputs import packaged_recipes, plan_assumptions
from layerloop.pipelines.plan import Gpus, dealt_by_index, evaluation_hours, longest_first, resident, step_by_step
from layerloop.pipelines.plan_judge import asked
from layerloop.pipelines.plan_text import Plan
from layerloop.pipelines.plan_work import Assumptions, Work

PAPER, EXACT = (parse_recipe(packaged_recipes()[name]) for name in ("paper", "paper-exact"))
ONE, EIGHT, THIRTY_TWO = Gpus(1, 1, 1, 1, 1), Gpus(1, 8, 8, 8, 8), Gpus(4, 8, 8, 8, 32)
JUDGE = 150.0  # seconds


def changed(section: str, **values: Any) -> Recipe:
    dumped = (EXACT if section == "rollout" else ANCHORED).model_dump()
    return Recipe.model_validate(dumped | {section: dumped[section] | values})


ANCHORED = changed("rollout", keep_velocities=False)


def work(recipe: Recipe = ANCHORED, **assumed: Any) -> Work:
    return Work(recipe, Runtime(), Assumptions(**assumed))


# The hand arithmetic of docs/PERFORMANCE.md: sampling 692 and learning 738 PFLOP at 450 TFLOP/s.


def test_the_papers_work_is_that_of_the_arithmetic_by_hand() -> None:
    parts = work().iteration()
    assert sum(parts.values()) == pytest.approx(1_422_000, rel=0.01)  # by hand without the adapter's part
    assert parts["sampling"] == pytest.approx(256 * 15 * 179.4, rel=0.01)
    assert work().evaluated_model() == pytest.approx(8_730_000, rel=0.005)
    assert evaluation_hours(work(), 1) == pytest.approx(5.4, abs=0.05)
    assert work().latent_bytes() == pytest.approx(2.83e9, rel=0.01)
    memory = work().gpu_bytes()
    assert memory["update"] == pytest.approx(50e9, rel=0.03)
    assert memory["sampling"] < memory["update"]


@pytest.mark.parametrize(
    ("gpus", "busy", "sampling"), [(ONE, 0.90, 1529), (EIGHT, 0.46, 239), (THIRTY_TWO, 0.13, 131)], ids=str
)
def test_step_by_step_the_share_of_busy_gpus_falls_as_by_hand(gpus: Gpus, busy: float, sampling: float) -> None:
    found = step_by_step(work(share_candidates=False), gpus, JUDGE)
    assert found.busy == pytest.approx(busy, abs=0.04)  # by hand eight ranks load for 66 s a step, here for 41
    assert found.seconds["sampling"] == pytest.approx(sampling, rel=0.03)


def test_ranks_that_share_candidates_sample_quicker_than_those_that_take_groups() -> None:
    for gpus in (EIGHT, THIRTY_TWO, Gpus(2, 8, 8, 8, 16)):
        shared, groups = (step_by_step(work(share_candidates=flag), gpus, JUDGE) for flag in (True, False))
        mean = work().iteration()["sampling"] / 450 / (gpus.workers * gpus.each)
        assert 0.99 * mean < shared.seconds["sampling"] < 0.9 * groups.seconds["sampling"]
    assert step_by_step(work(), ONE, JUDGE).seconds["sampling"] == pytest.approx(1529, rel=0.01)


def test_sampling_at_half_the_side_costs_a_fifth_and_evaluating_as_much() -> None:
    half = work(changed("rollout", resolution=320))
    assert half.forward(4) < 0.21 * work().forward(4)
    assert half.latent_bytes() == work(PAPER).latent_bytes() / 4
    assert half.evaluated_model() == work().evaluated_model()
    memory = half.gpu_bytes()
    assert memory["update"] < work().gpu_bytes()["update"] - 3e9
    assert memory["evaluation"] == work().gpu_bytes()["evaluation"]


def test_the_resident_way_reaches_what_it_is_for() -> None:
    paper = work(PAPER)
    assert resident(paper, 8, JUDGE).busy > 0.85
    alone = resident(paper, 32, JUDGE)
    assert 0.3 < alone.busy < 0.45  # one judge of 150 s is longer than what 32 GPUs sample
    assert alone.seconds["judge"] > 90
    assert resident(paper, 32, JUDGE / 3).busy > 0.7
    lagging = resident(paper, 32, JUDGE, lag=1)
    assert alone.wall > lagging.wall > JUDGE and resident(paper, 32, JUDGE / 2, lag=1).busy > 0.75
    assert resident(work(), 8, JUDGE, lag=1).wall > resident(work(), 8, JUDGE).wall  # anchors for all points
    assert resident(paper, 8, JUDGE, lag=1).wall < resident(paper, 8, JUDGE).wall  # none


def test_the_gpus_never_compute_for_longer_than_there_is_time() -> None:
    for gpus, judge in itertools.product((1, 2, 8, 16, 32, 64), (0.0, JUDGE)):
        for lag in (0, 1):
            assert 0 < resident(work(), gpus, judge, lag=lag).busy <= 1


def test_the_replicas_that_are_named_are_the_fewest_that_do() -> None:
    plan = Plan.of(PAPER, Runtime(), Assumptions(), cluster=None, workers=1)
    seconds = plan.judge.seconds(Assumptions())
    for lag in (0, 1):
        count = plan.replicas(THIRTY_TWO, lag=lag)
        assert count is not None and count > 1
        enough, fewer = (resident(plan.work, 32, seconds / n, lag=lag).busy for n in (count, count - 1))
        assert enough >= 0.7 > fewer


@pytest.mark.parametrize(
    "values",
    [
        {"outside": "heun", "window": {"size": 4, "start": 0}},
        {"outside": "euler", "window": {"size": 4, "start": 0}},
        {"outside": "heun", "window": {"size": 2, "start": 3}},
        {"outside": "heun", "window": {"size": 3, "start": 4}, "share_prefix": True},
        {"outside": "euler", "window": {"size": 3, "position": "random"}},
    ],
    ids=str,
)
def test_forwards_are_those_that_sampling_makes(values: dict[str, Any]) -> None:
    recipe = changed("rollout", **values)
    plans = [plan for iteration in range(1, 41) for plan in plan_iteration(recipe, iteration, 1000)]
    rollout = recipe.rollout
    made = [
        SamplingPlan(
            (0.0,) * (rollout.steps + 1), plan.window_start, plan.window_size, plan.dynamics, plan.etas,
            rollout.outside, rollout.share_prefix,
        ).nfe(rollout.group_size) / rollout.group_size
        for plan in plans
    ]  # fmt: skip
    exact = values["window"].get("position", "fixed") == "fixed"
    assert work(recipe).calls == pytest.approx(sum(made) / len(made), rel=1e-9 if exact else 0.02)


def test_an_algorithm_of_the_forward_process_samples_as_at_inference() -> None:
    recipe = changed("update", algorithm="nft")
    assert (work(recipe).calls, work(recipe).points) == (19.0, 4)
    assert work(recipe).latent_bytes() == work().latent_bytes() / 6


def test_learning_costs_more_with_a_kl_term_and_less_without_checkpoints() -> None:
    plain = work().point(4)
    assert work(changed("update", kl=0.1)).point(4) == pytest.approx(plain + work().forward(4))
    kept = Work(PAPER, Runtime.model_validate({"model": {"gradient_checkpointing": False}}), Assumptions())
    assert kept.point(4) == pytest.approx(plain - work().forward(4))
    assert kept.gpu_bytes()["update"] > 2 * work().gpu_bytes()["update"]


def test_velocities_that_are_kept_save_the_anchors_and_take_space() -> None:
    kept = work(changed("rollout", keep_velocities=True))
    assert kept.iteration()["anchors"] == 0
    assert kept.latent_bytes() == pytest.approx(work().latent_bytes() * 10 / 6)
    for lag, saved in ((0, 0.5), (1, 1.0)):
        with_anchors, without = (resident(one, 1, 0.0, lag=lag) for one in (work(), kept))
        points = 1024 * work().mean(work().forward) / 450
        assert with_anchors.computing - without.computing == pytest.approx(saved * points, rel=0.02)


def test_the_longest_first_balances_and_groups_by_index_do_not() -> None:
    assert longest_first([3, 3, 2, 2, 2], 2) == 7  # not optimal (6), and within 4/3
    chance = random.Random(1)
    costs = [chance.choice((118.0, 157.0, 200.0, 246.0)) for _ in range(16) for _ in range(16)]
    assert longest_first(costs, 32) < 1.05 * sum(costs) / 32
    assert dealt_by_index([4, 1, 1, 1], 2, 1) == 5
    assert dealt_by_index([4, 1, 1, 1], 2, 2) == 4
    assert dealt_by_index([1, 2], 4, 8) == 2


def test_the_judges_requests_are_those_that_are_sent() -> None:
    found = asked(work())
    canaries = len(GRADES) + len(ORDERS)
    assert found.requests == 256 + 16 * 2 + canaries  # sixteen candidates are compared in two grids
    assert 2500 < found.input_tokens / found.requests < 4500
    assert asked(work(changed("judge", canaries=False, phase2={"enabled": False}))).requests == 256
    assert asked(work(changed("judge", samples=3, temperature=0.5))).requests == 3 * 256 + 32 + canaries
    pairs = asked(work(changed("judge", phase2={"method": "pairwise"})))
    assert pairs.requests > found.requests
    assert found.seconds(Assumptions()) == pytest.approx(150, rel=0.01)
    assert found.seconds(Assumptions(judge_replicas=3)) == pytest.approx(50, rel=0.01)


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_recipe_has_a_plan_that_fits_a_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", name]) == 0
    text = capsys.readouterr().out
    assert "COMPUTED, not measured" in text
    assert max(map(len, text.splitlines())) <= 100
    for field in Assumptions.model_fields:
        assert f"  {field} " in text


def test_the_plan_as_json_counts_what_the_text_says(capsys: pytest.CaptureFixture[str]) -> None:
    prices = ["--set", "plan.gpu_hour_price=2", "--set", "judge.price.input=0.5", "--set", "plan.iterations=10"]
    assert main(["plan", "paper", "--json", *prices]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["computed"] is True
    way = found["layouts"][1]["ways"][1]
    assert way["way"] == "resident"
    assert way["wall_seconds"] == pytest.approx(sum(way["seconds"].values()), rel=1e-4)
    total = way["campaign"]
    assert total["gpu_cost"] == pytest.approx(2 * total["gpu_hours"], rel=1e-4)
    assert total["judge_cost"] == pytest.approx(10 * found["judge"]["input_tokens"] * 0.5e-6, rel=1e-4)
    assert total["stored_gb"] == pytest.approx(10 * found["bytes"]["an iteration"] / 1e9, rel=1e-4)
    assert total["days"] * 24 == pytest.approx(10 * way["wall_seconds"] / 3600 + total["evaluation_hours"], rel=1e-4)


def cluster_file(folder: Path, gpus: str) -> Path:
    """A cluster file of two images and these lines."""
    digest, file = "@sha256:" + "0" * 64, folder / "cluster.yaml"
    file.write_text(f"images: {{policy: 'r/p{digest}', light: 'r/l{digest}'}}\n{gpus}")
    return file


def test_a_cluster_file_says_which_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = cluster_file(tmp_path, "gpus: 4\nupdate_gpus: 8\n")
    assert main(["plan", "paper", "--cluster", str(file), "--workers", "3", "--json"]) == 0
    (layout,) = json.loads(capsys.readouterr().out)["layouts"]
    assert [layout[key] for key in ("workers", "each", "update", "evaluate", "total")] == [3, 4, 8, 4, 12]


def test_a_resident_run_has_the_gpus_of_its_one_pod(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`compile --resident` makes one pod of `gpus`: workers add nothing to it."""
    file = cluster_file(tmp_path, "gpus: 2\n")
    assert main(["plan", "paper", "--cluster", str(file), "--workers", "4", "--json"]) == 0
    (layout,) = json.loads(capsys.readouterr().out)["layouts"]
    assert [(way["way"], way["gpus"]) for way in layout["ways"]] == [
        ("step by step", 8), ("resident", 2), ("resident, lag 1", 2),
    ]  # fmt: skip
    for way in layout["ways"]:
        total, hours = way["campaign"], 200 * way["wall_seconds"] / 3600
        expected = hours * way["gpus"] + total["evaluation_hours"] * 2
        assert total["gpu_hours"] == pytest.approx(expected, rel=1e-4)
    assert main(["plan", "paper", "--cluster", str(file), "--workers", "4"]) == 0
    assert "\n  resident, on its pod's 2 GPUs  " in capsys.readouterr().out
    assert main(["plan", "paper", "--workers", "4"]) == 2
    assert "workers is 4, and no cluster file says which GPUs each has" in capsys.readouterr().err


def test_what_is_no_assumption_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "paper", "--set", "plan.tflop=600"]) == 2
    assert "plan.tflop is not a known key: did you mean 'tflops'?" in capsys.readouterr().err
    assert main(["plan", "paper", "--set", "plan.tflops=0"]) == 2
    assert "plan.tflops is 0" in capsys.readouterr().err
    assert main(["plan", "paper", "--workers", "0"]) == 2
    with pytest.raises(LayerloopError, match="is not a change"):
        plan_assumptions(["plan.tflops"])
    assumed, rest = plan_assumptions(["plan.tflops=600", "rollout.steps=8"])
    assert (assumed.tflops, rest) == (600.0, ["rollout.steps=8"])


def test_the_page_about_performance_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "paper"]) == 0
    page = (Path(__file__).parents[2] / "docs/PERFORMANCE.md").read_text()
    assert capsys.readouterr().out.strip() in page, "docs/PERFORMANCE.md: put in what `layerloop plan paper` prints"
    assert page.splitlines()[2].startswith("**Computed, not measured.**")


def test_the_table_of_the_readme_is_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    prices = ("plan.gpu_hour_price=2.5", "judge.price.input=0.1", "judge.price.output=0.3")
    assert main(["plan", "paper", "--json", *(word for price in prices for word in ("--set", price))]) == 0
    plan = json.loads(capsys.readouterr().out)
    one, eight = (next(way["campaign"] for way in on["ways"] if way["way"] == "resident") for on in plan["layouts"][:2])
    tokens = [200 * plan["judge"][name] / 1e6 for name in ("input_tokens", "output_tokens")]
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for row in (
        f"| time | minutes on two CPU cores | {one['days']:.1f} days | {24 * eight['days']:.0f} hours |",
        f"| GPU hours; at 2.50 each | | {one['gpu_hours']:.0f}; {one['gpu_cost']:.0f} | {eight['gpu_hours']:.0f}; "
        f"{eight['gpu_cost']:.0f} |",
        f"{plan['gpu_bytes']['update'] / 1e9:.0f} GB of the GPU",
        f"{round(one['stored_gb'], -1):.0f} GB; 45 GB with `retention`",
        f"{tokens[0]:.0f} M tokens in, {tokens[1]:.0f} M out",
        f"| a hosted one, at 0.10 and 0.30 a million | | {one['judge_cost']:.0f} | {eight['judge_cost']:.0f} |",
    ):
        assert row in readme
