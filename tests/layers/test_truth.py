"""Which rendered elements are true layers: what nothing shows is none, and the rest recomposes to the design."""

import numpy as np
import pytest

from layerloop.components.layers.crello import generate_design, render_elements
from layerloop.components.layers.stack import flatten
from layerloop.components.layers.truth import differences, ground_truth
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import DesignsRecipe

ELEMENTS, GROUPS = DesignsRecipe(), DesignsRecipe(layers="groups")


def block(box, alpha=255, colour=(200, 30, 30)):
    """A canvas of 16 x 16 with one rectangle (left, top, right, bottom)."""
    layer = np.zeros((16, 16, 4), np.uint8)
    layer[box[1] : box[3], box[0] : box[2]] = (*colour, alpha)
    return layer


FULL = (0, 0, 16, 16)
BACKGROUND, PHOTO = block(FULL), block(FULL, colour=(10, 90, 200))
LOGO, CORNER = block((1, 1, 5, 5), colour=(255, 255, 255)), block((10, 10, 15, 15))


def test_what_an_opaque_full_layer_hides_is_left_out():
    found = ground_truth(np.stack([BACKGROUND, CORNER, PHOTO, LOGO]), ELEMENTS)
    assert np.array_equal(found.layers, [PHOTO, LOGO])
    assert (found.facts["elements"], found.facts["hidden"]) == (4, 2)


def test_a_layer_that_almost_covers_hides_nothing():
    for above in (block((0, 0, 16, 15)), block(FULL, alpha=254)):
        assert len(ground_truth(np.stack([BACKGROUND, CORNER, above]), ELEMENTS).layers) == 3


def test_leaving_out_hidden_layers_changes_no_pixel_of_the_design():
    stack = np.stack([BACKGROUND, CORNER, PHOTO, LOGO])
    assert np.array_equal(flatten(stack, "white"), flatten(ground_truth(stack, ELEMENTS).layers, "black"))


def test_transparent_elements_are_kept_or_dropped_as_the_recipe_says():
    shadow = block((2, 2, 12, 12), alpha=110)
    stack = np.stack([BACKGROUND, shadow, LOGO])
    assert len(ground_truth(stack, ELEMENTS).layers) == 3
    dropped = ground_truth(stack, DesignsRecipe(transparent="drop"))
    assert np.array_equal(dropped.layers, [BACKGROUND, LOGO]) and dropped.facts["transparent"] == 1


def test_it_is_the_elements_own_image_that_is_transparent_not_its_opacity():
    faded = block((2, 2, 12, 12), alpha=128)  # an opaque image at opacity 0.5
    kept = ground_truth(np.stack([BACKGROUND, faded]), DesignsRecipe(transparent="drop"), [False, False])
    assert len(kept.layers) == 2


def test_white_goes_below_what_does_not_cover_and_empty_layers_go():
    found = ground_truth(np.stack([block((0, 0, 16, 16), alpha=0), LOGO]), ELEMENTS)
    assert (found.layers[0] == 255).all() and np.array_equal(found.layers[1], LOGO) and found.facts["empty"] == 1
    with pytest.raises(LayerloopError, match="no visible layer"):
        ground_truth(np.zeros((2, 4, 4, 4), np.uint8), ELEMENTS)


def test_fourteen_discs_apart_are_one_group():
    discs = [block((1 + 4 * (k % 4), 4 * (k // 4), 4 + 4 * (k % 4), 3 + 4 * (k // 4))) for k in range(14)]
    stack = np.stack([BACKGROUND, *discs])
    assert len(ground_truth(stack, ELEMENTS).layers) == 15
    grouped = ground_truth(stack, GROUPS)
    assert len(grouped.layers) == 2 and grouped.facts["layers"] == 2
    assert np.array_equal(flatten(grouped.layers, "black"), flatten(stack, "black"))


def test_layers_that_overlap_stay_apart_in_their_order():
    grouped = ground_truth(np.stack([BACKGROUND, block((0, 0, 8, 8)), CORNER, block((4, 4, 12, 12))]), GROUPS)
    assert len(grouped.layers) == 3
    assert np.array_equal(grouped.layers[2], block((4, 4, 12, 12)))


def test_a_generated_design_of_every_kind_becomes_what_it_says():
    """Background (hidden), cover, disc or the like, bar, card, shadow, text."""
    design = generate_design(np.random.default_rng(4), canvas=(128, 96), layers=2, every_kind=True)
    rendered = list(render_elements(design, size=(128, 96)))
    stack, see_through = np.stack([e.layer for e in rendered]), [e.transparent for e in rendered]
    keep = ground_truth(stack, ELEMENTS, see_through)
    drop = ground_truth(stack, DesignsRecipe(transparent="drop"), see_through)
    assert (keep.facts["elements"], keep.facts["hidden"], keep.facts["layers"]) == (7, 1, 6)
    assert drop.facts["transparent"] == 2  # the shadow, and the text, whose ink is half transparent as in LayerD
    assert np.array_equal(flatten(keep.layers, "white"), flatten(stack, "white"))


def test_every_difference_to_layerd_is_a_sentence():
    facts = {"hidden": 3, "text_previews": 5, "text_fonts": 2}
    text = " ".join(differences(ELEMENTS, facts))
    assert "5 text elements are their row’s preview" in text and "2 are drawn from font files" in text
    assert "are kept; LayerD leaves them out" in text and "Every element is a layer" in text
    other = " ".join(differences(DesignsRecipe(transparent="drop", layers="groups"), facts))
    assert "are left out as in LayerD" in other and "are merged, by LayerD’s grouping" in other
