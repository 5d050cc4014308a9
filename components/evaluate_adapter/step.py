"""The step `evaluate_adapter`: adapter and base decompose the same held-out pictures from the same noise."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from layerloop.components.evaluate_adapter import against
from layerloop.components.evaluate_adapter.assess import Row, assess, compare_rows
from layerloop.components.evaluate_adapter.cases import Case, Cases, Kind, read_cases
from layerloop.components.evaluate_adapter.gallery import Shown
from layerloop.components.evaluate_adapter.pictures import Choice, choose, sheet, strips_of
from layerloop.components.evaluate_adapter.provenance import Clock, model_name, notices, provenance, settings
from layerloop.components.evaluate_adapter.report import Report, render
from layerloop.components.evaluate_adapter.results import (
    judge_sentence,
    kubeflow_metrics,
    mean_of,
    metrics_json,
    reward_curve,
    samples_table,
    score_manifests,
)
from layerloop.components.runtime.contract import StepResult, step_main
from layerloop.components.runtime.distributed import device
from layerloop.components.runtime.progress import log, progress
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest, Shard
from layerloop.components.storage.campaign import MANIFEST, Campaign
from layerloop.components.storage.delivered import delivered_weights
from layerloop.components.storage.images import encode_png
from layerloop.components.storage.manifests import add_file, commit, read_file, verify

if TYPE_CHECKING:
    import torch

    from layerloop.components.layers.stack import Pixels
    from layerloop.components.policy.model import LayeredPolicy

CASES_PER_SHARD = 32  # what a killed attempt loses at most, and what is in memory at once
SHOWN: dict[Kind, int] = {"designs": 7, "pictures": 4}  # samples with contact sheets

Chunk = tuple[Case, ...]


def run(*, campaign: str, iteration: int | None = None, fail_when_worse: bool = False) -> StepResult:
    """Compare an adapter with its base on held-out designs and pictures, and write the report.

    The adapter's weights are those that would be published: the average, where the recipe keeps one. Both sample
    exactly as at inference (Heun, no guidance) from the same seeds. Decompositions are kept in shards, so a
    step that is run again continues; the base's are shared by all evaluations of the campaign.

    Args:
        campaign: Root URI of the campaign.
        iteration: Whose adapter to evaluate; by default the last committed one.
        fail_when_worse: Fail where the adapter is worse than the one that was evaluated before it (against.py); the
            evaluation is committed all the same.

    Raises:
        LayerloopError: there is no adapter yet, nothing is held out, or the adapter decodes into NaN.
    """
    opened = Campaign.open(campaign)
    k = opened.head() if iteration is None else iteration
    if k < 1:
        raise LayerloopError(
            f"campaign {opened.uri} has no adapter to evaluate (iteration {k}): train an iteration first"
        )
    name = f"iteration-{k:06d}"
    folder = opened.evaluation_dir(name)
    done = opened.find(folder)
    if done is not None:
        verify(opened.store, done)
        log(f"the evaluation of iteration {k} is committed already")
        return _result(opened, done, fail_when_worse)

    recipe, sources, adapter = opened.recipe, opened.sources(), opened.policy(k)
    cases = read_cases(opened, sources)
    log(f"evaluating iteration {k} on {len(cases.of('designs'))} designs and {len(cases.of('pictures'))} pictures")
    clock = Clock()
    policy, prompt = _load(opened, sources, adapter, clock)
    chunks = [cases.cases[at : at + CASES_PER_SHARD] for at in range(0, len(cases.cases), CASES_PER_SHARD)]
    base = f"evaluations/base/decompositions-{policy.fingerprint[:12]}"  # shared by all evaluations of the campaign
    with policy.without_adapter():
        base_shards = _sample(opened, chunks, base, policy, prompt, "base", clock)
    weights = delivered_weights(adapter).sha256
    tuned_shards = _sample(opened, chunks, f"{folder}/decompositions-{weights[:12]}", policy, prompt, name, clock)

    base_rows = _assess(opened, chunks, base_shards, "base", clock)
    tuned_rows = _assess(opened, chunks, tuned_shards, name, clock)
    truth = [assess(c, c.truth, max_edits=recipe.evaluation.max_edits) for c in cases.cases if c.truth is not None]
    comparisons = compare_rows(base_rows, tuned_rows, resamples=recipe.evaluation.bootstrap, seed=recipe.seed)

    shown = _shown(opened, cases, chunks, base_rows, tuned_rows, base_shards, tuned_shards)
    scores = score_manifests(opened, k)
    facts = provenance(recipe, policy, adapter, cases, clock)
    report = Report(
        title=f"Iteration {k} against its base",
        campaign=recipe.name,
        model=model_name(recipe),
        counts={"designs": len(cases.of("designs")), "pictures": len(cases.of("pictures"))},
        comparisons=comparisons,
        reference=mean_of(truth),
        judge=judge_sentence(scores),
        notices=notices(cases),
        curve=reward_curve(opened, scores),
        shown=shown,
        settings=settings(facts),
        max_edits=recipe.evaluation.max_edits,
        resamples=recipe.evaluation.bootstrap,
        version=version("layerloop"),
    )
    metrics = metrics_json(comparisons, report.reference, facts, resamples=report.resamples)
    files = {"metrics.json": metrics, "samples.parquet": samples_table({"base": base_rows, name: tuned_rows})}
    files |= {_sheet_name(item.choice): encode_png(sheet(item.choice, item.strips)) for item in shown}
    files["report.html"] = render(report)
    manifest = Manifest(
        kind="evaluation",
        iteration=k,
        shards=(*base_shards, *tuned_shards),
        files=tuple(add_file(opened.store, f"{folder}/{file}", data) for file, data in files.items()),
        counts={"designs": report.counts["designs"], "pictures": report.counts["pictures"], "sheets": len(shown)},
        metadata={"base_fingerprint": policy.fingerprint, "adapter_sha256": weights},
    )
    return _result(opened, commit(opened.store, f"{folder}/{MANIFEST}", manifest), fail_when_worse)


def _load(opened: Campaign, sources: Manifest, adapter: Manifest, clock: Clock) -> tuple[LayeredPolicy, torch.Tensor]:
    """The base with the adapter on it, and the cached prompt embedding `(T, E)`."""
    from safetensors.torch import load

    from layerloop.components.policy.lora import load_adapter
    from layerloop.components.policy.model import LayeredPolicy
    from layerloop.components.storage.folders import local_folder

    model = opened.recipe.model
    with clock.time("loading"), tempfile.TemporaryDirectory() as temporary:
        folder = local_folder(model.base) if "://" in model.base else None
        policy = LayeredPolicy.load(model, device=device(), folder=folder)
        for name, file in (
            ("adapter_model.safetensors", delivered_weights(adapter)),
            ("adapter_config.json", adapter.file("adapter_config.json")),
        ):
            (Path(temporary) / name).write_bytes(read_file(opened.store, file))
        load_adapter(policy, temporary)
        prompt = load(read_file(opened.store, sources.file("prompt.safetensors")))["prompt_embeds"]
    return policy, prompt


def _sample(
    opened: Campaign,
    chunks: Sequence[Chunk],
    stem: str,
    policy: LayeredPolicy,
    prompt: torch.Tensor,
    model: str,
    clock: Clock,
) -> list[Shard]:
    """Shards `<stem>-000000.tar` ... of one model's decompositions, one a chunk."""
    from layerloop.components.evaluate_adapter.decompose import decomposed_shard

    recipe = opened.recipe.evaluation
    shards = []
    with clock.time(f"sampling {'base' if model == 'base' else 'adapter'}"):
        for index, chunk in enumerate(chunks):
            name = f"{stem}-{index:06d}.tar"
            shard, sampled = decomposed_shard(
                opened.store, name, policy, chunk, prompt, steps=recipe.steps, batch_size=recipe.batch_size, model=model
            )
            shards.append(shard)
            log(f"{name}: {len(chunk)} decompositions{'' if sampled else ', there already'}")
    return shards


