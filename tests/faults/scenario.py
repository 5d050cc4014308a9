"""A small campaign of two iterations, every stage of which is cut off at a change of the store and run again.

What has to hold after every point: the second attempt ends well; what is committed is what an uninterrupted campaign
has committed, by hash (so no sample is lost or doubled, and the adapter is the same); every object is what its manifest
says; what no manifest names is removed by repair and nothing else is; no temporary file is left; and no request that
the judge was paid for, and whose reply was stored, is sent again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.storage.campaign import RECIPE, Campaign
from layerloop.components.storage.lease import sweep
from layerloop.components.storage.stores import LocalStore, MissingObjectError, Store, open_store
from layerloop.components.storage.verification import Findings, repair_campaign, unnamed_objects, verify_campaign

from ..campaigns import SIDE, plain_name, save_tiny_base
from ..score_rollouts.judges import MeddlingJudge, meddling_judge
from .places import Place

HERE = Path(__file__).parent
CONCURRENCY = 4  # requests of the judge in flight: the most that a kill may lose after they were paid
KILLED = -9
RECIPE_OF_ALL = {
    "name": "faults",
    "seed": 3,
    "data": {"resolution": SIDE, "images_per_shard": 3, "holdout": 2},
    "rollout": {
        "groups": 3, "group_size": 3, "min_layers": 1, "max_layers": 2, "steps": 3, "outside": "euler",
        "window": {"size": 1, "start": 0}, "noise": {"eta": 0.7},
    },
    "judge": {"model": "layerloop-reference-judge", "resolution": SIDE, "backdrops": ["white"],
              "phase2": {"resolution": SIDE}, "canaries": False},
    "lora": {"rank": 2, "alpha": 2.0},
    "update": {"learning_rate": 1e-2, "steps": 1, "ema": 0.9},
    "evaluation": {"steps": 1, "layers": [2], "designs": 2, "pictures": 2},
    "retention": {"trajectories": 1, "replies": 1},
}  # fmt: skip
RUNTIME = {"rollout": {"batch_size": 4}, "update": {"microbatch": 8}, "judge": {"concurrency": CONCURRENCY}}


@dataclass(frozen=True)
class Stage:
    """A command that is cut off: its step, and what it is given beside the campaign."""

    name: str
    step: str
    options: tuple[str, ...] = ()


def stages(images: Path, recipe: Path, judge_url: str) -> list[Stage]:
    """All stages of the campaign, in their order; those of the second iteration find state of the first, and remove
    some of it."""
    found = [Stage("shard", "shard_dataset", ("--images", str(images), "--recipe", str(recipe)))]
    for number in ("1", "2"):
        which = ("--iteration", number)
        found += [
            Stage(f"rollouts{number}", "generate_rollouts", which),
            Stage(f"scores{number}", "score_rollouts", (*which, "--judge-url", judge_url)),
            Stage(f"update{number}", "update_lora", which),
        ]
    head = ("--iteration", "2")
    return [*found, Stage("evaluate", "evaluate_adapter", head), Stage("publish", "publish_adapter", head)]


@dataclass(frozen=True)
class Attempt:
    """How a command ended."""

    status: int
    said: str


class Nursery:
    """Forks of a process with everything imported (nursery.py)."""

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        self._folder, self._count = folder, itertools.count()
        pipe = subprocess.PIPE
        # One thread a process, since threads would not survive a fork.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [python, str(HERE / "nursery.py")]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self._ready = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def run(
        self, step: str, arguments: Sequence[str], environment: Mapping[str, str], *, user: int | None = None
    ) -> Attempt:
        """Run a step's command to its end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if not self._ready:
            assert self._process.stdout.readline() == "ready\n"
            self._ready = True
        log = self._folder / f"{next(self._count):05d}-{step}.log"
        request = {"step": step, "arguments": list(arguments), "environment": dict(environment), "log": str(log)}
        self._process.stdin.write(json.dumps(request | {"user": user}) + "\n")
        self._process.stdin.flush()
        return Attempt(int(self._process.stdout.readline()), log.read_text())


