"""The complete step: base and adapter on the same noise, the report, and what it leaves in the campaign."""

from __future__ import annotations

import io
import json
import posixpath
import re
import subprocess

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load, save
from warm_python import warm

from layerloop.components.evaluate_adapter.cases import read_cases
from layerloop.components.evaluate_adapter.decompose import read_decompositions
from layerloop.components.evaluate_adapter.report import standalone
from layerloop.components.evaluate_adapter.step import run
from layerloop.components.layers.measure import DEFINITIONS, measure_all
from layerloop.components.policy.lora import put_adapter, read_adapter
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.policy.sampling import Plan, rollout
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.storage.campaign import MANIFEST
from layerloop.components.storage.manifests import add_file, commit, read_file, verify

from ..campaigns import CampaignBuilder, named, policy_folder
from .conftest import Evaluated, MakeLab, drawn_design, hold_out, source_of


def metrics_of(lab: CampaignBuilder, iteration: int = 2) -> dict[str, dict[str, float]]:
    manifest = lab.campaign.find(f"evaluations/iteration-{iteration:06d}")
    assert manifest is not None
    return json.loads(read_file(lab.store, manifest.file("metrics.json")))


def test_an_evaluation_leaves_everything_that_it_promises(evaluated: Evaluated) -> None:
    manifest = evaluated.manifest
    assert evaluated.result.manifests == {"evaluation": manifest}
    verify(evaluated.lab.store, manifest)
    assert manifest.counts == {"designs": 5, "pictures": 2, "sheets": 7}
    names = {file.name.rpartition("/")[2] for file in manifest.files}
    assert {"report.html", "metrics.json", "samples.parquet"} < names
    assert sum("/sheets/" in file.name for file in manifest.files) == 7
    assert evaluated.result.files["report"] == standalone(evaluated.file("report.html"))


def test_numbers_are_those_of_the_stored_layers(evaluated: Evaluated) -> None:
    """Measured again from the shards by hand, and averaged: what metrics.json says."""
    lab = evaluated.lab
    cases = read_cases(lab.campaign, lab.campaign.sources())
    for model, key in (("base", "base"), ("iteration-000002", "tuned")):
        shards = [shard for shard in evaluated.manifest.shards if f"/{model}/" in shard.name]
        stacks = {name: stack for shard in shards for name, stack in read_decompositions(lab.store, shard).items()}
        rows = [measure_all(stacks[case.name], case.source, case.truth) for case in cases.of("designs")]
        for name in ("bad_layers", "slot_l1", "inpainting_ssim", "recomposition_error"):
            values = [value for row in rows if (value := row[name]) is not None]
            assert evaluated.metrics[f"designs.{name}"][key] == pytest.approx(np.mean(values)), name


def test_layers_are_sampled_as_at_inference_from_the_cases_seed(evaluated: Evaluated) -> None:
    """Heun over the policy's own schedule, one image at a time, gives what the step sampled in batches."""
    lab = evaluated.lab
    cases = read_cases(lab.campaign, lab.campaign.sources())
    policy = LayeredPolicy.load(lab.recipe.model)
    prompt = load(lab.store.read(named(lab.store, "sources/prompt.safetensors")))["prompt_embeds"]
    for model in ("base", "iteration-000002"):
        if model != "base":
            put_adapter(policy.transformer, read_adapter(policy_folder(lab.campaign, 2)))
        (shard,) = (shard for shard in evaluated.manifest.shards if f"/{model}/" in shard.name)
        stacks = read_decompositions(lab.store, shard)
        for case in (cases.cases[0], cases.cases[-1]):
            layers, height, width = case.geometry
            condition = policy.encode(case.source[None], prompt)
            plan = Plan(sigmas=policy.sigmas(2, height, width), outside="heun")
            final = rollout(policy, condition, policy.noise(case.seed, layers, height, width), plan).final
            expected = policy.layers_uint8(final, height, width)[0].astype(int)
            assert np.abs(expected - stacks[case.name]).max() <= 1  # a batch may round the last bit otherwise


