"""A campaign of two iterations through all steps, and what it left, as values that another machine can be held to.

Exact on every machine are names, keys of samples, seeds, counts, what was asked for and in which order; float32 sums
are not (processor, build of torch), nor the bytes of a PNG (build of zlib), so hashes of files that hold either are
left out here. `objects` has the hash of every object, for machines that calculate alike (`machine`).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import platform
import re
import tarfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from layerloop.components.evaluate_adapter.step import run as evaluate_adapter
from layerloop.components.generate_rollouts.step import run as generate_rollouts
from layerloop.components.publish_adapter.step import run as publish_adapter
from layerloop.components.schema.record import SEAL
from layerloop.components.score_rollouts.step import run as score_rollouts
from layerloop.components.shard_dataset.step import run as shard_dataset
from layerloop.components.storage.campaign import Campaign
from layerloop.components.update_lora.step import run as update_lora

from ..campaigns import plain_name
from ..score_rollouts.judges import meddling_judge

ITERATIONS, SIDE = 2, 32
RECIPE: dict[str, Any] = {
    "name": "replay",
    "seed": 5,
    "model": {"base": "tiny", "dtype": "float32"},
    "data": {"resolution": SIDE, "holdout": 2, "images_per_shard": 4},
    "rollout": {
        "groups": 2, "group_size": 3, "min_layers": 2, "max_layers": 2, "steps": 3, "outside": "euler",
        "window": {"size": 2, "start": 0}, "noise": {"dynamics": "cps"},
    },
    "judge": {
        "model": "layerloop-reference-judge", "resolution": SIDE, "backdrops": ["white", "black"],
        "phase2": {"resolution": SIDE},
    },
    "lora": {"rank": 2, "alpha": 2.0},
    "update": {"learning_rate": 1e-3, "ema": 0.9},
    "evaluation": {"steps": 2, "layers": [2], "designs": 3, "pictures": 2},
}  # fmt: skip
# Keys of what a clock or the machine says; of words for people, whose place is the page that they are on.
LEFT_OUT = re.compile(r"second|latency|machine|memory|version|torch|threads|^made$|definitions|title")
INEXACT = re.compile(r"\b[0-9a-f]{64}\b")  # hashes of files with float32 sums or PNGs in them
ADAPTER = re.compile(r"(?<=/decompositions-)[0-9a-f]{12}")  # in a name: of the adapter that they are of
EXACT_KEYS = ("rubric_sha256", "prompt_sha256", "base_fingerprint")


def make_campaign(folder: Path) -> Campaign:
    """Shard, then twice rollouts, scores and update, then evaluate and publish: every step in this process."""
    draw_pictures(folder)
    uri = str(folder / "replay")
    shard_dataset(
        campaign=uri, recipe=json.dumps(RECIPE), images=str(folder / "images"), designs=str(folder / "designs")
    )
    with meddling_judge() as judge:
        for _ in range(ITERATIONS):
            generate_rollouts(campaign=uri)
            score_rollouts(campaign=uri, judge_url=judge.url)
            update_lora(campaign=uri)
    evaluate_adapter(campaign=uri)
    publish_adapter(campaign=uri)
    return Campaign.open(uri)


def draw_pictures(folder: Path) -> None:
    """Seven images and three designs of two layers, of the recipe's size: integers only, so alike everywhere."""
    for name, count in (("images", 7), ("designs", 3)):
        for number in range(count):
            ground, thing = _design(hash_seed(name, number))
            if name == "images":
                (folder / name).mkdir(parents=True, exist_ok=True)
                flat = np.where(thing[..., 3:] > 0, thing, ground)[..., :3]
                Image.fromarray(flat).save(folder / name / f"{number}.png")
                continue
            (folder / name / f"{number}").mkdir(parents=True)
            for index, layer in enumerate((ground, thing)):
                Image.fromarray(layer).save(folder / name / f"{number}" / f"{index}.png")


def hash_seed(name: str, number: int) -> int:
    return int(hashlib.sha256(f"{name} {number}".encode()).hexdigest()[:8], 16)


