"""Measures of one decomposition. Each is one function; its docstring is its definition, repeated verbatim by every
report.

All of them are ours ("our definition"): the papers name some of these quantities and publish no formula. A change of a
definition is a change of the number's name. Stacks are `(L, H, W, 4)` uint8, straight RGBA, bottom first; images are
`(H, W, 3)` uint8. Pure functions of pixels: numpy, and scikit-image or scipy in the functions that need them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from layerloop.components.layers.stack import Pixels, check_stack, composite, on_backdrop
from layerloop.components.schema.errors import LayerloopError

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

FAINT = 2 / 255  # alpha up to this counts as transparent
SOLID = 0.9  # alpha from this on counts as opaque
LUMA = np.array([0.299, 0.587, 0.114])  # Rec. 601


# ------------------------------------------------------------------------------------------------- one value per layer


def mean_alpha(stack: Pixels) -> Floats:
    """Mean alpha of a layer over the canvas, 0..1."""
    return stack[..., 3].mean(axis=(-2, -1)) / 255


def coverage(stack: Pixels, *, faint: float = FAINT) -> Floats:
    """Share of the canvas where a layer's alpha is above 2/255."""
    return (stack[..., 3] > faint * 255).mean(axis=(-2, -1))


def semi_transparent(stack: Pixels, *, faint: float = FAINT, solid: float = SOLID) -> Floats:
    """Share of a layer's covered pixels (alpha above 2/255) whose alpha is under 0.9; 0 where it covers nothing."""
    alpha = stack[..., 3]
    covered = (alpha > faint * 255).sum(axis=(-2, -1))
    partial = ((alpha > faint * 255) & (alpha < solid * 255)).sum(axis=(-2, -1))
    return partial / np.maximum(covered, 1)


def blank(stack: Pixels, *, least: float = 0.005) -> Flags:
    """A layer is blank when its mean alpha is under 0.005."""
    return mean_alpha(stack) < least


def glazed(stack: Pixels, *, extent: float = 0.25, share: float = 0.8) -> Flags:
    """A layer is glazed when it is not blank, covers more than a quarter of the canvas (alpha above 2/255), and more
    than 80 % of what it covers has an alpha under 0.9: a veil over the image in place of an object."""
    return ~blank(stack) & (coverage(stack) > extent) & (semi_transparent(stack) > share)


def bad(stack: Pixels) -> Flags:
    """A layer is bad when it is blank or glazed."""
    return blank(stack) | glazed(stack)


def duplicate(
    stack: Pixels, source: Pixels, *, extent: float = 0.9, solid: float = SOLID, distance: float = 0.03
) -> Flags:
    """A foreground layer is a duplicate when it is opaque (alpha of 0.9 or more) over more than 90 % of the canvas and
    its RGB L1 to the source there is under 0.03: a copy of the image. Layer 0 is never counted as one."""
    opaque = stack[..., 3] >= solid * 255
    gap = np.abs(stack[..., :3].astype(np.int16) - source[..., :3]).mean(axis=-1) / 255
    area = opaque.sum(axis=(-2, -1))
    l1 = (gap * opaque).sum(axis=(-2, -1)) / np.maximum(area, 1)
    flags: Flags = (opaque.mean(axis=(-2, -1)) > extent) & (l1 < distance)
    flags[0] = False
    return flags


# ----------------------------------------------------------------------------------------- one value per decomposition


def bad_layers(stack: Pixels) -> float:
    """Bad layers (blank or glazed) in a decomposition, layer 0 included."""
    return float(bad(stack).sum())


def blank_layers(stack: Pixels) -> float:
    """Blank layers in a decomposition. Not every image needs every layer, so a few of them are legitimate."""
    return float(blank(stack).sum())


def glazed_layers(stack: Pixels) -> float:
    """Glazed layers in a decomposition."""
    return float(glazed(stack).sum())


def duplicate_layers(stack: Pixels, source: Pixels) -> float:
    """Foreground layers in a decomposition that repeat the complete source."""
    return float(duplicate(stack, source).sum())


def used_layers(stack: Pixels, source: Pixels) -> float:
    """Share of the requested layers that are neither blank nor a duplicate."""
    return float((~blank(stack) & ~duplicate(stack, source)).mean())


def evenness(stack: Pixels) -> float:
    """Pielou's evenness H(p) / log(L) of the layers' features: p is each layer's share of the total gradient magnitude
    of luma (Rec. 601) premultiplied by alpha. 1 when all layers hold equally much, 0 where only one layer has any.
    More is not always better: true layers seldom reach 1, and ghosts and noise raise it."""
    layers = len(stack)
    luma = (stack[..., :3] @ LUMA) / 255 * (stack[..., 3] / 255)
    total = gradient_magnitude(luma).sum(axis=(-2, -1))
    if layers < 2 or total.sum() <= 0:
        return 0.0
    shares = total[total > 0] / total.sum()
    return float(max(0.0, -(shares * np.log(shares)).sum() / np.log(layers)))


