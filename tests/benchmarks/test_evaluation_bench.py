"""What measuring costs: LayerD's protocol against its formulas written directly, and all of it against sampling."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from PIL import Image

from layerloop.components.layers.designs import render_sketches
from layerloop.components.layers.layerd import evaluate, warp
from layerloop.components.layers.stack import Pixels, composite, on_backdrop

from ..campaigns import CampaignBuilder

SIDE, MERGES = 640, 5
Level = tuple[int, float, float, float]  # merges, cost, RGB L1, alpha IoU


# ------------------------------------------- the protocol as it is written down, every pair measured where it is needed


def scores(layer: Pixels, reference: Pixels) -> tuple[float, float]:
    """(RGB L1, alpha IoU) in floating point."""
    ours, theirs = layer.astype(np.float64) / 255, reference.astype(np.float64) / 255
    covered = theirs[..., 3] > 0
    rgb_l1 = (np.abs(ours[..., :3] - theirs[..., :3]).mean(-1) * covered).sum() / (covered.sum() + 1e-8)
    union = np.maximum(ours[..., 3], theirs[..., 3]).sum()
    return float(rgb_l1), float(np.minimum(ours[..., 3], theirs[..., 3]).sum() / union) if union else 0.0


def similarity(layer: Pixels, aligned: list[Pixels]) -> float:
    return sum((1 - rgb_l1 + alpha_iou) / 2 for rgb_l1, alpha_iou in (scores(layer, other) for other in aligned))


def over(lower: Pixels, upper: Pixels) -> Pixels:
    return np.asarray(Image.alpha_composite(Image.fromarray(lower), Image.fromarray(upper)))


def grouped(stack: Pixels) -> list[Pixels]:
    remaining, groups = list(stack), []
    while remaining:
        top = [
            index
            for index, layer in enumerate(remaining)
            if not any(((layer[..., 3] > 0) & (later[..., 3] > 0)).any() for later in remaining[index + 1 :])
        ]
        joined = remaining[top[0]]
        for index in top[1:]:
            joined = over(joined, remaining[index])
        groups.append(joined)
        remaining = [layer for index, layer in enumerate(remaining) if index not in top]
    return groups[::-1]


def best_merge(layers: list[Pixels], others: list[Pixels], path: list[tuple[int, int]]) -> tuple[float, int]:
    best, at = -np.inf, 0
    for i in range(len(layers) - 1) if len(layers) > 2 else ():
        merged = over(layers[i], layers[i + 1])
        lower, upper = ([others[b] for a, b in path if a == index] for index in (i, i + 1))
        before = similarity(layers[i], lower) + similarity(layers[i + 1], upper)
        options = [similarity(merged, upper)]
        if i + 2 < len(layers):
            options += [similarity(layers[i + 2], lower), similarity(layers[i + 2], upper)]
        after = max(options) + similarity(merged, lower)
        if after > before and after - before > best:
            best, at = after - before, i
    return best, at


def align(ours: list[Pixels], theirs: list[Pixels], merges: int) -> tuple[list[tuple[int, int]], Level]:
    pairs: npt.NDArray[np.float64] = np.array([[scores(one, other) for other in theirs] for one in ours])
    costs = (pairs[..., 0] + 1 - pairs[..., 1]) / 2
    path = warp(costs)
    means = np.array([(costs[pair], *pairs[pair]) for pair in path]).mean(0)
    return path, (merges, *map(float, means))


def protocol(prediction: Pixels, truth: Pixels) -> list[Level]:
    ours, theirs = grouped(prediction), grouped(truth)
    path, level = align(ours, theirs, 0)
    levels = [level]
    while len(levels) <= MERGES:
        our_gain, our_index = best_merge(ours, theirs, path)
        their_gain, their_index = best_merge(theirs, ours, [(j, i) for i, j in path])
        if max(our_gain, their_gain) == -np.inf:
            break
        side, at = (ours, our_index) if our_gain > their_gain else (theirs, their_index)
        side[at : at + 2] = [over(side[at], side[at + 1])]
        path, level = align(ours, theirs, len(levels))
        levels.append(level)
    return levels


def decomposition(draw: np.random.Generator, truth: Pixels, kind: int) -> Pixels:
    """What models make of a design: shifted edges, noise in the alpha, and faults that merges repair in part."""
    out = np.roll(truth, 2, axis=1)
    out[0] = truth[0]
    noise = draw.integers(-12, 13, out.shape[:3])
    out[1:, ..., 3] = np.clip(out[1:, ..., 3].astype(int) + noise[1:] * (out[1:, ..., 3] > 0), 0, 255)
    if kind == 1:  # the picture is still in the background
        out[0] = composite(truth)
    elif kind == 2:  # two layers in one, and another twice
        out = np.concatenate([out[:1], composite(out[1:3])[None], out[3:], out[-1:]])
    elif kind == 3:  # a veil: everything overlaps
        out[1:, ..., 3] = np.maximum(out[1:, ..., 3], 3)
    elif kind == 4:  # layers in halves
        halves = np.repeat(out[1:4], 2, axis=0)
        halves[::2, : SIDE // 2], halves[1::2, SIDE // 2 :] = 0, 0
        out = np.concatenate([out[:1], halves, out[4:5]])
    return np.ascontiguousarray(out)


@pytest.mark.timeout(1800)
def test_layerds_protocol_is_quick_and_equal_to_its_formulas(record_benchmark: Callable[[str, float], None]) -> None:
    """Processor seconds of the direct implementation over ours, of 640 pixels, 4 to 8 layers, up to five merges."""
    draw = np.random.default_rng(8)
    ratios: list[float] = []
    merges: list[int] = []
    for number in range(10):
        truth = render_sketches(draw, count=1, layers=4 + number // 2, size=(SIDE, SIDE))[0]
        prediction = decomposition(draw, truth, number % 5)
        start = time.process_time()
        expected = protocol(prediction, truth)
        middle = time.process_time()
        found = [astuple(level) for level in evaluate(prediction, truth, max_edits=MERGES)]
        ratios.append((middle - start) / (time.process_time() - middle))
        merges.append(len(found) - 1)
        assert len(found) == len(expected)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    print(
        "times as fast, by case (merges):",
        [(round(ratio, 1), count) for ratio, count in zip(ratios, merges, strict=True)],
    )
    record_benchmark("layerd_speedup", statistics.median(ratios))
    assert statistics.median(ratios) >= 25


# --------------------------------------------------------------------------------- measuring against producing, at tiny


EVALUATION = """
import json, os, resource, sys
from pathlib import Path
from layerloop.components.evaluate_adapter.step import run
from layerloop.components.policy.at import policy_at
from layerloop.components.storage.campaign import Campaign

