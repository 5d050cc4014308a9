"""The page: what it says of given numbers, what it shows, and that it stays small."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from html import unescape
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from layerloop.components.evaluate_adapter import report as report_module
from layerloop.components.evaluate_adapter.assess import Comparisons, assess, compare_rows, paired_differences
from layerloop.components.evaluate_adapter.cases import Case, Kind
from layerloop.components.evaluate_adapter.charts import Line, Point, common_reach, curve, histogram, lines, whisker
from layerloop.components.evaluate_adapter.gallery import ShownCase, full_size, style
from layerloop.components.evaluate_adapter.history import Evaluated, judge_cost
from layerloop.components.evaluate_adapter.report import Report, render, standalone
from layerloop.components.evaluate_adapter.results import kubeflow_metrics, metrics_json
from layerloop.components.evaluate_adapter.sheets import caption, choose, data_url, strips_of, without_layer
from layerloop.components.evaluate_adapter.statistics import Comparison
from layerloop.components.evaluate_adapter.tables import number, verdict
from layerloop.components.layers.columns import COLUMNS, DEFINITIONS, LAYERD, better_of, quoted, title_of
from layerloop.components.layers.measure import MEASURES
from layerloop.components.layers.stack import Pixels, composite
from layerloop.components.schema.manifest import Manifest

from .conftest import case_of, drawn_design, source_of


def compared(base: float, tuned: float, low: float, high: float, n: int = 20) -> Comparison:
    p = 0.5 if low <= 0 <= high else 0.001
    return Comparison(base, tuned, tuned - base, low, high, n, p, p)


BETTER = compared(0.5, 0.3, -0.3, -0.1)
WORSE = compared(0.5, 0.7, 0.1, 0.3)
UNCLEAR = compared(0.5, 0.52, -0.1, 0.2)


def page_of(table: Mapping[str, Comparison], **fields: Any) -> str:
    values: dict[str, Any] = {
        "title": "Iteration 3 against its base",
        "campaign": "lab",
        "model": "the tiny policy",
        "counts": {"designs": 20},
        "comparisons": Comparisons(by_kind={"designs": table}),
        "reference": {},
        "judge": "Nobody judged.",
        **fields,
    }
    return render(Report(**values)).decode()


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_the_summary_names_what_is_clearly_better_and_clearly_worse() -> None:
    text = text_of(page_of({"bad_layers": BETTER, "layer_l1": WORSE, "halo": UNCLEAR, "evenness": BETTER}))
    assert "clearly better in bad layers (0.50 → 0.30 )" in text
    assert "clearly worse in layer RGB L1, on black and white (0.50 → 0.70 )" in text
    assert "The one other measure shows no clear difference." in text


def test_the_summary_begins_with_what_there_is_more_of_and_with_the_headline() -> None:
    """An adapter that broke leaves fewer layers blank too, which is a part of its bad layers and not the news."""
    table = {"blank_layers": BETTER, "idle_layers": BETTER, "halo": WORSE, "glazed_layers": WORSE, "bad_layers": WORSE}
    text = page_of(table).split("</p>")[1]
    assert text.index("clearly worse in bad layers") < text.index("clearly better in blank layers")
    assert text.index("halo") < text.index("glazed layers")


def test_the_summary_admits_when_nothing_is_clear() -> None:
    text = text_of(page_of({"bad_layers": UNCLEAR, "layer_l1": UNCLEAR}))
    assert "does not differ from the base by more than chance in any of 2 measures" in text
    assert "clearly better" not in text and "clearly worse" not in text


@pytest.mark.parametrize(
    ("column", "comparison", "expected"),
    [
        ("bad_layers", BETTER, "good"),  # lower is better, and it fell
        ("inpainting_ssim", BETTER, "bad"),  # higher is better, and it fell
        ("evenness", BETTER, ""),  # neither direction is better
        ("slot_l1", BETTER, ""),  # lower is better, but white layers that are missing lower it too
        ("slot_l1_2", BETTER, ""),
        ("layer_l1_2", BETTER, "good"),
        ("layerd_alpha_iou_0", WORSE, "good"),
        ("layerd_clean_cost_3", WORSE, "bad"),
        ("bad_layers", UNCLEAR, ""),
        ("coverage", BETTER, ""),  # neither direction is better
        ("bad_layers", compared(0.5, 0.3, -0.3, -0.1, n=4), ""),  # too few pairs
    ],
)
def test_colour_follows_direction_and_interval(column: str, comparison: Comparison, expected: str) -> None:
    assert verdict(column, comparison) == expected


def test_only_clear_differences_are_coloured_on_the_page() -> None:
    page = page_of({"bad_layers": UNCLEAR, "evenness": UNCLEAR})
    assert 'class="chip good"' not in page and '<td class="bad"' not in page and 'var(--good)"' not in page
    assert '<td class="good" data-label="difference">−0.20 (−40\u00a0%)</td>' in page_of({"bad_layers": BETTER})


def test_where_a_measure_is_undefined_it_says_for_whom_and_how_often() -> None:
    page = page_of({"residue": replace(UNCLEAR, tuned_undefined=7), "bad_layers": UNCLEAR})
    assert page.count("undefined: ") == 1 and "20<br><small>undefined: 7 of adapter</small>" in page
    lost = compare_rows([{"kind": "designs", "layers": 2, "residue": 0.2}] * 2, [{"residue": None}] * 2, seed=0)
    row = text_of(page_of({}, comparisons=lost))
    assert "0 undefined: 2 of adapter" in row, "a measure that one model has nowhere keeps its row"
    document = json.loads(metrics_json(lost, {}, {}))
    assert document["designs.residue"]["tuned"] is None and document["designs.residue"]["base"] == 0.2
    assert kubeflow_metrics(document) == {"designs_residue_base": 0.2}


def test_numbers_are_readable() -> None:
    assert [number(0.12345), number(-0.5), number(0.5, signed=True), number(-1e-9, signed=True), number(None)] == [
        "0.123", "−0.500", "+0.500", "0.000", "–",
    ]  # fmt: skip


def test_no_number_contradicts_its_colour() -> None:
    """A clear difference whose interval would read "0.000 ... +0.002" at three decimals."""
    page = text_of(page_of({"bad_layers": compared(0.5, 0.50105, 0.00004, 0.0021)}))
    assert "+0.00105 (+0.2 %) +0.00004 … +0.00210" in page


def test_definitions_are_repeated_verbatim() -> None:
    text = text_of(page_of(dict.fromkeys(MEASURES, UNCLEAR)))
    for name, definition in DEFINITIONS.items():
        if name not in ("slots", "layerd", "judge"):
            assert definition.replace("'", "&#x27;") in text, name


def test_who_judged_is_said_with_what_that_means() -> None:
    names = {"judge_alpha_cleanliness": BETTER, "judge_mean": UNCLEAR, "residue": UNCLEAR}
    page = page_of({}, comparisons=Comparisons({"pictures": names}), judged="A judge scored 4 decompositions.")
    text = text_of(page)
    assert f"Judge A judge scored 4 decompositions. {DEFINITIONS['judge']}".replace("'", "&#x27;") in text
    assert text.index("By the judge, 0 to 1") < text.index("Judge, alpha cleanliness ↑") < text.index("Judge, mean ↑")
    assert page.count('<td class="bad"') == 1, "a judge's number that falls is worse"


def test_how_the_true_layers_were_made_is_said() -> None:
    text = text_of(page_of({"bad_layers": BETTER}, ground_truth=["Texts are <previews>.", "White goes below."]))
    assert "True layers Texts are &lt;previews&gt;. White goes below." in text
    assert "True layers" not in text_of(page_of({"bad_layers": BETTER}))


def rows_of(page: str) -> list[str]:
    """Headings of the rows of the first table, in order."""
    body = page.split("<tbody>")[1].split("</tbody>")[0]
    return [text_of(unescape(heading)) for heading in re.findall(r'<th scope="row">(.*?)<span', body)]


@pytest.mark.parametrize("kind", ["designs", "pictures"])
def test_every_measure_is_a_row_of_the_tables(kind: Kind) -> None:
    columns = [*MEASURES, *(f"{prefix}_{score}_0" for prefix in ("layerd", "layerd_clean") for score in LAYERD)]
    page = page_of({}, comparisons=Comparisons(by_kind={kind: dict.fromkeys(columns, UNCLEAR)}), max_edits=0)
    expected = [title_of(column) for column in (*MEASURES, *(score.name for score in LAYERD.values()))]
    assert sorted(rows_of(page)) == sorted(expected)


@pytest.mark.parametrize("kind", ["designs", "pictures"])
def test_the_headline_is_what_says_that_it_belongs_there(kind: Kind) -> None:
    page = page_of({}, comparisons=Comparisons(by_kind={kind: dict.fromkeys(MEASURES, UNCLEAR)}))
    cards = re.findall(r'<p class="what">(.*?)<span', page)
    assert cards == [title_of(name) for name in quoted(f"{kind} headline") if name in MEASURES]  # type: ignore[arg-type]
    assert cards[0] == "Bad layers" and len(cards) >= 3


def test_kubeflow_gets_the_columns_that_say_so() -> None:
    comparisons = Comparisons({"designs": dict.fromkeys(COLUMNS, BETTER), "pictures": {"residue": WORSE}})
    document = json.loads(metrics_json(comparisons, {}, {"seconds": {"measuring": 2.0}}))
    bases = [name for name in kubeflow_metrics(document) if name.endswith("_base")]
    assert bases == [*(f"designs_{name}_base" for name in quoted("kubeflow")), "pictures_residue_base"]
    assert kubeflow_metrics(document)["pictures_residue_adapter"] == 0.7
    assert kubeflow_metrics(document)["seconds_measuring"] == 2.0


def test_names_from_recipes_cannot_break_the_page() -> None:
    page = page_of({"bad_layers": BETTER}, campaign="<b>x</b>", judge='"><script>alert(1)</script>', notices=["<i>"])
    assert "<script" not in page and "<b>x</b>" not in page and "&lt;i&gt;" in page


def test_every_column_has_a_title_and_a_direction() -> None:
    assert title_of("layerd_alpha_iou_1") == "LayerD alpha IoU, 1 edit"
    assert title_of("layerd_clean_rgb_l1_5") == "LayerD RGB L1, 5 edits, faint alpha cleared"
    assert title_of("layerd_edits") == "LayerD edits made"
    assert (better_of("layerd_rgb_l1_0"), better_of("layerd_edits"), better_of("residue")) == ("lower", None, "lower")


# ------------------------------------------------------------------------------------------------------------- pictures


def some_cases(count: int) -> tuple[list[Case], list[Pixels], list[Pixels]]:
    """Designs, good decompositions of them and bad ones, worse the higher the index."""
    cases, good, bad = [], [], []
    for index in range(count):
        truth = drawn_design(index, 3)
        cases.append(case_of(f"{index:016x}", "designs", 3, index, source_of(truth), truth))
        spoiled = truth.copy()
        spoiled[1, ..., 3] = spoiled[1, ..., 3] * (1 - index / count)
        good.append(truth)
        bad.append(spoiled)
    return cases, good, bad


def test_best_median_worst_and_a_random_rest_are_shown() -> None:
    cases, good, bad = some_cases(9)
    base = [assess(case, stack, max_edits=1) for case, stack in zip(cases, good, strict=True)]
    tuned = [assess(case, stack, max_edits=1) for case, stack in zip(cases, bad, strict=True)]
    gaps = [t["layerd_cost_0"] - b["layerd_cost_0"] for b, t in zip(base, tuned, strict=True)]
    choices = choose(cases, base, tuned, seed=1, count=5)
    order = np.argsort(gaps, kind="stable")
    assert [choice.case.key for choice in choices[:3]] == [cases[order[at]].key for at in (0, 4, 8)]
    assert [choice.why.split()[0] for choice in choices] == ["best", "median", "worst", "drawn", "drawn"]
    assert len({choice.case.key for choice in choices}) == 5
    assert choices == choose(cases, base, tuned, seed=1, count=5)
    assert [c.case.key for c in choices[3:]] != [c.case.key for c in choose(cases, base, tuned, seed=3, count=5)[3:]]


def test_fewer_cases_than_wanted_are_all_shown() -> None:
    cases, good, _ = some_cases(2)
    rows = [assess(case, stack, max_edits=0) for case, stack in zip(cases, good, strict=True)]
    assert len(choose(cases, rows, rows, seed=1, count=7)) == 2
    assert choose([], [], [], seed=1, count=3) == []


def test_small_tiles_are_embedded_exactly() -> None:
    layer = np.random.default_rng(0).integers(0, 256, (40, 48, 4), dtype=np.uint8)
    kind, _, data = data_url(layer).partition(",")
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))
    visible = layer[..., 3] > 0
    assert kind == "data:image/webp;base64" and np.array_equal(shown[visible], layer[visible])
    assert np.array_equal(shown[..., 3], layer[..., 3])


def test_large_tiles_are_reduced() -> None:
    data = data_url(np.full((300, 600, 3), 90, np.uint8)).partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (160, 80)


def test_flags_and_numbers_stand_under_a_layer() -> None:
    flags, lines = caption(
        {
            "coverage": 0.613,
            "mean_alpha": 0.2,
            "semi_transparent": 0.93,
            "blank": False,
            "glazed": True,
            "duplicate": False,
            "idle": True,
        }
    )
    assert flags == "glazed, idle" and [line.replace("\u00a0", " ") for line in lines] == [
        "covers 61 %",
        "α 0.20, semi 93 %",
    ]


def shown_samples(count: int) -> list[ShownCase]:
    cases, good, bad = some_cases(count)
    rows = [assess(case, stack, max_edits=0) for case, stack in zip(cases, good, strict=True)]
    choices = choose(cases, rows, rows, seed=1, count=count)
    return [
        ShownCase(choice, tuple(strips_of(choice, {"Base": good[choice.case.seed], "Adapter": bad[choice.case.seed]})))
        for choice in choices
    ]


def test_each_sample_shows_reference_base_and_adapter_with_all_their_layers() -> None:
    page = page_of({"bad_layers": BETTER}, shown=shown_samples(1))
    article, _, removed = page[page.index("<article") : page.index("</article>")].partition("<details>")
    assert re.findall(r'class="side \w+">(\w+)<', article) == ["Reference", "Base", "Adapter"]
    assert (
        article.count("<img") == 1 + 2 * 2 + 3 * 3
    )  # the source, two recompositions and differences, three layers each
    heads = re.findall(r'class="head">([^<]*)<', article)
    assert heads == ["recomposed", "layer 0, inpainted", "layer 1", "layer 2", "|difference| ×4"]
    assert len(re.findall(r"<span|<div class=\"cell\"", article)) - 2 == 4 * 6, "a cell in every column of every row"
    assert 'width="128" height="128"' in article and 'class="layer pixels"' in article
    assert removed.count("<img") == 2 * 3 and "without layer 2" in removed
    alts = re.findall(r'<img[^>]* alt="([^"]*)"', page)
    assert len(alts) == len(set(alts)) == page.count("<img") and all(alts)
    assert alts[-1].startswith("Adapter, without layer 2, ")


def test_a_page_that_would_grow_too_large_leaves_samples_out_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = shown_samples(6)
    full = page_of({"bad_layers": BETTER}, shown=shown)
    assert full.count("<article") == 6 and "left out here" not in full
    monkeypatch.setattr(report_module, "TARGET_BYTES", len(full) * 2 // 3)
    page = page_of({"bad_layers": BETTER}, shown=shown)
    kept = page.count("<article")
    assert 1 <= kept < 6 and len(page.encode()) <= len(full) * 2 // 3 + 900
    assert f"{kept} of 20 cases" in page and f"{6 - kept} more are in gallery" in page


def test_pictures_come_before_numbers() -> None:
    page = page_of({"bad_layers": BETTER}, shown=shown_samples(1))
    assert page.index("<article") < page.index('class="card"') < page.index("<table")


def test_what_is_left_without_a_layer_is_the_composite_of_the_others() -> None:
    stack = drawn_design(3, 3)
    assert np.array_equal(without_layer(stack, 1), composite(stack[[0, 2]]))
    assert without_layer(stack, 0)[..., 3].min() == 0, "where the background is gone nothing is left"


def test_every_link_of_the_page_leads_to_a_file_of_the_gallery() -> None:
    shown = shown_samples(2)
    page = page_of({"bad_layers": BETTER}, shown=shown)
    files = {name: data for item in shown for name, data in full_size(item, campaign="lab")}
    links = set(re.findall(r' href="([^"]*)"', page))
    assert links == files.keys()
    for strip in shown[0].strips:
        stored = files[f"{shown[0].folder}/{strip.model.lower()}-layer1.png"]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored))), strip.stack[1]), "exactly, and of that model"
    inner = files[f"{shown[0].folder}/index.html"].decode()
    local = {f"{shown[0].folder}/{name}" for name in re.findall(r'(?:src|href)="(?!data:|\.\.)([^"]*)"', inner)}
    assert local == {name for name in files if name.startswith(shown[0].folder) and name.endswith(".png")}
    assert 'href="../../report.html"' in inner and not re.search(r"\$\{\w+\}", inner)


def test_alone_the_page_has_no_links() -> None:
    shown, before = shown_samples(1), [Evaluated(1, "../../iteration-000001/x/report.html", {}, {})]
    page = page_of({"bad_layers": BETTER}, shown=shown, earlier=before, iteration=3)
    alone = standalone(page.encode()).decode()
    assert "../../iteration-000001/x/report.html" in page and "href=" not in alone
    assert text_of(alone) == text_of(page)


@pytest.mark.parametrize(
    ("origin", "title"),
    [
        ("/data/posters/summer.psd", "summer.psd"),
        ("s3://bucket/photos/IMG_1.jpg?X-Amz-Signature=secret", "IMG_1.jpg"),
        ("photos.tar:folder/IMG_2.jpg", "IMG_2.jpg"),
        ("photos.tar:IMG_3.jpg", "IMG_3.jpg"),
        ("designs/poster/", "poster"),
        ("crello.parquet:12", "crello.parquet:12"),
        ("what?.png", "what?.png"),
        ("", "01234567"),
    ],
)
def test_a_case_is_called_as_its_file_is(origin: str, title: str) -> None:
    truth = drawn_design(1, 2)
    case = case_of("0123456789abcdef", "designs", 2, 0, source_of(truth), truth, origin)
    assert case.title == title


def test_too_few_images_are_called_too_few() -> None:
    text = text_of(page_of({"bad_layers": compared(0.5, 0.3, -0.3, -0.1, n=6)}))
    assert text.count("6 images are too few to tell (8 are needed)") == 3, "headline, card and table"
    assert "clearly" not in text.partition("Decompositions")[0]
    assert "too few to tell" not in text_of(page_of({"bad_layers": BETTER}))


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance of `#rrggbb`."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_texts_charts_and_white_layers_have_enough_contrast(theme: int) -> None:
    """WCAG AA: 4.5 for text, 3 for charts."""
    block = re.findall(r":root \{([^}]*--page[^}]*)\}", style())[theme]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    for text in ("ink", "dim", "faint", "accent", "good", "bad"):
        for behind in ("page", "card", "soft"):
            assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)
    for text in ("good", "bad", "accent"):
        assert contrast(colours[text], colours[f"{text}-soft"]) >= 4.5, text
    assert contrast(colours["page"], colours["accent"]) >= 4.5, "the chosen backdrop's label"
    for line in ("base", "s1", "s2", "s3", "s4", "s5"):
        assert contrast(colours[line], colours["card"]) >= 3, line
    for square in ("square", "paper"):
        assert contrast("#ffffff", colours[square]) >= 2 and contrast("#000000", colours[square]) >= 3, square


def test_links_between_iterations_stand_beside_their_measures() -> None:
    before = [Evaluated(k, f"../../iteration-{k:06d}/x/report.html", {"designs.bad_layers": 0.4 - k / 10},
                        {"designs.bad_layers": 0.5}) for k in (1, 2)]  # fmt: skip
    page = page_of({"bad_layers": BETTER}, earlier=before, iteration=3)
    text = text_of(page[page.index("<h2>Iterations") : page.index("<figure")])
    assert "base 0.500 iteration 1 0.300 iteration 2 0.200 iteration 3, this page 0.300" in text
    assert page.count("../../iteration-000002/x/report.html") == 1
    svg = ElementTree.fromstring(re.findall(r"<svg viewBox.*?</svg>", page[page.index("<h2>Iterations") :])[0])
    assert len(list(svg.iter("circle"))) == 6, "adapter and base at three iterations"
    assert "<h2>Iterations" not in page_of({"bad_layers": BETTER}, iteration=3)


def test_the_cost_is_the_sum_over_iterations() -> None:
    def scores(iteration: int, **metrics: float) -> Manifest:
        return Manifest(kind="scores", iteration=iteration, metadata={"metrics": dict(metrics)})

    one = scores(1, judge_requests=1000, judge_tokens_input=5e5, judge_tokens_output=2e4, judge_cost=1.5)
    two = scores(2, judge_requests=500, judge_tokens_input=1e5, judge_tokens_output=1e4, judge_cost=0.25)
    assert judge_cost([one, two]) == (
        "1,500 requests in 2 iterations, 600,000 tokens read and 30,000 written; cost 1.75 by the prices of the runtime"
    )
    assert judge_cost([scores(1, judge_requests=3)]).endswith("no prices in runtime.judge.price")
    assert judge_cost([]) == "" == judge_cost([Manifest(kind="scores", iteration=1)])


# --------------------------------------------------------------------------------------------------------------- charts


def test_differences_are_paired_and_undefined_ones_left_out() -> None:
    base = [{"kind": "designs", "residue": value} for value in (0.25, None, 0.5)]
    tuned = [{"residue": value} for value in (0.5, 0.1, 0.25)]
    assert paired_differences(base, tuned) == {"designs": {"residue": [0.25, -0.25]}}


def test_gains_lie_to_the_right_whichever_direction_is_better() -> None:
    svg = ElementTree.fromstring(histogram([0.5, 0.5, 0.1, 0.0, -0.25], "label", bins=10, width=210))
    bars = [(float(bar.get("x", 0)), float(bar.get("height", 0)), bar.get("fill")) for bar in svg.iter("rect")]
    assert [fill for _, _, fill in bars] == ["var(--bad)", "var(--base)", "var(--good)", "var(--good)"]
    assert [round(x - 0.75) for x, _, _ in bars] == [50, 100, 120, 200]
    assert bars[3][1] == pytest.approx(2 * bars[0][1])
    page = page_of({"bad_layers": BETTER}, differences={"designs": {"bad_layers": [-1.0, -1.0, 0.0, 2.0]}})
    assert "better on 2, worse on 1, alike on 1" in text_of(page), "fewer bad layers are better"


def test_a_chart_tells_its_lines_apart_without_colour() -> None:
    figure = lines([Line("one", {1: 0.0, 2: 1.0}), Line("two", {1: 1e-7, 2: 2e-7})], "KL & <clip>")
    svg = ElementTree.fromstring(re.sub(r"^.*?</figcaption>|<div.*$|</figure>$", "", figure))
    one, two = (line.get("stroke-dasharray") for line in svg.iter("polyline"))
    assert one != two and "KL &amp; &lt;clip&gt;" in figure


@pytest.mark.parametrize("values", [[0.5, 0.5], [0.5, 0.5 + 1e-16], [0.0, 0.0], [-3.0, 1e9], [1e-9, 3e-9]])
def test_a_chart_of_any_values_is_well_formed(values: list[float]) -> None:
    figure = lines([Line("line", dict(enumerate(values)))], "title")
    heights = [float(y) for y in re.findall(r'cy="([^"]*)"', figure)]
    assert len(heights) == 2 and all(0 <= height <= 170 for height in heights)


def test_a_whisker_ends_where_its_interval_ends() -> None:
    svg = ElementTree.fromstring(whisker(compared(1, 2, 0.5, 1.5), "good", 1.0, width=100))
    zero, bar = svg.findall("line")
    dot = svg.find("circle")
    assert dot is not None
    low, high, middle = float(bar.get("x1", 0)), float(bar.get("x2", 0)), float(zero.get("x1", 0))
    assert middle == 50 < low < float(dot.get("cx", 0)) < high < 100
    assert (high - middle) / (low - middle) == pytest.approx(3, rel=0.02)
    assert svg.find("path") is None


def test_whiskers_of_a_table_have_one_scale() -> None:
    small, large = compared(1.0, 0.98, -0.04, 0.0), compared(10.0, 5.0, -8.0, -2.0)
    assert common_reach([small, large]) == 0.8 and common_reach([small]) == 0.04 and common_reach([]) == 0.01
    assert common_reach([compared(0.1, 0.2, -1.0, 1.0)]) == 1.0

    def offset(c: Comparison) -> float:
        dot = ElementTree.fromstring(whisker(c, "", 0.8)).find("circle")
        assert dot is not None
        return 52 - float(dot.get("cx", 0))

    assert offset(large) / offset(small) == pytest.approx(25, rel=0.05)
    beyond = ElementTree.fromstring(whisker(large, "", 0.5))
    assert len(beyond.findall("path")) == 1, "an arrow where the interval goes on"


def test_a_curve_has_a_point_for_each_iteration_at_its_height() -> None:
    points = [Point(k, 0.3 + 0.1 * k, 0.2, 0.9, 7, 8) for k in range(1, 5)]
    svg = ElementTree.fromstring(curve(points, width=500, height=200))
    dots = [(float(dot.get("cx", 0)), float(dot.get("cy", 0))) for dot in svg.iter("circle")]
    assert len(dots) == 4
    steps = np.diff(np.array(dots), axis=0)
    assert np.allclose(steps[:, 0], steps[0, 0], atol=0.2) and np.allclose(steps[:, 1], steps[0, 1], atol=0.2)
    assert steps[0, 0] > 0 > steps[0, 1]  # to the right, and up as rewards rise


@pytest.mark.parametrize("count", [1, 2, 61, 700])
def test_a_curve_of_any_length_is_well_formed_and_sparsely_labelled(count: int) -> None:
    points = [Point(k, 0.5, 0.5, 0.5, 8, 8) for k in range(1, count + 1)]
    svg = ElementTree.fromstring(curve(points))
    labels = [text.text for text in svg.iter("text") if text.get("text-anchor") == "middle"]
    assert 1 <= len(labels) <= 20


def test_comparisons_by_layer_count_are_of_those_designs_only() -> None:
    cases = [
        case_of(f"{n:016x}", "designs", n, n, source_of(t), t) for n, t in ((n, drawn_design(n, n)) for n in (2, 3))
    ]
    base = [assess(case, case.truth, max_edits=0) for case in cases if case.truth is not None]
    tuned = [{**row, "slot_l1": row["layers"] / 10} for row in base]
    slots = compare_rows(base, tuned, seed=0).slots
    assert {count: table["slot_l1"].tuned for count, table in slots.items()} == {2: 0.2, 3: 0.3}
    assert "slot_l1_2" in slots[3] and "slot_l1_2" not in slots[2]
