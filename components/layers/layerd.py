"""LayerD's protocol: dynamic time warping between two layer stacks, after 0 to 5 merges.

Source: Suzuki et al., "LayerD", ICCV 2025, and its code (github.com/CyberAgentAILab/LayerD at 6b95bc5, Apache-2.0,
`src/layerd/evaluation`). Equal to it in every score and in every choice; written around one observation: the protocol
needs two numbers of a pair of layers, so each pair is measured once, in integers.

It does not see (measured; the reason for the measures of `measure.py`) blank layers, the order of
layers that do not overlap, colour under alpha 0, and, nearly, a background that was not inpainted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from layerloop.components.layers.stack import Pixels, check_stack
from layerloop.components.schema.errors import LayerloopError

Path = list[tuple[int, int]]

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
    """An image of the protocol with arrays that its comparisons share."""

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        self.alpha = np.ascontiguousarray(pixels[..., 3])
        self.covered = np.flatnonzero(self.alpha)
        colour = pixels[..., :3].reshape(-1, 3)
        self.full = len(self.covered) == self.alpha.size
        self.colour = colour
        self.covered_colour = colour if self.full else colour[self.covered]


class _Pairs:
    """RGB L1 and alpha IoU of pairs, each measured once. The reference is the second of a pair."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[float, float]] = {}
        self._kept: list[_Layer] = []  # keeps ids unique for the lifetime of the cache

    def add(self, layer: _Layer) -> _Layer:
        """Keep a layer, which makes its id a key."""
        self._kept.append(layer)
        return layer

    def scores(self, layer: _Layer, reference: _Layer) -> tuple[float, float]:
        """(RGB L1, alpha IoU)."""
        key = (id(layer), id(reference))
        if key not in self._known:
            colour = layer.colour if reference.full else layer.colour[reference.covered]
            higher, lower = np.maximum(colour, reference.covered_colour), np.minimum(colour, reference.covered_colour)
            distance = int((higher - lower).sum(dtype=np.int64))
            union = int(np.maximum(layer.alpha, reference.alpha).sum(dtype=np.int64))
            common = int(np.minimum(layer.alpha, reference.alpha).sum(dtype=np.int64))
            self._known[key] = (
                distance / 765 / (len(reference.covered) + 1e-8),  # 1e-8: the original's guard for an empty reference
                common / union if union else 0.0,
            )
        return self._known[key]

    def cost(self, layer: _Layer, reference: _Layer) -> float:
        """(RGB L1 + 1 - alpha IoU) / 2."""
        rgb_l1, alpha_iou = self.scores(layer, reference)
        return (rgb_l1 + (1 - alpha_iou)) / 2


def group_indices(alphas: npt.NDArray[np.uint8]) -> list[list[int]]:
    """Indices of layers `(L, H, W)` in groups that do not overlap, bottom first.

    Repeatedly, all layers that no later remaining layer overlaps (alpha > 0 on both) leave as one group, the topmost.
    """
    masks = (alphas > 0).reshape(len(alphas), -1)
    overlap = masks.astype(np.float32) @ masks.astype(np.float32).T > 0
    remaining = list(range(len(alphas)))
    groups: list[list[int]] = []
    while remaining:
        top = [i for at, i in enumerate(remaining) if not any(overlap[i, j] for j in remaining[at + 1 :])]
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
    under alpha 0 make no difference; alpha noise of 1/255 does (it makes layers overlap): see `clear_faint_alpha`.

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
    pairs = _Pairs()
    ours, theirs = _grouped(prediction, pairs), _grouped(truth, pairs)
    path, level = _align(ours, theirs, pairs, edits=0)
    levels = [level]
    while len(levels) <= max_edits:
        our_gain, our_index = _best_merge(ours, theirs, path, pairs)
        their_gain, their_index = _best_merge(theirs, ours, [(j, i) for i, j in path], pairs)
        if max(our_gain, their_gain) == -np.inf:
            break
        side, at = (ours, our_index) if our_gain > their_gain else (theirs, their_index)
        side[at : at + 2] = [pairs.add(_merged(side[at], side[at + 1]))]
        path, level = _align(ours, theirs, pairs, edits=len(levels))
        levels.append(level)
    return levels


def at_edits(levels: Sequence[EditLevel], edits: int) -> EditLevel:
    """The level after `edits` merges, or the last one of a decomposition that stopped earlier."""
    return levels[min(edits, len(levels) - 1)]


def clear_faint_alpha(stack: Pixels, *, most: int = 2) -> Pixels:
    """The stack with every alpha of `most`/255 or less set to 0.

    A decoder leaves alpha noise of a level or two, which the protocol takes for overlap: on a toy case of three groups,
    a floor of 1/255 costs 0.26 of alpha IoU. Numbers after clearing are reported in addition to those without, for
    all models alike.
    """
    out = stack.copy()
    out[..., 3][out[..., 3] <= most] = 0
    return out


def _grouped(stack: Pixels, pairs: _Pairs) -> list[_Layer]:
    """The stack's groups of layers that do not overlap, each merged into one."""
    layers = [_Layer(pixels) for pixels in stack]
    groups = []
    for indices in group_indices(stack[..., 3]):
        joined = layers[indices[0]]
        for index in indices[1:]:
            joined = _merged(joined, layers[index])
        groups.append(pairs.add(joined))
    return groups


def _merged(lower: _Layer, upper: _Layer) -> _Layer:
    """`upper` over `lower` in Pillow's 8-bit arithmetic, which the original's numbers depend on."""
    from PIL import Image

    return _Layer(np.asarray(Image.alpha_composite(Image.fromarray(lower.pixels), Image.fromarray(upper.pixels))))


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
        merged = pairs.add(_merged(layers[i], layers[i + 1]))
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
