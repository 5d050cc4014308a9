"""Every measure, on layers whose value is known by construction."""

from __future__ import annotations

import math

import numpy as np
import pytest

from layerloop.components.layers.measure import (
    DEFINITIONS,
    MEASURES,
    bad,
    blank,
    coverage,
    duplicate,
    evenness,
    glazed,
    inpainting_l1,
    inpainting_ssim,
    mean_alpha,
    mean_slot_l1,
    measure_all,
    measure_layers,
    recomposition_error,
    residue,
    ring_smoothness,
    semi_transparent,
    slot_l1,
    used_layers,
)
from layerloop.components.layers.stack import Pixels, composite, on_backdrop
from layerloop.components.schema.errors import LayerloopError

SIDE = 64


def layer(
    colour: tuple[int, int, int] = (0, 0, 0), alpha: int = 0, box: tuple[int, int, int, int] | None = None
) -> Pixels:
    """A layer of one colour in a box (top, bottom, left, right), or all over."""
    out = np.zeros((SIDE, SIDE, 4), np.uint8)
    top, bottom, left, right = box or (0, SIDE, 0, SIDE)
    out[top:bottom, left:right] = (*colour, alpha)
    return out


def design() -> Pixels:
    """A horizontal ramp, a red card and a blue one over a corner of it: (3, 64, 64, 4)."""
    ramp = np.full((SIDE, SIDE, 4), 255, np.uint8)
    ramp[..., 0] = ramp[..., 1] = ramp[..., 2] = (np.arange(SIDE) * 2 + 60)[None, :]
    return np.stack([ramp, layer((220, 30, 30), 255, (8, 40, 8, 40)), layer((30, 40, 220), 255, (32, 56, 32, 56))])


def source_of(stack: Pixels) -> Pixels:
    return on_backdrop(composite(stack), "black")


def defined(value: float | None) -> float:
    assert value is not None
    return value


# --------------------------------------------------------------------------------------------------------------- layers


def test_blank_means_a_mean_alpha_under_one_half_percent() -> None:
    threshold = 0.005 * SIDE * SIDE  # 20.48 opaque pixels
    stack = np.stack([layer((9, 9, 9), 255, (0, 1, 0, 20)), layer((9, 9, 9), 255, (0, 1, 0, 21))])
    assert 20 < threshold < 21
    assert blank(stack).tolist() == [True, False]
    assert mean_alpha(stack) == pytest.approx([20 / 4096, 21 / 4096])
    assert blank(stack, least=0.001).tolist() == [False, False]


@pytest.mark.parametrize(
    ("alpha", "rows", "expected"),
    [
        (120, 40, True),  # a veil over 62 % of the canvas
        (120, 16, False),  # exactly a quarter is not over a quarter
        (120, 17, True),
        (229, 40, True),  # 0.898
        (230, 40, False),  # 0.902 is solid
        (2, 64, False),  # fainter than counts as coverage; not blank either
    ],
)
def test_glazed_means_a_wide_and_mostly_translucent_layer(alpha: int, rows: int, expected: bool) -> None:
    stack = layer((200, 0, 0), alpha, (0, rows, 0, SIDE))[None]
    assert glazed(stack).tolist() == [expected]


def test_a_layer_with_enough_solid_pixels_is_not_glazed() -> None:
    for solid_rows, expected in ((7, True), (9, False)):  # of 40 covered rows; 8 are exactly 80 % translucent
        veil = layer((200, 0, 0), 120, (0, 40, 0, SIDE))
        veil[:solid_rows, :, 3] = 255
        assert glazed(veil[None]).tolist() == [expected]


def test_a_very_faint_layer_is_blank_and_therefore_not_glazed() -> None:
    stack = layer((200, 0, 0), 1)[None]
    assert (blank(stack).item(), glazed(stack).item(), bad(stack).item()) == (True, False, True)


