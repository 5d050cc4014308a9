"""LayerD's protocol: dynamic time warping between two layer stacks, after 0 to 5 merges.

Source: Suzuki et al., "LayerD", ICCV 2025, and its code (github.com/CyberAgentAILab/LayerD at 6b95bc5, Apache-2.0,
`src/layerd/evaluation`). Equal to it in every score and in every choice; written around one observation: the protocol
needs two numbers of a pair of layers, so each pair is measured once, in integers.

It does not see (measured; the reason for the measures of `measure.py`) blank layers, the order of
layers that do not overlap, colour under alpha 0, and, nearly, a background that was not inpainted.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from layerloop.components.layers.planes import byte_sum
from layerloop.components.layers.stack import Pixels, check_stack
from layerloop.components.schema.errors import LayerloopError

Path = list[tuple[int, int]]
Box = tuple[int, int, int, int]  # left, top, right, bottom

_COLOUR = np.array([255, 255, 255, 0], np.uint8).view(np.uint32)[0]  # the bytes R, G, B of a word

PROTOCOL = (
    "LayerD's protocol. Layers that do not overlap (alpha > 0) are first joined into groups, on both sides. Groups are "
    "aligned by dynamic time warping on cost = (RGB L1 + 1 - alpha IoU) / 2 and every number is the mean over the "
    "alignment's pairs. RGB L1 is taken where the reference's alpha is above 0; alpha IoU is the sum of the smaller "
    "alphas over the sum of the larger. Then up to 5 times two adjacent groups of either side are merged, greedily, "
    "while that gains; a decomposition that stops early counts with its last level at all later ones."
)


@dataclass(frozen=True)
class EditLevel:
    """Scores after `edits` merges: means over the alignment's pairs, each in [0, 1]."""

    edits: int
    cost: float
    rgb_l1: float
    alpha_iou: float


class _Layer:
    """An image `(H, W, 4)` of the protocol, and what its comparisons share."""

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        self.alpha = np.ascontiguousarray(pixels[..., 3])
        self.box = Image.fromarray(self.alpha).getbbox()  # of alpha > 0: left, top, right, bottom; None if blank
        self.mass = byte_sum(self.alpha)
        self.covered = int(np.count_nonzero(self.alpha))

    @functools.cached_property
    def mask(self) -> npt.NDArray[np.uint32]:
        """Within the box, words that keep R, G and B where alpha is above 0: `(h, w)`."""
        return (self.alpha[_slices(self.box)] > 0) * _COLOUR


class _Pairs:
    """RGB L1 and alpha IoU of pairs, and merges of adjacent layers, each made once. The reference is the second."""

    def __init__(self, height: int, width: int) -> None:
        self._known: dict[tuple[int, int], tuple[float, float]] = {}
        self._merged: dict[tuple[int, int], _Layer] = {}
        self._kept: list[_Layer] = []  # keeps ids unique for the lifetime of the cache
        # Fresh arrays of this size would be given pages anew for each pair, which takes longer than the arithmetic.
        self._larger, self._smaller = (np.empty(height * width * 4, np.uint8) for _ in range(2))

    def add(self, layer: _Layer) -> _Layer:
        """Keep a layer, which makes its id a key."""
        self._kept.append(layer)
        return layer

    def merged(self, lower: _Layer, upper: _Layer) -> _Layer:
        """`upper` over `lower`."""
        key = (id(lower), id(upper))
        if key not in self._merged:
            self._merged[key] = self.add(_merged(lower, upper))
        return self._merged[key]

    def scores(self, layer: _Layer, reference: _Layer) -> tuple[float, float]:
        """(RGB L1, alpha IoU)."""
        key = (id(layer), id(reference))
        if key not in self._known:
            distance, apart = self._colour_distance(layer, reference), self._alpha_distance(layer, reference)
            mass = layer.mass + reference.mass
            union, common = (mass + apart) // 2, (mass - apart) // 2  # sums of the larger and of the smaller alpha
            self._known[key] = (
                distance / 765 / (reference.covered + 1e-8),  # 1e-8: the original's guard for an empty reference
                common / union if union else 0.0,
            )
        return self._known[key]

    def cost(self, layer: _Layer, reference: _Layer) -> float:
        """(RGB L1 + 1 - alpha IoU) / 2."""
        rgb_l1, alpha_iou = self.scores(layer, reference)
        return (rgb_l1 + (1 - alpha_iou)) / 2

    def _colour_distance(self, layer: _Layer, reference: _Layer) -> int:
        """Sum of |difference| over R, G and B where the reference's alpha is above 0."""
        if reference.box is None:
            return 0
        at = _slices(reference.box)
        gap = self._difference(layer.pixels[at], reference.pixels[at])
        words = gap.view(np.uint32)[..., 0]
        np.bitwise_and(words, reference.mask, out=words)
        return byte_sum(gap)

    def _alpha_distance(self, layer: _Layer, reference: _Layer) -> int:
        """Sum of |difference| of both alphas."""
        if layer.box is None or reference.box is None or _common(layer.box, reference.box) is None:
            return layer.mass + reference.mass
        (a, b, c, d), (e, f, g, h) = layer.box, reference.box
        at = _slices((min(a, e), min(b, f), max(c, g), max(d, h)))
        return byte_sum(self._difference(layer.alpha[at], reference.alpha[at]))

    def _difference(self, one: Pixels, other: Pixels) -> Pixels:
        """|difference| of each byte, in memory that the next call overwrites."""
        larger = np.maximum(one, other, out=self._larger[: one.size].reshape(one.shape))
        smaller = np.minimum(one, other, out=self._smaller[: one.size].reshape(one.shape))
        return np.subtract(larger, smaller, out=larger)


