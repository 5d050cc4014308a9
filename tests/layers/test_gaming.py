"""The gaming table: crafted decompositions of one design, and where an honest measure must put them.

Each row of `CRAFTED` is a way to look decomposed without being so, or a fault of real models, in the words of
`measure.BLIND`. Three things are held of every measure that gives a verdict and is quoted anywhere:

- none of these stacks scores better than the true layers;
- it scores worse, or its kind stands in the measure's row as `blind` and so beside its definition in every report;
- in each chain of `ORDER` the next one is never better, of those that the measure sees.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from layerloop.components.evaluate_adapter.assess import assess
from layerloop.components.evaluate_adapter.cases import Case
from layerloop.components.layers.columns import COLUMNS, DEFINITIONS, gives_verdict, quoted
from layerloop.components.layers.designs import render_sketches
from layerloop.components.layers.measure import BLIND, MEASURES
from layerloop.components.layers.stack import Pixels, composite, on_backdrop
from layerloop.components.storage.images import encode_png

SIDE = 96
BOX = (slice(22, 62), slice(30, 74))  # of the white card


def grid() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(float)
    return rows, columns


@functools.cache
def truth() -> Pixels:
    """A textured background, a striped disc with a soft edge, a white card, black bars over a part of it."""
    rows, columns = grid()
    stack = np.zeros((4, SIDE, SIDE, 4))
    waves = 25 * np.sin(columns / 5) + 20 * np.cos(rows / 7)
    stack[0] = np.stack([120 + waves, 100 + rows / 2, 140 - waves, np.full_like(rows, 255)], -1)
    radius = np.hypot(rows - 62, columns - 30)
    stack[1, ..., :3] = np.stack([200 + 40 * np.sin(rows / 2), 60 + columns / 2, 40 + rows / 2], -1)
    stack[1, ..., 3] = 255 * np.clip((24 - radius) / 4, 0, 1)
    stack[2][BOX] = 255
    stack[3, 30:50:6, 50:90] = stack[3, 31:51:6, 50:90] = stack[3, 32:52:6, 50:90] = (8, 8, 8, 255)
    stack[1:][stack[1:, ..., 3] == 0] = 0
    return np.rint(stack.clip(0, 255)).astype(np.uint8)


@functools.cache
def picture() -> Pixels:
    return composite(truth())


def source() -> Pixels:
    return on_backdrop(picture(), "white")


def blank(count: int = 1) -> Pixels:
    return np.zeros((count, SIDE, SIDE, 4), np.uint8)


def layers(*parts: Pixels) -> Pixels:
    """Layers `(H, W, 4)` and stacks, one above the other, completed by blank ones to four."""
    stack = np.concatenate([part if part.ndim == 4 else part[None] for part in parts])
    return np.concatenate([stack, blank(4 - len(stack))]) if len(stack) < 4 else stack


def with_alpha(image: Pixels, alpha: int | npt.NDArray[np.int64]) -> Pixels:
    return np.concatenate([image[..., :3], np.full((SIDE, SIDE, 1), 0, np.uint8) + np.uint8(alpha)], -1)


def part(image: Pixels, rows: slice = slice(None), columns: slice = slice(None)) -> Pixels:
    """The image inside a rectangle, nothing outside."""
    out = np.zeros_like(image)
    out[..., rows, columns, :] = image[..., rows, columns, :]
    return out


def patch(top: int, left: int, colour: tuple[int, int, int] = (255, 0, 90)) -> Pixels:
    """A patch of 8 x 8, which is 0.7 % of the canvas."""
    out = blank()[0]
    out[top : top + 8, left : left + 8] = (*colour, 255)
    return out


def changed(layer: int, pixels: Pixels) -> Pixels:
    """The true layers with another one at `layer`."""
    stack = truth().copy()
    stack[layer] = pixels
    return stack


def upper(change: Callable[[Pixels], Pixels]) -> Pixels:
    """The true layers, those above the background changed."""
    return np.concatenate([truth()[:1], np.stack([change(layer.copy()) for layer in truth()[1:]])])


def noise(seed: int, *shape: int, scale: float = 1.0) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).normal(0, scale, shape)


def mixed(one: Pixels, other: Pixels, share: float) -> Pixels:
    return np.rint(one * (1 - share) + other * share).astype(np.uint8)


def floor(alpha: int, colour: tuple[int, int, int]) -> Callable[[Pixels], Pixels]:
    """At least so much alpha everywhere, in a colour where there was none."""

    def veil(layer: Pixels) -> Pixels:
        layer[layer[..., 3] == 0, :3] = colour
        layer[..., 3] = np.maximum(layer[..., 3], alpha)
        return layer

    return veil


def fringe(width: int) -> Callable[[Pixels], Pixels]:
    """A grey rim of 60 % around what there is."""
    from scipy.ndimage import maximum_filter

    def rim(layer: Pixels) -> Pixels:
        outside = maximum_filter(layer[..., 3], 2 * width + 1) > layer[..., 3]
        layer[outside & (layer[..., 3] < 153)] = (128, 128, 128, 153)
        return layer

    return rim


def background_rim(layer: Pixels) -> Pixels:
    """Two pixels of the true background around what there is."""
    from scipy.ndimage import maximum_filter

    wide = maximum_filter(layer[..., 3], 5)
    return with_alpha(np.where(layer[..., 3:] > 0, layer, truth()[0]), wide.astype(np.int64)[..., None])


def squared(layer: Pixels) -> npt.NDArray[np.int64]:
    return np.rint(layer[..., 3:].astype(float) ** 2 / 255).astype(np.int64)


def speckled(layer: Pixels) -> Pixels:
    alpha = layer[..., 3] + noise(1, SIDE, SIDE, scale=40) * (layer[..., 3] > 0)
    return with_alpha(layer, np.rint(alpha.clip(0, 255)).astype(np.int64)[..., None])


def blurred(layer: Pixels) -> Pixels:
    from scipy.ndimage import gaussian_filter

    alpha = gaussian_filter(layer[..., 3].astype(float), 2.5)
    colour = layer[layer[..., 3] > 0, :3].mean(0)
    layer[layer[..., 3] == 0, :3] = colour
    return with_alpha(layer, np.rint(alpha).astype(np.int64)[..., None])


def repainted(layer: Pixels) -> Pixels:
    """One colour, the mean."""
    layer[..., :3] = layer[layer[..., 3] > 0, :3].mean(0)
    return layer


def grainy(layer: Pixels) -> Pixels:
    layer[..., :3] = np.rint(layer[..., :3] + noise(2, SIDE, SIDE, 3, scale=40)).clip(0, 255)
    return layer


def shifted(pixels: int) -> Callable[[Pixels], Pixels]:
    return lambda layer: np.roll(layer, (pixels, pixels), axis=(0, 1))


def halves(which: npt.NDArray[np.bool_]) -> Pixels:
    """Every object cut in two layers by a mask; the bars stay whole."""
    objects = composite(truth()[1:3])
    return layers(truth()[0], objects * which[..., None], objects * ~which[..., None], truth()[3])


def random_layers() -> Pixels:
    return np.random.default_rng(5).integers(0, 256, (4, SIDE, SIDE, 4)).astype(np.uint8)


def hidden_colour(layer: Pixels) -> Pixels:
    layer[layer[..., 3] == 0, :3] = np.random.default_rng(6).integers(0, 256, (int((layer[..., 3] == 0).sum()), 3))
    return layer


def strips(axis: int) -> Pixels:
    cuts = [slice(start, start + SIDE // 4) for start in range(0, SIDE, SIDE // 4)]
    return layers(*(part(picture(), rows=cut) if axis == 0 else part(picture(), columns=cut) for cut in cuts))


def blurred_picture(sigma: float) -> Pixels:
    from scipy.ndimage import gaussian_filter

    colours = gaussian_filter(picture()[..., :3].astype(float), (sigma, sigma, 0))
    return with_alpha(np.rint(colours).astype(np.uint8), 255)


def cut(which: npt.NDArray[np.int64], *, soft: float = 0.0) -> Pixels:
    """Three layers of the picture, by which of them has a pixel, over a layer 0 without holes: the picture blurred.
    `soft` rounds their edges; what this takes of a layer, the next one has below it."""
    from scipy.ndimage import gaussian_filter

    parts = []
    for index in range(3):
        mask = gaussian_filter((which == index).astype(float), soft) if soft else (which == index).astype(float)
        below = np.maximum(mask, which > 0) if soft and index == 0 else mask
        parts.append(with_alpha(picture(), np.rint(255 * below).astype(np.int64)[..., None]))
    return layers(blurred_picture(8), *parts)


def squares() -> npt.NDArray[np.int64]:
    rows, columns = grid()
    return np.asarray((rows // 24 + columns // 24) % 3, np.int64)


def blots() -> npt.NDArray[np.int64]:
    from scipy.ndimage import gaussian_filter

    return np.asarray(np.argmax([gaussian_filter(noise(seed, SIDE, SIDE), 8) for seed in (7, 8, 9)], axis=0))


def by_value(plane: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Thirds of the pixels, by their value."""
    return np.digitize(plane, np.quantile(plane, (1 / 3, 2 / 3)))


