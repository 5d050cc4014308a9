"""Predicted and true layers side by side: who is compared with whom, and what differs, edges above all."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from layerloop.components.layers.planes import Floats, byte_sum, edge_band, gradient_magnitude, laid
from layerloop.components.layers.stack import Backdrop, Pixels, on_backdrop


@dataclass(frozen=True)
class Matching:
    """A decomposition `(L, H, W, 4)` and the true layers `(M, H, W, 4)`, of one size."""

    stack: Pixels
    truth: Pixels

    @functools.cached_property
    def on_white(self) -> Floats:
        """`(L, M)`: RGB L1, 0..1, of every predicted layer and every true one, laid on white."""
        return _distances(self.stack, self.truth, "white")

    @functools.cached_property
    def on_both(self) -> Floats:
        """`(N, N)`, N the larger of L and M: the mean of the RGB L1 on black and on white. What one side lacks counts
        as blank layers there, so nothing is gained by leaving layers out or by adding some."""
        stack, truth = self.padded
        counts = len(self.stack), len(self.truth)
        white = _distances(stack, truth, "white") if counts[0] != counts[1] else self.on_white
        return (white + _distances(stack, truth, "black")) / 2

    @functools.cached_property
    def padded(self) -> tuple[Pixels, Pixels]:
        """Both stacks with as many layers as the larger one has."""
        count = max(len(self.stack), len(self.truth))
        blank = np.zeros((count, *self.stack.shape[1:]), np.uint8)
        stack, truth = (np.concatenate([some, blank[len(some) :]]) for some in (self.stack, self.truth))
        return stack, truth

    @functools.cached_property
    def partners(self) -> list[int]:
        """For each layer of the padded stack the true layer it is matched to: one to one, with the least total cost."""
        return _assigned(self.on_both)

    def edges(self) -> list[tuple[Pixels, Pixels]]:
        """(predicted, true) of the true foreground layers, those of which alpha is 0 everywhere left out."""
        stack, truth = self.padded
        return [
            (stack[ours], truth[theirs])
            for ours, theirs in enumerate(self.partners)
            if 0 < theirs < len(self.truth) and truth[theirs, ..., 3].any()
        ]


def slot_l1(matching: Matching) -> list[float | None]:
    """RGB L1 of each predicted slot to its best-matching true layer, both laid on white, 0..1. Slots and true layers
    are matched one to one with the least total cost; a slot that is left over when there are fewer true layers has
    none. Slot k of two models may match different true layers."""
    from scipy.optimize import linear_sum_assignment

    costs = matching.on_white
    values: list[float | None] = [None] * len(costs)
    for slot, reference in zip(*linear_sum_assignment(costs), strict=True):
        values[slot] = float(costs[slot, reference])
    return values


def mean_slot_l1(matching: Matching) -> float:
    """Mean over the slots of a decomposition of the RGB L1 to the best-matching true layer (one to one, on white), as
    the paper shows layers. White content is nothing on white: layers that lack it score no worse, so no verdict follows
    from this number."""
    return float(np.mean([value for value in slot_l1(matching) if value is not None]))


def layer_l1(matching: Matching) -> list[float]:
    """RGB L1, 0..1, of each predicted layer to the true layer that it is matched to (one to one, with the least total
    cost), the mean of both laid on black and on white."""
    return [float(matching.on_both[ours, theirs]) for ours, theirs in enumerate(matching.partners)][
        : len(matching.stack)
    ]


def mean_layer_l1(matching: Matching) -> float:
    """Mean over layers of the RGB L1, 0..1, of predicted layers to the true layers they are matched to (one to one,
    with the least total cost), laid on black and on white. Where one side has fewer layers, it is completed by blank
    ones."""
    return float(np.mean([matching.on_both[pair] for pair in enumerate(matching.partners)]))


def alpha_error(matching: Matching) -> float | None:
    """Mean absolute error of alpha, 0..1, over the canvas and over the true foreground layers, each against the
    predicted layer matched to it (matting's MAE). Undefined where there is no foreground."""
    gaps = [np.abs(ours[..., 3].astype(np.int16) - theirs[..., 3]).mean() / 255 for ours, theirs in matching.edges()]
    return float(np.mean(gaps)) if gaps else None


def alpha_gradient_error(matching: Matching) -> float | None:
    """Sum of squared differences of the gradient magnitudes of alpha (Gaussian derivative, sigma 1.4; Rhemann et al.,
    CVPR 2009), relative to that of the true alpha alone: 0 for the same edges, 1 for none at all. Mean over the true
    foreground layers, each against the predicted layer matched to it. Undefined where no true layer has an edge."""
    values = []
    for ours, theirs in matching.edges():
        wanted, found = _alpha_gradient(theirs), _alpha_gradient(ours)
        if (energy := float((wanted**2).sum())) > 1e-6:
            values.append(float(((found - wanted) ** 2).sum()) / energy)
    return float(np.mean(values)) if values else None


def halo(matching: Matching) -> float | None:
    """Mean absolute RGB difference, 0..1, along the edges of the true foreground layers (within 1/160 of the longest
    side, 2 pixels at the least), each against the predicted layer matched to it, laid on black and on white: fringes,
    hard or soft where it should be the other way round, and colour that bled. Undefined where no true layer has an
    edge."""
    values = []
    for ours, theirs in matching.edges():
        band = edge_band(theirs[..., 3])
        if band.any():
            found, wanted = laid(ours[band][None], theirs[band][None])
            values.append(float(np.abs(found - wanted).mean()) / 255)
    return float(np.mean(values)) if values else None


def _alpha_gradient(layer: Pixels) -> Floats:
    from scipy.ndimage import gaussian_filter

    return np.asarray(gradient_magnitude(gaussian_filter(layer[..., 3].astype(np.float64) / 255, 1.4)), np.float64)


def _distances(stack: Pixels, truth: Pixels, backdrop: Backdrop) -> Floats:
    """`(L, M)`: RGB L1, 0..1, of layers laid on a backdrop."""
    ours, theirs = on_backdrop(stack, backdrop), on_backdrop(truth, backdrop)
    costs = np.empty((len(ours), len(theirs)))
    for i, layer in enumerate(ours):
        for j, other in enumerate(theirs):
            gap = np.maximum(layer, other) - np.minimum(layer, other)
            costs[i, j] = byte_sum(gap) / gap.size / 255
    return costs


def _assigned(costs: Floats) -> list[int]:
    from scipy.optimize import linear_sum_assignment

    return [int(column) for column in linear_sum_assignment(costs)[1]]
