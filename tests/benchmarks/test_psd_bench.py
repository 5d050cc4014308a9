"""Writing a Photoshop document of a large picture, against psd-tools' own writer in the same run."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from psd_tools import PSDImage

from layerloop.components.layers.export import read_psd
from layerloop.components.layers.psd import layer_names, save_psd
from layerloop.components.layers.stack import Pixels

WIDTH, HEIGHT, LAYERS = 4000, 3000, 5


def large_stack() -> Pixels:
    """A photograph's gradients and grain under four layers with soft edges: (5, 3000, 4000, 4)."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    stack = np.zeros((LAYERS, HEIGHT, WIDTH, 4), np.uint8)
    for index in range(LAYERS):
        grain = rng.integers(0, 6, (HEIGHT, WIDTH), dtype=np.uint8)
        for channel in range(3):
            stack[index, ..., channel] = (columns * (channel + 1) + rows * (index + 1)) / 120 % 240
            stack[index, ..., channel] += grain
        centre, radius = 600 + 700 * index, 500 + 100 * index
        distance = np.hypot(columns - centre, rows - HEIGHT / 2)
        stack[index, ..., 3] = 255 if index == 0 else ((radius - distance) / 8 + 0.5).clip(0, 1) * 255
    return stack


def saved_by_psd_tools(path: Path, stack: Pixels) -> None:
    document = PSDImage.new(mode="RGB", size=(WIDTH, HEIGHT))
    for name, layer in zip(layer_names(LAYERS), stack, strict=True):
        document.create_pixel_layer(Image.fromarray(layer), name=name)
    document.save(path)


@pytest.mark.timeout(900)
def test_a_large_document_is_written_no_slower_than_by_psd_tools(
    tmp_path: Path, record_benchmark: Callable[[str, float], None]
) -> None:
    stack = large_stack()
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(2):
        for who, save in (("ours", save_psd), ("theirs", saved_by_psd_tools)):
            start = time.perf_counter()
            save(tmp_path / f"{who}.psd", stack)
            seconds[who].append(time.perf_counter() - start)
    ratio = min(seconds["ours"]) / min(seconds["theirs"])
    record_benchmark("psd_write_ratio", ratio)
    record_benchmark("psd_write_seconds", min(seconds["ours"]))
    assert ratio <= 1
    assert np.array_equal(read_psd((tmp_path / "ours.psd").read_bytes()), np.where(stack[..., 3:] > 0, stack, 0))


PEAK = """
import re, sys
from pathlib import Path
import numpy as np
from layerloop.components.layers.psd import save_psd

def peak():  # kB; ru_maxrss would begin with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

save_psd(Path(sys.argv[2]), np.zeros((2, 8, 8, 4), np.uint8))
before = peak()
save_psd(Path(sys.argv[2]), np.load(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says a process's own peak")
def test_a_large_document_takes_less_than_twice_its_pixels(
    tmp_path: Path, record_benchmark: Callable[[str, float], None]
) -> None:
    """Of a process of its own, the stack included: its peak beyond that of the imports."""
    np.save(tmp_path / "stack.npy", large_stack())
    said = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "stack.npy"), str(tmp_path / "a.psd")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    ratio = int(said) * 1024 / (LAYERS * HEIGHT * WIDTH * 4)
    record_benchmark("psd_write_memory_ratio", ratio)
    assert 1 < ratio < 2
