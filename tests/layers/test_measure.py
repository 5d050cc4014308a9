"""Every measure, on layers whose value is known by construction."""

from __future__ import annotations

import math

import numpy as np
import pytest

from layerloop.components.layers.background import (
    holes,
    inpainting_l1,
    inpainting_ssim,
    residue,
    ring_smoothness,
    structural_similarity,
)
from layerloop.components.layers.designs import render_sketches
from layerloop.components.layers.flags import (
    blank,
    coverage,
    duplicate,
    flags_of,
    glazed,
    idle,
    mean_alpha,
    semi_transparent,
)
from layerloop.components.layers.matching import (
    alpha_error,
    alpha_gradient_error,
    halo,
    layer_l1,
    mean_layer_l1,
    mean_slot_l1,
    slot_l1,
)
from layerloop.components.layers.measure import (
    DEFINITIONS,
    MEASURES,
    edge_recomposition,
    evenness,
    evenness_gap,
    match,
    measure_all,
    measure_layers,
    recomposition_error,
)
from layerloop.components.layers.seams import unsupported_edges
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
        (2, 64, False),  # nobody sees it: blank
        (30, 4, True),  # not wide, but faint
        (40, 4, False),  # 0.157
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


@pytest.mark.parametrize("alpha", [1, 2])
def test_a_layer_that_nobody_sees_is_blank_and_therefore_not_glazed(alpha: int) -> None:
    stack = layer((200, 0, 0), alpha)[None]
    assert (blank(stack).item(), glazed(stack).item()) == (True, False)