def test_an_adapter_that_changes_nothing_differs_from_the_base_in_nothing(make_lab: MakeLab) -> None:
    lab = make_lab()
    hold_out(lab, [drawn_design(1, 2), drawn_design(2, 3)], [])
    lab.adapter(1, scale=0.0)
    run(campaign=lab.uri)
    measures = {name: value for name, value in metrics_of(lab, 1).items() if name.startswith("designs.")}
    assert len(measures) > 30
    assert {value["difference"] for value in measures.values()} == {0.0}


def test_the_average_is_evaluated_where_one_is_kept_as_it_is_what_would_be_published(make_lab: MakeLab) -> None:
    """The average here is of weights that change nothing, next to trained ones that do."""
    lab = make_lab()
    hold_out(lab, [drawn_design(1, 2), drawn_design(2, 3)], [])
    lab.adapter(1)
    where, trained = lab.campaign.policy_dir(1), lab.campaign.policy(1)
    tensors = load(lab.adapter_weights(1))
    average = add_file(lab.store, f"{where}/ema.safetensors", save({k: v * 0 for k, v in tensors.items()}))
    lab.store.delete(f"{where}/{MANIFEST}")
    commit(lab.store, f"{where}/{MANIFEST}", trained.model_copy(update={"files": (*trained.files, average)}))
    manifest = run(campaign=lab.uri).manifests["evaluation"]
    metrics = metrics_of(lab, 1)
    assert {value["difference"] for name, value in metrics.items() if name.startswith("designs.")} == {0.0}
    assert metrics["provenance"]["adapter_sha256"] == manifest.metadata["adapter_sha256"] == average.sha256


def test_an_adapter_that_changes_something_is_seen_to(evaluated: Evaluated) -> None:
    metrics = evaluated.result.metrics
    assert metrics["designs_slot_l1_difference"] != 0
    assert metrics["designs_slot_l1_base"] == evaluated.metrics["designs.slot_l1"]["base"]


def test_links_of_the_report_are_names_of_the_manifest(lab: CampaignBuilder) -> None:
    for iteration in (1, 2):
        run(campaign=lab.uri, iteration=iteration)
    manifest = lab.campaign.find("evaluations/iteration-000002")
    earlier = lab.campaign.find("evaluations/iteration-000001")
    assert manifest is not None and earlier is not None
    report = manifest.file("report.html")
    folder = report.name.rpartition("/")[0]
    page = read_file(lab.store, report).decode()
    links = {posixpath.normpath(f"{folder}/{link}") for link in re.findall(r' href="([^"]*)"', page)}
    assert earlier.file("report.html").name in links
    known = {file.name for file in (*manifest.files, *earlier.files)}
    assert len(links) > 40 and links <= known


def test_a_second_run_returns_what_the_first_committed(evaluated: Evaluated) -> None:
    store = evaluated.lab.store
    files = {name: store.read(name) for name in store.list("evaluations/")}
    assert run(campaign=evaluated.lab.uri) == evaluated.result
    assert {name: store.read(name) for name in store.list("evaluations/")} == files


def test_an_interrupted_run_continues_with_the_shards_that_it_finished(
    lab: CampaignBuilder, capsys: pytest.CaptureFixture[str]
) -> None:
    run(campaign=lab.uri)
    kept = metrics_of(lab)
    lab.store.delete(named(lab.store, "evaluations/iteration-000002/metrics.json"))
    lab.store.delete("evaluations/iteration-000002/manifest.json")
    capsys.readouterr()
    run(campaign=lab.uri)
    assert capsys.readouterr().err.count("7 decompositions, kept from an earlier attempt") == 2
    again = metrics_of(lab)
    assert {k: v for k, v in again.items() if k != "provenance"} == {k: v for k, v in kept.items() if k != "provenance"}


