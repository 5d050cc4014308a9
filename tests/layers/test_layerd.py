"""LayerD's protocol, against its measured behaviour on a toy case and against numbers that its own code gave."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

from layerloop.components.layers.layerd import (
    EditLevel,
    at_edits,
    evaluate,
    group_indices,
    warp,
)
from layerloop.components.layers.planes import cleared
from layerloop.components.layers.stack import Pixels, composite
from layerloop.components.schema.errors import LayerloopError


def toy(*, floor: int = 0) -> Pixels:
    """A grey background, a red square, a green one over a quarter of it, and a blue one apart: (4, 128, 128, 4)."""
    stack = np.zeros((4, 128, 128, 4), np.uint8)
    stack[0] = (200, 200, 200, 255)
    stack[1, 10:50, 10:50] = (255, 0, 0, 255)
    stack[2, 30:80, 30:80] = (0, 255, 0, 255)
    stack[3, 90:120, 90:120] = (0, 0, 255, 255)
    stack[1:, ..., 3] = np.maximum(stack[1:, ..., 3], floor)
    return stack


def scores(prediction: Pixels) -> list[tuple[float, float]]:
    """(RGB L1, alpha IoU) at every level against the toy case."""
    return [(round(level.rgb_l1, 4), round(level.alpha_iou, 4)) for level in evaluate(prediction, toy())]


BLANK = np.zeros((1, 128, 128, 4), np.uint8)


def test_the_truth_itself_is_perfect() -> None:
    assert evaluate(toy(), toy()) == [EditLevel(edits=0, cost=0.0, rgb_l1=0.0, alpha_iou=1.0)]


def test_blank_layers_are_invisible() -> None:
    assert scores(np.concatenate([toy(), BLANK])) == [(0.0, 1.0)]
    assert scores(np.concatenate([toy()[:2], BLANK, toy()[2:], BLANK])) == [(0.0, 1.0)]


def test_the_order_of_layers_that_do_not_overlap_is_invisible() -> None:
    assert scores(toy()[[0, 3, 1, 2]]) == [(0.0, 1.0)]


def test_the_order_of_layers_that_overlap_is_not() -> None:
    assert scores(toy()[[0, 2, 1, 3]])[0][1] < 1


def test_colour_under_alpha_zero_is_invisible() -> None:
    prediction = toy()
    prediction[prediction[..., 3] == 0] = (123, 45, 67, 0)
    assert scores(prediction) == [(0.0, 1.0)]


def test_an_alpha_floor_of_one_level_collapses_the_grouping() -> None:
    assert scores(toy(floor=1)) == [(0.0833, 0.7385), (0.0003, 0.9787)]
    assert scores(toy(floor=10))[0] == (0.0833, 0.6595)


def test_clearing_faint_alpha_undoes_a_floor_of_two_levels_and_no_more() -> None:
    assert scores(cleared(toy(floor=2))) == [(0.0, 1.0)]
    assert np.array_equal(cleared(toy(floor=3)), toy(floor=3))


def test_a_background_that_was_not_inpainted_is_barely_seen() -> None:
    prediction = toy()
    prediction[0] = composite(toy())
    (level,) = evaluate(prediction, toy())
    assert (round(level.rgb_l1, 4), level.alpha_iou, round(level.cost, 3)) == (0.0557, 1.0, 0.028)


def test_everything_in_one_layer() -> None:
    prediction = np.concatenate([composite(toy())[None], BLANK, BLANK, BLANK])
    assert [(round(a, 3), round(b, 3)) for a, b in scores(prediction)] == [(0.111, 0.435), (0.063, 0.604)]


def test_the_composite_in_every_layer() -> None:
    prediction = np.stack([composite(toy())] * 4)
    assert [(round(a, 3), round(b, 3)) for a, b in scores(prediction)] == [(0.125, 0.576), (0.094, 0.802)]


def test_an_empty_layer_against_an_empty_layer_has_no_overlap() -> None:
    # Grouped with the background on both sides, a blank pair never meets; alone it scores IoU 0, as in the original.
    stack = np.concatenate([BLANK, BLANK])
    (level,) = evaluate(stack, stack)
    assert (level.rgb_l1, level.alpha_iou, level.cost) == (0.0, 0.0, 0.5)


def test_fewer_than_two_layers_are_refused() -> None:
    with pytest.raises(LayerloopError, match="was given 1 and 4 layers"):
        evaluate(toy()[:1], toy())


def test_sizes_must_agree() -> None:
    with pytest.raises(LayerloopError, match="bring both to one size"):
        evaluate(toy()[:, :64], toy())


def test_no_more_merges_than_asked_for() -> None:
    prediction = np.concatenate([composite(toy())[None], BLANK, BLANK, BLANK])
    assert len(evaluate(prediction, toy(), max_edits=0)) == 1


# ----------------------------------------------------------------------------------- against the original's own numbers


def drawn_case(seed: int) -> tuple[Pixels, Pixels]:
    """A pair of stacks of random rectangles and their damage: `random` alone, so that it never changes."""
    draw = random.Random(seed)

    def stack(layers: int) -> Pixels:
        out = np.zeros((layers, 40, 32, 4), np.uint8)
        out[0] = (*(int(draw.random() * 256) for _ in range(3)), 255)
        for layer in out[1:]:
            top, left = int(draw.random() * 34), int(draw.random() * 26)
            bottom, right = top + 3 + int(draw.random() * 18), left + 3 + int(draw.random() * 18)
            alpha = 255 if draw.random() < 0.6 else 40 + int(draw.random() * 200)
            layer[top:bottom, left:right] = (*(int(draw.random() * 256) for _ in range(3)), alpha)
        return out

    layers = 2 + int(draw.random() * 6)
    truth = stack(layers)
    damage = int(draw.random() * 6)
    prediction = stack(2 + int(draw.random() * 5)) if damage == 0 else truth.copy()
    if damage == 1:
        prediction[0] = composite(truth)
    elif damage == 2:
        prediction[1:, ..., 3] = np.maximum(prediction[1:, ..., 3], 1 + int(draw.random() * 12))
    elif damage == 3:
        prediction[int(draw.random() * layers)] = composite(truth)
    elif damage == 4:
        order = sorted(range(layers), key=lambda _: draw.random())
        prediction = prediction[order]
    elif damage == 5:
        prediction = np.roll(prediction, 2, axis=1)
        prediction[..., 3] = (prediction[..., 3] * 0.7).astype(np.uint8)
    return prediction, truth


def test_scores_equal_the_originals_at_every_level() -> None:
    """`layerd_original.json` is what LayerD's code (6b95bc5) gave: [edits, cost, L1, IoU] a level, levels a case."""
    golden = json.loads((Path(__file__).parent / "layerd_original.json").read_text())
    assert len(golden) == 60
    assert sum(len(levels) > 2 for levels in golden) >= 10  # merges are exercised
    for seed, expected in enumerate(golden):
        found = [[level.edits, level.cost, level.rgb_l1, level.alpha_iou] for level in evaluate(*drawn_case(seed))]
        assert len(found) == len(expected), f"case {seed}"
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12, err_msg=f"case {seed}")