def test_a_wide_layer_of_three_levels_is_blank_and_not_glazed_too() -> None:
    stack = layer((200, 0, 0), 3, (0, SIDE // 4 + 4, 0, SIDE))[None]  # over 31 % of the canvas, mean alpha 0.0037
    assert coverage(stack).item() == 0.3125
    assert (blank(stack).item(), glazed(stack).item()) == (True, False)


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
    for candidate, expected in ((complete, True), (near, True), (far, False), (half, False)):
        assert duplicate(np.stack([layer((9, 9, 9), 255), candidate]), source).tolist() == [False, expected]


def test_a_duplicate_is_also_a_layer_that_repeats_one_below() -> None:
    ramp, red, blue = design()
    moved = np.roll(red, 2, axis=0)  # IoU 0.88
    tinted = red.copy()
    tinted[..., :3] += 8  # RGB L1 0.031
    for repeated, expected in ((red, True), (moved, False), (tinted, False), (ramp, True)):
        stack = np.stack([ramp, red, blue, repeated])
        assert duplicate(stack, source_of(design())).tolist() == [False, False, False, expected]
    empty = np.stack([ramp, layer(), layer()])
    assert not duplicate(empty, source_of(design())).any(), "blank layers are no copies of each other"


def test_an_idle_layer_is_one_that_the_image_does_without() -> None:
    stack = design()
    source = source_of(stack)
    assert not idle(stack, source).any()
    whole = composite(stack)
    assert idle(np.stack([whole, *stack[1:]]), source).tolist() == [False, True, False], "blue repairs what red hides"
    veil = whole.copy()
    veil[..., 3] = 100
    assert idle(np.stack([whole, veil]), source).tolist() == [False, True]
    assert idle(np.stack([*stack, layer((0, 255, 0), 255, (0, 8, 40, 48))]), source).tolist() == [False] * 3 + [True]
    assert idle(np.stack([*stack, stack[2]]), source).tolist() == [False] * 3 + [True], "of equal ones the upper"
    assert idle(np.stack([*stack, whole]), source).tolist() == [False] * 3 + [True]
    assert idle(np.stack([stack[0], whole, whole * 0]), source).tolist() == [True, False, False], "layer 0 is hidden"


def test_a_layer_that_is_hidden_is_idle() -> None:
    ramp, red, blue = design()
    cover = layer((40, 90, 40), 255, (0, SIDE, 0, SIDE))
    stack = np.stack([ramp, red, cover, blue])
    assert idle(stack, source_of(stack)).tolist() == [True, True, False, False], "the ramp too"


def test_layer_zero_is_idle_where_layers_of_use_hide_it() -> None:
    whole = composite(design())
    left, right = whole.copy(), whole.copy()
    left[:, 32:], right[:, :32] = 0, 0
    assert idle(np.stack([design()[0], left, right]), whole).tolist() == [True, False, False]
    assert idle(np.stack([whole, left, right]), whole).tolist() == [False, True, True]
    right[:2] = 0  # 1.6 % of the canvas is not hidden
    assert idle(np.stack([design()[0], left, right]), whole).tolist() == [False] * 3


def test_a_faint_element_of_the_true_layers_is_of_use() -> None:
    stack = np.stack([layer((200, 200, 200), 255), layer((0, 0, 0), 60, (8, 40, 8, 40))])
    assert not idle(stack, source_of(stack)).any()
    stack[1, ..., 3] //= 20  # three levels of alpha
    assert flags_of(stack, source_of(stack)).bad.tolist() == [False, True]


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
    one = layer((200, 90, 0), 255, (8, 20, 8, 20))
    three = np.maximum(one, np.maximum(np.roll(one, 20, axis=0), np.roll(one, 20, axis=1)))
    p = np.array([0.25, 0.75])
    assert evenness(np.stack([one, three])) == pytest.approx(-(p * np.log(p)).sum() / math.log(2))


def test_evenness_sees_black_as_it_sees_white() -> None:
    for colour in ((0, 0, 0), (255, 255, 255), (90, 90, 90)):
        card = layer(colour, 255, (8, 40, 8, 40))
        assert evenness(np.stack([card, card, layer()])) == pytest.approx(math.log(2) / math.log(3))


def test_evenness_of_veils_that_nobody_sees_is_nothing() -> None:
    card = layer((255, 255, 255), 255, (8, 40, 8, 40))
    veil = layer((0, 0, 0), 2, (20, 60, 20, 60))
    assert evenness(np.stack([card, veil])) == 0.0


def test_the_gap_of_evenness_is_a_distance() -> None:
    card = layer((255, 255, 255), 255, (8, 40, 8, 40))
    even, uneven = np.stack([card, card]), np.stack([card, layer()])
    assert evenness_gap(match(even, uneven)) == evenness_gap(match(uneven, even)) == pytest.approx(1.0)
    assert evenness_gap(match(even, even)) == 0.0


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


def test_ssim_is_that_of_scikit_image() -> None:
    from skimage.metrics import structural_similarity as reference

    one, other = np.random.default_rng(3).uniform(0, 255, (2, 2, 17, 23, 3))
    other = (one + other) / 2
    for window in (3, 7):
        found = structural_similarity(one, other, window)
        for image, beside, values in zip(one, other, found, strict=True):
            _, wanted = reference(image, beside, win_size=window, channel_axis=-1, data_range=255.0, full=True)
            assert np.array_equal(values, wanted)


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


@pytest.mark.parametrize("upper", [0, 1, 3])
def test_where_nothing_is_above_layer_zero_all_of_it_is_judged(upper: int) -> None:
    """A picture left whole has left everything; there is no way out through an empty area."""
    source = source_of(design())
    rest = [layer()] * upper
    assert defined(residue(np.stack([composite(design()), *rest]), source)) == pytest.approx(1.0)
    assert defined(residue(np.stack([layer((1, 1, 1), 255), *rest]), source)) == pytest.approx(0.0)
    assert holes(np.stack([layer((1, 1, 1), 255), *rest])) == 0.0
    assert holes(np.stack([layer(), *rest])) == 1.0
    assert ring_smoothness(np.stack([layer((1, 1, 1), 255), *rest])) is None


def test_holes_are_counted_under_the_upper_layers_only() -> None:
    stack = design()
    stack[0, 56:, 56:, 3] = 0
    assert holes(stack) == 0.0
    stack[0, 8:40, 8:24, 3] = 229  # half of the red card
    assert holes(stack) == pytest.approx(16 * 32 / (2 * 32 * 32 - 8 * 8 - 8 * 24), abs=0.06)


def test_residue_of_a_flat_source_is_undefined() -> None:
    stack = np.stack([layer((90, 90, 90), 255), layer((90, 90, 90), 255, (8, 40, 8, 40))])
    assert residue(stack, source_of(stack)) is None
    source = source_of(stack)
    stack[0, ..., :3] = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3))
    assert residue(stack, source) is None, "noise in layer 0 makes no 0 of it"


# ---------------------------------------------------------------------------------------------------------------- slots


def test_slots_are_matched_to_their_best_reference_whatever_their_order() -> None:
    truth = design()
    assert slot_l1(match(truth[[2, 0, 1]], truth)) == [0.0, 0.0, 0.0]


def test_slot_distance_is_measured_on_white() -> None:
    truth = np.stack([layer((255, 255, 255), 255), layer((255, 0, 0), 255, (0, 32, 0, 64))])
    stack = truth.copy()
    stack[1] = layer((255, 0, 0), 255, (0, 16, 0, 64))  # a quarter of the canvas shows white in place of red
    assert slot_l1(match(stack, truth)) == pytest.approx([0.0, 0.25 * 2 / 3])
    assert mean_slot_l1(match(stack, truth)) == pytest.approx(0.25 / 3)


