"""What `layerloop decompose` takes beside the model: reading, restoring, and writing all outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from layerloop.components.decompose.run import decompose
from layerloop.components.layers.photos import photo_crops
from layerloop.components.schema.decomposition import DecomposeOptions

PICTURES, SIDE, LAYERS, STEPS = 16, 640, 2, 1  # fewest layers and steps: with more the model's share only grows


@pytest.mark.timeout(3600)
def test_decompose_overhead_fraction(tmp_path: Path, record_benchmark: Callable[[str, float], None]) -> None:
    """Everything but the model's calls as a share of the wall time, the model's loading among it."""
    for index, photo in enumerate(photo_crops(np.random.default_rng(0), count=PICTURES, size=(SIDE, SIDE))):
        Image.fromarray(photo).save(tmp_path / f"{index:02d}.png")
    options = DecomposeOptions(layers=LAYERS, steps=STEPS, sampler="euler", resolution=SIDE, batch_size=1)
    summary = decompose([tmp_path], tmp_path / "out", options)
    assert not summary.failed
    assert len(list((tmp_path / "out").glob("*/*.psd"))) == PICTURES
    overhead = 1 - summary.model_seconds / summary.seconds
    record_benchmark("decompose_overhead_fraction", overhead)
    record_benchmark("decompose_seconds_per_picture_seconds", summary.seconds / PICTURES)
    assert overhead <= 0.35
