"""The reference judge's opinion of a decomposition: five qualities in [0, 1], by rule.

It is a stand-in for a VLM, and reinforcement learning will climb on it, so every quality is smooth, none is earned by
a layer that is blank, hidden, see-through or a copy, and all of them fall when the recomposition leaves the source.
Only what can be seen is used: the source, and colour and alpha of the layers as far as they follow from the images in
the request (`request_images.py`).

Symbols: S source, R recomposition, P_k premultiplied colour and a_k alpha of layer k, 0 = background; all in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

CRITERIA = (
    "semantic_separation",
    "alpha_cleanliness",
    "background_inpainting",
    "feature_distribution",
    "content_validity",
)
BLANK = 0.008  # visible share of the canvas below which a layer counts as partly blank
EDGE = 0.15  # colour step that counts as a full edge of the source
SAME = 0.08  # mean colour distance at which two colours stop being the same
TRUE = 0.12  # the same between the recomposition and the source: wider, since every autoencoder loses something


@dataclass(frozen=True)
class RecoveredLayers:
    """A decomposition as recovered from images: `source[H, W, 3]`, `recomposition[H, W, 3]`, `colour[L, H, W, 3]`
    (premultiplied) and `alpha[L, H, W]`, float32 in [0, 1], bottom layer first."""

    source: Floats
    recomposition: Floats
    colour: Floats
    alpha: Floats


def qualities(seen: RecoveredLayers) -> dict[str, float]:
    """Criterion -> [0, 1]; the criteria are those of the default rubric."""
    layers = len(seen.alpha)
    trust = _fidelity(seen) ** 3  # what is not true to the source is worth little, however tidy
    if layers == 1:  # nothing was taken apart
        return {**dict.fromkeys(CRITERIA, 0.0), "content_validity": trust * float(seen.alpha[0].mean())}

    above = np.cumprod(1 - seen.alpha[::-1], axis=0)[::-1]  # light that reaches layer k-1 through layers k..L-1
    visible = seen.alpha[1:] * np.concatenate([above[2:], np.ones_like(above[:1])])
    presence = np.clip(visible.mean((1, 2)) / BLANK, 0, 1)
    haze = _haze(seen.alpha[1:])
    copy = _copy_of_source(seen)
    own = (1 - copy) * (1 - _repetition(seen))
    source_edges = _edges(seen.source)
    lifted = _lifted(seen)

    separation = np.mean(presence * own * _alignment(seen, source_edges)) * (0.4 + 0.6 * lifted)
    cleanliness = np.mean(
        presence * _soft(haze, 0.2) * _soft(_roughness(seen.alpha[1:]), 0.12) * (1 - 0.7 * _fringe(seen))
    )
    distribution = _evenness(seen, source_edges, presence * (1 - copy)) * (0.4 + 0.6 * lifted)
    valid = np.concatenate([seen.alpha[:1].mean((1, 2)) ** 2, presence * _soft(haze, 0.3) * own])
    return {
        "semantic_separation": float(trust * separation),
        "alpha_cleanliness": float(trust * cleanliness),
        "background_inpainting": float(trust * _inpainting(seen)),
        "feature_distribution": float(trust * distribution),
        "content_validity": float(trust * valid.mean()),
    }


# ------------------------------------------------------------------------------------------------------------ the parts


def _soft(value: Floats | float, half: float) -> Floats:
    """1 at 0, one half at `half`, falling smoothly to 0."""
    return np.asarray(1 / (1 + (np.asarray(value) / half) ** 2), np.float32)


def _fidelity(seen: RecoveredLayers) -> float:
    """Fidelity of the recomposition: the share of pixels that have the source's colour, as shown or as the layers give
    it, whichever is worse. A share, not a mean distance: a thing that is missing counts for its area, not for how much
    it stands out."""
    laid = np.ones_like(seen.source)
    for colour, alpha in zip(seen.colour, seen.alpha, strict=True):
        laid = colour + laid * (1 - alpha[..., None])
    return min(float(_same(shown, seen.source, TRUE).mean()) for shown in (laid, seen.recomposition))


def _haze(alpha: Floats) -> Floats:
    """(L,): see-through area outside outlines, relative to its area. An outline goes from 0 to 1 in two pixels."""
    step = _largest(alpha) - _smallest(alpha)
    half = (4 * alpha * (1 - alpha) * (1 - step) ** 2).sum((1, 2))
    return np.asarray(half / (alpha.sum((1, 2)) + 1e-3 * alpha[0].size), np.float32)


def _roughness(alpha: Floats) -> Floats:
    """(L,): what a 3x3 median would remove or fill (specks, pinholes, frayed outlines), relative to its area."""
    smooth = _middle(_middle(alpha, 1), 2)
    return np.asarray(np.abs(alpha - smooth).sum((1, 2)) / (alpha.sum((1, 2)) + 2e-3 * alpha[0].size), np.float32)


def _copy_of_source(seen: RecoveredLayers) -> Floats:
    """(L-1,): 0..1 as an upper layer comes to hold the complete image."""
    straight = _straight(seen)[1:]
    same = _same(straight, seen.source)
    share = (seen.alpha[1:] * same).mean((1, 2))
    return np.asarray(_ramp(share, 0.6, 0.95), np.float32)


def _repetition(seen: RecoveredLayers) -> Floats:
    """(L-1,): the largest share of an upper layer that another upper layer repeats, colour and place."""
    straight, alpha = _straight(seen)[1:], seen.alpha[1:]
    out = np.zeros(len(alpha), np.float32)
    for i in range(len(alpha)):
        for j in range(i):
            both = (np.minimum(alpha[i], alpha[j]) * _same(straight[i], straight[j])).sum()
            share = both / (min(alpha[i].sum(), alpha[j].sum()) + 1e-3 * alpha[i].size)
            out[i], out[j] = max(out[i], share), max(out[j], share)
    return np.clip(out, 0, 1)


def _alignment(seen: RecoveredLayers, source_edges: Floats) -> Floats:
    """(L-1,): the share of an upper layer's outline that lies on an edge of the source, where it can be seen."""
    reach = np.clip(_largest(source_edges[None])[0] / EDGE, 0, 1)
    alpha = seen.alpha[1:]
    outline = np.stack([_edges(a[..., None]) for a in alpha])
    for index in range(len(alpha)):
        for upper in alpha[index + 1 :]:
            outline[index] *= 1 - upper
    return np.asarray((outline * reach).sum((1, 2)) / (outline.sum((1, 2)) + 1e-6 + 1e-4 * outline[0].size), np.float32)


