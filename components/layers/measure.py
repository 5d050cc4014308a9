"""Measures of one decomposition. Each is one function; its docstring is its definition, repeated verbatim by every
report.

Nearly all are ours ("our definition"): the papers name some of these quantities and publish no formula. Numbers go with
their definition: each `metrics.json` holds the texts, and numbers of different texts are not compared (columns.py).
No measure may prefer a crafted stack to the true layers; tests/layers/test_gaming.py tries, and what a measure cannot
tell from the true layers stands in its row as `blind`. Stacks are `(L, H, W, 4)` uint8, straight RGBA, bottom first;
images are `(H, W, 3)` uint8. Pure functions of pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from layerloop.components.layers.background import holes, inpainting_l1, inpainting_ssim, residue, ring_smoothness
from layerloop.components.layers.flags import (
    LayerFlags,
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
    Matching,
    alpha_error,
    alpha_gradient_error,
    halo,
    mean_layer_l1,
    mean_slot_l1,
    slot_l1,
)
from layerloop.components.layers.planes import cleared, edge_band, gradient_magnitude, laid, laid_luma
from layerloop.components.layers.seams import unsupported_edges
from layerloop.components.layers.stack import Pixels, check_stack, composite, on_backdrop
from layerloop.components.schema.errors import LayerloopError

# ----------------------------------------------------------------------------------------- one value per decomposition


def bad_layers(flags: LayerFlags) -> float:
    """Bad layers (blank, glazed, duplicate or idle) in a decomposition, layer 0 included. Known layers may have some
    themselves: small elements are blank, elements of the colour behind them idle. Their count stands beside."""
    return float(flags.bad.sum())


def blank_layers(flags: LayerFlags) -> float:
    """Blank layers in a decomposition. Not every image needs every layer, so a few of them are legitimate."""
    return float(flags.blank.sum())


def glazed_layers(flags: LayerFlags) -> float:
    """Glazed layers in a decomposition."""
    return float(flags.glazed.sum())


def duplicate_layers(flags: LayerFlags) -> float:
    """Foreground layers in a decomposition that repeat the complete source or a layer below them."""
    return float(flags.duplicate.sum())


def idle_layers(flags: LayerFlags) -> float:
    """Layers in a decomposition that can be taken away without the image missing anything."""
    return float(flags.idle.sum())


def used_layers(flags: LayerFlags) -> float:
    """Share of the requested layers that are neither blank nor a duplicate nor idle."""
    return float((~(flags.blank | flags.duplicate | flags.idle)).mean())


def evenness(stack: Pixels) -> float:
    """Pielou's evenness H(p) / log(L) of the layers' features: p is each layer's share of the total gradient magnitude
    of luma (Rec. 601), of the layers laid on black and on white; alpha of 2/255 and less counts as 0. 1 when all layers
    hold equally much, 0 where only one layer has any. Neither more nor less is better: true layers seldom reach 1, and
    copies, ghosts and noise raise it. Where there are true layers, the distance to theirs says how good it is."""
    layers = len(stack)
    total = np.array([gradient_magnitude(laid_luma(layer)).mean(axis=0).sum() for layer in cleared(stack)])
    if layers < 2 or total.sum() <= 0:
        return 0.0
    shares = total[total > 0] / total.sum()
    return float(max(0.0, -(shares * np.log(shares)).sum() / np.log(layers)))


def evenness_gap(matching: Matching, own: float | None = None) -> float:
    """Distance of the feature evenness of a decomposition from that of the true layers, 0..1. It is 0 for the true
    layers; more of a fault may bring it back, since what one layer gains in detail another loses."""
    return abs((evenness(matching.stack) if own is None else own) - evenness(matching.truth))


def recomposition_error(stack: Pixels, source: Pixels, picture: Pixels | None = None) -> float:
    """Mean absolute RGB difference, 0..1, between the composite of all layers and the source, averaged over the
    composite laid on black and on white: a pixel that no layer covers costs 0.5 whatever its colour."""
    (pixels,) = laid(composite(stack) if picture is None else picture)
    return float(np.abs(pixels - source[..., :3].astype(np.float64)).mean() / 255)


def edge_recomposition(stack: Pixels, source: Pixels, picture: Pixels | None = None) -> float | None:
    """Mean absolute RGB difference, 0..1, between the composite of all layers and the source along the edges of the
    predicted foreground layers (within 1/160 of the longest side, 2 pixels at the least), averaged over the composite
    laid on black and on white: seams, fringes and halos. Undefined where no foreground layer has an edge."""
    band = np.zeros(stack.shape[1:3], bool)
    for layer in stack[1:]:
        band |= edge_band(layer[..., 3])
    if not band.any():
        return None
    (pixels,) = laid((composite(stack) if picture is None else picture)[band][None])
    return float(np.abs(pixels - source[band][..., :3].astype(np.float64)).mean() / 255)


# ------------------------------------------------------------------------------------------------- all of them at once


# Headings of the report's tables, in their order.
Group = Literal["Layers", "Against the source", "Against the true layers", "Edges", "Layer 0, inpainted", "Description"]
# Where a number is quoted in addition to the tables: at the top of the report, as a metric of Kubeflow, on the model
# card of a published adapter, and in the study of docs/RESULTS.md.
Place = Literal["designs headline", "pictures headline", "kubeflow", "card", "study", "nightly"]
Better = Literal["lower", "higher"] | None  # None: neither is better in itself

# What measures may be blind to: crafted stacks (tests/layers/test_gaming.py), in a reader's words.
BLIND: Mapping[str, str] = {
    "untouched": "a picture left whole in layer 0 under layers that add nothing",
    "background": "objects left in the background as well",
    "holes": "a background with holes",
    "filled": "a background filled with something else",
    "veils": "faint veils over a sound decomposition",
    "copies": "a layer repeated in another one's place",
    "missing": "an object left out of its layer",
    "split": "an object split over layers",
    "joined": "objects joined in one layer",
    "tiles": "the picture cut into tiles, strips, blots or dots",
    "slices": "the picture sliced by brightness or hue",
    "bands": "the picture as a blur and layers of detail",
    "cut out": "the background cut out around its objects, over one colour",
    "order": "the order of layers",
    "fringes": "fringes around objects",
    "alpha noise": "noise in alpha",
    "colour noise": "noise in colour",
    "shifted": "objects shifted by pixels",
    "white": "white content that is missing",
    "junk": "junk in a layer of its own",
}


def all_but(*seen: str) -> tuple[str, ...]:
    """The keys of BLIND without those of what a measure sees."""
    return tuple(kind for kind in BLIND if kind not in seen)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of an evaluation's table, and all that reports need to know to show it (see columns.py)."""

    name: str
    title: str
    better: Better
    group: Group
    quoted: Mapping[Place, int] = field(default_factory=dict)  # place -> rank there; ties in the order of the tables
    verdict: bool = True  # whether a difference in its direction is called better; not where it can be had for nothing
    blind: tuple[str, ...] = ()  # keys of BLIND: what scores like the true layers

    @property
    def blindness(self) -> str:
        """A sentence on what the column may not tell apart; "" where nothing is known."""
        if not self.blind:
            return ""
        seen = [words for kind, words in BLIND.items() if kind not in self.blind]
        if len(seen) < len(self.blind):
            return f"It is made to see {'; '.join(seen)}; most other faults score like the true layers."
        return f"Some of these score like the true layers: {'; '.join(BLIND[kind] for kind in self.blind)}."


