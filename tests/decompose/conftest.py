"""Pictures as people have them, and one run over all of them with the tiny policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from layerloop.components.decompose import DecomposeOptions, Summary, decompose

QUICK = {"layers": 2, "steps": 1, "sampler": "euler"}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def save_pictures(folder: Path) -> dict[str, np.ndarray]:
    """Pictures that can be used, and their pixels as they should come back: (H, W, 3 or 4)."""
    folder.mkdir(parents=True, exist_ok=True)
    astronaut = Image.fromarray(data.astronaut()[:, 60:400])
    astronaut.save(folder / "portrait.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned clockwise
    cat = Image.fromarray(data.chelsea()[:200:2, :300:2])
    cat.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=turned)
    grey = np.asarray(cat.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(folder / "sixteen.png")
    cat.convert("CMYK").save(folder / "print.tif")
    cut = np.dstack([np.asarray(cat), np.tile(np.linspace(0, 255, 150).astype(np.uint8), (100, 1))])
    Image.fromarray(cut).save(folder / "cut out.webp", lossless=True)
    Image.new("RGB", (1, 1), (9, 99, 199)).save(folder / "dot.png")
    Image.fromarray(np.tile(np.asarray(cat)[:40], (1, 200, 1))).save(folder / "strip.png")
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    return {
        "portrait": np.asarray(astronaut),
        "turned": np.asarray(cat),
        "sixteen": np.asarray(cat.convert("L").convert("RGB")),
        "print": np.asarray(cat.convert("CMYK").convert("RGB")),
        "cut out": cut,
        "dot": np.full((1, 1, 3), (9, 99, 199), np.uint8),
        "strip": np.tile(np.asarray(cat)[:40], (1, 200, 1)),
        "moving": np.full((30, 40, 3), (254, 0, 0), np.uint8),
    }


def save_unusable(folder: Path) -> dict[str, str]:
    """Pictures that cannot be used, by name, with what has to be said about each."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = (folder / "portrait.png").read_bytes()
    (folder / "cut short.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    Image.new("1", (30_000, 4_000)).save(folder / "huge.png")
    return {
        "cut short.png": "truncated or damaged",
        "text.jpg": "not a known format",
        "empty.png": "empty (0 bytes)",
        "huge.png": "over the 100 allowed: make it smaller",
        "absent.png": "does not exist",
    }


@dataclass(frozen=True)
class Ran:
    """A run over pictures of all kinds."""

    pictures: dict[str, np.ndarray]
    unusable: dict[str, str]
    folder: Path  # of the pictures
    out: Path
    summary: Summary


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One run over everything; tests only read it."""
    folder, out = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("out") / "layers"
    pictures, unusable = save_pictures(folder), save_unusable(folder)
    summary = decompose([folder, folder / "absent.png"], out, DecomposeOptions(**QUICK))
    return Ran(pictures, unusable, folder, out, summary)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder of two small pictures."""
    folder = tmp_path / "two"
    folder.mkdir()
    Image.fromarray(data.chelsea()[:80, :120]).save(folder / "a.png")
    Image.fromarray(data.coffee()[:80, :120]).save(folder / "b.png")
    return folder