def _design(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A ramp `(32, 32, 4)`, and a rectangle of one colour to lie on it."""
    words = np.frombuffer(hashlib.sha256(str(seed).encode()).digest(), np.uint8).astype(int)
    ground = np.full((SIDE, SIDE, 4), 255, np.uint8)
    ground[..., :3] = 60 + words[:3] // 2 + 2 * np.arange(SIDE)[None, :, None]
    thing = np.zeros_like(ground)
    top, left = 2 + words[3] % 12, 2 + words[4] % 12
    thing[top : top + 14, left : left + 14] = (*words[5:8], 255)
    return ground, thing


def machine() -> str:
    """What decides a float32 sum and the bytes of a PNG."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    named = [f"{name} {version(name)}" for name in ("torch", "numpy", "scipy", "pillow", "pyarrow", "safetensors")]
    capability = torch.backends.cpu.get_cpu_capability()
    return ", ".join([platform.machine(), model[1] if model else "unknown", capability, *named])


def objects(campaign: Campaign) -> dict[str, str]:
    """The hash of every object by its name without hashes: of JSON without what `values` leaves out, and of none that
    is a page for people, whose texts hold times."""
    return {
        _plain(name): hashlib.sha256(
            json.dumps(_portable(json.loads(data)), sort_keys=True).encode() if name.endswith(".json") else data
        ).hexdigest()
        for name, data in _objects(campaign)
        if not name.endswith((".html", ".md", ".parquet"))
    }


def _objects(campaign: Campaign) -> Iterator[tuple[str, bytes]]:
    """What the steps left: no leases, no replies of the judge, which hold its clock."""
    folder = str(Path(campaign.uri.removeprefix("file://")).parent).encode()
    for name in sorted(campaign.store.list()):
        if not name.startswith(("lease/", "runs/")) and "/replies/" not in name:
            data = campaign.store.read(name)
            yield name, data.replace(folder, b"<folder>") if name.endswith(".json") else data


def values(campaign: Campaign) -> dict[str, Any]:
    """Every object by its name without hashes: JSON as it is but for clocks and hashes, of a tar its members' names
    and their JSON, of anything else that it is there."""
    found: dict[str, Any] = {}
    for name, data in _objects(campaign):
        plain = _plain(name)
        if name.endswith(".json"):
            found[plain] = _portable(json.loads(data))
        elif name.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                found[plain] = {
                    member.name: _portable(json.load(tar.extractfile(member)))  # type: ignore[arg-type]
                    if member.name.endswith(".json")
                    else "bytes"
                    for member in tar
                }
        else:
            found[plain] = "bytes"
    return found


def _portable(value: Any, key: str = "") -> Any:
    """A JSON value without what differs between machines and moments."""
    if isinstance(value, dict):
        return {
            name: _portable(item, name)
            for name, item in value.items()
            if not LEFT_OUT.search(name) and name not in (SEAL, "bytes")
        }
    if isinstance(value, list):
        return [_portable(item, key) for item in value]
    if isinstance(value, str) and key not in EXACT_KEYS:
        return INEXACT.sub("<sha256>", _plain(value))
    return value


def _plain(name: str) -> str:
    return ADAPTER.sub("<adapter>", plain_name(name))


def differences(stored: Any, found: Any, *, near: float, where: str = "") -> list[str]:
    """A line for each place where two such values differ, floats by more than `near` of the larger."""
    if isinstance(stored, dict) and isinstance(found, dict):
        lines = [
            f"{where}/{key} is {'new' if key in found else 'gone'}" for key in sorted(stored.keys() ^ found.keys())
        ]
        both = sorted(stored.keys() & found.keys())
        return lines + [
            line for key in both for line in differences(stored[key], found[key], near=near, where=f"{where}/{key}")
        ]
    if isinstance(stored, list) and isinstance(found, list) and len(stored) == len(found):
        pairs = enumerate(zip(stored, found, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, near=near, where=f"{where}[{i}]")]
    if isinstance(stored, float) and isinstance(found, int | float) and not isinstance(found, bool):
        same = math.isclose(stored, found, rel_tol=near, abs_tol=near / 100)
        return [] if same else [f"{where}: {stored!r} -> {found!r}"]
    return [] if stored == found and type(stored) is type(found) else [f"{where}: {stored!r} -> {found!r}"]
