"""What is evaluated, chosen from the sources."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from layerloop.components.evaluate_adapter.cases import Case, Cases, batches, read_cases
from layerloop.components.evaluate_adapter.provenance import ground_truth
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.seeds import seed_for

from ..campaigns import SIDE, CampaignBuilder
from .conftest import MakeLab, case_of, drawn_design, hold_out, source_of


def test_designs_come_with_their_layers_at_their_own_count(make_lab: MakeLab) -> None:
    lab = make_lab()
    stacks = [drawn_design(1, 2), drawn_design(2, 3)]
    hold_out(lab, stacks, [])
    cases = read_cases(lab.campaign, lab.campaign.sources()).of("designs")
    assert [case.layers for case in cases] == [2, 3]
    for case, stack in zip(cases, stacks, strict=True):
        assert case.truth is not None and np.array_equal(case.truth, stack)
        assert np.array_equal(case.source, source_of(stack))
        assert case.seed == seed_for(lab.recipe.seed, "evaluation", case.key, case.layers)


def test_counts_that_the_recipe_does_not_ask_for_are_left_out_and_counted(make_lab: MakeLab) -> None:
    lab = make_lab()
    hold_out(lab, [drawn_design(1, 2), drawn_design(2, 4), drawn_design(3, 5)], [])
    cases = read_cases(lab.campaign, lab.campaign.sources())
    assert [case.layers for case in cases.cases] == [2]
    assert cases.left_out == {"designs with other than 2 or 3 layers": 2}


def test_a_limited_number_is_taken_evenly_over_the_counts(make_lab: MakeLab) -> None:
    lab = make_lab()
    hold_out(lab, [drawn_design(seed, 2) for seed in range(10)] + [drawn_design(seed, 3) for seed in range(10, 14)], [])
    cases = read_cases(lab.campaign, lab.campaign.sources())
    assert [case.layers for case in cases.cases] == [2, 2, 2, 3, 3, 3]
    assert cases.left_out == {"designs beyond recipe.evaluation.designs": 8}


def test_the_choice_does_not_depend_on_the_order_of_the_sources(make_lab: MakeLab, tmp_path: Path) -> None:
    stacks = [drawn_design(seed, 2 + seed % 2) for seed in range(14)]
    chosen = []
    for name, order in (("a", stacks), ("b", stacks[::-1])):
        lab = make_lab(f"{tmp_path}/{name}")
        hold_out(lab, order, [source_of(drawn_design(seed, 3)) for seed in range(20, 24)])
        chosen.append([(c.name, c.seed) for c in read_cases(lab.campaign, lab.campaign.sources()).cases])
    assert chosen[0] == chosen[1] and len(chosen[0]) == 8


def test_what_the_sources_say_of_the_chosen_designs_is_summed(make_lab: MakeLab) -> None:
    lab = make_lab()
    hold_out(lab, [drawn_design(1, 2), drawn_design(2, 3), drawn_design(3, 5)], [])
    cases = read_cases(lab.campaign, lab.campaign.sources())
    assert cases.truth == {"designs": 2, "rows": 2, "elements": 5, "hidden": 0, "text_previews": 2}
    texts = ground_truth(cases, lab.recipe)
    assert "2 text elements are their row’s preview" in " ".join(texts)
    (old,) = ground_truth(Cases((), {}, {"untold": 4}), lab.recipe)
    assert old.startswith("4 designs were sharded by an earlier version")
    (files,) = ground_truth(Cases((), {}, {"designs": 3}), lab.recipe)
    assert files.startswith("3 designs came as files of layers")


def test_a_damaged_design_is_refused_by_name(make_lab: MakeLab) -> None:
    lab = make_lab()
    hold_out(lab, [drawn_design(1, 2)], [])
    manifest = lab.campaign.sources()
    name = manifest.shards[0].name
    data = lab.store.read(name)
    lab.store.write(name, data[:-2000] + bytes(2000)[: len(data) - len(data[:-2000])].replace(b"\0", b"x"))
    with pytest.raises(LayerloopError, match=r"designs-000000-\w+\.tar"):
        read_cases(lab.campaign, manifest)


def test_memory_does_not_grow_with_the_number_of_designs(tmp_path: Path) -> None:
    """Forty designs, decoded, are 8 MB: their pixels stay in a scratch file until they are asked for."""
    draw, peaks = np.random.default_rng(0), []
    for count in (4, 40):
        recipe = {"name": "many", "evaluation": {"layers": [2], "designs": count}}
        lab = CampaignBuilder.begin(tmp_path / str(count), recipe)
        stacks = [draw.integers(0, 256, (2, 128, 128, 4), np.uint8) for _ in range(count)]
        lab.sources(designs=[(source_of(stack), stack) for stack in stacks], per_shard=4)
        sources = lab.campaign.sources()
        tracemalloc.start()
        cases = read_cases(lab.campaign, sources)
        assert sum(case.truth is not None and case.source.shape == (128, 128, 3) for case in cases.cases) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 300_000


def test_layers_of_another_size_than_their_image_are_named(make_lab: MakeLab) -> None:
    lab = make_lab()
    lab.sources(designs=[(source_of(drawn_design(1, 2)), drawn_design(1, 2, width=SIDE + 16))])
    (case,) = read_cases(lab.campaign, lab.campaign.sources()).cases
    with pytest.raises(LayerloopError, match=r"is \[32, 32\] and its layers .*32, 48, 4.*: shard the designs again"):
        _ = case.truth


def test_batches_share_one_geometry_and_keep_the_order() -> None:
    def case(key: str, layers: int, width: int) -> Case:
        return case_of(key, "pictures", layers, 0, np.zeros((16, width, 3), np.uint8), None)

    cases = [case("a", 2, 16), case("b", 2, 16), case("c", 2, 16), case("d", 3, 16), case("e", 3, 32)]
    assert [[c.key for c in batch] for batch in batches(cases, 2)] == [["a", "b"], ["c"], ["d"], ["e"]]