def test_white_layers_are_seen_on_black() -> None:
    """On white, leaving every white layer blank is perfect."""
    truth = np.stack([layer((90, 120, 60), 255), *(layer((255, 255, 255), 255, (8, 40, x, x + 8)) for x in (0, 40))])
    nothing = np.stack([truth[0], layer(), layer()])
    assert mean_slot_l1(match(nothing, truth)) == 0.0
    assert layer_l1(match(nothing, truth)) == pytest.approx([0, 32 * 8 / SIDE**2 / 2, 32 * 8 / SIDE**2 / 2])


def test_layers_that_one_side_lacks_are_blank_ones() -> None:
    truth = design()
    missing = mean_layer_l1(match(truth[:2], truth))
    assert missing == pytest.approx(mean_layer_l1(match(np.stack([*truth[:2], layer()]), truth))) and missing > 0.01
    assert mean_layer_l1(match(np.stack([*truth, layer()]), truth)) == 0.0
    junk = np.stack([*truth, layer((255, 0, 255), 255, (0, 8, 0, 8))])
    assert mean_layer_l1(match(junk, truth)) > 0


def test_edges_are_compared_with_those_of_the_matched_true_layer() -> None:
    truth = design()
    same = match(truth[[0, 2, 1]], truth)
    assert [alpha_error(same), alpha_gradient_error(same), halo(same)] == [0.0, 0.0, 0.0]
    half = truth.copy()
    half[2, ..., 3] //= 2  # 127
    assert alpha_error(match(half, truth)) == pytest.approx(24 * 24 / SIDE**2 * 128 / 255 / 2)
    assert alpha_gradient_error(match(half, truth)) == pytest.approx((128 / 255) ** 2 / 2, abs=0.01)
    gone = match(truth[:1], truth)
    assert alpha_error(gone) == pytest.approx((32 * 32 + 24 * 24) / SIDE**2 / 2)
    assert alpha_gradient_error(gone) == pytest.approx(1.0)
    only = match(truth[:1], truth[:1])
    assert [alpha_error(only), alpha_gradient_error(only), halo(only)] == [None, None, None]


def test_a_halo_is_colour_in_the_band_along_the_edge_and_nowhere_else() -> None:
    truth = design()
    inside, fringed = truth.copy(), truth.copy()
    inside[1, 20:28, 16:28, :3] = 0  # far from edges
    assert halo(match(inside, truth)) == 0.0
    fringed[1, 6:8, 8:40] = (128, 128, 128, 153)
    assert 0.01 < defined(halo(match(fringed, truth))) < 0.2


def test_recomposition_is_judged_along_predicted_edges_where_there_is_no_truth() -> None:
    truth = design()
    source = source_of(truth)
    assert defined(edge_recomposition(truth, source)) < 1e-6
    off = truth.copy()
    off[0, :4] = 0  # wrong, but far from every edge
    assert defined(edge_recomposition(off, source)) < 1e-6
    fringed = truth.copy()
    fringed[1, 6:8, 8:40] = (128, 128, 128, 153)
    assert defined(edge_recomposition(fringed, source)) > 2 * recomposition_error(fringed, source)
    assert edge_recomposition(truth[:1], source) is None


def test_an_edge_is_unsupported_where_the_source_has_none() -> None:
    """A card of 32 x 32 on grey, cut out of it with twice its width: two sides of three are seams."""
    ground, card = layer((120, 120, 120), 255), layer((20, 200, 60), 255, (16, 48, 16, 32))
    source = source_of(np.stack([ground, card]))
    assert unsupported_edges(np.stack([ground, card]), source) == 0
    wide = layer((120, 120, 120), 255, (16, 48, 16, 48))
    wide[16:48, 16:32] = card[16:48, 16:32]
    seams = (32 + 2 * 16 - 4) / (4 * 32)  # the right side and half of two others, but for what lies near the card's
    assert defined(unsupported_edges(np.stack([ground, wide]), source)) == pytest.approx(seams, abs=0.04)
    behind = np.stack([ground, wide, composite(np.stack([ground, card]))])
    assert unsupported_edges(behind, source) is None, "what is hidden has no edge to see, and a full layer none at all"
    assert unsupported_edges(ground[None], source) is None


