"""Pictures in, layered files out: the model samples while the files of earlier pictures are written."""

from __future__ import annotations

import collections
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from layerloop.components.decompose.counts import choose_count, without_blank
from layerloop.components.decompose.files import Result, write_files
from layerloop.components.decompose.model import Choice, Model, choose, load
from layerloop.components.decompose.output import OutputFolder
from layerloop.components.decompose.pictures import Picture, condition, find_pictures, look_at, working_size
from layerloop.components.layers.normalise import image_key
from layerloop.components.layers.restore import restore
from layerloop.components.runtime.progress import log, progress
from layerloop.components.schema.decomposition import DecomposeOptions
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.messages import counted
from layerloop.components.schema.seeds import seed_for

Pixels = npt.NDArray[np.uint8]

WRITERS = 2  # pictures whose files are made at once, beside the model
WAITING = 4  # sampled pictures in memory; the model waits for the writers then


@dataclass(frozen=True)
class Outcome:
    """What became of a picture: made now, kept from an earlier run, or failed for a `reason`."""

    picture: str
    status: Literal["made", "kept", "failed"]
    folder: Path | None = None
    reason: str = ""


@dataclass(frozen=True)
class Summary:
    """What became of all pictures, in the order in which they were given, and where the time went."""

    outcomes: list[Outcome]
    seconds: float
    model_seconds: float  # within calls of the model: encoding, sampling, decoding

    @property
    def failed(self) -> list[Outcome]:
        """Those that failed."""
        return [outcome for outcome in self.outcomes if outcome.status == "failed"]

    def __str__(self) -> str:
        counts = collections.Counter(outcome.status for outcome in self.outcomes)
        parts = [f"{counts['made']} made"]
        parts += [f"{counts['kept']} kept from an earlier run"] if counts["kept"] else []
        parts += [f"{counts['failed']} failed"] if counts["failed"] else []
        share = 100 * self.model_seconds / self.seconds if self.seconds else 0.0
        return (
            f"{counted(len(self.outcomes), 'pictures')}: {', '.join(parts)}; {self.seconds:.1f} s, {share:.0f} % of it "
            "in the model"
        )


def decompose(pictures: Iterable[str | Path], out: str | Path, options: DecomposeOptions | None = None) -> Summary:
    """Decompose pictures into layers at their own size, and write each one's files to a subfolder of `out`.

    A picture that cannot be used, or whose files cannot be written, is an outcome with a reason; the others go on. What
    was made before with the same settings is kept. Every subfolder appears whole: layers as PNG with straight alpha,
    their recomposition, a page, documents, and `layers.json`, which says order, boxes and how it was made.

    Args:
        pictures: files, folders, or `s3://` URIs.
        out: a local folder.
        options: see DecomposeOptions; by default four layers of the model that can run here.

    Raises:
        LayerloopError: nothing can be started: no pictures, no model, an adapter of another base, or a folder that
            cannot be written or has results of other settings.
    """
    start, options = time.monotonic(), options or DecomposeOptions()
    origins, folder = find_pictures(pictures), OutputFolder(out)
    with folder.held():
        choice = choose(options)
        log(f"model: {choice.description}")
        folder.check(_settings(choice, options))
        run = _Run(choice, options, folder)
        todo = run.look(origins)
        model = load(choice, options) if todo else None
        if model is not None:
            run.settings["base_fingerprint"] = model.policy.fingerprint
            folder.claim(run.settings)
            run.decompose(model, todo)
    outcomes = [run.outcomes[origin] for origin in origins]
    return Summary(outcomes, time.monotonic() - start, run.model_seconds)


def _settings(choice: Choice, options: DecomposeOptions) -> dict[str, Any]:
    """What results depend on, but for the base's fingerprint."""
    return {
        "base": choice.base,
        "prompt": choice.recipe.model.prompt,
        "dtype": choice.recipe.model.dtype,
        "adapter_sha256": choice.adapter_sha256,
        "layers": options.layers,
        "sampler": options.sampler,
        "steps": options.steps or choice.recipe.evaluation.steps,
        "guidance": options.guidance,
        "resolution": choice.data.resolution,
        "seed": options.seed,
        "drop_blank": options.drop_blank,
    }


@dataclass
class _Work:
    """A picture that is to be decomposed, into the folder `name`."""

    picture: Picture
    name: str
    size: tuple[int, int]  # (width, height) that the model works at