def processor():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

root, seconds = sys.argv[1], []
for _ in range(2):
    loaded = policy_at(Campaign.open(root), 1, device="cpu", delivered=True)
    start = processor()
    run(loaded, campaign=root, runtime="evaluation: {batch_size: 8}")
    seconds.append(processor() - start)
    Path(root, "evaluations/iteration-000001/manifest.json").unlink()  # the second time all is sampled
print(json.dumps([*seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10]))
"""


def evaluated(folder: Path, *, designs: int, size: int, steps: int) -> tuple[float, float, float]:
    """(processor seconds of sampling both models, those of everything else but loading, peak memory in MB) of an
    evaluation in a process of its own: designs of `size` pixels and 2 to 4 layers, by the shipped tiny policy."""
    draw = np.random.default_rng(3)
    recipe = {
        "name": "bench",
        "model": {"base": "tiny"},
        "lora": {"rank": 4, "alpha": 4.0},
        "evaluation": {"steps": steps, "layers": [2, 3, 4], "designs": designs, "pictures": 0},
    }
    lab = CampaignBuilder.begin(folder, recipe)
    stacks = [
        render_sketches(draw, count=1, layers=2 + number % 3, size=(size, size), photo_share=0.0)[0]
        for number in range(designs)
    ]
    lab.sources(designs=[(on_backdrop(composite(stack), "white"), stack) for stack in stacks])
    lab.adapter(1)
    done = subprocess.run([sys.executable, "-c", EVALUATION, lab.uri], stdout=subprocess.PIPE, text=True, check=True)
    whole, rest, memory = json.loads(done.stdout.splitlines()[-1])
    table = pq.read_table(next(folder.glob("evaluations/iteration-000001/*/samples.parquet")))
    assert table.num_rows == 2 * designs
    return whole - rest, rest, memory


@pytest.mark.timeout(3600)
def test_measuring_and_the_report_cost_little_beside_sampling(
    record_benchmark: Callable[[str, float], None], tmp_path: Path
) -> None:
    """Processor seconds of an evaluation that are neither loading nor sampling, over those of sampling both models:
    200 designs of 64 pixels, sampled as the packaged recipe does. What is measured in other processes counts."""
    sampling, rest, _ = evaluated(tmp_path / "campaign", designs=200, size=64, steps=20)
    print(f"{sampling:.1f} s of sampling, {rest:.1f} s of the rest")
    record_benchmark("evaluation_overhead_fraction", rest / sampling)
    assert rest / sampling <= 0.1


@pytest.mark.timeout(3600)
def test_memory_does_not_grow_with_the_number_of_designs(
    record_benchmark: Callable[[str, float], None], tmp_path: Path
) -> None:
    """Peak memory of an evaluation of 200 designs over that of 50, of 192 pixels. All 150 more, decoded, are 85 MB."""
    few = evaluated(tmp_path / "few", designs=50, size=192, steps=1)[2]
    many = evaluated(tmp_path / "many", designs=200, size=192, steps=1)[2]
    print(f"{few:.0f} MB of 50 designs, {many:.0f} MB of 200")
    record_benchmark("evaluation_memory_ratio", many / few)
    assert many - few <= 30
