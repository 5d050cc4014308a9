"""Systems side by side: adapters that were evaluated, and layers that other programs made of the same pictures."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from layerloop.components.evaluate_adapter.assess import assess
from layerloop.components.evaluate_adapter.cases import Case, Cases, read_cases
from layerloop.components.evaluate_adapter.comparable import Evaluation, check_comparable
from layerloop.components.evaluate_adapter.compare import main
from layerloop.components.evaluate_adapter.other_adapters import BASE, is_adapter, sample_adapters
from layerloop.components.evaluate_adapter.paper_tables import paper_tables, tables_markdown
from layerloop.components.evaluate_adapter.results import samples_table
from layerloop.components.evaluate_adapter.step import run
from layerloop.components.evaluate_adapter.systems import (
    as_json,
    as_markdown,
    compare_systems,
    measure_folder,
    read_evaluation,
)
from layerloop.components.evaluate_adapter.systems_page import as_html
from layerloop.components.layers.columns import DEFINITIONS
from layerloop.components.layers.export import write_psd
from layerloop.components.layers.stack import Pixels
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.images import encode_png
from layerloop.components.storage.inventory import unnamed_objects
from layerloop.pipelines.cli import main as layerloop

from ..campaigns import CampaignBuilder, policy_folder
from .conftest import Evaluated, case_of, drawn_design, source_of


def some_cases(count: int = 10) -> Cases:
    stacks = [drawn_design(seed, 2 + seed % 2) for seed in range(count)]
    cases = [case_of(f"{n:016x}", "designs", len(stack), n, source_of(stack), stack) for n, stack in enumerate(stacks)]
    return Cases(tuple(cases), {})


def rows_of(cases: Cases, make: Any) -> list[dict[str, Any]]:
    return [assess(case, make(case), max_edits=0) for case in cases.cases]


def blank(case: Case) -> Pixels:
    """All of the picture in layer 0."""
    assert case.truth is not None
    stack = np.zeros_like(case.truth)
    stack[0, ..., :3], stack[0, ..., 3] = case.source, 255
    return stack


def test_each_system_is_compared_with_the_base_and_wins_are_counted() -> None:
    cases = some_cases()
    base, perfect = rows_of(cases, blank), rows_of(cases, lambda case: case.truth)
    table = compare_systems(base, {"same": base, "perfect": perfect}, seed=0)
    bad = table["designs.bad_layers"]
    assert (bad["perfect"].wins, bad["same"].wins) == (1.0, 0.5)
    assert bad["perfect"].comparison.n == 10 and bad["same"].comparison.difference == 0
    assert table["designs.slot_l1.L2"]["perfect"].comparison.n == 5
    assert table["designs.slot_l1.L3"]["perfect"].comparison.tuned == 0
    assert table["designs.coverage"]["perfect"].wins is None  # neither direction is better
    document = as_json(table)
    assert json.loads(json.dumps(document))["designs.bad_layers"]["perfect"]["wins"] == 1.0


def test_p_values_are_adjusted_over_all_systems() -> None:
    cases = some_cases()
    base, perfect = rows_of(cases, blank), rows_of(cases, lambda case: case.truth)
    alone = compare_systems(base, {"a": perfect}, seed=0)["designs.bad_layers"]["a"].comparison
    three = compare_systems(base, dict.fromkeys("abc", perfect), seed=0)["designs.bad_layers"]["a"].comparison
    assert alone.p == three.p and alone.adjusted is not None and three.adjusted is not None
    assert three.adjusted > alone.adjusted


def test_the_table_is_markdown_with_a_column_a_system() -> None:
    cases = some_cases()
    base, perfect = rows_of(cases, blank), rows_of(cases, lambda case: case.truth)
    lines = as_markdown(compare_systems(base, {"LayerD": perfect, "x": base[:4]}, seed=0), ["LayerD", "x"]).splitlines()
    assert lines[0] == "| measure | n | base | LayerD | x |" and len({line.count("|") for line in lines}) == 1
    (bad,) = [line for line in lines if line.startswith("| designs: Bad layers ↓ |")]
    assert "wins 100 %" in bad and "wins 50 %" in bad


def test_the_base_of_a_table_does_not_depend_on_the_order_of_systems_of_other_cases() -> None:
    cases = some_cases()
    base, perfect = rows_of(cases, blank), rows_of(cases, lambda case: case.truth)
    for names in (["all", "few"], ["few", "all"]):
        rows = {name: {"all": perfect, "few": perfect[:4]}[name] for name in names}
        (bad,) = [
            line
            for line in as_markdown(compare_systems(base, rows, seed=0), ["all", "few"]).splitlines()
            if line.startswith("| designs: Bad layers ↓ |")
        ]
        _, _, count, mean, complete, few, _ = (cell.strip() for cell in bad.split("|"))
        values = [row["bad_layers"] for row in base if row["kind"] == "designs"]
        assert int(count) == len(values) == 10 and float(mean) == pytest.approx(sum(values) / 10, abs=0.01)
        assert "[n 4, base " in few and "[n" not in complete


def test_the_page_has_a_section_for_each_system() -> None:
    cases = some_cases(24)
    base, perfect = rows_of(cases, blank), rows_of(cases, lambda case: case.truth)
    table = compare_systems(base, {"<LayerD>": perfect, "same": base}, seed=0)
    page = as_html(table, ["<LayerD>", "same"], [], campaign="x").decode()
    first, second, whole = page.split("<h2>")[1:4]
    assert first.startswith("&lt;LayerD&gt;") and "clearly worse in 0" in first and first.count('<td class="good"') > 3
    assert "Bad layers" in first and '<td data-label="cases won">100 %</td>' in first
    assert second.startswith("same") and "better than the base in 0 measures, clearly worse in 0" in second
    assert (
        "<table" not in second and whole.startswith("All measures") and "<th>&lt;LayerD&gt;</th><th>same</th>" in whole
    )
    alone = as_html({"designs.bad_layers": table["designs.bad_layers"]}, ["<LayerD>"], [], campaign="x").decode()
    assert "Clearly better than the base in 1 measure, clearly worse in 0, not clearly different in 0." in alone


def test_tables_have_the_shape_of_the_papers() -> None:
    cases = some_cases(24)
    base, perfect = rows_of(cases, blank), rows_of(cases, lambda case: case.truth)
    table = compare_systems(base, {"perfect": perfect, "same": base}, seed=0)
    first, second, fourth = paper_tables(table, ["perfect", "same"])
    assert first.title.startswith("As Table 1: RGB L1 of the layers on designs")
    assert [name.partition(",")[2] for name in first.columns] == ["", " 2 layers ↓", " 3 layers ↓"]
    assert list(first.rows) == ["base", "perfect", "same"]
    assert [(float(text), good) for text, good in first.rows["perfect"]] == [(0, False)] * 3
    assert fourth.columns[0] == "designs: Layer 0 inpainting, SSIM ↑" and fourth.rows["perfect"][0] == ("1.00", True)
    bad = [name.startswith("designs: Bad layers") for name in second.columns].index(True)
    assert second.rows["perfect"][bad][1] and not second.rows["same"][bad][1]
    text = tables_markdown([first, second, fourth])
    assert text.count("| base |") == 3 and "they do not compare with the paper" in text and "**1.00**" in text
    page = as_html(table, ["perfect", "same"], [first], campaign="x").decode()
    assert page.index("As Table 1") < page.index("<h2>perfect") and "Bold" not in page
    assert paper_tables({}, ["perfect"]) == [] and tables_markdown([]) == ""


def test_a_system_of_other_cases_is_refused() -> None:
    cases = some_cases(2)
    base = rows_of(cases, blank)
    other = [{**row, "seed": row["seed"] + 99} for row in base]
    with pytest.raises(LayerloopError, match="^x has no case in common with the base"):
        compare_systems(base, {"x": other}, seed=0)


# --------------------------------------------------------------------------------------------- layers of other programs


def test_layers_as_numbered_pngs_and_as_psd_measure_the_same(tmp_path: Path) -> None:
    cases = some_cases(3)
    for case in cases.cases:
        assert case.truth is not None
        (tmp_path / "png" / case.name).mkdir(parents=True)
        (tmp_path / "psd").mkdir(exist_ok=True)
        for number, layer in enumerate(case.truth):
            (tmp_path / "png" / case.name / f"layer_{number + 8}.png").write_bytes(encode_png(layer))
        (tmp_path / "png" / case.name / "composite.png").write_bytes(encode_png(case.source))
        (tmp_path / "psd" / f"{case.name}.psd").write_bytes(write_psd(case.truth))
    expected = rows_of(cases, lambda case: case.truth)
    assert measure_folder(tmp_path / "png", cases, max_edits=0) == expected
    assert measure_folder(tmp_path / "psd", cases, max_edits=0) == expected


def test_another_number_of_layers_at_another_size_is_measured(tmp_path: Path) -> None:
    """As LayerD gives: as many layers as it finds, at the size that it works at."""
    cases = some_cases(1)
    (case,) = cases.cases
    (tmp_path / case.name).mkdir()
    for number in range(4):
        layer = np.zeros((2 * case.source.shape[0], 2 * case.source.shape[1], 4), np.uint8)
        layer[number * 8 :] = 255
        (tmp_path / case.name / f"{number:04}.png").write_bytes(encode_png(layer))
    (row,) = measure_folder(tmp_path, cases, max_edits=0)
    assert (row["layers"], row["height"]) == (2, case.source.shape[0]) and row["bad_layers"] is not None


def test_layers_of_other_programs_are_converted_as_pictures_are(tmp_path: Path) -> None:
    """16-bit grey and palettes are what they show, not clipped and not indices."""
    cases = some_cases(1)
    (case,) = cases.cases
    height, width = case.source.shape[:2]
    ramp = np.linspace(0, 255, width).astype(np.uint8)[None].repeat(height, 0)
    kinds = {"deep": Image.fromarray(ramp.astype(np.uint16) * 257), "flat": Image.fromarray(ramp)}
    kinds["palette"] = kinds["flat"].convert("P")
    for kind, image in kinds.items():
        (tmp_path / kind / case.name).mkdir(parents=True)
        image.save(tmp_path / kind / case.name / "0.png")
    deep, flat, palette = (measure_folder(tmp_path / kind, cases, max_edits=0) for kind in kinds)
    assert deep == flat == palette and flat[0]["recomposition_error"] is not None


def test_layers_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    cases = some_cases(1)
    (case,) = cases.cases
    with pytest.raises(LayerloopError, match="nowhere is no folder: give an evaluation, an adapter or"):
        measure_folder(tmp_path / "nowhere", cases, max_edits=0)
    with pytest.raises(LayerloopError, match=rf"has layers of none of the 1 cases: .* {case.name}/0\.png"):
        measure_folder(tmp_path, cases, max_edits=0)
    (tmp_path / case.name).mkdir()
    with pytest.raises(LayerloopError, match="has no layers: give numbered PNGs"):
        measure_folder(tmp_path, cases, max_edits=0)
    (tmp_path / case.name / "0.png").write_bytes(encode_png(np.zeros((40, 20, 4), np.uint8)))
    with pytest.raises(LayerloopError, match="has a layer of 20 x 40, the picture is"):
        measure_folder(tmp_path, cases, max_edits=0)
    (tmp_path / case.name / "00.png").write_bytes(b"")
    with pytest.raises(LayerloopError, match="have one number"):
        measure_folder(tmp_path, cases, max_edits=0)
    (tmp_path / f"{case.name}.psd").write_bytes(b"none")
    with pytest.raises(LayerloopError, match="cannot be read as a PSD"):
        measure_folder(tmp_path, cases, max_edits=0)


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_compares_an_evaluation_with_a_folder_of_layers(
    evaluated: Evaluated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    campaign = evaluated.lab.campaign
    assert main([evaluated.lab.uri, "--sources", str(tmp_path / "sources")]) == 0
    cases = read_cases(campaign, campaign.sources())
    assert len(list((tmp_path / "sources").iterdir())) == len(cases.cases)
    for case in cases.of("designs"):
        assert case.truth is not None
        (tmp_path / "true" / case.name).mkdir(parents=True)
        for number, layer in enumerate(case.truth):
            (tmp_path / "true" / case.name / f"{number}.png").write_bytes(encode_png(layer))
    evaluation = f"{evaluated.lab.uri}/evaluations/iteration-000002"
    out = tmp_path / "t.json"
    capsys.readouterr()
    assert main([evaluated.lab.uri, f"tuned={evaluation}", f"true={tmp_path}/true", "--output", str(out)]) == 0
    assert capsys.readouterr().out.startswith("| measure | n | base | tuned | true |")
    table = json.loads(out.read_text())
    assert table["designs.slot_l1"]["true"]["tuned"] == 0
    quoted = evaluated.metrics["designs.slot_l1"]
    assert table["designs.slot_l1"]["tuned"]["difference"] == pytest.approx(quoted["difference"])
    assert "true" not in table["pictures.bad_layers"]


def test_an_adapter_from_elsewhere_is_sampled_as_the_campaigns_own_are(
    lab: CampaignBuilder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter of iteration 2, as a folder with one subfolder of weights: the numbers of its own evaluation."""
    run(campaign=lab.uri)
    read = read_evaluation(f"{lab.uri}/evaluations/iteration-000002")
    base, tuned = read.base, read.tuned
    shutil.copytree(policy_folder(lab.campaign, 2), tmp_path / "released" / "model")
    found = sample_adapters(
        lab.campaign, read_cases(lab.campaign, lab.campaign.sources()), {"x": f"{tmp_path}/released"}
    )
    for ours, theirs in ((found["x"], tuned), (found[BASE], base)):
        assert [{name: row.get(name) for name in row} for row in ours] == [
            {name: their[name] for name in row} for row, their in zip(ours, theirs, strict=True)
        ]
    assert not [name for name in unnamed_objects(lab.campaign) if name.startswith("evaluations")]
    capsys.readouterr()
    assert main([lab.uri, f"x={tmp_path}/released", "--output", str(tmp_path / "t.md")]) == 0
    printed, logged = capsys.readouterr()
    assert (
        printed.startswith("| measure | n | base | x |") and "**As Table 1" in printed and "decomposing" not in logged
    )
    assert main([lab.uri, f"base={tmp_path}/released"]) == 2
    assert "system base is the campaign's base itself" in capsys.readouterr().err