@dataclass
class _Run:
    choice: Choice
    options: DecomposeOptions
    folder: OutputFolder
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    model_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.settings = _settings(self.choice, self.options)

    # ---- before the model

    def look(self, origins: Sequence[str]) -> list[_Work]:
        """The pictures that are not done, those of one size side by side; the others' outcomes are known then."""
        taken: dict[str, None] = {}
        todo = []
        for origin in origins:
            try:
                picture = look_at(origin)
                name = self.folder.name_for(picture, taken)
                size = working_size(picture, self.choice.data)
            except Exception as error:
                self._fail(origin, error)
                continue
            taken[name] = None
            if picture.note:
                log(f"{origin}: {picture.note}")
            if self.folder.done(name, self.options.formats):
                self.outcomes[origin] = Outcome(origin, "kept", self.folder.root / name)
            else:
                todo.append(_Work(picture, name, size))
        return sorted(todo, key=lambda work: work.size)

    def _fail(self, origin: str, error: Exception) -> Outcome:
        """The outcome of a picture that failed, and a line about it; the traceback too of a defect."""
        if isinstance(error, LayerloopError):
            reason = str(error)
        elif isinstance(error, MemoryError):
            reason = "it does not fit in memory: make it smaller"
        else:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            log("".join(traceback.format_exception(error)).rstrip())
        log(f"failed {origin}: {reason}")
        self.outcomes[origin] = Outcome(origin, "failed", None, reason)
        return self.outcomes[origin]

    # ---- with the model

    def decompose(self, model: Model, todo: Sequence[_Work]) -> None:
        """Sample batch by batch; reading the next and writing the last ones goes on meanwhile."""
        size = self.options.batch_size or self.choice.runtime.evaluation.batch_size
        written = self._written(model, _batches(todo, size))
        for outcome in progress(written, what="decomposing", unit="pictures", total=len(todo)):
            self.outcomes[outcome.picture] = outcome

    def _written(self, model: Model, batches: Sequence[Sequence[_Work]]) -> Iterator[Outcome]:
        """The outcome of every picture that was sampled, when its files are written."""
        waiting: collections.deque[tuple[_Work, Future[None]]] = collections.deque()
        with ThreadPoolExecutor(WRITERS, "write") as writers, ThreadPoolExecutor(1, "read") as reader:
            for work, source, stacks in self._sampled(model, batches, reader):
                waiting.append((work, writers.submit(self._write, work, source, stacks)))
                while waiting and (len(waiting) > WAITING or waiting[0][1].done()):
                    yield self._outcome(*waiting.popleft())
            while waiting:
                yield self._outcome(*waiting.popleft())

    def _sampled(
        self, model: Model, batches: Sequence[Sequence[_Work]], reader: ThreadPoolExecutor
    ) -> Iterator[tuple[_Work, Pixels, dict[int, Pixels]]]:
        """Each picture with its pixels and its decompositions by number of layers; failures are outcomes."""
        reads = [reader.submit(_read_batch, batch) for batch in batches[:1]]
        for index in range(len(batches)):
            read = reads.pop().result()
            reads = [reader.submit(_read_batch, batch) for batch in batches[index + 1 : index + 2]]
            good = []
            for work, pixels in read:
                if isinstance(pixels, Exception):
                    self._fail(work.picture.origin, pixels)
                else:
                    good.append((work, pixels))
            for (work, pixels), stacks in zip(good, self._sample(model, good), strict=True):
                if isinstance(stacks, Exception):
                    self._fail(work.picture.origin, stacks)
                else:
                    yield work, pixels, stacks

    def _sample(self, model: Model, batch: Sequence[tuple[_Work, Pixels]]) -> list[dict[int, Pixels] | LayerloopError]:
        """Decompositions by number of layers of pictures of one size, or why there are none."""
        import torch

        if not batch:
            return []
        try:
            return self._sample_at_once(model, batch)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        if len(batch) > 1:
            return [one for work in batch for one in self._sample(model, [work])]
        layers = self.options.layers
        return [
            LayerloopError(
                f"{layers} layers at {self.choice.data.resolution} pixels do not fit on the GPU: lower --resolution or "
                "--layers"
            )
        ]

    def _sample_at_once(
        self, model: Model, batch: Sequence[tuple[_Work, Pixels]]
    ) -> list[dict[int, Pixels] | LayerloopError]:
        from layerloop.components.policy.inference import sample_layers

        images = np.stack([condition(pixels, work.size) for work, pixels in batch])
        found: list[dict[int, Pixels]] = [{} for _ in batch]
        start = time.monotonic()
        for layers in self.options.counts:
            seeds = [seed_for(self.options.seed, image_key(image), layers, "decompose") for image in images]
            stacks = sample_layers(
                model.policy, images, model.prompt,
                seeds=seeds, layers=layers, how=model.how, blank_prompt=model.blank_prompt,
            )  # fmt: skip
            for stacks_of_one, stack in zip(found, stacks, strict=True):
                if stack is not None:
                    stacks_of_one[layers] = stack
        self.model_seconds += time.monotonic() - start
        nan = LayerloopError("the model's layers of it are NaN: its weights have diverged, give another adapter")
        return [stacks_of_one or nan for stacks_of_one in found]

    def _write(self, work: _Work, source: Pixels, stacks: Mapping[int, Pixels]) -> None:
        stack, kept, trials = choose_count(stacks, condition(source, work.size))
        if self.options.drop_blank:
            stack = without_blank(stack)
        result = Result(
            work.picture, work.name, source, restore(stack, source), kept, trials,
            self.settings, self.choice.description,
        )  # fmt: skip
        with self.folder.picture(work.name) as store:
            write_files(result, store, self.options.formats)

    def _outcome(self, work: _Work, future: Future[None]) -> Outcome:
        try:
            future.result()
        except Exception as error:
            return self._fail(work.picture.origin, error)
        return Outcome(work.picture.origin, "made", self.folder.root / work.name)


def _batches(todo: Sequence[_Work], size: int) -> list[list[_Work]]:
    """Up to `size` neighbours of one working size each."""
    batches: list[list[_Work]] = []
    for work in todo:
        if batches and len(batches[-1]) < size and batches[-1][0].size == work.size:
            batches[-1].append(work)
        else:
            batches.append([work])
    return batches


def _read_batch(batch: Sequence[_Work]) -> list[tuple[_Work, Pixels | Exception]]:
    """The pixels of each picture, or why they cannot be had."""
    read: list[tuple[_Work, Pixels | Exception]] = []
    for work in batch:
        try:
            read.append((work, work.picture.read()))
        except Exception as error:  # decoders raise nearly anything on hostile bytes
            read.append((work, error))
    return read