def test_a_wide_layer_of_three_levels_is_blank_and_not_glazed_too() -> None:
    stack = layer((200, 0, 0), 3, (0, SIDE // 4 + 4, 0, SIDE))[None]  # over 31 % of the canvas, mean alpha 0.0037
    assert coverage(stack).item() == 0.3125
    assert (blank(stack).item(), glazed(stack).item(), bad(stack).item()) == (True, False, True)


def test_coverage_and_translucency_ignore_alpha_of_two_levels() -> None:
    stack = layer((1, 1, 1), 2)[None]
    assert (coverage(stack).item(), semi_transparent(stack).item()) == (0.0, 0.0)
    stack[0, :32, :, 3] = 3
    stack[0, :16, :, 3] = 255
    assert (coverage(stack).item(), semi_transparent(stack).item()) == (0.5, 0.5)


def test_a_duplicate_is_the_whole_source_again_above_layer_zero() -> None:
    stack = design()
    source = source_of(stack)
    complete = composite(stack)
    near = complete.copy()
    near[..., :3] = np.clip(near[..., :3].astype(int) + 6, 0, 255)  # L1 0.0235
    far = complete.copy()
    far[..., :3] = np.clip(far[..., :3].astype(int) + 10, 0, 255)  # L1 0.039
    half = complete.copy()
    half[:7, :, 3] = 0  # opaque over 89 %
    tests = np.stack([complete, complete, near, far, half])
    assert duplicate(tests, source).tolist() == [False, True, True, False, False]
    assert used_layers(tests, source) == pytest.approx(3 / 5)


# ------------------------------------------------------------------------------------------------------- decompositions


def test_evenness_is_one_for_equal_layers_and_zero_for_a_single_one() -> None:
    card = layer((255, 255, 255), 255, (8, 40, 8, 40))
    assert evenness(np.stack([card, card, card])) == pytest.approx(1.0)
    assert evenness(np.stack([card, layer(), layer()])) == 0.0
    assert evenness(np.stack([layer(), layer()])) == 0.0
    assert evenness(card[None]) == 0.0


def test_evenness_of_two_of_four_layers_is_one_half() -> None:
    card = layer((255, 255, 255), 255, (8, 40, 8, 40))
    assert evenness(np.stack([card, card, layer(), layer()])) == pytest.approx(math.log(2) / math.log(4))


def test_evenness_weighs_layers_by_their_gradients() -> None:
    bright = layer((200, 200, 200), 255, (8, 40, 8, 40))
    dim = layer((50, 50, 50), 255, (8, 40, 8, 40))
    p = np.array([0.8, 0.2])
    assert evenness(np.stack([bright, dim])) == pytest.approx(-(p * np.log(p)).sum() / math.log(2))


def test_evenness_ignores_colour_under_alpha_zero() -> None:
    card, hidden = layer((255, 255, 255), 255, (8, 40, 8, 40)), layer()
    hidden[..., :3] = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3))
    assert evenness(np.stack([card, hidden])) == 0.0


def test_recomposition_error_is_zero_for_the_truth_and_one_half_for_nothing() -> None:
    stack = design()
    assert recomposition_error(stack, source_of(stack)) < 1e-6
    assert recomposition_error(np.zeros_like(stack), source_of(stack)) == pytest.approx(0.5)


def test_recomposition_error_is_the_mean_colour_distance() -> None:
    stack = np.stack([layer((100, 100, 100), 255)])
    assert recomposition_error(stack, np.full((SIDE, SIDE, 3), (100, 130, 100), np.uint8)) == pytest.approx(
        30 / 3 / 255
    )


def test_inpainting_is_judged_only_where_the_true_upper_layers_are() -> None:
    truth = design()
    stack = truth.copy()
    stack[0, 60:, :] = (0, 0, 0, 255)  # wrong, but nothing covers it
    assert defined(inpainting_l1(stack, truth)) == 0.0
    assert defined(inpainting_ssim(stack, truth)) == pytest.approx(1.0)
    stack[0, 8:40, 8:40, :3] = 255 - stack[0, 8:40, 8:40, :3]
    assert defined(inpainting_l1(stack, truth)) > 0.1
    assert defined(inpainting_ssim(stack, truth)) < 0.7


def test_a_background_that_was_not_inpainted_scores_low() -> None:
    truth = design()
    stack = truth.copy()
    stack[0] = composite(truth)
    covered = truth[1:, ..., 3].any(axis=0)
    gap = np.abs(truth[0, ..., :3].astype(int) - composite(truth)[..., :3])[covered].mean() / 255
    assert defined(inpainting_l1(stack, truth)) == pytest.approx(gap)
    assert defined(inpainting_ssim(stack, truth)) < 0.4


def test_a_hole_does_not_pass_for_an_inpainted_background() -> None:
    truth = design()
    stack = truth.copy()
    stack[0, truth[1:, ..., 3].any(axis=0)] = (*truth[0, 0, 0, :3], 0)  # right colour, no alpha
    assert defined(inpainting_l1(stack, truth)) >= 0.49
    assert defined(inpainting_ssim(stack, truth)) < 0.6


def test_inpainting_is_undefined_where_nothing_was_covered() -> None:
    truth = np.stack([design()[0], layer()])
    assert inpainting_l1(truth, truth) is None
    assert inpainting_ssim(truth, truth) is None


def test_residue_is_one_when_layer_zero_is_the_source_and_near_zero_when_inpainted() -> None:
    truth = design()
    source = source_of(truth)
    stack = truth.copy()
    stack[0] = composite(truth)
    assert defined(residue(stack, source)) == pytest.approx(1.0)
    assert defined(residue(truth, source)) < 0.02


def test_residue_of_a_half_strength_ghost_is_one_half() -> None:
    truth = design()
    truth[0, ..., :3] = 120  # flat, so that only the ghost has gradients
    stack = truth.copy()
    stack[0, ..., :3] = (truth[0, ..., :3].astype(int) + composite(truth)[..., :3]) // 2
    assert defined(residue(stack, source_of(truth))) == pytest.approx(0.5, abs=0.02)