@dataclass(frozen=True, kw_only=True)
class Measure(Column):
    """A measure of one decomposition: its name is the column's, the function's docstring its definition."""

    function: Callable[..., float | None]
    # the function's arguments (measure_all)
    takes: Literal["stack", "source", "composite", "flags", "truth", "matching", "evenness"]

    @property
    def needs(self) -> Literal["stack", "source", "truth"]:
        """What there must be in addition to the decomposition."""
        if self.takes in ("truth", "matching", "evenness"):
            return "truth"
        return "stack" if self.takes == "stack" else "source"

    @property
    def definition(self) -> str:
        """The function's docstring on one line, and what the measure cannot tell apart."""
        return " ".join(filter(None, (_text(self.function), self.blindness)))


def _text(function: Callable[..., Any]) -> str:
    """A function's docstring on one line."""
    return " ".join(inspect.getdoc(function).split())  # type: ignore[union-attr]


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
            function=bad_layers, takes="flags",
            quoted={
                "designs headline": 1, "pictures headline": 1, "kubeflow": 0, "card": 1, "study": 1, "nightly": 1,
            },
            blind=all_but(
                "untouched", "veils", "copies", "missing", "joined", "slices", "bands", "cut out", "white",
            ),
        ),
        Measure(
            name="blank_layers", title="Blank layers", better="lower", group="Layers",
            function=blank_layers, takes="flags",
        ),
        Measure(
            name="glazed_layers", title="Glazed layers", better="lower", group="Layers",
            function=glazed_layers, takes="flags",
        ),
        Measure(
            name="duplicate_layers", title="Duplicate layers", better="lower", group="Layers",
            function=duplicate_layers, takes="flags",
            quoted={"kubeflow": 0, "card": 2},
            blind=all_but("copies"),
        ),
        Measure(
            name="idle_layers", title="Idle layers", better="lower", group="Layers",
            function=idle_layers, takes="flags",
        ),
        Measure(
            name="used_layers", title="Used layers", better="higher", group="Layers",
            function=used_layers, takes="flags",
        ),
        Measure(
            name="evenness", title="Feature evenness", better=None, group="Layers",
            function=evenness, takes="stack",
            quoted={"kubeflow": 0, "card": 4},
        ),
        Measure(
            name="evenness_gap", title="Feature evenness, distance to the truth's", better="lower", group="Layers",
            function=evenness_gap, takes="evenness",
            quoted={"kubeflow": 0, "card": 5, "study": 4},
            blind=("order", "shifted"),
        ),
        Measure(
            name="recomposition_error", title="Recomposition error", better="lower", group="Against the source",
            function=recomposition_error, takes="composite",
            quoted={"designs headline": 6, "pictures headline": 2, "kubeflow": 0, "card": 6, "nightly": 3},
            blind=("untouched", "background", "filled", "split", "joined", "tiles", "slices", "cut out"),
        ),
        Measure(
            name="layer_l1", title="Layer RGB L1, on black and white", better="lower", group="Against the true layers",
            function=mean_layer_l1, takes="matching",
            quoted={"designs headline": 3, "kubeflow": 0, "card": 3, "study": 2, "nightly": 2},
            blind=("order",),
        ),
        Measure(
            name="slot_l1", title="Per-slot RGB L1", better="lower", group="Against the true layers",
            function=mean_slot_l1, takes="matching", verdict=False,
            quoted={"kubeflow": 0, "card": 3, "study": 3},
        ),
        Measure(
            name="alpha_error", title="Alpha error", better="lower", group="Edges",
            function=alpha_error, takes="matching",
            quoted={"kubeflow": 0, "card": 7},
            blind=("background", "holes", "filled", "order", "colour noise"),
        ),
        Measure(
            name="alpha_gradient_error", title="Alpha gradient error", better="lower", group="Edges",
            function=alpha_gradient_error, takes="matching",
            quoted={"kubeflow": 0, "card": 7},
            blind=("background", "holes", "filled", "order", "colour noise"),
        ),
        Measure(
            name="halo", title="Halo", better="lower", group="Edges",
            function=halo, takes="matching",
            quoted={"designs headline": 4, "kubeflow": 0, "card": 7},
            blind=("background", "holes", "filled", "order", "junk"),
        ),
        Measure(
            name="edge_recomposition", title="Recomposition error along edges", better="lower", group="Edges",
            function=edge_recomposition, takes="composite",
            quoted={"pictures headline": 3, "kubeflow": 0, "card": 7},
            blind=("untouched", "background", "filled", "split", "joined", "tiles", "slices", "bands"),
        ),
        Measure(
            name="unsupported_edges", title="Edges that the source has not", better="lower", group="Edges",
            function=unsupported_edges, takes="source",
            quoted={"pictures headline": 2, "kubeflow": 0, "card": 7},
            blind=all_but("tiles", "slices", "fringes", "white", "junk"),
        ),
        Measure(
            name="inpainting_ssim", title="Layer 0 inpainting, SSIM", better="higher", group="Layer 0, inpainted",
            function=inpainting_ssim, takes="truth",
            quoted={"designs headline": 5, "kubeflow": 0, "card": 8},
            blind=all_but("background", "holes", "filled", "tiles", "slices", "bands", "cut out"),
        ),
        Measure(
            name="inpainting_l1", title="Layer 0 inpainting, RGB L1", better="lower", group="Layer 0, inpainted",
            function=inpainting_l1, takes="truth",
            quoted={"kubeflow": 0, "card": 8},
            blind=all_but("background", "holes", "filled", "tiles", "slices", "bands", "cut out"),
        ),
        Measure(
            name="residue", title="Layer 0 residue", better="lower", group="Layer 0, inpainted",
            function=residue, takes="source",
            quoted={"pictures headline": 4, "kubeflow": 0, "card": 8},
            blind=all_but("background", "slices", "bands"),
        ),
        Measure(
            name="holes", title="Layer 0 holes", better="lower", group="Layer 0, inpainted",
            function=holes, takes="stack",
            quoted={"pictures headline": 5, "kubeflow": 0, "card": 8},
            blind=all_but("holes"),
        ),
        Measure(
            name="ring_smoothness", title="Layer 0 ring smoothness", better="higher", group="Layer 0, inpainted",
            function=ring_smoothness, takes="stack", verdict=False,
            quoted={"kubeflow": 0},
        ),
        Measure(
            name="coverage", title="Foreground coverage", better=None, group="Description",
            function=_mean_coverage, takes="stack",
        ),
        Measure(
            name="mean_alpha", title="Foreground mean alpha", better=None, group="Description",
            function=_mean_foreground_alpha, takes="stack",
        ),
        Measure(
            name="semi_transparent", title="Semi-transparent share", better=None, group="Description",
            function=_mean_semi_transparent, takes="stack",
        ),
    )
}  # fmt: skip