@dataclass
class Scenario:
    """The uninterrupted campaign, a copy of it before each stage, and what runs commands on copies."""

    folder: Path
    nursery: Nursery
    judge: MeddlingJudge
    stages: list[Stage]
    stretch: Stage  # all of both iterations in one command
    committed: dict[str, dict[str, Any]] = field(default_factory=dict)  # after each stage

    @property
    def before(self) -> Path:
        """Copies of the campaign by stage, each as it was when the stage began."""
        return self.folder / "before"

    def stage(self, name: str) -> Stage:
        return next(stage for stage in (*self.stages, self.stretch) if stage.name == name)

    def run(
        self, stage: Stage, uri: str, strike: Mapping[str, Any] | None = None, *, user: int | None = None, **more: str
    ) -> Attempt:
        """The stage's command on the campaign at `uri`, struck where `strike` says."""
        given = environment(strike and {"path": counted(uri), **strike}) | more
        return self.nursery.run(stage.step, ["--campaign", uri, *stage.options], given, user=user)

    def make(self) -> None:
        """Run all stages without any fault."""
        uri = self.folder / "golden" / "lab"
        for stage in self.stages:
            shutil.copytree(uri, self.before / stage.name / "lab") if uri.exists() else None
            done = self.run(stage, str(uri))
            assert done.status == 0, done.said
            self.committed[stage.name] = committed(verify_campaign(Campaign.open(str(uri)), log=_quiet))
        shutil.copytree(self.before / "rollouts1", self.before / self.stretch.name)
        self.committed[self.stretch.name] = self.committed["update2"]

    def put(self, stage: str, place: Place) -> str:
        """A copy of the campaign as it is before a stage, at a URI of its own."""
        uri = place.new()
        source = self.before / stage / "lab"
        if not source.exists():
            return uri
        if "://" not in uri:
            shutil.copytree(source, uri)
            return uri
        there, target = open_store(str(source)), open_store(uri)
        for name in there.list():
            target.write(name, there.read(name))
        return uri


def environment(strike: Mapping[str, Any] | None) -> dict[str, str]:
    """What a process under test finds in its environment."""
    return {
        "LAYERLOOP_RUNTIME": json.dumps(RUNTIME),
        "LAYERLOOP_FAULTS": json.dumps(strike) if strike else "",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE / "hook"), os.environ.get("PYTHONPATH")))),
        **{name: value for name, value in os.environ.items() if name.startswith("AWS_")},
    }


def counted(uri: str) -> str:
    """What the hook counts of a campaign: its folder, or its path in requests."""
    return uri.removeprefix("s3:/") if uri.startswith("s3://") else uri


@contextmanager
def scenario(folder: Path, *, without: Collection[str] = (), python: str = sys.executable) -> Iterator[Scenario]:
    """The scenario, made in `folder`, but for stages that nobody wants."""
    images, logs, recipe = folder / "images", folder / "logs", folder / "recipe.json"
    for path in (images, logs):
        path.mkdir(parents=True)
    base = save_tiny_base(folder / "base")
    draw = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(images / f"{number}.png")
    recipe.write_text(json.dumps(RECIPE_OF_ALL | {"model": {"base": str(base), "dtype": "float32"}}))
    with meddling_judge() as judge, Nursery(logs, python) as nursery:
        judge.change = opinionated
        judge.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that was killed
        stretch = Stage("stretch", "train_stretch", ("--iteration", "1", "--iterations", "2", "--judge-url", judge.url))
        wanted = [stage for stage in stages(images, recipe, judge.url) if stage.name not in without]
        made = Scenario(folder, nursery, judge, wanted, stretch)
        made.make()
        yield made