def test_adapters_are_told_from_evaluations_and_folders_of_layers(evaluated: Evaluated, tmp_path: Path) -> None:
    assert (
        is_adapter("StabilityLabs/Stable-Layers")
        and is_adapter("hf://owner/name/model")
        and is_adapter("a.safetensors")
    )
    assert is_adapter(str(policy_folder(evaluated.lab.campaign, 2)))
    assert not is_adapter(f"{evaluated.lab.uri}/evaluations/iteration-000002")
    assert not is_adapter(str(tmp_path)) and not is_adapter("/nowhere")


def test_a_misspelt_path_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "campaigns/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_adapter("owner/name") and not is_adapter("campaigns/mien/published/mine-000001")


def test_the_command_line_hands_over(evaluated: Evaluated, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    evaluation = f"{evaluated.lab.uri}/evaluations/iteration-000002"
    out = tmp_path / "t.md"
    assert layerloop(["compare", evaluated.lab.uri, f"tuned={evaluation}", "-o", str(out)]) == 0
    printed = capfd.readouterr().out
    assert printed == out.read_text() and printed.startswith("| measure | n | base | tuned |")
    assert layerloop(["compare", evaluated.lab.uri]) == 2


@pytest.mark.parametrize(
    ("systems", "line"),
    [
        ([], "no system is given"),
        (["nameless"], "system 'nameless' is not NAME=URI"),
        (["a=/x", "a=/y"], "two systems have one name"),
        (["a=/nowhere"], "/nowhere is no folder: give an evaluation, an adapter or"),
        (["base=/nowhere"], "system base is the campaign's base itself: give /nowhere another name"),
        (["a=/nowhere", "--output", "/nowhere/x.html"], "--output is /nowhere/x.html: its folder is not there"),
        (["--sources", "/proc/x"], "/proc/x cannot be written ("),
        (["a=/nowhere", "--output", "x.pdf"], "--output is x.pdf: give it one of the suffixes .md, .json, .html"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    evaluated: Evaluated, capsys: pytest.CaptureFixture[str], systems: list[str], line: str
) -> None:
    assert main([evaluated.lab.uri, *systems]) == 2
    assert line in capsys.readouterr().err


def test_an_evaluation_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LayerloopError, match=r"samples\.parquet"):
        read_evaluation(str(tmp_path))
    (tmp_path / "samples.parquet").write_bytes(b"none")
    with pytest.raises(LayerloopError, match="is damaged"):
        read_evaluation(str(tmp_path))
    (tmp_path / "samples.parquet").write_bytes(samples_table({"base": []}))
    with pytest.raises(LayerloopError, match="has no samples"):
        read_evaluation(str(tmp_path))
    (tmp_path / "samples.parquet").write_bytes(samples_table({"base": rows_of(some_cases(1), blank)}))
    (tmp_path / "metrics.json").write_text('{"definitions": {}}')
    with pytest.raises(LayerloopError, match="says nothing of definitions and base: give the folder of a whole"):
        read_evaluation(str(tmp_path))


def an_evaluation(cases: Cases, definitions: dict[str, str] | None = None, **provenance: Any) -> Evaluation:
    rows = rows_of(cases, blank)
    known = {"base_fingerprint": "a" * 64, "dtype": "float32", "prompt": "", "sampler": "heun", "steps": 20}
    return Evaluation(rows, rows, {**DEFINITIONS, **(definitions or {})}, known | provenance)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (
            {"base_fingerprint": "b" * 64},
            "x and y have another base (aaaaaaaaaaaa and bbbbbbbbbbbb): a table is of one",
        ),
        ({"steps": 50}, "x and y have another number of steps (20 and 50)"),
        ({"prompt": "a layered design"}, "x and y have another prompt"),
        ({"definitions": {"idle": "as it was"}}, "x and y have other definitions of idle: evaluate y again"),
    ],
)
def test_evaluations_that_do_not_belong_into_one_table_are_one_line(changed: dict[str, Any], line: str) -> None:
    cases = some_cases(2)
    both = {"x": an_evaluation(cases), "y": an_evaluation(cases, **changed)}
    with pytest.raises(LayerloopError, match=re.escape(line)):
        check_comparable(both, cases, measured_now=False, sampled=None)
    assert check_comparable({"x": both["x"]}, cases, measured_now=True, sampled=None) == []