def _slices(box: Box | None) -> tuple[slice, slice]:
    left, top, right, bottom = box or (0, 0, 0, 0)
    return slice(top, bottom), slice(left, right)


def _common(one: Box, other: Box) -> Box | None:
    """The part that two boxes share."""
    left, top, right, bottom = (*map(max, one[:2], other[:2]), *map(min, one[2:], other[2:]))
    return (left, top, right, bottom) if left < right and top < bottom else None


def group_indices(alphas: npt.NDArray[np.uint8]) -> list[list[int]]:
    """Indices of layers `(L, H, W)` in groups that do not overlap, bottom first.

    Repeatedly, all layers that no later remaining layer overlaps (alpha > 0 on both) leave as one group, the topmost.
    """
    masks = [np.ascontiguousarray(alpha) > 0 for alpha in alphas]
    boxes = [Image.fromarray(mask).getbbox() for mask in masks]
    overlap = np.zeros((len(masks), len(masks)), bool)
    for i, j in itertools.combinations(range(len(masks)), 2):
        ours, theirs = boxes[i], boxes[j]
        if ours is not None and theirs is not None and (box := _common(ours, theirs)) is not None:
            overlap[i, j] = (masks[i][_slices(box)] & masks[j][_slices(box)]).any()
    remaining = list(range(len(alphas)))
    groups: list[list[int]] = []
    while remaining:
        top = [i for at, i in enumerate(remaining) if not overlap[i, remaining[at + 1 :]].any()]
        groups.append(top)
        remaining = [i for i in remaining if i not in top]
    return groups[::-1]


def warp(costs: npt.NDArray[np.float64]) -> Path:
    """Dynamic time warping of `(n, m)` costs from (0, 0) to (n-1, m-1): the aligned pairs, in order.

    Ties are broken as in the original: the diagonal step first, then a step of the first index.
    """
    n, m = costs.shape
    total = np.zeros((n, m))
    total[:, 0], total[0] = np.cumsum(costs[:, 0]), np.cumsum(costs[0])
    for i in range(1, n):
        for j in range(1, m):
            total[i, j] = costs[i, j] + min(total[i - 1, j], total[i, j - 1], total[i - 1, j - 1])
    i, j = n - 1, m - 1
    path = [(i, j)]
    while i > 0 or j > 0:
        if i == 0:
            j -= 1
        elif j == 0:
            i -= 1
        else:
            diagonal, up, left = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
            if diagonal <= up and diagonal <= left:
                i, j = i - 1, j - 1
            elif up <= diagonal and up <= left:
                i -= 1
            else:
                j -= 1
        path.append((i, j))
    return path[::-1]