def recomposition_error(stack: Pixels, source: Pixels) -> float:
    """Mean absolute RGB difference, 0..1, between the composite of all layers and the source, averaged over the
    composite laid on black and on white: a pixel that no layer covers costs 0.5 whatever its colour."""
    (laid,) = _laid(composite(stack))
    return float(np.abs(laid - source[..., :3].astype(np.float64)).mean() / 255)


def inpainting_ssim(stack: Pixels, truth: Pixels) -> float | None:
    """SSIM (7x7 window, RGB) between layer 0 and the true background, averaged over the area that the true upper layers
    cover (alpha above 2/255) and over both laid on black and on white. Undefined where nothing is covered."""
    from skimage.metrics import structural_similarity

    area = covered_area(truth)
    if not area.any():
        return None
    window = min(7, *(side if side % 2 else side - 1 for side in area.shape))
    values = []
    for ours, theirs in zip(*_laid(stack[0], truth[0]), strict=True):
        _, ssim = structural_similarity(ours, theirs, win_size=window, channel_axis=-1, data_range=255.0, full=True)
        values.append(ssim[area].mean())
    return float(np.mean(values))


def inpainting_l1(stack: Pixels, truth: Pixels) -> float | None:
    """Mean absolute RGB difference, 0..1, between layer 0 and the true background in the area that the true upper
    layers cover (alpha above 2/255), averaged over both laid on black and on white. Undefined where nothing is
    covered."""
    area = covered_area(truth)
    if not area.any():
        return None
    ours, theirs = _laid(stack[0], truth[0])
    return float(np.abs(ours - theirs)[:, area].mean() / 255)


def residue(stack: Pixels, source: Pixels) -> float | None:
    """How much of the source's foreground is left in layer 0, 0..1, where no true background is known. In the area that
    the predicted upper layers cover (joint alpha above 0.5), widened by one pixel to take in its outline: the
    least-squares coefficient of the source's luma gradients in layer 0's (laid on black and on white), clipped to 0..1.
    1 when layer 0 still is the source there, 0 when nothing of it shows. Undefined where nothing is covered or the
    source is flat there."""
    area = _predicted_area(stack)
    if area is None:
        return None
    zone = _widened(area, 1)
    wanted = _gradient(source[..., :3].astype(np.float64) @ LUMA)[:, zone]
    energy = float((wanted**2).sum())
    if energy < 1.0 * zone.sum():  # under a grey level per pixel: nothing that could be left over
        return None
    found = np.stack([_gradient(luma)[:, zone] for luma in _laid(stack[0])[0] @ LUMA])
    return float(np.clip((found * wanted).sum(axis=(1, 2)) / energy, 0, 1).mean())