def test_soft_edges_are_supported_as_hard_ones_are() -> None:
    """A shadow of 40 % whose edge takes 12 pixels, faint noise of alpha, and an object a pixel off."""
    ground, shadow = layer((180, 180, 180), 255), layer()
    shadow[..., 3] = (102 * np.clip((40 - np.hypot(*(np.mgrid[:SIDE, :SIDE] - 32))) / 12, 0, 1)).astype(np.uint8)
    source = source_of(np.stack([ground, shadow]))
    assert unsupported_edges(np.stack([ground, shadow]), source) == 0
    assert defined(unsupported_edges(np.stack([ground, shadow]), source_of(ground[None]))) == 1
    noisy = design()
    noisy[1:, ..., 3] |= np.random.default_rng(1).integers(0, 8, noisy[1:, ..., 3].shape).astype(np.uint8)
    assert defined(unsupported_edges(noisy, source_of(design()))) < 0.01
    off = np.concatenate([design()[:1], np.roll(design()[1:], 1, axis=1)])
    assert defined(unsupported_edges(off, source_of(design()))) < 0.05


@pytest.mark.parametrize("photos", [0.0, 1.0])
def test_true_layers_have_no_unsupported_edges_and_tiles_have_many(photos: float) -> None:
    rows, columns = np.mgrid[:SIDE, :SIDE] // 16
    for seed in range(4):
        drawn = np.random.default_rng(seed)
        truth = render_sketches(drawn, count=1, layers=3, size=(SIDE, SIDE), photo_share=photos)[0]
        source = source_of(truth)
        merged = np.stack([truth[0], composite(truth[1:])])
        tiles = np.stack([truth[0], *(composite(truth) * ((rows + columns) % 2 == k)[..., None] for k in (0, 1))])
        assert max(defined(unsupported_edges(stack, source)) for stack in (truth, merged)) < 0.05
        assert defined(unsupported_edges(tiles, source)) > 0.2


def test_assignment_is_one_to_one_and_the_cheapest_in_total() -> None:
    def grey(value: int) -> Pixels:
        return layer((value, value, value), 255)

    # Slot 0 is nearest to reference 0, and so is slot 1; together they are cheapest when slot 0 gives way.
    stack, truth = np.stack([grey(90), grey(100)]), np.stack([grey(100), grey(60)])
    assert slot_l1(match(stack, truth)) == pytest.approx([30 / 255, 0.0])


def test_a_slot_without_a_reference_is_left_out() -> None:
    truth = design()
    matching = match(np.concatenate([truth, layer((9, 9, 9), 255)[None]]), truth)
    assert slot_l1(matching) == [0.0, 0.0, 0.0, None]
    assert mean_slot_l1(matching) == 0.0


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
    assert [(row["blank"], row["glazed"], row["duplicate"], row["idle"]) for row in rows] == [
        (False, False, False, False), (False, True, False, True), (True, False, False, False),
    ]  # fmt: skip
    assert rows[1]["coverage"] == 1.0 and rows[1]["mean_alpha"] == pytest.approx(120 / 255)


def test_sizes_must_agree() -> None:
    with pytest.raises(LayerloopError, match="the source is"):
        measure_all(design(), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(LayerloopError, match=r"the truth is \[3, 8, 64, 4\] and the decomposition"):
        measure_all(design(), source_of(design()), design()[:, :8])
    with pytest.raises(LayerloopError, match="the truth is float64"):
        measure_all(design(), source_of(design()), design() / 255)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (8, 1), (2, 40), (3, 3)])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_every_measure_bears_small_canvases_and_any_number_of_layers(size: tuple[int, int], layers: int) -> None:
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 256, (3, *size, 4)).astype(np.uint8)
    truth[0, ..., 3] = 255
    for stack in (draw.integers(0, 256, (layers, *size, 4)).astype(np.uint8), np.zeros((layers, *size, 4), np.uint8)):
        for known in (truth, np.zeros_like(truth), None):
            values = measure_all(stack, source_of(truth), known)
            assert all(value is None or math.isfinite(value) for value in values.values())
            assert len(measure_layers(stack, source_of(truth))) == layers


def test_a_source_with_alpha_is_taken_as_the_picture_that_was_decomposed() -> None:
    """On white, as cases are made; colour under alpha 0 is nothing."""
    stack = design()
    source = composite(stack)
    source[:20, :20, 3] = 0
    assert measure_all(stack, source, stack) == measure_all(stack, on_backdrop(source, "white"), stack)
    assert measure_layers(stack, source) == measure_layers(stack, on_backdrop(source, "white"))


def test_every_measure_has_a_definition_that_names_its_thresholds() -> None:
    assert set(MEASURES) <= set(DEFINITIONS)
    assert all(len(text) > 30 and "\n" not in text for text in DEFINITIONS.values())
    assert "0.005" in DEFINITIONS["blank"] and "80 %" in DEFINITIONS["glazed"] and "0.03" in DEFINITIONS["duplicate"]