def _assess(opened: Campaign, chunks: Sequence[Chunk], shards: Sequence[Shard], model: str, clock: Clock) -> list[Row]:
    """Every case's numbers, in the order of the cases. A shard is in memory at a time."""
    from layerloop.components.evaluate_adapter.decompose import read_decompositions

    measure = functools.partial(assess, max_edits=opened.recipe.evaluation.max_edits)
    rows: list[Row] = []
    threads = min(8, os.cpu_count() or 1)  # numpy lets go of the interpreter on large arrays
    with clock.time("measuring"), ThreadPoolExecutor(threads) as pool:
        pairs = list(zip(chunks, shards, strict=True))
        for chunk, shard in progress(pairs, what=f"measuring {model}", unit="shards"):
            stacks = read_decompositions(opened.store, shard)
            rows += pool.map(measure, chunk, [stacks[case.name] for case in chunk])
    return rows


def _shown(
    opened: Campaign,
    cases: Cases,
    chunks: Sequence[Chunk],
    base_rows: Sequence[Row],
    tuned_rows: Sequence[Row],
    base_shards: Sequence[Shard],
    tuned_shards: Sequence[Shard],
) -> list[Shown]:
    """What is shown, of each kind, with its pictures read from the shards again."""
    from layerloop.components.evaluate_adapter.decompose import read_decompositions

    choices: list[Choice] = []
    for kind, count in SHOWN.items():
        at = [index for index, case in enumerate(cases.cases) if case.kind == kind]
        choices += choose(
            [cases.cases[index] for index in at],
            [base_rows[index] for index in at],
            [tuned_rows[index] for index in at],
            seed=opened.recipe.seed,
            count=count,
        )
    wanted = {choice.case.name for choice in choices}
    stacks: dict[str, dict[str, Pixels]] = {name: {} for name in wanted}
    for model, shards in (("Base", base_shards), ("Adapter", tuned_shards)):
        for chunk, shard in zip(chunks, shards, strict=True):
            if wanted & {case.name for case in chunk}:
                found = read_decompositions(opened.store, shard)
                for name in wanted & found.keys():
                    stacks[name][model] = found[name]
    return [Shown(choice, tuple(strips_of(choice, stacks[choice.case.name]))) for choice in choices]


def _sheet_name(choice: Choice) -> str:
    return f"sheets/{choice.case.kind}-{choice.case.name}.png"


def _result(opened: Campaign, manifest: Manifest, fail_when_worse: bool) -> StepResult:
    if fail_when_worse:
        against.fail_when_worse(opened, manifest)
    document = json.loads(read_file(opened.store, manifest.file("metrics.json")))
    return StepResult(
        manifests={"evaluation": manifest},
        files={"report": read_file(opened.store, manifest.file("report.html"))},
        metrics=kubeflow_metrics(document),
    )


main = functools.partial(step_main, run, iteration_from="policy")

if __name__ == "__main__":
    raise SystemExit(main())