def opinionated(body: dict[str, Any], number: int, text: str) -> str:
    """Scores that follow from what is asked: the layers of a random policy are all alike."""
    digest = itertools.cycle(hashlib.sha256(json.dumps(body["messages"], sort_keys=True).encode()).digest())
    return re.sub(r"(?<=: )\d(?:\.\d+)?(?=[,}\s])", lambda _: str(next(digest) % 6), text)


# ------------------------------------------------------------------------------------------------------- what must hold

_MEASURED = re.compile(r"metrics\.json|report\.html")  # files with seconds in them


def committed(found: Findings) -> dict[str, Any]:
    """What every manifest of a campaign commits: counts, and the hash of each object by its plain name. Times are left
    out, and so are the manifest that names its own store, and the objects that hold them."""
    return {
        plain_name(name): {
            "counts": manifest.counts,
            "facts": _facts(manifest),
            "objects": {
                plain_name(file.name): "" if _MEASURED.fullmatch(file.base_name) else file.sha256
                for file in (*manifest.shards, *manifest.files)
            },
        }
        for name, manifest in found.manifests.items()
    }


def _facts(manifest: Manifest) -> dict[str, Any]:
    """The metadata that no clock and no earlier attempt has a part in."""
    return {name: value for name, value in manifest.metadata.items() if name != "metrics"}


def _quiet(line: str) -> None:
    pass


def spoil_orphans(uri: str) -> int:
    """Cut every object that no manifest names in half, as a disk does that lost its power: nobody may believe them."""
    store = open_store(uri)
    if not store.exists(RECIPE):
        return 0
    orphans = unnamed_objects(Campaign.open(uri))
    for name in orphans:
        data = store.read(name)
        store.write(name, data[: len(data) // 2])
    return len(orphans)


def stored_replies(store: Store) -> set[str]:
    """The requests whose replies a campaign has, by their hash: the judge's id of its reply."""
    found = set[str]()
    for name in store.list("iterations/"):
        if "/replies/" in name:
            with contextlib.suppress(MissingObjectError):  # the server was still at work on the killed one's deletion
                found.add(json.loads(store.read(name))["id"])
    return found


@dataclass
class Judged:
    """What the judge was paid for before an attempt, and which of it is stored."""

    answered: Counter[str]
    stored: set[str]

    def problem(self, now: Counter[str]) -> str:
        """What was paid for twice, in words; empty where it is nothing."""
        again = {digest for digest, count in self.answered.items() if now[digest] > count}
        if wasted := again & self.stored:
            return f"{len(wasted)} requests whose replies were stored were sent again"
        return f"{len(again)} requests were sent again, {CONCURRENCY} may be" if len(again) > CONCURRENCY else ""


def problems(made: Scenario, stage: Stage, uri: str) -> list[str]:
    """What is wrong with a campaign whose stage was struck and then run again; nothing where all holds."""
    found: list[str] = []
    try:
        campaign = Campaign.open(uri)
        sweep(campaign.store, log=_quiet)  # as the first step of every run does
        verified = verify_campaign(campaign, log=_quiet)
        found += [f"{where}: {what}" for where, what in verified.faults.items()] + verified.copies
        if temporary := [name for name in verified.leftovers if isinstance(campaign.store, LocalStore)]:
            found.append(f"left over: {', '.join(temporary)}")
        now, wanted = committed(verified), made.committed[stage.name]
        found += [
            f"{name} is not what the uninterrupted campaign has" for name in wanted if now.get(name) != wanted[name]
        ]
        found += [f"{name} is committed, and not by the uninterrupted campaign" for name in now.keys() - wanted.keys()]
        repair_campaign(campaign, log=_quiet)
        after = verify_campaign(campaign, log=_quiet)
        if not after.sound or after.orphans or after.leftovers:
            found.append(f"repair leaves {'; '.join(after.lines())}")
        if committed(after) != now:
            found.append("repair changed what is committed")
    except LayerloopError as error:
        found.append(str(error))
    return found