def _lifted(seen: RecoveredLayers) -> float:
    """Whether the upper layers cover what differs from the background, all of it and nothing else: the F-measure of
    their cover against that area, with precision counting double (F0.5), since what is left uncovered already costs
    fidelity. Zero where the background is the source itself."""
    cover = 1 - np.prod(1 - seen.alpha[1:], axis=0)
    differs = 1 - _same(_straight(seen)[0], seen.source, TRUE)
    return float(1.25 * (cover * differs).sum() / (cover.sum() + 0.25 * differs.sum() + 1e-3 * cover.size))


def _fringe(seen: RecoveredLayers) -> Floats:
    """(L-1,): the share of the outline's inner rim that has the background's colour instead of the layer's own."""
    straight, alpha = _straight(seen), seen.alpha[1:]
    rim = alpha * (1 - _smallest(alpha))
    same = _same(straight[1:], straight[:1]) * seen.alpha[:1]
    return np.asarray((rim * same).sum((1, 2)) / (rim.sum((1, 2)) + 1e-3 * rim[0].size), np.float32)


def _evenness(seen: RecoveredLayers, source_edges: Floats, worth: Floats) -> float:
    """Pielou's evenness of the detail of the upper layers, times the share of layers that are of any use.

    Only detail that the source has counts, so noise buys nothing. The background is left out: it may be plain.
    """
    reach = 1.5 * _largest(source_edges[None])[0]
    detail = np.array(
        [
            np.minimum(_edges(np.concatenate([colour, alpha[..., None]], -1)), reach).sum()
            for colour, alpha in zip(seen.colour[1:], seen.alpha[1:], strict=True)
        ]
    )
    detail = detail * worth + 1e-9
    share = detail / detail.sum()
    even = 1.0 if len(share) == 1 else float(-(share * np.log(share)).sum() / math.log(len(share)))
    return even * float(worth.mean())