def ring_smoothness(stack: Pixels) -> float | None:
    """Whether layer 0 is as smooth where it was inpainted as around it, 0..1. With a the mean gradient magnitude of its
    luma in the area that the predicted upper layers cover (joint alpha above 0.5; widened by one pixel to take in its
    outline) and b that in the ring around it (1/32 of the longest side wide, at least 2 pixels): (min(a, b) + e) /
    (max(a, b) + e), where e is one grey level per pixel. 1 when the texture continues, small when ghosts, seams or blur
    show. Mean over layer 0 laid on black and on white. Undefined without such an area or ring."""
    area = _predicted_area(stack)
    if area is None:
        return None
    inside = _widened(area, 1)
    ring = _widened(area, 2 + max(2, max(area.shape) // 32)) & ~_widened(area, 2)
    if not ring.any():
        return None
    values = []
    for luma in _laid(stack[0])[0] @ LUMA:
        magnitude = gradient_magnitude(luma)
        a, b = magnitude[inside].mean(), magnitude[ring].mean()
        values.append((min(a, b) + 1.0) / (max(a, b) + 1.0))
    return float(np.mean(values))


def slot_l1(stack: Pixels, truth: Pixels) -> list[float | None]:
    """RGB L1 of each predicted slot to its best-matching true layer, both laid on white, 0..1. Slots and true layers
    are matched one to one with the least total cost; a slot that is left over when there are fewer true layers has
    none."""
    from scipy.optimize import linear_sum_assignment

    ours = on_backdrop(stack, "white").astype(np.int16)
    theirs = on_backdrop(truth, "white").astype(np.int16)
    costs = np.array([[np.abs(layer - reference).mean() / 255 for reference in theirs] for layer in ours])
    values: list[float | None] = [None] * len(stack)
    for slot, reference in zip(*linear_sum_assignment(costs), strict=True):
        values[slot] = float(costs[slot, reference])
    return values


def mean_slot_l1(stack: Pixels, truth: Pixels) -> float:
    """Mean over the slots of a decomposition of the RGB L1 to the best-matching true layer (one to one, on white)."""
    return float(np.mean([value for value in slot_l1(stack, truth) if value is not None]))


# ------------------------------------------------------------------------------------------------- all of them at once


# Headings of the report's tables, in their order.
Group = Literal["Layers", "Against the source", "Against the true layers", "Layer 0, inpainted", "Description"]
# Where a number is quoted in addition to the tables: at the top of the report, as a metric of Kubeflow, on the model
# card of a published adapter, and in the study of docs/RESULTS.md.
Place = Literal["designs headline", "pictures headline", "kubeflow", "card", "study", "nightly"]
Better = Literal["lower", "higher"] | None  # None: neither is better in itself


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of an evaluation's table, and all that reports need to know to show it (see columns.py)."""

    name: str
    title: str
    better: Better
    group: Group
    quoted: Mapping[Place, int] = field(default_factory=dict)  # place -> rank there; ties in the order of the tables


@dataclass(frozen=True, kw_only=True)
class Measure(Column):
    """A measure of one decomposition: its name is the column's, the function's docstring its definition."""

    function: Callable[..., float | None]
    needs: Literal["stack", "source", "truth"]  # what the function takes in addition to the decomposition

    @property
    def definition(self) -> str:
        """The function's docstring on one line."""
        return " ".join(inspect.getdoc(self.function).split())  # type: ignore[union-attr]


def _mean_coverage(stack: Pixels) -> float:
    """Mean over the foreground layers of the share of the canvas where alpha is above 2/255."""
    return float(coverage(stack)[1:].mean()) if len(stack) > 1 else 0.0


def _mean_foreground_alpha(stack: Pixels) -> float:
    """Mean alpha of the foreground layers over the canvas."""
    return float(mean_alpha(stack)[1:].mean()) if len(stack) > 1 else 0.0


def _mean_semi_transparent(stack: Pixels) -> float | None:
    """Mean over the layers that are not blank of the share of their covered pixels (alpha above 2/255) whose alpha is
    under 0.9. Undefined where all layers are blank."""
    shown = semi_transparent(stack)[~blank(stack)]
    return float(shown.mean()) if len(shown) else None


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure(
            name="bad_layers", title="Bad layers", better="lower", group="Layers",
            function=bad_layers, needs="stack",
            quoted={
                "designs headline": 1, "pictures headline": 1, "kubeflow": 0, "card": 1, "study": 1, "nightly": 1,
            },
        ),
        Measure(
            name="blank_layers", title="Blank layers", better="lower", group="Layers",
            function=blank_layers, needs="stack",
        ),
        Measure(
            name="glazed_layers", title="Glazed layers", better="lower", group="Layers",
            function=glazed_layers, needs="stack",
        ),
        Measure(
            name="duplicate_layers", title="Duplicate layers", better="lower", group="Layers",
            function=duplicate_layers, needs="source",
            quoted={"kubeflow": 0, "card": 2},
        ),
        Measure(
            name="used_layers", title="Used layers", better="higher", group="Layers",
            function=used_layers, needs="source",
        ),
        Measure(
            name="evenness", title="Feature evenness", better="higher", group="Layers",
            function=evenness, needs="stack",
            quoted={"pictures headline": 3, "kubeflow": 0, "card": 4, "study": 3},
        ),
        Measure(
            name="recomposition_error", title="Recomposition error", better="lower", group="Against the source",
            function=recomposition_error, needs="source",
            quoted={"pictures headline": 2, "kubeflow": 0, "card": 5, "nightly": 3},
        ),
        Measure(
            name="slot_l1", title="Per-slot RGB L1", better="lower", group="Against the true layers",
            function=mean_slot_l1, needs="truth",
            quoted={"designs headline": 3, "kubeflow": 0, "card": 3, "study": 2, "nightly": 2},
        ),
        Measure(
            name="inpainting_ssim", title="Layer 0 inpainting, SSIM", better="higher", group="Layer 0, inpainted",
            function=inpainting_ssim, needs="truth",
            quoted={"designs headline": 4, "kubeflow": 0, "card": 6},
        ),
        Measure(
            name="inpainting_l1", title="Layer 0 inpainting, RGB L1", better="lower", group="Layer 0, inpainted",
            function=inpainting_l1, needs="truth",
            quoted={"kubeflow": 0, "card": 7},
        ),
        Measure(
            name="residue", title="Layer 0 residue", better="lower", group="Layer 0, inpainted",
            function=residue, needs="source",
            quoted={"pictures headline": 4, "kubeflow": 0, "card": 8},
        ),
        Measure(
            name="ring_smoothness", title="Layer 0 ring smoothness", better="higher", group="Layer 0, inpainted",
            function=ring_smoothness, needs="stack",
            quoted={"kubeflow": 0},
        ),
        Measure(
            name="coverage", title="Foreground coverage", better=None, group="Description",
            function=_mean_coverage, needs="stack",
        ),
        Measure(
            name="mean_alpha", title="Foreground mean alpha", better=None, group="Description",
            function=_mean_foreground_alpha, needs="stack",
        ),
        Measure(
            name="semi_transparent", title="Semi-transparent share", better=None, group="Description",
            function=_mean_semi_transparent, needs="stack",
        ),
    )
}  # fmt: skip