# ------------------------------------------------------------------------------------------------------------ the parts


def test_groups_are_peeled_from_the_top() -> None:
    assert group_indices(toy()[..., 3]) == [[0], [1], [2, 3]]


def test_groups_of_layers_that_touch_nowhere_are_one() -> None:
    alphas = np.zeros((3, 4, 4), np.uint8)
    alphas[0, 0], alphas[1, 1], alphas[2, 2] = 255, 1, 255
    assert group_indices(alphas) == [[0, 1, 2]]


def test_warp_prefers_the_diagonal_and_then_the_first_index() -> None:
    assert warp(np.zeros((3, 3))) == [(0, 0), (1, 1), (2, 2)]
    assert warp(np.zeros((3, 1))) == [(0, 0), (1, 0), (2, 0)]
    assert warp(np.array([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])) == [(0, 0), (0, 1), (1, 2)]
    assert warp(np.array([[0.0, 5.0], [0.0, 5.0], [0.0, 0.0]])) == [(0, 0), (1, 0), (2, 1)]


def test_a_decomposition_that_stops_early_keeps_its_last_level() -> None:
    levels = [EditLevel(0, 0.4, 0.2, 0.4), EditLevel(1, 0.2, 0.1, 0.7)]
    assert [at_edits(levels, edits) for edits in range(4)] == [levels[0], *[levels[1]] * 3]


def test_a_decomposition_of_64_pixels_takes_milliseconds() -> None:
    cases = [drawn_case(seed) for seed in range(20)]
    start = time.process_time()
    for case in cases:
        evaluate(*case)
    assert (time.process_time() - start) / len(cases) < 0.05