def evaluate(prediction: Pixels, truth: Pixels, *, max_edits: int = 5) -> list[EditLevel]:
    """Scores of a prediction `(L, H, W, 4)` against a truth `(M, H, W, 4)` for 0, 1, ... merges.

    The list ends early where no merge gains anything. Blank layers, order among layers that do not overlap, and colour
    under alpha 0 make no difference; alpha noise of 1/255 does (it makes layers overlap): see `planes.cleared`.

    Raises:
        LayerloopError: fewer than two layers on either side (the original leaves such samples out), or sizes differ.
    """
    check_stack(prediction, what="the prediction")
    check_stack(truth, what="the truth")
    if min(len(prediction), len(truth)) < 2:
        raise LayerloopError(
            f"LayerD's protocol was given {len(prediction)} and {len(truth)} layers: it needs two on either side"
        )
    if prediction.shape[1:] != truth.shape[1:]:
        raise LayerloopError(
            f"LayerD's protocol was given {list(prediction.shape)} and {list(truth.shape)}: bring both to one size"
        )
    pairs = _Pairs(*prediction.shape[1:3])
    ours, theirs = _grouped(prediction, pairs), _grouped(truth, pairs)
    path, level = _align(ours, theirs, pairs, edits=0)
    levels = [level]
    while len(levels) <= max_edits:
        our_gain, our_index = _best_merge(ours, theirs, path, pairs)
        their_gain, their_index = _best_merge(theirs, ours, [(j, i) for i, j in path], pairs)
        if max(our_gain, their_gain) == -np.inf:
            break
        side, at = (ours, our_index) if our_gain > their_gain else (theirs, their_index)
        side[at : at + 2] = [pairs.merged(side[at], side[at + 1])]
        path, level = _align(ours, theirs, pairs, edits=len(levels))
        levels.append(level)
    return levels


def at_edits(levels: Sequence[EditLevel], edits: int) -> EditLevel:
    """The level after `edits` merges, or the last one of a decomposition that stopped earlier."""
    return levels[min(edits, len(levels) - 1)]


def _grouped(stack: Pixels, pairs: _Pairs) -> list[_Layer]:
    """The stack's groups of layers that do not overlap, each merged into one."""
    layers = [_Layer(np.ascontiguousarray(pixels)) for pixels in stack]
    groups = []
    for indices in group_indices(stack[..., 3]):
        joined = layers[indices[0]]
        for index in indices[1:]:
            joined = _merged(joined, layers[index])
        groups.append(pairs.add(joined))
    return groups


def _merged(lower: _Layer, upper: _Layer) -> _Layer:
    """`upper` over `lower` in Pillow's 8-bit arithmetic, which the original's numbers depend on.

    Where `upper` has alpha 0 Pillow copies `lower`, so only `upper`'s bounding box is composited.
    """
    if upper.box is None:
        return lower
    at = _slices(upper.box)
    below, above = (Image.fromarray(layer.pixels[at]) for layer in (lower, upper))
    pixels = lower.pixels.copy()
    pixels[at] = np.asarray(Image.alpha_composite(below, above))
    return _Layer(pixels)


def _align(ours: list[_Layer], theirs: list[_Layer], pairs: _Pairs, *, edits: int) -> tuple[Path, EditLevel]:
    """The alignment of two sides, and its scores."""
    costs = np.array([[pairs.cost(layer, reference) for reference in theirs] for layer in ours])
    path = warp(costs)
    scores = np.array([pairs.scores(ours[i], theirs[j]) for i, j in path])
    cost = float(np.mean([costs[i, j] for i, j in path]))
    return path, EditLevel(
        edits=edits, cost=cost, rgb_l1=float(scores[:, 0].mean()), alpha_iou=float(scores[:, 1].mean())
    )


def _best_merge(layers: list[_Layer], others: list[_Layer], path: Path, pairs: _Pairs) -> tuple[float, int]:
    """The largest gain in local similarity by merging layers i and i+1 of one side, and i; (-inf, 0) where none gains.

    Before the merge, i and i+1 are compared with what each is aligned to. After it the merged layer takes what i was
    aligned to, and the best of: the merged layer with what i+1 was aligned to, or layer i+2 with what either was
    aligned to. The layers of the side being merged are the first of each pair, so on the truth's side the roles of RGB
    L1's mask are swapped; so it is in the original.
    """
    best, at = -np.inf, 0
    if len(layers) <= 2:
        return best, at

    def similarity(layer: _Layer, aligned: list[_Layer]) -> float:
        return sum(1 - pairs.cost(layer, other) for other in aligned)

    for i in range(len(layers) - 1):
        merged = pairs.merged(layers[i], layers[i + 1])
        lower = [others[b] for a, b in path if a == i]
        upper = [others[b] for a, b in path if a == i + 1]
        before = similarity(layers[i], lower) + similarity(layers[i + 1], upper)
        options = [similarity(merged, upper)]
        if i + 2 < len(layers):
            options += [similarity(layers[i + 2], lower), similarity(layers[i + 2], upper)]
        after = max(option + similarity(merged, lower) for option in options)
        if after > before and after - before > best:
            best, at = after - before, i
    return best, at
