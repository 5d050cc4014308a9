"""Base and adapter by every sampler: the table, its verdicts, and the step that samples it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load

from layerloop.components.evaluate_adapter import samplers
from layerloop.components.evaluate_adapter.assess import Row
from layerloop.components.evaluate_adapter.cases import Cases, read_cases
from layerloop.components.evaluate_adapter.decompose import read_decompositions
from layerloop.components.evaluate_adapter.samplers import chosen_cases, sampler_table
from layerloop.components.evaluate_adapter.step import run
from layerloop.components.layers.measure import measure_all
from layerloop.components.policy.adapters import read_adapter
from layerloop.components.policy.inference import sample_layers
from layerloop.components.policy.lora import put_adapter
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.policy.prompt import embed_prompt
from layerloop.components.schema import inference
from layerloop.components.schema.inference import COMPARED, REFERENCE, Inference

from ..campaigns import CampaignBuilder, named, policy_folder
from .conftest import case_of


def rows_with(bad: dict[tuple[Inference, str], float], images: int = 12) -> dict[tuple[Inference, str], list[Row]]:
    """Rows by setting and model; `bad` is the mean of bad layers where it is not 1 for the base and 0.5 for the
    adapter. Each image adds its own."""
    own = np.linspace(0, 0.3, images)
    return {
        (setting, model): [
            {
                "bad_layers": bad.get((setting, model), 1.0 if model == "base" else 0.5) + own[i],
                "layer_l1": 0.1 if i < 9 else None,  # known of designs only
                "recomposition_error": 0.02,
            }
            for i in range(images)
        ]
        for setting in COMPARED
        for model in ("base", "adapter")
    }  # fmt: skip


def by_name(table: dict[str, list[dict[str, object]]]) -> dict[Inference, dict[str, object]]:
    return {Inference(s["steps"], s["sampler"], s["guidance"]): s for s in table["settings"]}  # type: ignore[arg-type]


def test_the_grid_is_what_people_use() -> None:
    names = {setting.name for setting in COMPARED}
    plain = {"euler-10", "euler-20", "euler-30", "euler-50", "heun-25", "heun-50"}
    assert names == plain | {f"{name}-guidance-4" for name in plain}
    assert REFERENCE in COMPARED
    calls = sum(s.calls for s in COMPARED) * 2
    assert calls == 1548 and f"{calls:,} model calls" in Path(inference.__file__).read_text()


def test_a_sampler_is_safe_that_is_worse_than_neither_the_base_nor_the_reference() -> None:
    garbled, lost, better = Inference(10, "euler", 1.0), Inference(20, "euler", 1.0), Inference(25, "heun", 4.0)
    rows = rows_with({
        (garbled, "adapter"): 2.0, (garbled, "base"): 3.0,  # better than the base, worse than by the reference
        (lost, "adapter"): 0.5, (lost, "base"): 0.2,  # as good as by the reference, and the base is better
        (better, "adapter"): 0.1,
    })  # fmt: skip
    found = by_name(sampler_table(rows, seed=3))
    assert {setting for setting, row in found.items() if not row["safe"]} == {garbled, lost}
    measures, kept = found[garbled]["measures"], found[garbled]["kept"]
    assert measures["bad_layers"]["difference"] == pytest.approx(-1.0) and measures["bad_layers"]["clear"]  # type: ignore[index]
    assert kept["bad_layers"]["difference"] == pytest.approx(1.5) and kept["bad_layers"]["base"] < 1  # type: ignore[index]
    assert measures["layer_l1"]["n"] == 9  # type: ignore[index]
    assert found[REFERENCE]["kept"]["bad_layers"]["difference"] == 0  # type: ignore[index]
    few = by_name(sampler_table(rows_with({(garbled, "adapter"): 2.0}, images=7), seed=3))
    assert {row["safe"] for row in few.values()} == {None}


def test_images_are_chosen_evenly_over_layer_counts() -> None:
    blank = np.zeros((16, 16, 3), np.uint8)
    cases = [case_of(f"{i:02d}", "designs", layers, i, blank, None) for layers in (2, 3, 4) for i in range(20)]
    cases += [case_of(f"{i:02d}", "pictures", 4, i, blank, None) for i in range(3)]
    chosen = chosen_cases(Cases(tuple(cases), {}))
    counts = [sum(c.kind == "designs" and c.layers == layers for c in chosen) for layers in (2, 3, 4)]
    assert counts == [8, 8, 8] and sum(c.kind == "pictures" for c in chosen) == 3
    assert [c for c in cases if c in chosen] == list(chosen)


GRID = (Inference(2, "euler", 1.0), Inference(2, "euler", 4.0), Inference(3, "heun", 1.0))


def test_the_step_samples_measures_and_shows_every_sampler(
    lab: CampaignBuilder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(samplers, "COMPARED", GRID)
    monkeypatch.setattr(samplers, "REFERENCE", GRID[2])
    result = run(campaign=lab.uri, samplers=True)
    manifest = lab.campaign.find("evaluations/samplers-000002")
    assert manifest is not None and manifest.counts == {"images": 7, "settings": 3}
    document = json.loads(lab.store.read(named(lab.store, "evaluations/samplers-000002/samplers.json")))

    # each number by hand: the layers of one setting, sampled again, and measured
    policy = LayeredPolicy.load(lab.recipe.model)
    prompt = load(lab.store.read(named(lab.store, "sources/prompt.safetensors")))["prompt_embeds"]
    blank = embed_prompt(lab.recipe.model.model_copy(update={"prompt": " "}))
    put_adapter(policy.transformer, read_adapter(policy_folder(lab.campaign, 2)))
    cases, bad = read_cases(lab.campaign, lab.campaign.sources()).cases, []
    (shard,) = (s for s in manifest.shards if s.name.startswith("evaluations/samplers-000002/euler-2-guidance-4"))
    stacks = read_decompositions(lab.store, shard)
    for case in cases:
        (expected,) = sample_layers(
            policy, case.source[None], prompt, seeds=[case.seed], layers=case.layers,
            how=Inference(2, "euler", 4.0), blank_prompt=blank,
        )  # fmt: skip
        assert expected is not None and np.abs(expected.astype(int) - stacks[case.name]).max() <= 1
        bad.append(measure_all(stacks[case.name], case.source, case.truth)["recomposition_error"])
    found = by_name(document)[GRID[1]]["measures"]["recomposition_error"]  # type: ignore[index]
    assert found["tuned"] == pytest.approx(np.mean(bad)) and found["n"] == 7
    assert found["base"] != found["tuned"]

    report = result.files["report"].decode()
    assert "<h2>By sampler</h2>" in report and report.count('<th scope="row">Euler, 2 steps</th>') == 2
    assert "too few images" in report

    capsys.readouterr()
    again = run(campaign=lab.uri, samplers=True)
    assert again.manifests == result.manifests and "decomposing" not in capsys.readouterr().err


def test_samplers_can_be_compared_after_the_evaluation(lab: CampaignBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "COMPARED", GRID[::2])
    monkeypatch.setattr(samplers, "REFERENCE", GRID[2])
    before = run(campaign=lab.uri)
    assert "By sampler" not in before.files["report"].decode()
    assert lab.campaign.find("evaluations/samplers-000002") is None
    after = run(campaign=lab.uri, samplers=True)
    assert after.files == before.files and after.manifests == before.manifests
    assert lab.campaign.find("evaluations/samplers-000002") is not None