def shuffled_strips() -> npt.NDArray[np.int64]:
    return np.asarray(np.random.default_rng(10).permutation(np.arange(SIDE // 8) % 3)[grid()[0].astype(int) // 8])


def bands() -> Pixels:
    """A blur, and three layers of half opacity that bring detail back: laid over each other they are the picture."""
    stack = [blurred_picture(12)]
    for sigma in (4, 1.5, 0):
        wanted = blurred_picture(sigma) if sigma else picture()
        detail = 2 * wanted[..., :3].astype(float) - composite(np.stack(stack))[..., :3]
        stack.append(with_alpha(np.rint(detail.clip(0, 255)).astype(np.uint8), 128))
    return np.stack(stack)


def background_cut_out() -> Pixels:
    """What is to be seen of the background as a layer of its own, over one colour."""
    flat = truth()[0].copy()
    flat[..., :3] = flat[..., :3].mean((0, 1))
    hole = 255 - composite(truth()[1:])[..., 3:].astype(np.int64)
    return layers(flat, with_alpha(truth()[0], hole), truth()[1], composite(truth()[2:]))


def without_bars() -> Pixels:
    """The background with the bars' place filled, all else as it should be."""
    return composite(truth()[:3])


def strip_veil() -> Pixels:
    alpha = np.where(grid()[0] < SIDE // 5, 255, 128)[..., None]
    return with_alpha(picture(), alpha)


def filled(pixels: Pixels) -> Pixels:
    """The true layers, with these pixels in the background where the objects hide it."""
    hidden = composite(truth()[1:])[..., 3:] == 255
    return changed(0, np.where(hidden, pixels, truth()[0]))


def plain(red: int, green: int, blue: int) -> Pixels:
    return np.full((SIDE, SIDE, 4), (red, green, blue, 255), np.uint8)


def inverse() -> Pixels:
    return with_alpha(255 - picture()[..., :3], 255)


def correcting(alpha: int) -> Pixels:
    """Noise in all layers but the top one, which brings the picture back through its alpha."""
    below = np.random.default_rng(12).integers(0, 256, (3, SIDE, SIDE, 4)).astype(np.uint8)
    below[0, ..., 3] = 255
    wanted = (picture()[..., :3] - composite(below)[..., :3] * (1 - alpha / 255)) / (alpha / 255)
    return layers(below, with_alpha(np.rint(wanted.clip(0, 255)).astype(np.uint8), alpha))


def in_shares(layer: Pixels, count: int) -> Pixels:
    """A layer as so many copies of itself which laid over each other are it again."""
    alpha = 1 - (1 - np.minimum(layer[..., 3], 254) / 255) ** (1 / count)
    return np.repeat(with_alpha(layer, np.rint(255 * alpha)[..., None].astype(np.int64))[None], count, axis=0)


def texture() -> npt.NDArray[np.int64]:
    """Alpha of 0 to 40, in waves."""
    rows, columns = grid()
    return np.rint(20 + 10 * np.sin(rows / 2) + 10 * np.cos(columns / 3)).astype(np.int64)[..., None]


LEFT = composite(truth()[[0, 2]])  # the card is still in the background
GHOST = mixed(truth()[0], picture(), 0.5)


class Crafted(NamedTuple):
    """A stack, and what it is a kind of: a key of BLIND, or "" where all measures may take it for the truth."""

    kind: str
    build: Callable[[], Pixels]


CRAFTED: dict[str, Crafted] = {
    # Nothing decomposed: the picture left whole, under layers that look used.
    "picture, blanks above": Crafted("untouched", lambda: layers(picture())),
    "picture, invisible veils above": Crafted("untouched", lambda: layers(picture(), *[with_alpha(picture(), 2)] * 3)),
    "picture, faint partial veils above": Crafted(
        "untouched", lambda: layers(picture(), *[part(with_alpha(picture(), 6), slice(0, 22))] * 3)
    ),
    "picture, half veils above": Crafted("untouched", lambda: layers(picture(), *[with_alpha(picture(), 128)] * 3)),
    "picture, half veils with an opaque strip": Crafted("untouched", lambda: layers(picture(), *[strip_veil()] * 3)),
    "picture, textured veils above": Crafted(
        "untouched", lambda: layers(picture(), *[with_alpha(picture(), texture())] * 3)
    ),
    "picture, dithered over itself": Crafted(
        "untouched",
        lambda: layers(
            picture(),
            *(with_alpha(picture(), (255 * (sum(grid()) % 3 == k)).astype(np.int64)[..., None]) for k in range(3)),
        ),
    ),
    "picture, boxes of itself around its objects": Crafted(
        "untouched",
        lambda: layers(
            picture(),
            *(picture() * (a.any(1)[:, None] & a.any(0))[..., None] for a in (truth()[1:, ..., 3] > 0)),
        ),
    ),
    "noise under the picture": Crafted("untouched", lambda: correcting(255)),
    "noise under a picture of 80 %": Crafted("untouched", lambda: correcting(204)),
    "picture, junk patches above": Crafted(
        "untouched", lambda: layers(picture(), patch(2, 2), patch(80, 80), patch(2, 80))
    ),
    "picture, pieces of itself above": Crafted(
        "untouched",
        lambda: layers(picture(), *(part(picture(), slice(20, 60), slice(30 * k, 30 * k + 30)) for k in range(3))),
    ),
    "picture, its true objects above": Crafted("background", lambda: changed(0, picture())),
    "picture in every layer": Crafted("untouched", lambda: layers(*[picture()] * 4)),
    "picture in every layer, cropped to 89 %": Crafted(
        "untouched", lambda: layers(picture(), *[part(picture(), slice(0, 85))] * 3)
    ),
    "picture in every layer, 8 levels off": Crafted(
        "untouched", lambda: layers(picture(), *[mixed(picture(), np.full_like(picture(), 255), 0.07)] * 3)
    ),
    "picture over the true layers": Crafted("untouched", lambda: changed(3, picture())),
    "picture in layer 1, layer 0 blank": Crafted("untouched", lambda: layers(blank(), picture())),
    "nothing at all": Crafted("untouched", lambda: blank(4)),
    "one layer, the picture": Crafted("untouched", lambda: picture()[None]),
    # Layer 0.
    "half a ghost in the background": Crafted("background", lambda: changed(0, GHOST)),
    "holes in the background": Crafted(
        "holes", lambda: changed(0, truth()[0] * (composite(truth()[1:])[..., 3:] < 128))
    ),
    "no background": Crafted("holes", lambda: changed(0, blank()[0])),
    "one colour where objects were": Crafted(
        "filled", lambda: filled(plain(*truth()[0, ..., :3].mean((0, 1)).astype(int)))
    ),
    "black where objects were": Crafted("filled", lambda: filled(plain(0, 0, 0))),
    "noise where objects were": Crafted("filled", lambda: filled(with_alpha(random_layers()[0], 255))),
    "objects inverted in the background": Crafted("filled", lambda: filled(inverse())),
    "a blur of the picture where objects were": Crafted("background", lambda: filled(blurred_picture(2))),
    # Sound layers with something on top of them.
    "colour under alpha 0": Crafted("", lambda: upper(hidden_colour)),
    "veils of one level": Crafted("", lambda: upper(floor(1, (0, 0, 0)))),
    "grey veils of ten levels": Crafted("veils", lambda: upper(floor(10, (128, 128, 128)))),
    "grey veils of forty levels": Crafted("veils", lambda: upper(floor(40, (128, 128, 128)))),
    "a patch of junk in each layer": Crafted(
        "junk", lambda: np.stack([composite(np.stack([one, patch(2, 80, (0, 255, 0))])) for one in truth()])
    ),
    "junk in place of the bars": Crafted("junk", lambda: layers(without_bars(), truth()[1:3], patch(80, 80))),
    # Copies, omissions, other cuts.
    "one object in three layers": Crafted("copies", lambda: layers(truth()[0], *[truth()[2]] * 3)),
    "an object twice, another left out": Crafted("copies", lambda: truth()[[0, 1, 2, 2]]),
    "the background twice": Crafted("copies", lambda: truth()[[0, 0, 1, 2]]),
    "the card left in the background": Crafted("missing", lambda: layers(LEFT, truth()[1], blank(), truth()[3])),
    "the disc nowhere": Crafted("missing", lambda: changed(1, blank()[0])),
    "the white card nowhere": Crafted("white", lambda: changed(2, blank()[0])),
    "objects cut in halves": Crafted("split", lambda: halves(grid()[1] < 40)),
    "an object in three shares of its alpha": Crafted(
        "split", lambda: layers(truth()[0], in_shares(truth()[1], 3), truth()[2:])
    ),
    "objects in strips of four pixels": Crafted("split", lambda: halves(grid()[1] % 8 < 4)),
    "objects in salt and pepper": Crafted("split", lambda: halves(noise(3, SIDE, SIDE) > 0)),
    "all objects in one layer": Crafted("joined", lambda: layers(truth()[0], composite(truth()[1:]))),
    "two objects in one layer": Crafted("joined", lambda: layers(truth()[0], truth()[1], composite(truth()[2:]))),
    "four strips": Crafted("tiles", lambda: strips(0)),
    "four columns": Crafted("tiles", lambda: strips(1)),
    # Layer 0 filled, so that nothing but the cuts is wrong with them.
    "strips over a blur": Crafted("tiles", lambda: cut((grid()[0] // 32).astype(np.int64))),
    "strips in any layer over a blur": Crafted("tiles", lambda: cut(shuffled_strips())),
    "squares over a blur": Crafted("tiles", lambda: cut(squares())),
    "squares over a blur, a corner left to it": Crafted("tiles", lambda: cut(np.where(sum(grid()) < 16, 3, squares()))),
    "soft squares over a blur": Crafted("tiles", lambda: cut(squares(), soft=2.5)),
    "strips over the picture inverted": Crafted(
        "tiles", lambda: layers(inverse(), cut((grid()[0] // 32).astype(np.int64))[1:])
    ),
    "blots over a blur": Crafted("tiles", lambda: cut(blots())),
    "a checkerboard of pixels over a blur": Crafted("tiles", lambda: cut((sum(grid()) % 2).astype(np.int64))),
    "dithered alpha over a blur": Crafted("tiles", lambda: cut(np.random.default_rng(11).integers(0, 3, (SIDE, SIDE)))),
    "slices by brightness over a blur": Crafted("slices", lambda: cut(by_value(picture()[..., :3].mean(-1)))),
    "slices by hue over a blur": Crafted(
        "slices", lambda: cut(by_value(picture()[..., 0].astype(float) - picture()[..., 2]))
    ),
    "blur and detail": Crafted("bands", bands),
    "the background cut out over one colour": Crafted("cut out", background_cut_out),
    "upside down": Crafted("order", lambda: truth()[::-1].copy()),
    "the bars under the card": Crafted("order", lambda: truth()[[0, 1, 3, 2]]),
    "the background on top": Crafted("order", lambda: truth()[[1, 2, 3, 0]]),
    # Edges, noise, colour.
    "fringes of one pixel": Crafted("fringes", lambda: upper(fringe(1))),
    "fringes of three pixels": Crafted("fringes", lambda: upper(fringe(3))),
    "rims of the background around objects": Crafted("fringes", lambda: upper(background_rim)),
    "alpha twice": Crafted("alpha noise", lambda: upper(lambda layer: with_alpha(layer, squared(layer)))),
    "noise in alpha": Crafted("alpha noise", lambda: upper(speckled)),
    "alpha blurred": Crafted("alpha noise", lambda: upper(blurred)),
    "noise in colour": Crafted("colour noise", lambda: upper(grainy)),
    "one colour an object": Crafted("colour noise", lambda: upper(repainted)),
    "random layers": Crafted("colour noise", random_layers),
    "shifted by one pixel": Crafted("shifted", lambda: upper(shifted(1))),
    "shifted by four pixels": Crafted("shifted", lambda: upper(shifted(4))),
    "each object mirrored": Crafted("shifted", lambda: upper(lambda layer: layer[:, ::-1])),
}

# Better first: no honest measure puts a later one before an earlier one.
ORDER: tuple[tuple[str, ...], ...] = (
    ("truth", "shifted by one pixel", "shifted by four pixels"),
    ("truth", "fringes of one pixel", "fringes of three pixels"),
    ("truth", "veils of one level", "grey veils of ten levels", "grey veils of forty levels"),
    ("truth", "half a ghost in the background", "picture, its true objects above", "picture, blanks above"),
    ("truth", "an object twice, another left out", "one object in three layers"),
    ("truth", "the card left in the background", "picture, blanks above"),
    ("truth", "two objects in one layer", "all objects in one layer"),
)


# --------------------------------------------------------------------------------------------------------- the measures

HONEST = [name for name, column in COLUMNS.items() if gives_verdict(name) and column.quoted]
INDIRECT = {"evenness_gap"}  # about all layers at once: what one gains in detail another loses
SAME = 0.001  # a difference under this is none; counts of layers differ by 1
CHANCE = 0.04  # of an object's gradients agreeing with a photograph's behind it
SLACK = 0.005  # by which chance gradients of the background may differ


@functools.cache
def case() -> Case:
    """The design that the crafted stacks decompose."""
    members = {f"layer{index}.png": encode_png(layer) for index, layer in enumerate(truth())}
    return Case("0" * 16, "designs", 4, 0, source().shape[:2], {"png": encode_png(source()), **members})


@functools.cache
def scores(name: str) -> dict[str, float | None]:
    """Every column of a crafted stack against the truth; signed so that lower is better."""
    stack = truth() if name == "truth" else CRAFTED[name].build()
    row = assess(case(), stack, max_edits=0)
    return {
        column: None if row.get(column) is None else row[column] * (-1 if COLUMNS[column].better == "higher" else 1)
        for column in HONEST
    }


def worse_by(column: str, name: str) -> float | None:
    """How much worse a stack is than the truth; None where it is undefined."""
    value, best = scores(name)[column], scores("truth")[column]
    assert best is not None
    assert value is None or math.isfinite(value), f"{column} of {name} is {value}"
    return None if value is None else value - best


@pytest.mark.parametrize("name", CRAFTED)
def test_nothing_beats_the_true_layers(name: str) -> None:
    better = {column: gap for column in HONEST if (gap := worse_by(column, name)) is not None and gap < -SLACK}
    assert not better, f"{name} is better than the true layers"


@pytest.mark.parametrize("column", HONEST)
def test_what_a_measure_cannot_tell_apart_stands_beside_its_definition(column: str) -> None:
    blind = {
        crafted.kind
        for name, crafted in CRAFTED.items()
        if crafted.kind and ((gap := worse_by(column, name)) is None or gap < SAME)
    }
    assert set(COLUMNS[column].blind) == blind
    assert [kind for kind in BLIND if kind in blind] == list(COLUMNS[column].blind), "in the order of BLIND"
    words = COLUMNS[column].blindness
    assert bool(words) == bool(blind)
    assert words in (MEASURES[column].definition if column in MEASURES else DEFINITIONS["layerd"])


@pytest.mark.parametrize("chain", ORDER, ids=lambda chain: chain[-1])
def test_more_of_a_fault_is_never_better(chain: tuple[str, ...]) -> None:
    for column in set(HONEST) - INDIRECT:
        seen = [name for name in chain if name == "truth" or CRAFTED[name].kind not in COLUMNS[column].blind]
        values = [value for name in seen if (value := scores(name)[column]) is not None]
        assert all(later >= earlier - SLACK for earlier, later in itertools.pairwise(values)), (column, values)


@pytest.mark.parametrize("name", [name for name, crafted in CRAFTED.items() if crafted.kind])
def test_every_fault_costs_on_designs(name: str) -> None:
    """Where there are true layers, two of the numbers at the top of the report say so."""
    seen = [column for column in quoted("designs headline") if (worse_by(column, name) or 0) > SAME]
    assert len(seen) >= 2, seen


@pytest.mark.parametrize("name", [name for name, crafted in CRAFTED.items() if crafted.kind == "untouched"])
def test_a_picture_left_whole_has_bad_layers(name: str) -> None:
    assert (worse_by("bad_layers", name) or 0) >= 1


@pytest.mark.parametrize("kind", ["untouched", "tiles", "slices", "bands", "cut out", "holes", "background"])
def test_what_is_not_decomposed_costs_without_true_layers_too(kind: str) -> None:
    for name in (name for name, crafted in CRAFTED.items() if crafted.kind == kind):
        seen = {column: gap for column in quoted("pictures headline") if (gap := worse_by(column, name) or 0) > SAME}
        assert max(seen.values(), default=0) > 0.1, name


def test_colour_under_alpha_zero_changes_no_number() -> None:
    assert scores("colour under alpha 0") == scores("truth")


def test_every_kind_has_its_crafted_stacks() -> None:
    assert {crafted.kind for crafted in CRAFTED.values()} == {*BLIND, ""}
    assert len(CRAFTED) >= 30 and len(HONEST) >= 15


PHOTOGRAPHS = ("untouched", "mirrored", "black", "noise", "inverted", "one colour")


@functools.cache
def photographs() -> list[Case]:
    """Designs over photographs, one of them with an object that lets the background through."""
    cases = []
    for seed, count in ((101, 3), (105, 3), (109, 3)):
        stack = render_sketches(np.random.default_rng(seed), count=1, layers=count, size=(SIDE, SIDE), photo_share=1.0)[
            0
        ]
        stack[-1, ..., 3] = np.rint(stack[-1, ..., 3] * (0.75 if seed == 101 else 1))
        members = {f"layer{index}.png": encode_png(layer) for index, layer in enumerate(stack)}
        image = on_backdrop(composite(stack), "white")
        cases.append(Case(f"{seed:016d}", "designs", count, 0, image.shape[:2], {"png": encode_png(image), **members}))
    return cases


@pytest.mark.parametrize("fault", PHOTOGRAPHS)
def test_nothing_beats_the_true_layers_over_photographs(fault: str) -> None:
    """Texture of a background goes on under objects, and through those that are not opaque: no fault of its own."""
    for one in photographs():
        true = one.truth
        assert true is not None
        layer = {
            "untouched": composite(true), "mirrored": true[0, :, ::-1], "black": plain(0, 0, 0),
            "noise": with_alpha(random_layers()[0], 255), "inverted": with_alpha(255 - true[0, ..., :3], 255),
            "one colour": plain(*true[0, ..., :3].mean((0, 1)).astype(int)),
        }[fault]  # fmt: skip
        wrong = np.concatenate([layer[None], true[1:]])
        best, found = (assess(one, stack, max_edits=0) for stack in (true, wrong))
        sign = {column: -1 if COLUMNS[column].better == "higher" else 1 for column in HONEST}
        better = {
            column: (found[column], best[column])
            for column in HONEST
            if found[column] is not None and sign[column] * (found[column] - best[column]) < -CHANCE
        }
        assert not better