DEFINITIONS: dict[str, str] = {name: measure.definition for name, measure in MEASURES.items()} | {
    "blank": _text(blank),
    "glazed": _text(glazed),
    "duplicate": _text(duplicate),
    "idle": _text(idle),
    "slots": _text(slot_l1),
}


def measure_all(stack: Pixels, source: Pixels, truth: Pixels | Matching | None = None) -> dict[str, float | None]:
    """Every measure of `MEASURES` of one decomposition, by name; None where it is undefined or needs an absent `truth`.

    Raises:
        LayerloopError: sizes differ, or `stack` is not a stack.
    """
    check_stack(stack, what="the decomposition")
    _check_size(source, stack, "the source")
    source = on_backdrop(source, "white")  # an image with alpha, as cases are made of it
    matching = match(stack, truth) if isinstance(truth, np.ndarray) else truth
    arguments: dict[str, tuple[Any, ...] | None] = {
        "stack": (stack,),
        "source": (stack, source),
        "composite": (stack, source, composite(stack)),
        "flags": (flags_of(stack, source),),
        "truth": None if matching is None else (stack, matching.truth),
        "matching": None if matching is None else (matching,),
    }
    values: dict[str, float | None] = {}
    for name, measure in MEASURES.items():
        if measure.takes == "evenness":
            arguments["evenness"] = None if matching is None else (matching, values["evenness"])
        given = arguments[measure.takes]
        values[name] = None if given is None else measure.function(*given)
    return values


def match(stack: Pixels, truth: Pixels) -> Matching:
    """A decomposition beside its true layers, as the measures take them.

    Raises:
        LayerloopError: sizes differ, or either is not a stack.
    """
    check_stack(stack, what="the decomposition")
    check_stack(truth, what="the truth")
    _check_size(truth, stack, "the truth")
    return Matching(stack, truth)


def _check_size(other: Pixels, stack: Pixels, what: str) -> None:
    if other.shape[-3:-1] != stack.shape[-3:-1]:
        raise LayerloopError(
            f"{what} is {list(other.shape)} and the decomposition {list(stack.shape)}: bring both to one size"
        )


def measure_layers(stack: Pixels, source: Pixels) -> list[dict[str, Any]]:
    """Numbers and flags of each layer: coverage, mean_alpha, semi_transparent, and flags blank, glazed, duplicate,
    idle."""
    columns: dict[str, npt.NDArray[Any]] = {
        "coverage": coverage(stack),
        "mean_alpha": mean_alpha(stack),
        "semi_transparent": semi_transparent(stack),
        **vars(flags_of(stack, on_backdrop(source, "white"))),
    }
    return [{name: values[index].item() for name, values in columns.items()} for index in range(len(stack))]