DEFINITIONS: dict[str, str] = {name: measure.definition for name, measure in MEASURES.items()} | {
    "blank": " ".join(inspect.getdoc(blank).split()),  # type: ignore[union-attr]
    "glazed": " ".join(inspect.getdoc(glazed).split()),  # type: ignore[union-attr]
    "duplicate": " ".join(inspect.getdoc(duplicate).split()),  # type: ignore[union-attr]
    "slots": " ".join(inspect.getdoc(slot_l1).split()),  # type: ignore[union-attr]
}


def measure_all(stack: Pixels, source: Pixels, truth: Pixels | None = None) -> dict[str, float | None]:
    """Every measure of `MEASURES` of one decomposition, by name; None where it is undefined or needs an absent `truth`.

    Raises:
        LayerloopError: sizes differ, or `stack` is not a stack.
    """
    check_stack(stack, what="the decomposition")
    for other, what in ((source, "the source"), (truth, "the truth")):
        if other is not None and other.shape[-3:-1] != stack.shape[-3:-1]:
            raise LayerloopError(
                f"{what} is {list(other.shape)} and the decomposition {list(stack.shape)}: bring both to one size"
            )
    values: dict[str, float | None] = {}
    for name, measure in MEASURES.items():
        if measure.needs == "stack":
            values[name] = measure.function(stack)
        elif measure.needs == "source":
            values[name] = measure.function(stack, source)
        else:
            values[name] = None if truth is None else measure.function(stack, truth)
    return values


def measure_layers(stack: Pixels, source: Pixels) -> list[dict[str, Any]]:
    """Numbers and flags of each layer: coverage, mean_alpha, semi_transparent, and flags blank, glazed,
    duplicate."""
    columns: dict[str, npt.NDArray[Any]] = {
        "coverage": coverage(stack),
        "mean_alpha": mean_alpha(stack),
        "semi_transparent": semi_transparent(stack),
        "blank": blank(stack),
        "glazed": glazed(stack),
        "duplicate": duplicate(stack, source),
    }
    return [{name: values[index].item() for name, values in columns.items()} for index in range(len(stack))]


# ------------------------------------------------------------------------------------------------------------- helpers


def covered_area(truth: Pixels, *, faint: float = FAINT) -> Flags:
    """Area `(H, W)` bool where any layer above layer 0 has an alpha above `faint`."""
    return np.asarray((truth[1:, ..., 3] > faint * 255).any(axis=0))


def gradient_magnitude(plane: npt.NDArray[Any]) -> Floats:
    """Magnitude of central differences of planes `(..., H, W)`, per pixel; one-sided at the edges."""
    return np.asarray(np.hypot(*_gradient(plane)))


def _gradient(plane: npt.NDArray[Any]) -> Floats:
    """`(2, ..., H, W)`: derivative down and across. A side of one pixel has none."""
    values = np.asarray(plane, np.float64)
    return np.stack(
        [np.gradient(values, axis=axis) if values.shape[axis] > 1 else np.zeros_like(values) for axis in (-2, -1)]
    )


def _laid(*images: Pixels) -> list[Floats]:
    """Each image `(H, W, 4)` laid on black and on white, `(2, H, W, 3)` float64, 0..255, unrounded, so that
    transparency never passes for a colour; `(1, H, W, 3)` where all are opaque and both are the same."""
    opaque = all(int(image[..., 3].min()) == 255 for image in images)
    out = []
    for image in images:
        alpha = image[..., 3:].astype(np.float64) / 255
        black = image[..., :3] * alpha
        out.append(black[None] if opaque else np.stack([black, black + 255 * (1 - alpha)]))
    return out


def _predicted_area(stack: Pixels) -> Flags | None:
    """Area `(H, W)` bool where the joint alpha of all layers above layer 0 exceeds 0.5; None if empty."""
    if len(stack) < 2:
        return None
    area: Flags = composite(stack[1:])[..., 3] > 127
    return area if area.any() else None


def _widened(area: Flags, pixels: int) -> Flags:
    """The area grown by `pixels` in the four directions and along the diagonals."""
    from scipy.ndimage import maximum_filter

    grown: Flags = maximum_filter(area, size=2 * pixels + 1, mode="constant", cval=False)
    return grown