def test_ring_smoothness_falls_with_a_seam_and_with_blur() -> None:
    truth = design()
    assert defined(ring_smoothness(truth)) == pytest.approx(1.0, abs=0.02)
    seam = truth.copy()
    seam[0, 8:40, 8:40, :3] = (10, 240, 10)
    assert defined(ring_smoothness(seam)) < 0.7
    textured = truth.copy()
    textured[0, ..., :3] = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 1))
    assert defined(ring_smoothness(textured)) > 0.9
    blurred = textured.copy()
    blurred[0, 8:40, 8:40, :3] = 128
    assert defined(ring_smoothness(blurred)) < 0.8


@pytest.mark.parametrize("stack", [np.stack([layer((1, 1, 1), 255), layer()]), layer((1, 1, 1), 255)[None]])
def test_layer_zero_cannot_be_judged_when_nothing_is_above_it(stack: Pixels) -> None:
    assert residue(stack, source_of(design())) is None
    assert ring_smoothness(stack) is None


def test_residue_of_a_flat_source_is_undefined() -> None:
    stack = np.stack([layer((90, 90, 90), 255), layer((90, 90, 90), 255, (8, 40, 8, 40))])
    assert residue(stack, source_of(stack)) is None


# ---------------------------------------------------------------------------------------------------------------- slots


def test_slots_are_matched_to_their_best_reference_whatever_their_order() -> None:
    truth = design()
    assert slot_l1(truth[[2, 0, 1]], truth) == [0.0, 0.0, 0.0]


def test_slot_distance_is_measured_on_white() -> None:
    truth = np.stack([layer((255, 255, 255), 255), layer((255, 0, 0), 255, (0, 32, 0, 64))])
    stack = truth.copy()
    stack[1] = layer((255, 0, 0), 255, (0, 16, 0, 64))  # a quarter of the canvas shows white in place of red
    assert slot_l1(stack, truth) == pytest.approx([0.0, 0.25 * 2 / 3])
    assert mean_slot_l1(stack, truth) == pytest.approx(0.25 / 3)


def test_assignment_is_one_to_one_and_the_cheapest_in_total() -> None:
    def grey(value: int) -> Pixels:
        return layer((value, value, value), 255)

    # Slot 0 is nearest to reference 0, and so is slot 1; together they are cheapest when slot 0 gives way.
    stack, truth = np.stack([grey(90), grey(100)]), np.stack([grey(100), grey(60)])
    assert slot_l1(stack, truth) == pytest.approx([30 / 255, 0.0])


def test_a_slot_without_a_reference_is_left_out() -> None:
    truth = design()
    values = slot_l1(np.concatenate([truth, layer((9, 9, 9), 255)[None]]), truth)
    assert values == [0.0, 0.0, 0.0, None]
    assert mean_slot_l1(np.concatenate([truth, layer((9, 9, 9), 255)[None]]), truth) == 0.0


# ------------------------------------------------------------------------------------------------------------------ all


def test_every_measure_is_defined_for_a_design_and_is_perfect_for_its_truth() -> None:
    truth = design()
    values = measure_all(truth, source_of(truth), truth)
    assert values.keys() == MEASURES.keys()
    perfect = {"bad_layers": 0, "duplicate_layers": 0, "used_layers": 1, "slot_l1": 0, "inpainting_l1": 0}
    assert {name: values[name] for name in perfect} == perfect
    assert values["inpainting_ssim"] == pytest.approx(1)


def test_measures_that_need_a_truth_are_none_without_one() -> None:
    truth = design()
    values = measure_all(truth, source_of(truth))
    undefined = {name for name, value in values.items() if value is None}
    assert undefined == {name for name, measure in MEASURES.items() if measure.needs == "truth"}
    assert {"slot_l1", "inpainting_ssim", "inpainting_l1"} <= undefined


def test_measures_do_not_change_what_they_measure() -> None:
    truth = design()
    kept, source = truth.copy(), source_of(truth)
    measure_all(truth, source, truth)
    measure_layers(truth, source)
    assert np.array_equal(truth, kept)


def test_each_layer_has_its_numbers_and_flags() -> None:
    stack = np.stack([design()[0], layer((200, 0, 0), 120), layer()])
    rows = measure_layers(stack, source_of(design()))
    assert [(row["blank"], row["glazed"], row["duplicate"]) for row in rows] == [
        (False, False, False), (False, True, False), (True, False, False),
    ]  # fmt: skip
    assert rows[1]["coverage"] == 1.0 and rows[1]["mean_alpha"] == pytest.approx(120 / 255)


def test_sizes_must_agree() -> None:
    with pytest.raises(LayerloopError, match="the source is"):
        measure_all(design(), np.zeros((8, 8, 3), np.uint8))


def test_every_measure_has_a_definition_that_names_its_thresholds() -> None:
    assert set(MEASURES) <= set(DEFINITIONS)
    assert all(len(text) > 30 and "\n" not in text for text in DEFINITIONS.values())
    assert "0.005" in DEFINITIONS["blank"] and "80 %" in DEFINITIONS["glazed"] and "0.03" in DEFINITIONS["duplicate"]