def test_the_base_is_sampled_once_for_all_iterations(lab: CampaignBuilder) -> None:
    one, two = (run(campaign=lab.uri, iteration=iteration).manifests["evaluation"] for iteration in (1, 2))
    shared = [shard for shard in two.shards if shard in one.shards]
    assert [shard.name.startswith("evaluations/base/") for shard in shared] == [True]
    assert metrics_of(lab, 1)["designs.slot_l1"]["base"] == metrics_of(lab, 2)["designs.slot_l1"]["base"]
    assert metrics_of(lab, 1)["designs.slot_l1"]["tuned"] != metrics_of(lab, 2)["designs.slot_l1"]["tuned"]


def test_every_sample_is_in_the_table_once_for_each_model(evaluated: Evaluated) -> None:
    table = pq.read_table(io.BytesIO(evaluated.file("samples.parquet"))).to_pylist()
    base, tuned = (
        [(row["key"], row["layers"], row["seed"]) for row in table if row["model"] == model]
        for model in ("base", "iteration-000002")
    )
    assert base == tuned and len(set(base)) == len(base) == 7
    design = next(row for row in table if row["kind"] == "designs" and row["layers"] == 3)
    assert None not in (design["slot_l1_2"], design["layerd_cost_5"], design["layerd_clean_alpha_iou_0"])
    image = next(row for row in table if row["kind"] == "pictures")
    assert image["slot_l1"] is None and image["recomposition_error"] is not None
    assert image["layers"] == 3  # no 4 in this recipe's layers: the most it evaluates


def test_metrics_explain_themselves(evaluated: Evaluated) -> None:
    document = evaluated.metrics
    assert document["definitions"].items() >= DEFINITIONS.items()
    adapter = evaluated.lab.campaign.policy(2)
    assert document["provenance"]["adapter_sha256"] == adapter.metadata["adapter_sha256"]
    assert document["provenance"]["steps"] == 2 and document["provenance"]["model_calls_per_decomposition"] == 3
    bad = document["designs.bad_layers"]
    statistics = {"base", "tuned", "difference", "low", "high", "n", "p", "adjusted", "relative", "decimals", "clear"}
    assert bad.keys() == statistics | {"title", "better", "reference", "undefined"}
    assert bad["n"] == 5 and bad["better"] == "lower" and bad["reference"] == 0
    assert {"designs.slot_l1.L2", "designs.slot_l1.L3.slot2", "designs.layerd_alpha_iou_5"} <= document.keys()
    assert document["designs.slot_l1.L2"]["n"] + document["designs.slot_l1.L3"]["n"] == 5


def test_sheets_are_pictures_that_open(evaluated: Evaluated) -> None:
    for file in evaluated.manifest.files:
        if "/sheets/" in file.name:
            assert Image.open(io.BytesIO(read_file(evaluated.lab.store, file))).width > 600