def _inpainting(seen: RecoveredLayers) -> float:
    """Background: opaque, rid of what the upper layers took off, and filled in as its surroundings suggest."""
    cover = 1 - np.prod(1 - seen.alpha[1:], axis=0)
    background = _straight(seen)[0]
    around = fill_from_outside(seen.source, 1 - _largest(cover[None])[0])
    contrast = np.abs(seen.source - around).mean(-1)
    lifted = cover * contrast
    residue = float((lifted * _same(background, seen.source)).sum() / (lifted.sum() + 1e-6))
    believable = float(
        (cover * np.exp(-np.abs(_blurred(background) - around).mean(-1) / 0.2)).sum() / (cover.sum() + 1e-6)
    )
    outline = _edges(cover[..., None])
    ghost = float((outline * _edges(background)).sum() / ((outline * _edges(seen.source)).sum() + 1e-4 * outline.size))
    something = min(1.0, float(lifted.mean()) / (0.1 * BLANK))
    opaque = float(seen.alpha[0].mean()) ** 3
    return opaque * (1 - residue) * believable * (1 - 0.5 * min(1.0, ghost)) * something


# ---------------------------------------------------------------------------------------------------------------- tools


def _straight(seen: RecoveredLayers) -> Floats:
    return np.clip(seen.colour / np.maximum(seen.alpha, 1 / 255)[..., None], 0, 1)


def _same(a: Floats, b: Floats, distance: float = SAME) -> Floats:
    """1 where two colours are the same, falling to 0 as their mean distance passes `distance`."""
    return np.asarray(np.exp(-((np.abs(a - b).mean(-1) / distance) ** 2)), np.float32)


def _ramp(value: Floats, low: float, high: float) -> Floats:
    t = np.clip((value - low) / (high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def _edges(pixels: Floats) -> Floats:
    """(H, W): size of the colour step to the next pixel right or below, the largest channel."""
    out = np.zeros(pixels.shape[:2], np.float32)
    down = np.abs(np.diff(pixels, axis=0)).max(-1)
    right = np.abs(np.diff(pixels, axis=1)).max(-1)
    out[:-1] = down
    out[:, :-1] = np.maximum(out[:, :-1], right)
    return out


def _shifted(planes: Floats, axis: int) -> tuple[Floats, Floats]:
    """`planes[N, H, W]` seen from one pixel before and after along `axis`, borders repeated."""
    first, last = planes.take([0], axis), planes.take([-1], axis)
    inner = [slice(None)] * 3
    inner[axis] = slice(None, -1)
    before = np.concatenate([first, planes[tuple(inner)]], axis)
    inner[axis] = slice(1, None)
    return before, np.concatenate([planes[tuple(inner)], last], axis)


def _largest(planes: Floats) -> Floats:
    """3x3 maximum of `planes[N, H, W]`."""
    for axis in (1, 2):
        before, after = _shifted(planes, axis)
        planes = np.maximum(np.maximum(before, planes), after)
    return planes


def _smallest(planes: Floats) -> Floats:
    """3x3 minimum."""
    return -_largest(-planes)


def _middle(planes: Floats, axis: int) -> Floats:
    """Median of three along an axis."""
    before, after = _shifted(planes, axis)
    low, high = np.minimum(before, after), np.maximum(before, after)
    return np.clip(planes, low, high)


def _blurred(pixels: Floats) -> Floats:
    """3x3 mean of `pixels[H, W, C]`, twice."""
    planes: npt.NDArray[Any] = np.moveaxis(pixels, -1, 0)
    for _ in range(2):
        for axis in (1, 2):
            before, after = _shifted(planes, axis)
            planes = (before + planes + after) / 3
    return np.moveaxis(planes, 0, -1)


def fill_from_outside(pixels: Floats, weight: Floats) -> Floats:
    """`pixels[H, W, C]` where `weight[H, W]` is 1, continued smoothly to where it is 0 (push-pull: means of ever larger
    blocks, each level filling what the finer one does not know)."""
    known = np.concatenate([pixels * weight[..., None], weight[..., None]], -1)
    levels = [known]
    while min(levels[-1].shape[:2]) > 1:
        finer = levels[-1]
        height, width = finer.shape[0] + finer.shape[0] % 2, finer.shape[1] + finer.shape[1] % 2
        padded = np.pad(finer, ((0, height - finer.shape[0]), (0, width - finer.shape[1]), (0, 0)))
        levels.append(padded.reshape(height // 2, 2, width // 2, 2, -1).mean((1, 3)))
    top = levels.pop()
    guess: npt.NDArray[Any] = top[..., :-1] / np.maximum(top[..., -1:], 1e-6)
    while levels:
        level = levels.pop()
        height, width = level.shape[:2]
        guess = guess.repeat(2, 0).repeat(2, 1)[:height, :width]
        guess = _blurred(guess)
        share = np.clip(level[..., -1:], 0, 1)
        guess = level[..., :-1] + guess * (1 - share)
    return np.asarray(guess, np.float32)