def test_what_is_measured_or_sampled_now_must_fit_too() -> None:
    cases = some_cases(2)
    old = {name: an_evaluation(cases, {"halo": "as it was"}) for name in "xy"}
    (note,) = check_comparable(old, cases, measured_now=False, sampled=None)
    assert note.startswith("measured by earlier definitions of halo")
    with pytest.raises(LayerloopError, match="have other definitions of halo: evaluate x again"):
        check_comparable(old, cases, measured_now=True, sampled=None)
    with pytest.raises(LayerloopError, match=r"x and the campaign have another base \(aaaaaaaaaaaa and cccc\)"):
        check_comparable({"x": an_evaluation(cases)}, cases, measured_now=True, sampled={"base_fingerprint": "cccc"})


def test_cases_that_an_evaluation_has_not_are_said() -> None:
    cases = some_cases(4)
    few, other = Cases(cases.cases[:3], {}), Cases(some_cases(6).cases[4:], {})
    (note,) = check_comparable({"x": an_evaluation(few)}, cases, measured_now=False, sampled=None)
    assert note == "x has 3 of the campaign's 4 cases"
    (note,) = check_comparable({"x": an_evaluation(cases)}, few, measured_now=False, sampled=None)
    assert note == "x has 3 of the campaign's 3 cases and 1 others"
    with pytest.raises(LayerloopError, match="x has none of the campaign's 4 cases"):
        check_comparable({"x": an_evaluation(other)}, cases, measured_now=False, sampled=None)


def test_undefined_values_are_counted_in_every_table() -> None:
    cases = some_cases()
    base, perfect = rows_of(cases, blank), rows_of(cases, lambda case: case.truth)
    assert all(row["edge_recomposition"] is None for row in base)  # its foreground is blank
    base[0]["edge_recomposition"], perfect[1]["edge_recomposition"] = 0.25, None
    never = [{**row, "edge_recomposition": None} for row in perfect]
    table = compare_systems(base, {"perfect": perfect, "never": never}, seed=0)
    lines = as_markdown(table, ["perfect", "never"]).splitlines()
    (line,) = [line for line in lines if line.startswith("| designs: Recomposition error along edges ↓ |")]
    _, _, count, mean, one, none, _ = (cell.strip() for cell in line.split("|"))
    assert (count, mean, none) == ("1", "0.250 [undefined: 9]", "– [undefined: 10] [n 0]")
    assert one.endswith("[undefined: 1]") and "wins 100 %" in one
    page = as_html(table, ["perfect", "never"], [], campaign="x").decode()
    row = page[page.rindex("Recomposition error along edges") :].partition("</tr>")[0]
    assert "<small>[undefined: 9]</small>" in row and "–<br><small>[n 0] [undefined: 10]</small>" in row