def test_the_command_on_s3_prints_its_metrics(make_lab: MakeLab, s3_bucket: str) -> None:
    lab = make_lab(s3_bucket)
    hold_out(lab, [drawn_design(1, 2), drawn_design(2, 3)], [source_of(drawn_design(3, 2))])
    lab.adapter(1)
    done = subprocess.run(
        [warm(), "-m", "layerloop.components.evaluate_adapter", "--campaign", lab.uri],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["designs_bad_layers_base"] >= 0
    assert lab.store.exists("evaluations/iteration-000001/manifest.json")


# ------------------------------------------------------------------------------------------------ refusals and absences


def test_a_campaign_without_an_adapter_is_refused(make_lab: MakeLab) -> None:
    lab = make_lab()
    hold_out(lab, [drawn_design(1, 2)], [])
    with pytest.raises(LayerloopError, match=r"has no adapter to evaluate \(iteration 0\): train an iteration first"):
        run(campaign=lab.uri)


def test_an_iteration_that_is_not_committed_is_refused(lab: CampaignBuilder) -> None:
    with pytest.raises(LayerloopError, match="iterations/000007/policy is not committed: run update_lora first"):
        run(campaign=lab.uri, iteration=7)
    assert not lab.store.list("evaluations/")


def test_an_adapter_that_decodes_into_nan_is_refused_and_nothing_is_committed(make_lab: MakeLab) -> None:
    lab = make_lab()
    hold_out(lab, [drawn_design(1, 2)], [])
    lab.adapter(1, scale=1e20)
    with pytest.raises(LayerloopError, match=r"iteration-000001 decodes image [0-9a-f]{16} into NaN: its weights have"):
        run(campaign=lab.uri)
    assert not lab.store.exists("evaluations/iteration-000001/manifest.json")


def test_without_designs_the_report_says_what_is_missing(make_lab: MakeLab) -> None:
    lab = make_lab()
    hold_out(lab, [], [source_of(drawn_design(seed, 3)) for seed in range(2)])
    lab.adapter(1)
    result = run(campaign=lab.uri)
    page = result.files["report"].decode()
    assert "holds out no designs with known layers" in page
    assert "Held-out designs" not in page and "LayerD’s protocol by" not in page
    assert not [name for name in metrics_of(lab, 1) if name.startswith("designs.")]
    assert "pictures_bad_layers_base" in result.metrics


def test_a_campaign_that_holds_out_nothing_is_refused(make_lab: MakeLab) -> None:
    lab = make_lab()
    hold_out(lab, [], [])
    lab.adapter(1)
    with pytest.raises(LayerloopError, match="holds out nothing that recipe.evaluation asks for"):
        run(campaign=lab.uri)


def test_the_report_says_who_judged(evaluated: Evaluated) -> None:
    assert "were given by layerloop-reference-judge: rules over pixels" in evaluated.page
    assert re.search(r"<polyline[^>]*>", evaluated.page)  # two iterations of rewards


def test_the_report_says_when_a_vlm_judged(make_lab: MakeLab) -> None:
    lab = make_lab()
    hold_out(lab, [drawn_design(1, 2)], [])
    lab.adapter(1)
    lab.scores(1, lambda k, g, c: 0.5 + 0.1 * c, judge="qwen3-vl-8b")
    page = run(campaign=lab.uri).files["report"].decode()
    assert "were given by qwen3-vl-8b (v1). Rubric: default 1." in page and "rules over pixels" not in page


def test_the_report_needs_nothing_from_elsewhere(evaluated: Evaluated) -> None:
    assert (
        "href=" in evaluated.file("report.html").decode() and "drawn" in evaluated.page
    )  # to the gallery, for local use
    assert not re.search(r"<script|<link|@import|url\(|src=\"(?!data:)|href=", evaluated.page)
    assert not re.search(r"\$\{\w+\}", evaluated.page)  # every place of the template is filled
    assert len(evaluated.page) < 1_000_000


def test_a_nightly_evaluation_is_compared_with_the_one_before_it(
    evaluated: Evaluated, capsys: pytest.CaptureFixture[str]
) -> None:
    lab, folder = evaluated.lab, "evaluations/iteration-000001"
    table = add_file(lab.store, f"{folder}/metrics.json", evaluated.file("metrics.json"))
    manifest = Manifest(kind="evaluation", iteration=1, files=(table,))
    commit(lab.store, f"{folder}/{MANIFEST}", manifest)
    try:
        run(campaign=lab.uri, iteration=2, baseline="previous")
        said = capsys.readouterr().err
        assert "since iteration-000001: designs.bad_layers" in said
        assert "+0 to +0, p 1, 5 pairs" in said
        run(campaign=lab.uri, iteration=2)
        assert "since iteration" not in capsys.readouterr().err
    finally:
        lab.store.delete(f"{folder}/{MANIFEST}")
