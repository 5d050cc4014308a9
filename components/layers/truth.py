"""The ground truth of a design: which of its rendered layers a decomposition is measured against. After LayerD
(github.com/CyberAgentAILab/LayerD at 6b95bc5, `src/layerd/data/crello.py`), with `differences` listed.

What no picture shows, no decomposition can find: a layer under an opaque one that covers the canvas is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layerloop.components.layers.layerd import group_indices
from layerloop.components.layers.stack import Pixels, composite
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import DesignsRecipe


@dataclass(frozen=True)
class Truth:
    """True layers `(L, H, W, 4)` uint8, straight RGBA, bottom first, and how they came from a design's elements."""

    layers: Pixels
    facts: Mapping[str, int]  # elements; of them hidden, transparent, empty; layers; texts by source


def ground_truth(stack: Pixels, rules: DesignsRecipe, transparent: Sequence[bool] = ()) -> Truth:
    """The true layers of a design's rendered elements `(N, H, W, 4)`, bottom first.

    1. elements without a visible pixel are left out; transparent ones too where `rules.transparent` is "drop";
    2. all below the topmost opaque layer that covers the canvas are left out: nothing of them is visible;
    3. white goes below what does not cover the canvas opaquely, so that the layers recompose to the design's image;
    4. where `rules.layers` is "groups", layers that do not overlap are merged (LayerD's grouping).

    Args:
        transparent: of each element, whether its own image is nowhere opaque; by default, of the layers themselves.

    Raises:
        LayerloopError: no layer is left.
    """
    seen = list(transparent) or [int(layer[..., 3].max()) < 255 for layer in stack]
    visible = [index for index, layer in enumerate(stack) if layer[..., 3].any()]
    kept = [index for index in visible if rules.transparent == "keep" or not seen[index]]
    covering = [index for index in kept if int(stack[index, ..., 3].min()) == 255]
    shown = kept[kept.index(covering[-1]) :] if covering else kept
    if not shown:
        raise LayerloopError("design has no visible layer: give one with pixels")
    layers = stack[shown]
    if int(composite(layers)[..., 3].min()) < 255:
        layers = np.concatenate([np.full_like(layers[:1], 255), layers])
    if rules.layers == "groups":
        layers = np.stack([composite(layers[group]) for group in group_indices(layers[..., 3])])
    facts = {
        "elements": len(stack),
        "empty": len(stack) - len(visible),
        "transparent": len(visible) - len(kept),
        "hidden": len(kept) - len(shown),
        "layers": len(layers),
    }
    return Truth(layers, facts)


def differences(rules: DesignsRecipe, facts: Mapping[str, int]) -> list[str]:
    """How this ground truth of Crello's designs differs from LayerD's, in sentences; `facts` are sums over designs."""
    previews, drawn = facts.get("text_previews", 0), facts.get("text_fonts", 0)
    texts = (
        f"{previews} text elements are their row’s preview stretched to size (at most 360 pixels in Crello, so soft)"
    )
    if drawn:
        texts += f", {drawn} are drawn from font files"
    found = [
        "As in LayerD: elements are placed, turned and faded by the row’s numbers, a text’s opacity is that of its "
        f"colour, layers under an opaque one that covers the canvas are left out ({facts.get('hidden', 0)} here, by "
        "index; LayerD’s slice leaves out others where it has removed elements before), and white goes below a "
        "background that does not cover.",
        f"Text: {texts}. LayerD draws all text from Crello’s fonts, and another family’s where one is missing.",
        (
            f"Transparent elements, whose own image is nowhere opaque, are left out as in LayerD "
            f"({facts.get('transparent', 0)} here)."
            if rules.transparent == "drop"
            else "Transparent elements, whose own image is nowhere opaque (shadows, overlays), are kept; LayerD leaves "
            "them out."
        ),
        (
            "Layers that do not overlap are merged, by LayerD’s grouping, so a design’s layers are its groups."
            if rules.layers == "groups"
            else "Every element is a layer; LayerD’s own truth is the same, and its protocol groups layers that do not "
            "overlap on both sides when it compares."
        ),
        f"Elements without a visible pixel are left out ({facts.get('empty', 0)} here), which LayerD keeps as blanks.",
        "Sizes: rendered at the policy’s size from 2 x 2 samples a pixel, not by Skia at 512 pixels on the short "
        "side; white is inserted wherever the composite is not opaque, not only where a pixel is fully clear.",
    ]
    return found
